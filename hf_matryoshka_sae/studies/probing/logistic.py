"""Linear probes: logistic regression on hidden states, and on the few most predictive latents.

All of them are one-versus-rest over C classes with balanced class weights, in float64, solved to convergence from
zero, so that the same data give the same probe. With y in {0, 1}, class c's loss is

    sum over words of weight(y) * log(1 + exp(-+(w . x + b))) + l2 / 2 |w|^2,     weight(y) = N / (2 * count of y)

on inputs that are centred and divided by one number, so that their coordinates have variance 1 on average: neither
the units nor a rotation of the hidden states matter.

Shapes: N words, D inputs, C classes, F latents.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from ...common.logs import check_time
from ...features.firings import values_of
from ...models.sparse_ops import LatentPairs, PairIndex, gather_sum


_ITERATIONS = 1000
_BOUND_ITERATIONS = 20


@dataclass
class LogisticProbe:
    """One-versus-rest logistic regression, in the units of its input.

    Args:
        weight (`Tensor` of shape `(C, D)`): Weights, float64.
        bias (`Tensor` of shape `(C,)`): Biases, float64.
    """

    weight: Tensor
    bias: Tensor

    def scores(self, x: Tensor) -> Tensor:
        """Return the log-odds of each class, `(N, C)`; a class is predicted where they are positive."""
        return x.to(self.weight) @ self.weight.T + self.bias


def fit_logistic(x: Tensor, targets: Tensor, l2: float = 1.0, own_units: bool = False) -> LogisticProbe:
    """Fit a probe with SciPy's L-BFGS; the same optimum as scikit-learn's with `class_weight="balanced"`, `C=1 / l2`.

    Args:
        x (`Tensor` of shape `(N, D)`): Inputs.
        targets (`Tensor` of shape `(N, C)`): Classes of each input, bool.
        l2 (`float`, *optional*, defaults to 1.0): Weight of the squared length of w, on inputs of variance 1.
        own_units (`bool`, *optional*, defaults to `False`): Whether the penalty is on inputs in their own units.

    Raises:
        `ValueError`: if shapes do not fit, an input is not finite, or a class has no member or no other.
    """
    weights = _balanced_weights(x, targets).cpu()
    if not x.isfinite().all():
        raise ValueError("A probe's inputs must be finite; some are not.")
    z = x.double().cpu()
    mean = z.mean(0)
    variance = (z - mean).square().mean(0)
    unit = torch.ones(()) if own_units else variance.mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    # Each input is divided by the root of its curvature at zero, the penalty's included, so that few steps suffice.
    penalty = l2 / len(z) * unit.double().square()
    scale = (variance + 4 * penalty).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    z, penalty = (z - mean) / scale, penalty / scale.square()
    classes = zip(targets.cpu().double().T, weights.T, strict=True)
    with _one_thread():
        solutions = []
        for y, c in classes:
            check_time()
            solutions.append(_minimum(z, y, c / len(z), penalty))
    weight = torch.stack([solution[:-1] for solution in solutions]) / scale
    bias = torch.stack([solution[-1] for solution in solutions]) - weight @ mean
    return LogisticProbe(weight.to(x.device), bias.to(x.device))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run the block on one thread: threads that wait for each other at every step slow small fits down manyfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _minimum(z: Tensor, y: Tensor, weights: Tensor, penalty: Tensor) -> Tensor:
    """Return weights and, last, bias `(D + 1,)` of least loss for one class."""

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = torch.from_numpy(point[:-1]), point[-1]
        margin = z @ w + b
        # Not softplus, which returns its input where that is large: the value must agree with its slope.
        value = -(weights * (F.logsigmoid(-margin) + y * margin)).sum() + (penalty * w.square()).sum() / 2
        slope = weights * (margin.sigmoid() - y)
        return value.item(), torch.cat([slope @ z + penalty * w, slope.sum()[None]]).numpy()

    options = {"maxiter": _ITERATIONS, "maxcor": 20, "ftol": 1e-15, "gtol": 1e-9}
    result = minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(result.x)


def f1_scores(predicted: Tensor, targets: Tensor) -> Tensor:
    """Return the F1 of each class, `(C,)`, from bool tensors `(N, C)`; 0 for a class neither predicted nor present."""
    hits = (predicted & targets).sum(0).double()
    return 2 * hits / (predicted.sum(0) + targets.sum(0)).clamp(min=1)


def rank_latents(latents: LatentPairs, targets: Tensor, k: int = 10, l1: float = 0.005) -> list[Tensor]:
    """Rank the latents that distinguish a class from the rest, by the weights of an L1-penalised probe.

    Each latent is divided by its root mean square, so that the ranking does not depend on units: a latent ranks high
    if it fires for much of the class and for little else. The loss is the mean over words, with `l1` times the
    sum of |w|, solved by FISTA (Beck & Teboulle 2009) over the pairs that fire. SAEBench's 0.01 is relative to class
    weights twice as large as these.

    Args:
        latents ([`LatentPairs`]): Latents of N words, on the CPU.
        targets (`Tensor` of shape `(N, C)`): Class of each word, bool.
        k (`int`, *optional*, defaults to 10): Largest number of latents.
        l1 (`float`, *optional*, defaults to 0.005): Weight of the penalty.

    Returns:
        `list[Tensor]`: For each class up to `k` latents, largest weight first. Only latents of positive weight are
        listed, so there may be none.
    """
    importance = _balanced_weights(latents, targets) / len(targets)
    matrix = _PairMatrix(latents)
    y = targets.double()
    step = 1 / _curvature(matrix, importance)
    weight = ahead = y.new_zeros(matrix.num_columns, y.shape[1])
    momentum = 1.0
    for _ in range(_ITERATIONS):
        gradient = matrix.transposed_product(importance * (matrix.product(ahead).sigmoid() - y))
        new = ahead - step * gradient
        # The last row is the bias, which is not penalised.
        new[:-1] = new[:-1].sign() * (new[:-1].abs() - l1 * step).clamp(min=0)
        change = new - weight
        if change.abs().max() <= 1e-6 * new.abs().max():
            break
        # Momentum that points uphill is reset (O'Donoghue & Candes 2015).
        momentum = 1.0 if ((ahead - new) * change).sum() > 0 else momentum
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead, weight, momentum = new + (momentum - 1) / following * change, new, following
    top, rows = new[:-1].topk(min(k, matrix.num_columns - 1), dim=0)
    return [matrix.latents[row[value > 0]] for value, row in zip(top.T, rows.T, strict=True)]


def main_latents(
    ranked: Tensor,
    train: LatentPairs,
    train_target: Tensor,
    heldout: LatentPairs,
    heldout_target: Tensor,
    min_gain: float = 0.03,
) -> tuple[Tensor, list[float]]:
    """Return the latents among which one class is split: the first k, as long as each raises a k-sparse probe's F1.

    Args:
        ranked (`Tensor`): Latents, the most predictive first; see [`rank_latents`].
        train ([`LatentPairs`]): Latents of the N words that k-sparse probes are fitted to.
        train_target (`Tensor` of shape `(N,)`): Whether each of these words is in the class, bool.
        heldout ([`LatentPairs`]): Latents of the M words on which F1 is measured.
        heldout_target (`Tensor` of shape `(M,)`): Whether each of these words is in the class, bool.
        min_gain (`float`, *optional*, defaults to 0.03): Gain in F1 above which a further latent is added.

    Returns:
        `tuple[Tensor, list[float]]`: The latents, and the F1 of the probes that were fitted, for k = 1, 2, ...
    """
    inputs, heldout_inputs = values_of(train, ranked), values_of(heldout, ranked)
    curve: list[float] = []
    for k in range(1, len(ranked) + 1):
        probe = fit_logistic(inputs[:, :k], train_target[:, None])
        f1 = f1_scores(probe.scores(heldout_inputs[:, :k]) > 0, heldout_target[:, None]).item()
        curve.append(f1)
        if k > 1 and f1 <= curve[-2] + min_gain:
            return ranked[: k - 1], curve
    return ranked, curve


def _balanced_weights(x: Tensor | LatentPairs, targets: Tensor) -> Tensor:
    """Check the targets of a probe; return the weight of each word in each class's loss, `(N, C)`."""
    rows = x.num_rows if isinstance(x, LatentPairs) else len(x)
    if targets.dtype != torch.bool or targets.ndim != 2 or len(targets) != rows:
        raise ValueError(
            f"A probe's targets must be bool and of shape ({rows}, C), got {targets.dtype} {list(targets.shape)}."
        )
    members = targets.sum(0)
    if ((members == 0) | (members == rows)).any():
        raise ValueError(
            f"Each class of a probe needs members and others among the {rows} inputs; members are {members.tolist()}."
        )
    return torch.where(targets, rows / (2 * members.double()), rows / (2 * (rows - members).double()))


