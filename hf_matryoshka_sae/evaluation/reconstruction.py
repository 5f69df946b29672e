"""Reconstruction metrics of every prefix, from sums over tokens that add up over batches and processes.

With r = x - x^ and x~ the mean of x over the evaluation set:

    fvu                          sum ||r||^2 / sum ||x - x~||^2
    explained_variance           1 - fvu
    explained_variance_saebench  1 - E||r||^2 / (E||x||^2 - (mean over d of E x_d^2)^2), as SAEBench 0.6; no R^2
    explained_variance_legacy    mean over tokens of 1 - ||r||^2 / ||x - mean of its batch||^2; no R^2
    explained_variance_dl        1 - sum_d var(r_d) / sum_d var(x_d) in each batch, averaged over batches
    mse                          E||r||^2 / D
    cossim                       E[x.x^ / (||x|| ||x^||)]
    l2_norm_in, l2_norm_out      E||x||, E||x^||
    l2_ratio                     E[||x^|| / ||x||], 1 where ||x|| < 1e-4
    relative_reconstruction_bias E||x^||^2 / E[x.x^]  (Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 10)
    mean_residual_fvu            ||E r||^2 / E||x - x~||^2: the part of fvu that another b_dec would take away

Shapes: N tokens, D `d_in`, P prefixes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..common.distributed import reduce_sum


_SMALL_NORM = 1e-4  # below this a ratio of norms counts as 1, as in SAEBench
# Entries of [P, n, D] residuals held at a time: on a CPU as many as fit its cache, on a GPU many, for few launches.
_PIECE = {"cpu": 2**18}


@dataclass
class ReconstructionSums:
    """Sums over tokens from which every metric follows; all float64.

    Args:
        tokens (`Tensor` of shape `()`): Number of tokens.
        batches (`Tensor` of shape `()`): Number of batches.
        x (`Tensor` of shape `(D,)`): Sum of x.
        x_square (`Tensor` of shape `(D,)`): Sum of x^2.
        norm_in (`Tensor` of shape `()`): Sum of ||x||.
        square_error, dot, square_out, norm_out, ratio, cosine (`Tensor` of shape `(P,)`): Sums of ||r||^2, x.x^,
            ||x^||^2, ||x^||, ||x^||/||x|| and cos(x, x^).
        legacy (`Tensor` of shape `(P,)`): Sum over tokens of ||r||^2 / ||x - mean of its batch||^2.
        unexplained (`Tensor` of shape `(P,)`): Sum over batches of sum_d var(r_d) / sum_d var(x_d).
        residual (`Tensor` of shape `(P, D)`): Sum of r: the part of the error that a bias could mend.
    """

    tokens: Tensor
    batches: Tensor
    x: Tensor
    x_square: Tensor
    norm_in: Tensor
    square_error: Tensor
    dot: Tensor
    square_out: Tensor
    norm_out: Tensor
    ratio: Tensor
    cosine: Tensor
    legacy: Tensor
    unexplained: Tensor
    residual: Tensor

    @classmethod
    def zeros(cls, prefixes: int, d_in: int) -> "ReconstructionSums":
        """Return sums over no tokens, for P prefixes and hidden states of width D."""
        shapes = dict.fromkeys((field.name for field in fields(cls)), (prefixes,))
        shapes |= {"tokens": (), "batches": (), "norm_in": (), "x": (d_in,), "x_square": (d_in,)}
        shapes["residual"] = (prefixes, d_in)
        return cls(**{name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()})

    @torch.no_grad()
    def add(self, x: Tensor, reconstructions: Tensor) -> None:
        """Add a batch.

        Args:
            x (`Tensor` of shape `(N, D)`): Hidden states.
            reconstructions (`Tensor` of shape `(P, N, D)`): Reconstructions by every prefix.

        Raises:
            `ValueError`: if shapes do not fit or a hidden state is not finite. Where a reconstruction is not finite,
                figures are NaN.
        """
        expected = (len(self.square_error), len(x), len(self.x))
        if x.ndim != 2 or tuple(reconstructions.shape) != expected:
            raise ValueError(
                f"Expected hidden states (N, {len(self.x)}) and reconstructions (P, N, D) = {expected}, got "
                f"{tuple(x.shape)} and {tuple(reconstructions.shape)}."
            )
        if not len(x):
            return
        x = x.float()
        rows = x.double()
        square = rows.square()
        norms, spread = square.sum(1).sqrt(), (rows - rows.mean(0)).square().sum(1)
        error = torch.empty(expected[:2], dtype=torch.float64, device=x.device)
        dot, square_out = torch.empty_like(error), torch.empty_like(error)
        residual = torch.zeros_like(self.residual, device=x.device)
        step = max(1, _PIECE.get(x.device.type, 2**26) // (expected[0] * expected[2]))
        for start in range(0, len(x), step):
            piece = slice(start, start + step)
            out = reconstructions[:, piece].float()
            r = x[piece] - out
            along = (r * x[piece]).sum(-1)
            error[:, piece] = r.norm(dim=-1).double().square()
            dot[:, piece] = square[piece].sum(1) - along
            square_out[:, piece] = dot[:, piece] - along + error[:, piece]
            # ||x^||^2 above is a difference of large numbers: where x^ is small, it is rounding noise, so sum it anew.
            prefix, token = (square_out[:, piece] < 0.01 * square[piece].sum(1)).nonzero(as_tuple=True)
            small = out[prefix, token].double()
            square_out[prefix, start + token] = small.square().sum(-1)
            dot[prefix, start + token] = (small * rows[start + token]).sum(-1)
            residual += r.sum(1)
        norm_out = square_out.sqrt()
        tiny = norms < _SMALL_NORM
        lengths = (norms * norm_out).clamp(min=torch.finfo(torch.float64).tiny)
        added = {
            "tokens": rows.new_tensor(len(x)),
            "batches": rows.new_tensor(1),
            "x": rows.sum(0),
            "x_square": square.sum(0),
            "norm_in": norms.sum(),
            "square_error": error.sum(1),
            "dot": dot.sum(1),
            "square_out": square_out.sum(1),
            "norm_out": norm_out.sum(1),
            "ratio": torch.where(tiny, 1.0, norm_out / norms.clamp(min=_SMALL_NORM)).sum(1),
            "cosine": (dot / lengths).sum(1),
            # A token at the batch's mean, such as the only one of a batch, counts as unexplained.
            "legacy": torch.where(spread > 0, error / spread, 1.0).sum(1),
            "unexplained": (error.sum(1) - residual.square().sum(1) / len(x)) / spread.sum(),
            "residual": residual,
        }
        if not added["x_square"].isfinite().all():
            raise ValueError("Hidden states are not finite (NaN or infinite). Try float32.")
        self.merge(added)

    def merge(self, other: "ReconstructionSums | Mapping[str, Any]") -> None:
        """Add sums over other tokens: another accumulator's, or a mapping such as [`to_dict`] gives."""
        values = other if isinstance(other, Mapping) else vars(other)
        for name, total in vars(self).items():
            value = torch.as_tensor(values[name], dtype=torch.float64).to(total.device)
            if value.shape != total.shape:
                raise ValueError(f"`{name}` must have shape {tuple(total.shape)}, got {tuple(value.shape)}.")
            total += value

    def reduce(self) -> "ReconstructionSums":
        """Return the sums of all processes."""
        reduce_sum(*vars(self).values())
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the sums as numbers and lists."""
        return {name: value.tolist() for name, value in vars(self).items()}

    @property
    def mean(self) -> Tensor:
        """Return the mean of x, `(D,)`."""
        return self.x / self.tokens

    @property
    def variance(self) -> float:
        """Return E||x - mean||^2."""
        # In float64: a difference of large numbers where the mean is large.
        return max(0.0, ((self.x_square - self.x.square() / self.tokens).sum() / self.tokens).item())

    def rows(self) -> list[dict[str, float]]:
        """Return every metric of every prefix.

        Raises:
            `ValueError`: if no token was added.
        """
        if not self.tokens:
            raise ValueError("There are no tokens to evaluate on: the hidden states are empty.")
        n, d_in = self.tokens.item(), len(self.x)
        square = self.x_square.sum().item() / n
        saebench = square - (self.x_square.mean().item() / n) ** 2
        metrics = {
            "fvu": self.square_error / n / (self.variance or math.nan),
            "explained_variance_saebench": 1 - self.square_error / n / saebench,
            "explained_variance_legacy": 1 - self.legacy / n,
            "explained_variance_dl": 1 - self.unexplained / self.batches,
            "mse": self.square_error / n / d_in,
            "cossim": self.cosine / n,
            "l2_norm_in": self.norm_in.expand_as(self.dot) / n,
            "l2_norm_out": self.norm_out / n,
            "l2_ratio": self.ratio / n,
            "relative_reconstruction_bias": self.square_out / self.dot,
            "mean_residual_fvu": self.residual.square().sum(1) / n**2 / (self.variance or math.nan),
        }
        metrics["explained_variance"] = 1 - metrics["fvu"]
        return [{name: value[p].item() for name, value in metrics.items()} for p in range(len(self.square_error))]
