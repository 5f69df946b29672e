"""Export a feature index as the JSON that Neuronpedia takes: the dashboards of SAEDashboard, in `batch-*.json`.

Fields that an index does not have (alignment with neurons, the histogram of all logits) are left empty.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..common.checks import check_at_least
from ..common.token_text import token_texts
from .index.layout import Context, Feature
from .index.store import FeatureIndex


_UNFINISHED = ".unfinished"


def export_neuronpedia(
    index: FeatureIndex,
    path: str | os.PathLike,
    tokenizer: Any,
    model_id: str | None = None,
    layer: int | None = None,
    sae_set: str = "matryoshka",
    latents: Iterable[int] | None = None,
    batch_size: int = 128,
    show: bool = True,
) -> list[Path]:
    """Write an index as Neuronpedia's feature JSON; return the paths of the files.

    Args:
        index ([`FeatureIndex`]): The index to export.
        path (`str` or `os.PathLike`): Folder for `batch-0.json`, `batch-1.json`, ...; it must hold none yet. An export
            that fails leaves none.
        tokenizer: The language model's tokenizer, for the texts of tokens.
        model_id (`str`, *optional*): Neuronpedia's name of the language model; by default the last part of its id.
        layer (`int`, *optional*): Layer of the hookpoint; by default the first number in its path.
        sae_set (`str`, *optional*, defaults to `"matryoshka"`): Neuronpedia's name of the SAE.
        latents (`Iterable[int]`, *optional*): Latents to export; all by default.
        batch_size (`int`, *optional*, defaults to 128): Features in a file.
        show (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Raises:
        `ValueError`: if the hookpoint names no layer, a latent does not exist, or the folder holds batches already.
    """
    check_at_least(1, batch_size=batch_size)
    latents = list(range(len(index)) if latents is None else latents)
    folder = Path(path)
    if any(folder.glob("batch-*.json")):
        raise ValueError(f"{folder} holds batches already; name another folder, or remove them.")
    head = {
        "model_id": model_id or str(index.about.get("base_model", "")).rstrip("/").split("/")[-1],
        "layer": _layer(index.about) if layer is None else layer,
        "sae_set": sae_set,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"Batches cannot be written to {folder}: {error}. Name another folder.") from error
    writer = _Writer(index, tokenizer)
    files = []
    with _staged(folder) as staged:
        starts = range(0, len(latents), batch_size)
        for number, start in enumerate(tqdm(starts, desc="neuronpedia", disable=not show, leave=False)):
            features = [writer.feature(latent) for latent in latents[start : start + batch_size]]
            file = staged / f"batch-{number}.json"
            file.write_text(json.dumps(head | {"features": features}, allow_nan=False), encoding="utf-8")
            files.append(folder / file.name)
    return files


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yield a folder whose files are moved into `folder` when the block succeeds, and deleted when it fails."""
    staged = folder / _UNFINISHED
    shutil.rmtree(staged, ignore_errors=True)  # of an export that was killed
    staged.mkdir()
    moved = []
    try:
        yield staged
        for file in sorted(staged.iterdir()):
            moved.append(folder / file.name)
            os.replace(file, moved[-1])
    except BaseException:
        for file in moved:
            file.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _layer(about: Mapping[str, Any]) -> int:
    number = re.search(r"\d+", str(about.get("hookpoint", "")))
    if number is None:
        raise ValueError(f"The hookpoint {about.get('hookpoint')!r} names no layer; pass `layer`.")
    return int(number[0])


class _Writer:
    """Features of one index as JSON-able values."""

    def __init__(self, index: FeatureIndex, tokenizer: Any) -> None:
        self.index, self.tokenizer = index, tokenizer
        self.frequencies: dict[int, float] = {}

    def feature(self, latent: int) -> dict[str, Any]:
        """Return one feature."""
        feature = self.index.feature(latent)
        self.frequencies[latent] = feature.frequency
        edges, counts = (np.asarray(part) for part in feature.histogram)
        about, dataset = self.index.about, self.index.about.get("dataset")
        window = int(about.get("context_length") or 0)
        return {
            "feature_index": int(feature.latent),
            "neuron_alignment_indices": [],
            "neuron_alignment_values": [],
            "neuron_alignment_l1": [],
            "correlated_neurons_indices": [],
            "correlated_neurons_l1": [],
            "correlated_neurons_pearson": [],
            "correlated_features_indices": [int(other) for other, _ in feature.cofiring],
            "correlated_features_l1": [],
            "correlated_features_pearson": [_number(self._phi(feature, *pair)) for pair in feature.cofiring],
            "neg_str": self._texts(token for token, _ in feature.suppressed),
            "neg_values": [_number(value) for _, value in feature.suppressed],
            "pos_str": self._texts(token for token, _ in feature.promoted),
            "pos_values": [_number(value) for _, value in feature.promoted],
            "frac_nonzero": _number(feature.frequency),
            "freq_hist_data_bar_values": [_number(value) for value in (edges[1:] + edges[:-1]) / 2],
            "freq_hist_data_bar_heights": [int(count) for count in counts],
            "logits_hist_data_bar_heights": [],
            "logits_hist_data_bar_values": [],
            "n_prompts_total": int(about.get("tokens") or about.get("tokens_wanted") or 0) // window if window else 0,
            "n_tokens_in_prompt": window,
            "dataset": str(dataset.get("path", "") if isinstance(dataset, Mapping) else dataset or ""),
            "decoder_weights_dist": [],
            "activations": self._activations(feature),
        }

    def _texts(self, tokens: Iterable[int]) -> list[str]:
        tokens = [int(token) for token in tokens]
        return token_texts(self.tokenizer, tokens) if tokens else []

    def _phi(self, feature: Feature, other: int, rate: float) -> float:
        """Compute Pearson's correlation of the firing of two latents from the rate at which the other fires too."""
        if other not in self.frequencies:
            self.frequencies[other] = self.index.feature(other, contexts=False).frequency
        one, two = feature.frequency, self.frequencies[other]
        spread = math.sqrt(one * (1 - one) * two * (1 - two))
        # The rate may come from a sample of the tokens, so the correlation can lie a little outside [-1, 1].
        return max(-1.0, min(1.0, (rate * one - one * two) / spread)) if spread else 0.0

    def _activations(self, feature: Feature) -> list[dict[str, Any]]:
        """Return the strongest contexts, then those of each quantile, strongest quantile first."""
        groups: dict[str, list[Context]] = {}
        for context in feature.contexts:
            groups.setdefault(str(context.kind), []).append(context)
        quantiles = sorted((kind for kind in groups if kind.isdigit()), key=int, reverse=True)
        share = feature.frequency / len(quantiles) if quantiles else 0.0
        records = []
        for kind in ["top", *quantiles]:
            contexts = groups.get(kind, [])
            values = [float(context.value) for context in contexts]
            if kind == "top":
                bounds = {"bin_min": -1.0, "bin_max": _number(feature.max), "bin_contains": -1.0}
            else:
                bounds = {"bin_min": _number(min(values)), "bin_max": _number(max(values))}
                bounds["bin_contains"] = _number(share)
            records += [
                bounds
                | {
                    "tokens": self._texts(context.token_ids),
                    "values": [_number(value) for value in context.activations],
                    "qualifying_token_index": int(context.peak),
                }
                for context in contexts
            ]
        return records


def _number(value: float) -> float | None:
    """Round a number for JSON, which has no NaN and no infinity: those become `None`."""
    value = float(value)
    return round(value, 6) if math.isfinite(value) else None
