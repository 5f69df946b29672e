"""`matryoshka-sae evaluate`: saved SAEs on held-out text, at every width, beside their baselines."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from ..activations import DatasetConfig, resolve_hookpoints
from ..activations.language_model import EMBEDDED
from ..assets import embedded_sae_path
from ..models import CONFIGS, SAEModel
from .baselines import Identity, PrincipalComponents, random_dictionary
from .data import HeldOut, open_heldout
from .fidelity import evaluate_fidelity
from .geometry import density_metrics, weight_geometry
from .report import ABOUT, plot, table, write_json
from .subjects import Dictionary, Subject


_ABOUT = (
    f"{ABOUT} random: directions drawn at random, in the shape of the SAE above it, as many firing at each width "
    "under selection mask. principal components: that many dense numbers per token, fitted to these tokens; left out "
    "from d_in on, where they are the identity. identity: the hidden states themselves. geometry: cosines between the "
    "weights of each prefix's latents. density: how often they fire."
)

_IDENTITY = "identity"

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


def main(arguments: list[str] | None = None) -> int:
    """Run the evaluation from command-line arguments; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    transformers_logging.disable_progress_bar()  # ours is the one to watch
    # Makes the process group where there are several processes. Not on MPS: it lacks float64, in which sums are.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    try:
        _run(parsed, accelerator)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        if accelerator.is_main_process:
            sys.stderr.write(f"\nerror: {error}\n")
        return 2
    finally:
        accelerator.end_training()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae evaluate",
        description="Evaluate saved SAEs on held-out text at every width, beside a random dictionary, principal "
        "components and the identity.",
    )
    parser.add_argument(
        "sae", metavar="REPO_OR_DIR", help="folder of an SAE, folder with several, Hub id, or 'embedded'"
    )
    parser.add_argument("--subfolder", help="of the repository or folder")
    parser.add_argument("--model", help="language model: Hub id, folder or 'embedded' (default: what the SAE names)")
    parser.add_argument("--hookpoint", help="where the SAE reads (default: what the SAE names)")
    parser.add_argument("--dataset", metavar="PATH", help="held-out text: file, folder or Hub id")
    parser.add_argument("--split", default="train", help="of the data set (default: %(default)s)")
    parser.add_argument("--column", default="text", help="with the text (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=60_000, help="to evaluate on (default: %(default)s)")
    parser.add_argument("--context_length", type=int, default=128, help="in tokens (default: %(default)s)")
    parser.add_argument("--widths", type=_widths, help="such as 64,128,256 (default: the SAE's prefix widths)")
    parser.add_argument(
        "--selection",
        choices=("mask", "restrict"),
        default="mask",
        help="whether latents past the width compete for places (mask, the default) or not; matters to TopK alone",
    )
    parser.add_argument("--no_baselines", action="store_true", help="the SAEs only")
    parser.add_argument("--output_dir", help="default: beside the SAE where it is a folder, else runs/evaluate")
    return parser


def _widths(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 64,128,256, got {text!r}") from None


def _run(parsed: argparse.Namespace, accelerator: Accelerator) -> None:
    for name in ("tokens", "context_length"):
        if getattr(parsed, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(parsed, name)}.")
    saes, folder = open_saes(parsed.sae, parsed.subfolder)
    opened: dict[str, HeldOut] = {}
    results = []
    for (model, hookpoint), group in _by_place(saes, parsed.model, parsed.hookpoint).items():
        if model not in opened:
            opened = {model: _open(parsed, model, hookpoint, accelerator.device)}  # one language model at a time
        (place,) = resolve_hookpoints(opened[model].model, [hookpoint])
        data = replace(opened[model], hookpoint=place)
        result = evaluate(data, group, parsed.widths, parsed.selection, not parsed.no_baselines)
        results.append({"model": model, "dataset": parsed.dataset or EMBEDDED, **result})
    if accelerator.is_main_process:
        _write(results, Path(parsed.output_dir) if parsed.output_dir else folder or Path("runs/evaluate"))


def open_saes(source: str, subfolder: str | None = None) -> tuple[dict[str, SAEModel], Path | None]:
    """Load the SAEs of a folder or repository.

    Args:
        source (`str`): Folder of an SAE, folder that holds such folders, Hub id, or `"embedded"`.
        subfolder (`str`, *optional*): Of either.

    Returns:
        The SAEs by name, in `eval` mode, and the folder they are in (`None` for the Hub).

    Raises:
        `ValueError`: if there is none.
    """
    if source == EMBEDDED:
        return {EMBEDDED: _load(str(embedded_sae_path()))}, None
    if not Path(source).expanduser().is_dir():
        return {source.rsplit("/")[-1]: _load(source, subfolder)}, None
    folder = Path(source).expanduser() / (subfolder or "")
    found = [folder] if _is_sae(folder) else sorted(path.parent for path in folder.rglob("config.json"))
    found = [path for path in found if _is_sae(path)]
    if not found:
        raise ValueError(f"'{folder}' holds no SAE: no config.json in or under it is that of an SAE.")
    saes = {path: _load(str(path)) for path in found}
    return {_name(path, folder, sae): sae for path, sae in saes.items()}, folder


def _is_sae(folder: Path) -> bool:
    try:
        known = {config.model_type for config in CONFIGS.values()}
        return json.loads((folder / "config.json").read_text())["model_type"] in known
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _load(source: str, subfolder: str | None = None) -> SAEModel:
    try:
        sae = AutoModel.from_pretrained(source, subfolder=subfolder or "")
    except OSError as error:
        raise ValueError(
            f"No SAE can be loaded from {source!r}: {error} It is no folder here; a repository on the Hub that "
            "holds several SAEs needs --subfolder."
        ) from error
    if not isinstance(sae, SAEModel):
        raise ValueError(f"{source!r} is a {type(sae).__name__}, not an SAE.")
    return sae.eval()


def _name(path: Path, folder: Path, sae: SAEModel) -> str:
    """A run's folders are `<name>/<hookpoint>`; the hookpoint is told elsewhere."""
    path, folder = path.resolve(), folder.resolve()
    if path.name == (sae.config.hookpoint or "").replace(":", "-"):
        path = path.parent
    return path.relative_to(folder).as_posix() if folder in path.parents else path.name


def _by_place(
    saes: dict[str, SAEModel], model: str | None, hookpoint: str | None
) -> dict[tuple[str, str], dict[str, SAEModel]]:
    """The SAEs that read from the same place."""
    places: dict[tuple[str, str], dict[str, SAEModel]] = {}
    for name, sae in saes.items():
        place = {"model": model or sae.config.base_model, "hookpoint": hookpoint or sae.config.hookpoint}
        for flag, value in place.items():
            if value is None:
                raise ValueError(f"The config of `{name}` names no {flag}; pass --{flag}.")
        places.setdefault(tuple(place.values()), {})[name] = sae
    return dict(sorted(places.items()))


def _open(parsed: argparse.Namespace, model: str, hookpoint: str, device: torch.device) -> HeldOut:
    dataset = None
    if parsed.dataset is not None:
        dataset = DatasetConfig(parsed.dataset, split=parsed.split, column=parsed.column)
    elif model != EMBEDDED:
        raise ValueError(f"Name held-out text for {model!r} with --dataset: a file, a folder or a Hub id.")
    return open_heldout(model, hookpoint, dataset, parsed.tokens, parsed.context_length, device=device)


def evaluate(
    data: HeldOut,
    saes: dict[str, SAEModel],
    widths: Sequence[int] | None = None,
    selection: str = "mask",
    baselines: bool = True,
) -> dict[str, Any]:
    """Evaluate the SAEs of one hookpoint, their weights and their firing, beside baselines.

    Args:
        data ([`HeldOut`]): The language model and held-out tokens; every process evaluates its share.
        saes (`dict[str, SAEModel]`): By name; in `eval` mode.
        widths (`Sequence[int]`, *optional*): By default each SAE's prefix widths.
        selection (`str`, *optional*, defaults to `"mask"`): See [`Dictionary`].
        baselines (`bool`, *optional*, defaults to `True`): Evaluate a random dictionary beside each SAE, principal
            components and the identity.

    Returns:
        `dict`: What [`evaluate_fidelity`] gives, with rows by name under `saes`; those of dictionaries have
        [`weight_geometry`] and [`density_metrics`] of their width under `geometry` and `density`.

    Raises:
        `ValueError`: for widths that an SAE lacks, or hidden states of another width than an SAE's.
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
        subjects[_IDENTITY] = Identity(every[-1:])
    result = evaluate_fidelity(data, subjects)
    rows = result.pop("subjects")
    for name, subject in subjects.items():
        if isinstance(subject, Dictionary):
            _add_details(rows[name], subject)
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


def _write(results: list[dict[str, Any]], folder: Path) -> None:
    write_json(folder / "evaluation.json", {"about": _ABOUT, "results": results})
    drawn = [result | {"saes": {k: v for k, v in result["saes"].items() if k != _IDENTITY}} for result in results]
    plot(drawn, folder / "evaluation.png")
    sys.stdout.write(f"{table(results)}\n\n{details(results)}\n")
    sys.stdout.write(f"Saved {folder / 'evaluation.json'} and {folder / 'evaluation.png'}\n")


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
