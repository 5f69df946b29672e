"""The evaluation of SAEs beside their baselines at every width: fidelity, weights, firing."""

import itertools
from collections.abc import Sequence
from typing import Any

from ..common.report import Column, Report
from ..models import SAEModel
from .baselines import Identity, PrincipalComponents, component_widths, random_dictionary
from .data import HeldOut
from .fidelity import evaluate_fidelity
from .firing import FiringSums, rare_share
from .geometry import density_metrics, weight_geometry
from .language_model import LossScaling
from .report import ABOUT, records_of
from .subjects import Dictionary, Subject


ABOUT_ALL = (
    f"{ABOUT} random: directions drawn at random, in the shape of the SAE above it, as many firing at each width "
    "under selection mask. principal components: that many dense numbers per token, fitted to these tokens; they "
    "end at d_in, where they are the identity. identity: the hidden states themselves. geometry: cosines between the "
    "weights of each prefix's latents. density: how often they fire."
)

COMPONENTS, IDENTITY = "principal components", "identity"

_COSINE = "mean over latents of the largest cosine to another's {} row."
_DETAILS = (
    Column("encoder", "max enc cos", _COSINE.format("encoder"), ".3f", path="geometry.average_max_encoder_cosine_sim"),
    Column("decoder", "max dec cos", _COSINE.format("decoder"), ".3f", path="geometry.average_max_decoder_cosine_sim"),
    Column("copies", "near copies", "share of near copies.", ".2%", path="geometry.share_near_duplicates"),
    Column("rank", "eff. rank", "of the decoder rows.", ".1f", path="geometry.effective_rank"),
    Column("alive", "alive", "share of latents that fire.", ".2%", path="density.frac_alive"),
    Column("over_1", "over 1%", "share of those on over 1% of tokens.", ".2%", path="density.freq_over_1_percent"),
    Column("over_10", "over 10%", "the same for 10%.", ".2%", path="density.freq_over_10_percent"),
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
        saes (`dict[str, SAEModel]`): SAEs by name, in `eval` mode.
        widths (`Sequence[int]`, *optional*): Widths to evaluate; by default each SAE's prefix widths.
        selection (`str`, *optional*, defaults to `"mask"`): `"mask"` or `"restrict"`, see [`Dictionary`].
        baselines (`bool`, *optional*, defaults to `True`): Evaluate a random dictionary beside each SAE, principal
            components and the identity.
        scaling ([`LossScaling`], *optional*): Scaling law of the language model; adds `compute_share` to each row.

    Returns:
        `dict`: The results of [`evaluate_fidelity`], with rows by name under `saes`; those of dictionaries have
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
        subjects[COMPONENTS] = PrincipalComponents.fit(data, component_widths(every, d_in))
        subjects[IDENTITY] = Identity(every[-1:])
    result = evaluate_fidelity(data, subjects)
    rows = result.pop("subjects")
    for name, subject in subjects.items():
        if isinstance(subject, Dictionary):
            _add_details(rows[name], subject)
    if scaling is not None and result["clean_ce"] is not None:
        for row in itertools.chain.from_iterable(rows.values()):
            row["compute_share"] = scaling.compute_share(result["clean_ce"], row["ce"])
    return {"hookpoint": data.hookpoint, "selection": selection, **result, "saes": rows}


def _add_details(rows: list[dict[str, Any]], dictionary: Dictionary) -> None:
    """Add geometry and densities to the row of each width; firings were summed over processes with the rows."""
    each = zip(dictionary.firing, dictionary.encodings, strict=True)
    densities = [row for firing, widths in each for row in density_metrics(firing, widths)]
    shapes = weight_geometry(dictionary.sae, dictionary.widths)
    for row, shape, density in zip(rows, shapes, densities, strict=True):
        row.update(geometry=shape, density=density)
    for row, firing in zip(rows, _firing_of_widths(dictionary), strict=True):
        row["rare"], row["rare_interval"] = rare_share(
            firing.fired[: row["width"]].cpu().numpy(), max(1, int(firing.tokens))
        )


def _firing_of_widths(dictionary: Dictionary) -> list[FiringSums]:
    """Return the firings of each width: of the one encoding, or of each."""
    each = zip(dictionary.firing, dictionary.encodings, strict=True)
    return [firing for firing, widths in each for _ in widths]


def details(results: Sequence[dict[str, Any]]) -> str:
    """Return geometry and densities as text, a line per width of each dictionary."""
    tables = []
    for result in results:
        records = [record for record in records_of(result) if "geometry" in record]
        tables.append(str(Report("details", f"{result['hookpoint']}: weights and firing", records, _DETAILS, {})))
    return "\n".join(tables)
