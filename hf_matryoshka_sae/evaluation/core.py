"""SAEs beside their baselines at every width: fidelity, weights, firing."""

from collections.abc import Sequence
from typing import Any

from ..models import SAEModel
from .baselines import Identity, PrincipalComponents, random_dictionary
from .data import HeldOut
from .fidelity import evaluate_fidelity
from .geometry import density_metrics, weight_geometry
from .language_model import LossScaling
from .report import ABOUT
from .subjects import Dictionary, Subject


ABOUT_ALL = (
    f"{ABOUT} random: directions drawn at random, in the shape of the SAE above it, as many firing at each width "
    "under selection mask. principal components: that many dense numbers per token, fitted to these tokens; left out "
    "from d_in on, where they are the identity. identity: the hidden states themselves. geometry: cosines between the "
    "weights of each prefix's latents. density: how often they fire."
)

IDENTITY = "identity"

_DETAILS = (
    ("width", "geometry", "width", 8, "d"),
    ("max enc cos", "geometry", "average_max_encoder_cosine_sim", 12, ".3f"),
    ("max dec cos", "geometry", "average_max_decoder_cosine_sim", 12, ".3f"),
    ("near copies", "geometry", "share_near_duplicates", 12, ".2%"),
    ("eff. rank", "geometry", "effective_rank", 10, ".1f"),
    ("alive", "density", "frac_alive", 8, ".2%"),
    ("over 1%", "density", "freq_over_1_percent", 8, ".2%"),
    ("over 10%", "density", "freq_over_10_percent", 9, ".2%"),
)


def evaluate(
    data: HeldOut,
    saes: dict[str, SAEModel],
    widths: Sequence[int] | None = None,
    selection: str = "mask",
    baselines: bool = True,
    scaling: LossScaling | None = None,
) -> dict[str, Any]:
    """Evaluate the SAEs of one hookpoint, their weights and their firing, beside baselines.

    Args:
        data ([`HeldOut`]): The language model and held-out tokens; every process evaluates its share.
        saes (`dict[str, SAEModel]`): By name; in `eval` mode.
        widths (`Sequence[int]`, *optional*): By default each SAE's prefix widths.
        selection (`str`, *optional*, defaults to `"mask"`): See [`Dictionary`].
        baselines (`bool`, *optional*, defaults to `True`): Evaluate a random dictionary beside each SAE, principal
            components and the identity.
        scaling ([`LossScaling`], *optional*): Of the language model; adds `compute_share` to each row.

    Returns:
        `dict`: What [`evaluate_fidelity`] gives, with rows by name under `saes`; those of dictionaries have
        [`weight_geometry`] and [`density_metrics`] of their width under `geometry` and `density`.

    Raises:
        `ValueError`: for widths that an SAE lacks, hidden states of another width than an SAE's, or a scaling law that
            does not fit the loss.
    """
    subjects: dict[str, Subject] = {}
    for name, sae in saes.items():
        dictionary = subjects[name] = Dictionary(sae.to(data.device), widths, selection)
        if baselines:
            random = random_dictionary(sae, data, dictionary.widths)
            subjects[f"random ({name})"] = Dictionary(random, dictionary.widths, selection)
    if baselines:
        every = sorted({width for subject in subjects.values() for width in subject.widths})
        (d_in,) = {sae.config.d_in for sae in saes.values()}
        if every[0] < d_in:
            subjects["principal components"] = PrincipalComponents.fit(data, [w for w in every if w < d_in])
        subjects[IDENTITY] = Identity(every[-1:])
    result = evaluate_fidelity(data, subjects)
    rows = result.pop("subjects")
    for name, subject in subjects.items():
        if isinstance(subject, Dictionary):
            _add_details(rows[name], subject)
    if scaling is not None and result["clean_ce"] is not None:
        for row in (row for found in rows.values() for row in found):
            row["compute_share"] = scaling.compute_share(result["clean_ce"], row["ce"])
    return {"hookpoint": data.hookpoint, "selection": selection, **result, "saes": rows}


def _add_details(rows: list[dict[str, Any]], dictionary: Dictionary) -> None:
    """Geometry and densities of each width; the firings were summed over processes with the rows."""
    widths = dictionary.widths
    if dictionary.encodes_once:
        densities = density_metrics(dictionary.firing[0], widths)
    else:
        each = zip(dictionary.firing, widths, strict=True)
        densities = [density_metrics(firing, [width])[0] for firing, width in each]
    for row, shape, density in zip(rows, weight_geometry(dictionary.sae, widths), densities, strict=True):
        row.update(geometry=shape, density=density)


def details(results: Sequence[dict[str, Any]]) -> str:
    """Geometry and densities as text, a line per width of each dictionary."""
    lines = []
    for result in results:
        lines.append(f"{result['hookpoint']}: weights and firing")
        for name, rows in result["saes"].items():
            if "geometry" not in rows[0]:
                continue
            lines.append(f"  {name}")
            lines.append("  " + " ".join(f"{title:>{size}}" for title, _, _, size, _ in _DETAILS))
            for row in rows:
                cells = [(row[part][key], size, form) for _, part, key, size, form in _DETAILS]
                lines.append("  " + " ".join(_cell(*cell) for cell in cells))
    return "\n".join(lines)


def _cell(value: float | None, size: int, form: str) -> str:
    return f"{'-':>{size}}" if value is None else f"{value:>{size}{form}}"