class _PairMatrix:
    """The latents that fire, each divided by its root mean square, and a column of ones, as a sparse matrix."""

    def __init__(self, latents: LatentPairs) -> None:
        latents = latents.keep(latents.values != 0)
        self.latents, columns = latents.cols.unique(return_inverse=True)
        self.num_columns = len(self.latents) + 1
        values = latents.values.double()
        squares = values.new_zeros(len(self.latents)).index_add_(0, columns, values.square())
        self.values = values / (squares / latents.num_rows).sqrt()[columns]
        self.index = PairIndex(latents.rows, columns, latents.num_rows, len(self.latents))

    def product(self, weight: Tensor) -> Tensor:
        """Return the product `(N, C)` with weights `(columns, C)`."""
        return gather_sum(self.values, weight[:-1], self.index.cols, self.index.by_token) + weight[-1]

    def transposed_product(self, residual: Tensor) -> Tensor:
        """Return the product `(columns, C)` of the transposed matrix with `(N, C)`."""
        order, offsets = self.index.by_latent
        of_latents = gather_sum(self.values[order], residual, self.index.rows[order], offsets)
        return torch.cat([of_latents, residual.sum(0, keepdim=True)])


def _curvature(matrix: _PairMatrix, importance: Tensor) -> Tensor:
    """Return an upper bound of each class's largest second derivative, `(C,)`.

    For a matrix A >= 0 and a vector v > 0 no eigenvalue exceeds max (A v)_i / v_i (Collatz-Wielandt), and power
    iteration brings that bound down.
    """
    v = importance.new_ones(matrix.num_columns, importance.shape[1])
    bound = v.new_full((v.shape[1],), torch.inf)
    for _ in range(_BOUND_ITERATIONS):
        image = matrix.transposed_product(importance * matrix.product(v))
        bound = torch.minimum(bound, (image / v).amax(0))
        v = (image / image.amax(0)).clamp(min=1e-6)
    return bound / 4
