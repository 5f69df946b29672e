"""The shared part of both `evaluate` modules: their two input layouts, and the sums over tokens made of either.

`evaluate` moves inputs as Python lists through Arrow, a few million numbers per second. Rows are for small arrays; for
anything larger sum up on the device with [`ReconstructionSums`] and pass its `to_dict()`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, List, Value
from torch import Tensor

from ..evaluation.firing import FiringSums
from ..evaluation.reconstruction import ReconstructionSums


_NUMBER, _NUMBERS = Value("float64"), List(Value("float64"))

OF_REFERENCES = {"tokens": _NUMBER, "batches": _NUMBER, "x": _NUMBERS, "x_square": _NUMBERS, "norm_in": _NUMBER}
"""Sums that depend on the hidden states alone."""

OF_PREDICTIONS = {
    field.name: List(_NUMBERS) if field.name == "residual" else _NUMBERS
    for field in fields(ReconstructionSums)
    if field.name not in OF_REFERENCES
}
"""Sums that depend on the reconstructions, one entry for each width."""

FIRING = {"fired": List(Value("int64")), "total": _NUMBERS}
"""Optional sums beside them: how often each latent fired, and the sum of its values, as in [`FiringSums`]."""

STATISTICS = Features({"predictions": {**OF_PREDICTIONS, **FIRING}, "references": OF_REFERENCES})
"""Layout of sums; one example holds the sums over a batch, or over any number of tokens."""


class SumsMetric(evaluate.Metric):
    """A metric that takes rows of numbers, or sums over tokens in the same two columns."""

    row_dims = 1
    """Dimensions of one token's reconstructions: 1, or 2 where there are several widths."""

    def _infer_feature_from_example(self, example: dict[str, Any]) -> Features:
        # `evaluate` takes the first layout that encodes without an error, and rows encode the keys of a dict too.
        rows, statistics = self.features
        return statistics if isinstance(example["references"], Mapping) else rows

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Add one token's rows, or one batch's sums."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Add rows, or lists of sums.

        Args:
            predictions (`Sequence`): Rows of the reconstructions, or sums over tokens.
            references (`Sequence`): Rows of the hidden states, or the same sums.

        Raises:
            `ValueError`: if these are neither, differ in length, lack a sum or hold a number that is not finite.
        """
        for name, column in (("predictions", predictions), ("references", references)):
            if column is None or isinstance(column, str | Mapping) or not hasattr(column, "__len__"):
                raise ValueError(f"`{name}` must be rows of numbers or a list of sums, got {type(column).__name__}.")
        if not len(predictions) or len(predictions) != len(references):
            raise ValueError(
                f"`predictions` and `references` must have the same number of rows, at least 1; got "
                f"{len(predictions)} and {len(references)}."
            )
        if isinstance(references[0], Mapping):
            columns = {
                "predictions": [_chosen(example, OF_PREDICTIONS, FIRING) for example in predictions],
                "references": [_chosen(example, OF_REFERENCES, {}) for example in references],
            }
        else:
            x, reconstructions = _rows(references, "references"), _rows(predictions, "predictions")
            if x.dim() != 2 or reconstructions.dim() != self.row_dims + 1 or x.shape[-1] != reconstructions.shape[-1]:
                shape = "(N, P, D)" if self.row_dims == 2 else "(N, D)"
                raise ValueError(
                    f"Expected `references` of shape (N, D) and `predictions` of shape {shape}, got "
                    f"{tuple(x.shape)} and {tuple(reconstructions.shape)}."
                )
            columns = {"predictions": reconstructions.numpy(), "references": x.numpy()}
        super().add_batch(**columns)


def _rows(rows: Any, name: str) -> Tensor:
    try:
        if isinstance(rows, Sequence):
            rows = np.asarray([np.asarray(row, dtype=np.float32) for row in rows])
        tensor = torch.as_tensor(rows).detach().cpu().float()
    except (TypeError, ValueError) as error:
        raise ValueError(f"All rows of `{name}` must hold as many numbers as each other: {error}") from error
    if not tensor.isfinite().all():
        raise ValueError(f"`{name}` must be finite, but hold NaN or infinity.")
    return tensor


def _chosen(example: Any, needed: Mapping[str, Any], optional: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sums of one column; those of the other column, which `to_dict` holds too, are left out."""
    if not isinstance(example, Mapping):
        raise ValueError(f"Sums must come as a dict in both columns, got {type(example).__name__}.")
    lacking = [name for name in needed if example.get(name) is None]
    if lacking:
        raise ValueError(f"The sums lack {', '.join(lacking)}. Pass all that ReconstructionSums.to_dict() holds.")
    sums = {name: example.get(name) for name in (*needed, *optional)}
    for name, feature in (needed | optional).items():
        dims = 0 if feature is _NUMBER else 2 if name == "residual" else 1
        if sums[name] is not None and not _are_finite(sums[name], dims):
            kind = ("a finite number", "a list of finite numbers", "a list of lists of finite numbers")[dims]
            raise ValueError(f"`{name}` must be {kind}, as in ReconstructionSums.to_dict().")
    return sums


