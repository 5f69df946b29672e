"""Measure what a card shows and a finished run lacks, with the run's own model and held-out text.

For each SAE: `statistics.safetensors`, `progressive_curve.json`, `power_law.json` and their plots, in its folder, and
the picture of its prefixes nested in each other where it has a feature index.
For the run: `evaluation.json` and `.png`, with the baselines. Each is written when it is done, and `measured.json`
then says of which weights it is, so that a second call does nothing and changed weights are measured again.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from ..activations import load_language_model, resolve_hookpoints
from ..activations.sentences import SENTENCE_EMBEDDING
from ..common.figures import save_figure
from ..common.files import write_json
from ..evaluation import HeldOut
from ..evaluation.core import evaluate
from ..evaluation.report import ABOUT, plot
from ..features import FeatureIndex
from ..features.index.layout import INDEX
from ..features.labels import short_labels
from ..features.sizes import FOLDER as INDEX_FOLDER
from ..features.tree.picture import nested_figure
from ..models import SAEModel
from ..models.digests import folder_digest
from ..models.pieces import tensor_files
from ..progressive import (
    LatentStatistics,
    decoder_spectrum,
    default_widths,
    fit_power_law,
    latent_statistics,
    plot_power_laws,
    progressive_curve,
)
from ..progressive.statistics import STATISTICS_FILE
from ..training import RunConfig, load_run_config
from ..training.data.text import open_heldout_text
from ..training.run.provenance import describe_model
from .layout import SAEFolder, find_saes


logger = logging.getLogger(__name__)

MEASURED_FILE = "measured.json"
CURVE, POWER_LAW, EVALUATION = "progressive_curve", "power_law", "evaluation"
NESTED = "nested_prefixes"

_STATISTICS = "statistics"
_FILES = {_STATISTICS: STATISTICS_FILE, CURVE: f"{CURVE}.json", POWER_LAW: f"{POWER_LAW}.json"}
_WIDTHS = 12  # of a curve, beside the prefix widths
_ABOUT = (
    f"{ABOUT} random: directions drawn at random, in the shape of the SAE above it, as many firing at each width "
    "under selection mask. principal components: that many dense numbers per token, fitted to these tokens; left out "
    "from d_in on. identity: the hidden states themselves."
)


def measure_run(run_dir: str | Path, names: Sequence[str] | None = None, show: bool = True) -> None:
    """Measure the results of a run's card that are missing or out of date.

    Args:
        run_dir (`str` or `Path`): The run's folder with its `run.yaml`, or the folder of one of its SAEs. Paths in
            the YAML are relative to the working directory, as in training. An SAE that is in no run's folder is not
            measured.
        names (`Sequence[str]`, *optional*): Patterns of the SAEs to measure, as in [`find_saes`].
        show (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Raises:
        `ValueError`: if this is no run's folder, or its language model or text cannot be found any more.
    """
    saes = find_saes(run_dir, names)
    folder = run_folder(Path(run_dir).expanduser())
    if folder is None and saes[0].subfolder == "":
        logger.info("'%s' is in no run's folder: nothing is measured, model and text are unknown.", run_dir)
        return
    config = _run_config(folder or Path(run_dir))
    if config.model is None or config.dataset is None:
        logger.info("The run in '%s' was given hidden states, which are not kept: nothing is measured.", run_dir)
        return
    if SENTENCE_EMBEDDING in config.hookpoints:
        logger.info("The run in '%s' read embeddings of whole texts: its own closing figures stand.", run_dir)
        return
    groups: dict[str, list[SAEFolder]] = {}
    for sae in saes:
        groups.setdefault(sae.hookpoint, []).append(sae)
    bench = _Bench(config, folder, show)
    for hookpoint, group in groups.items():
        for sae in group:
            _measure_sae(sae, hookpoint, bench)
        _evaluate(group, hookpoint, bench)


def run_folder(folder: Path) -> Path | None:
    """Return the nearest folder with a `run.yaml` among a folder and its three parents; `None` if there is none."""
    return next((each for each in (folder, *folder.resolve().parents[:3]) if (each / "run.yaml").is_file()), None)


def is_measured(folder: Path, name: str, weights: str | None = None) -> bool:
    """Return whether a result in an SAE's folder was measured with the weights that are there now.

    Args:
        folder (`Path`): The SAE's folder.
        name (`str`): Name of the result, such as `"progressive_curve"`.
        weights (`str`, *optional*): Digest of the weights; computed where it is not given.
    """
    return bool(read_json(folder / MEASURED_FILE).get(name) == (weights or folder_digest(folder)))


def evaluations(run_dir: Path, weights: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """Return the results in a run's `evaluation.json` that belong to the present weights, one for each hookpoint.

    Args:
        run_dir (`Path`): The run's folder.
        weights (`Mapping[str, str]`): Digest of each SAE's present weights, by its path in the run's folder.
    """
    results = []
    for result in read_json(run_dir / f"{EVALUATION}.json").get("results", []):
        measured = result.get("weights", {})
        if measured and all(weights.get(place, digest) == digest for place, digest in measured.items()):
            results.append(result)
    return results


@dataclass
class _Bench:
    """A run's language model and held-out text, opened when the first measurement needs them."""

    config: RunConfig
    folder: Path
    show: bool
    heldout: HeldOut | None = None

    def at(self, hookpoint: str) -> HeldOut:
        if self.heldout is None:
            config, device = self.config, torch.device("cuda" if torch.cuda.is_available() else "cpu")
            model, tokenizer = load_language_model(config.model, config.model_revision, config.model_dtype, device)
            batches = open_heldout_text(config, tokenizer)
            self.heldout = HeldOut(model, batches, hookpoint, tokenizer.mask_token_id, tokenizer)
            _note(self.folder, "language_model", describe_model(model))
        (place,) = resolve_hookpoints(self.heldout.model, [hookpoint])
        return HeldOut(self.heldout.model, self.heldout.batches, place, self.heldout.mask_token_id)


def _run_config(folder: Path) -> RunConfig:
    path = folder / "run.yaml"
    if not path.is_file():
        raise ValueError(f"'{folder}' is no folder of a run: it has no run.yaml, so model and text are unknown.")
    return load_run_config(path)


def _load(sae: SAEFolder, device: torch.device) -> SAEModel:
    return AutoModel.from_pretrained(sae.folder).eval().to(device)


# One SAE


def _measure_sae(place: SAEFolder, hookpoint: str, bench: _Bench) -> None:
    weights = folder_digest(place.folder)
    _draw_nested(place.folder, weights)
    missing = [
        name
        for name, file in _FILES.items()
        if not ((place.folder / file).is_file() and is_measured(place.folder, name, weights))
    ]
    if not missing:
        return
    data = bench.at(hookpoint)
    sae = _load(place, data.device)
    logger.info("Measuring %s", place.folder)
    statistics = _statistics(sae, place.folder, data, weights)
    if CURVE in missing:
        loss_widths = sae.prefix_widths if data.has_loss else []
        widths = default_widths(sae, _WIDTHS)
        curve = progressive_curve(sae, data, widths, statistics=statistics, loss_widths=loss_widths, show=bench.show)
        curve.save(place.folder, CURVE)
        _note(place.folder, CURVE, weights)
    if POWER_LAW in missing:
        _write_power_laws(sae, statistics, place.folder)
        _note(place.folder, POWER_LAW, weights)


def _draw_nested(folder: Path, weights: str | None) -> None:
    """Draw which latents refine which, where there is a feature index of these weights that knows."""
    path, index_file = folder / f"{NESTED}.png", folder / INDEX_FOLDER / INDEX
    if not index_file.is_file():
        return
    fresh = path.is_file() and path.stat().st_mtime >= index_file.stat().st_mtime
    if fresh and is_measured(folder, NESTED, weights):
        return
    try:
        index = FeatureIndex.open(folder)
        index.check(AutoModel.from_pretrained(folder))
    except ValueError as error:
        logger.info("No picture is drawn of the feature index in %s: %s", folder, error)
        return
    tree = index.tree(AutoConfig.from_pretrained(folder).widths)
    if len(tree.roots()) < len(tree):
        save_figure(nested_figure(tree, short_labels(index)), path)
        _note(folder, NESTED, weights)


def _statistics(sae: SAEModel, folder: Path, data: HeldOut, weights: str | None) -> LatentStatistics:
    """Load the statistics in the folder if they belong to these weights, or measure and save them.

    Statistics without a note that are newer than the weights were made by the user and are kept.
    """
    path, noted = folder / STATISTICS_FILE, read_json(folder / MEASURED_FILE).get(_STATISTICS)
    newest = max((file.stat().st_mtime for file in tensor_files(folder)), default=0.0)
    if path.is_file() and (noted == weights or (noted is None and path.stat().st_mtime >= newest)):
        try:
            statistics = LatentStatistics.load(folder)
            statistics.check(sae)
            _note(folder, _STATISTICS, weights)
            return statistics
        except ValueError as error:
            logger.warning("The statistics in %s are measured again: %s", folder, error)
    statistics = latent_statistics(sae, data)
    statistics.save(folder)
    _note(folder, _STATISTICS, weights)
    return statistics


def _write_power_laws(sae: SAEModel, statistics: LatentStatistics, folder: Path) -> None:
    """Fit power laws to energy, frequency and decoder spectrum; save them, or why there are too few values."""
    importance: dict[str, Callable[[], torch.Tensor]] = {
        "energy": lambda: statistics.mean_square,
        "frequency": lambda: statistics.frequency,
        "decoder spectrum": lambda: decoder_spectrum(sae).cpu(),
    }
    fits, not_fitted = {}, {}
    for name, values in importance.items():
        try:
            fits[name] = (values(), fit_power_law(values()))
        except ValueError as error:
            not_fitted[name] = str(error)
    if fits:
        plot_power_laws(fits, folder / f"{POWER_LAW}.png")
    else:
        (folder / f"{POWER_LAW}.png").unlink(missing_ok=True)  # of other weights
    records = {name: fit.to_dict() for name, (_, fit) in fits.items()}
    write_json(folder / f"{POWER_LAW}.json", {"tokens": statistics.tokens, "fits": records, "not_fitted": not_fitted})


# The SAEs of one hookpoint, beside their baselines


def _evaluate(group: Sequence[SAEFolder], hookpoint: str, bench: _Bench) -> None:
    weights = {_place(sae, bench.folder): folder_digest(sae.folder) for sae in group}
    before = evaluations(bench.folder, weights)
    if any(_at(result) == hookpoint and weights.keys() <= result["weights"].keys() for result in before):
        return
    data = bench.at(hookpoint)
    saes = {name_in_run(sae, bench.folder): _load(sae, data.device) for sae in group}
    result = {"weights": weights, **evaluate(data, saes)}
    results = sorted([*(each for each in before if _at(each) != hookpoint), result], key=_at)
    path = bench.folder / f"{EVALUATION}.json"
    write_json(path, {"about": _ABOUT, "results": results})
    curves = [each | {"saes": {k: v for k, v in each["saes"].items() if k != "identity"}} for each in results]
    plot(curves, path.with_suffix(".png"))


def name_in_run(sae: SAEFolder, folder: Path) -> str:
    """Return an SAE's name in the run's reports: the first part of its path, `<sae name>/<hookpoint>`."""
    place, run_dir = sae.folder.resolve(), folder.resolve()
    if run_dir not in place.parents:
        return sae.name or place.name
    return place.parent.relative_to(run_dir).as_posix() if len(place.relative_to(run_dir).parts) > 1 else place.name


def _place(sae: SAEFolder, folder: Path) -> str:
    return sae.folder.resolve().relative_to(folder.resolve()).as_posix()


def _at(result: dict[str, Any]) -> str:
    return str(result.get("hookpoint"))


# What has been measured


def _note(folder: Path, name: str, value: Any) -> None:
    path = folder / MEASURED_FILE
    write_json(path, {**read_json(path), name: value})


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; empty where the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