def _are_finite(value: Any, dims: int) -> bool:
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return numbers.ndim == dims and bool(np.isfinite(numbers).all())


def summed(predictions: Sequence[Any], references: Sequence[Any]) -> tuple[ReconstructionSums, dict[str, Tensor]]:
    """Sum up everything that was added.

    Args:
        predictions (`Sequence`): Rows of reconstructions, `(D,)` or, for several widths, `(P, D)`; or mappings with
            sums.
        references (`Sequence`): Rows of hidden states `(D,)`, or mappings with sums.

    Returns:
        [`ReconstructionSums`], and where every example has them `fired` and `total` of each latent.

    Raises:
        `ValueError`: if batches or sums are of different shapes.
    """
    if isinstance(references[0], Mapping):
        return _added([{**x, **reconstruction} for x, reconstruction in zip(references, predictions, strict=True)])
    try:
        x, reconstructions = torch.tensor(references), torch.tensor(predictions)
    except ValueError as error:
        raise ValueError(f"Batches differ in the number of columns: {error}.") from error
    if reconstructions.dim() == 2:
        reconstructions = reconstructions[:, None]
    sums = ReconstructionSums.zeros(reconstructions.shape[1], x.shape[1])
    sums.add(x, reconstructions.transpose(0, 1))
    return sums, {}


def _added(examples: Sequence[Mapping[str, Any]]) -> tuple[ReconstructionSums, dict[str, Tensor]]:
    sums = ReconstructionSums.zeros(len(examples[0]["square_error"]), len(examples[0]["x"]))
    for example in examples:
        sums.merge(example)
    if not any(example[name] is not None for name in FIRING for example in examples):
        return sums, {}
    lengths = {len(example[name] or ()) for example in examples for name in FIRING}
    if len(lengths) > 1:
        raise ValueError("`fired` and `total` must come with all sums, with an entry for each latent.")
    return sums, {name: torch.tensor([example[name] for example in examples]).double().sum(0) for name in FIRING}


def with_firing(
    sums: ReconstructionSums, firing: Mapping[str, Tensor], widths: Sequence[int] | None
) -> list[dict[str, float]]:
    """Compute the metrics of each width, with `l0`, `l1` and `dead` where firings are known.

    Args:
        sums ([`ReconstructionSums`]): Sums of P widths.
        firing (`Mapping[str, Tensor]`): Empty, or `fired` and `total` of each latent, as [`summed`] returns them.
        widths (`Sequence[int]`, *optional*): The P widths; by default one, of all latents.

    Raises:
        `ValueError`: if a width is above the number of latents.
    """
    rows = sums.rows()
    if firing:
        counts = FiringSums(len(firing["fired"]))
        counts.tokens, counts.fired, counts.moments[0] = sums.tokens, firing["fired"], firing["total"]
        widths = [len(counts.fired)] if widths is None else widths
        if widths[-1] > len(counts.fired):
            raise ValueError(f"`fired` counts {len(counts.fired)} latents, fewer than the width {widths[-1]}.")
        for row, firing_row in zip(rows, counts.rows(widths), strict=True):
            row.update(firing_row)
    return rows


def means(tokens: int, **columns: Sequence[float] | None) -> dict[str, float]:
    """Return the mean of each list of numbers per token.

    Args:
        tokens (`int`): Number of tokens.
        columns (`Sequence[float]`, *optional*): One number for each token, by name; `None` is left out.

    Raises:
        `ValueError`: if there is not one finite number for each token.
    """
    means_by_name = {}
    for name, values in columns.items():
        if values is None:
            continue
        numbers = torch.as_tensor(values, dtype=torch.float64)
        if numbers.shape != (tokens,) or not numbers.isfinite().all():
            raise ValueError(
                f"`{name}` must hold a finite number for each of {tokens} tokens, got shape {tuple(numbers.shape)}."
            )
        means_by_name[name] = numbers.mean().item()
    return means_by_name
