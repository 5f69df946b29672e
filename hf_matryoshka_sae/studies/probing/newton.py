"""Logistic regressions on one latent each, for all latents and all tasks at once.

With c_n an example's weight (they add up to 1), y_n its label and u_i the latent's root mean square, each pair of a
latent i and a task has the probe p_n = sigmoid(w a_n,i + b) that minimises

    sum over n of c_n (softplus(w a_n,i + b) - y_n (w a_n,i + b)) + ridge / 2 (w u_i)^2

by Newton's method with step halving: two unknowns, so each step is a 2 x 2 system. A latent fires rarely, so its sums
run over the examples on which it fires; all others have the same probability sigmoid(b) and count by their weight. The
ridge keeps w finite where a latent separates the classes or does not vary; one over the number of examples is that of
scikit-learn's C = 1 on a latent of root mean square 1.

Shapes: N examples, F latents, T tasks, M activations.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, softplus

from .columns import LatentColumns


_ENTRIES_AT_ONCE = 2**18  # activations x tasks in one block: six buffers of 2 MB
_STEPS = 100
_TOLERANCE = 1e-14  # gain of a step, in nats, below which a probe has converged
_LEAST_CURVATURE = 1e-12


@dataclass
class Probes:
    """One probe for each latent and task, in the units of the latents.

    Args:
        weight (`Tensor` of shape `(F, T)`): Weights, float64.
        bias (`Tensor` of shape `(F, T)`): Biases, float64.
        loss (`Tensor` of shape `(F, T)`): Cross-entropy in nats on the fitted examples, without the ridge.
    """

    weight: Tensor
    bias: Tensor
    loss: Tensor


def class_weights(targets: Tensor, part: Tensor | None = None) -> Tensor:
    """Return each example's weight in each task's loss, `(N, T)` in float64: each class of a task weighs one half.

    So a probe that knows nothing has a loss of ln 2 = 0.693 on every task, however rare its positives are.

    Args:
        targets (`Tensor` of shape `(N, T)`): Labels, bool.
        part (`Tensor` of shape `(N,)`, *optional*): Examples that count, bool; by default all.

    Raises:
        `ValueError`: if a class has no example in this part.
    """
    part = torch.ones(len(targets), dtype=torch.bool) if part is None else part
    members = targets & part[:, None]
    count, positive = int(part.sum()), members.sum(0)
    if ((positive == 0) | (positive == count)).any():
        raise ValueError(
            f"Each task needs examples of both classes; of the {count} examples of a part, positive are "
            f"{positive.tolist()}. Give more examples, or leave such a task out."
        )
    negative = (count - positive).double()
    return torch.where(members, 0.5 / positive.double(), 0.5 / negative) * part[:, None]


def fit_probes(
    columns: LatentColumns,
    targets: Tensor,
    weights: Tensor,
    ridge: float,
    start: Probes | None = None,
    progress: Callable[[int], object] | None = None,
) -> Probes:
    """Fit a probe for each latent and each task.

    Args:
        columns ([`LatentColumns`]): Activations of F latents on N examples.
        targets (`Tensor` of shape `(N, T)`): Labels of the tasks, bool.
        weights (`Tensor` of shape `(N, T)`): Weights of the examples, as from [`class_weights`]. Leave out the
            activations of examples of weight 0 ([`LatentColumns.among`]): they change nothing but take time.
        ridge (`float`): Weight of the penalty, above 0.
        start ([`Probes`], *optional*): Probes to start from, for example those of other examples.
        progress (`Callable`, *optional*): Called with the number of latents of each finished block.

    Raises:
        `ValueError`: if shapes do not fit, or for a ridge that is not above 0.
    """
    expected = (columns.num_rows, targets.shape[-1])
    if targets.dtype != torch.bool or tuple(targets.shape) != expected or tuple(weights.shape) != expected:
        raise ValueError(
            f"Expected bool targets and weights of shape ({columns.num_rows}, T), got {targets.dtype} "
            f"{tuple(targets.shape)} and weights {tuple(weights.shape)}."
        )
    if not ridge > 0:
        raise ValueError(f"`ridge` must be above 0, so that every probe has an optimum; got {ridge}.")
    counted = max(1, int((weights > 0).any(1).sum()))
    scale = columns.values.new_zeros(columns.num_latents, dtype=torch.float64)
    scale.index_add_(0, columns.cols, columns.values.double().square())
    scale = (scale / counted).sqrt()
    scale[scale == 0] = 1
    columns = LatentColumns(
        columns.rows, columns.values.double() / scale[columns.cols], columns.offsets, columns.num_rows
    )
    positive = (weights * targets).sum(0)
    if start is None:
        weight = weights.new_zeros(columns.num_latents, targets.shape[1])
        bias = (positive / (weights.sum(0) - positive)).log().expand_as(weight).clone()
    else:
        weight, bias = start.weight * scale[:, None], start.bias.clone()
    loss = torch.empty_like(weight)
    for some in _blocks(columns, targets.shape[1]):
        objective = _Objective.of(columns.select(some), targets, weights, ridge)
        solution = _newton(objective, weight[some], bias[some])
        weight[some], bias[some], loss[some] = solution
        if progress is not None:
            progress(len(some))
    return Probes(weight / scale[:, None], bias, loss - ridge / 2 * weight.square())


def cross_entropy(scores: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted cross-entropy `(T,)` in nats of log-odds `(N, T)`, one for each task."""
    return (weights * (softplus(scores) - scores * targets)).sum(0)


def _blocks(columns: LatentColumns, tasks: int) -> list[Tensor]:
    """Split the latents into groups of a bounded number of activations, or of one latent that fires often."""
    most = max(1, 4 * _ENTRIES_AT_ONCE // max(1, tasks))
    group = (columns.offsets[:-1] + torch.arange(columns.num_latents)) // most
    return list(torch.arange(columns.num_latents).split(group.unique_consecutive(return_counts=True)[1].tolist()))


@dataclass
class _Objective:
    """Value, gradient and curvature of the probes of some latents, at points of all their tasks.

    Args:
        columns ([`LatentColumns`]): Activations of F latents.
        weights (`Tensor` of shape `(N, T)`): Weights of the examples.
        ridge (`float`): Weight of the penalty.
        positive (`Tensor` of shape `(T,)`): Weight of the positive examples.
        along (`Tensor` of shape `(F, T)`): Sum of c y a.
        silent (`Tensor` of shape `(F, T)`): Weight of the examples on which a latent does not fire.
    """

    columns: LatentColumns
    weights: Tensor
    ridge: float
    positive: Tensor
    along: Tensor
    silent: Tensor

    @classmethod
    def of(cls, columns: LatentColumns, targets: Tensor, weights: Tensor, ridge: float) -> "_Objective":
        positive = weights * targets
        firing = replace(columns, values=torch.ones_like(columns.values)).sums(weights)
        silent = (weights.sum(0) - firing).clamp(min=0)
        return cls(columns, weights, ridge, positive.sum(0), columns.sums(positive), silent)

    def select(self, latents: Tensor) -> "_Objective":
        """Return the objective of some of the latents."""
        return replace(
            self, columns=self.columns.select(latents), along=self.along[latents], silent=self.silent[latents]
        )

    def at(self, w: Tensor, b: Tensor) -> Tensor:
        """Return value, gradient by w and b, and second derivatives by ww, wb and bb: `(6, F, T)`."""
        p = b.sigmoid()
        out = torch.zeros(6, *w.shape, dtype=torch.float64)
        out[0] = self.silent * softplus(b) - w * self.along - b * self.positive + self.ridge / 2 * w.square()
        out[1] = self.ridge * w - self.along
        out[2] = self.silent * p - self.positive
        out[3] = self.ridge
        out[5] = self.silent * p * (1 - p) + _LEAST_CURVATURE
        self._add_firing(out, w, b)
        return out

    def _add_firing(self, out: Tensor, w: Tensor, b: Tensor) -> None:
        columns, tasks = self.columns, w.shape[1]
        cols, size = columns.cols, max(1, _ENTRIES_AT_ONCE // tasks)
        buffers = [w.new_empty(min(size, len(cols)), tasks) for _ in range(5)]
        for begin in range(0, len(cols), size):
            of_block = slice(begin, begin + size)
            a, latent, row = columns.values[of_block], cols[of_block], columns.rows[of_block]
            m, p, c, q, larger = (buffer[: len(a)] for buffer in buffers)
            torch.index_select(w, 0, latent, out=m).mul_(a[:, None])
            m.add_(torch.index_select(b, 0, latent, out=q))
            torch.index_select(self.weights, 0, row, out=c)
            torch.sigmoid(m, out=p)
            torch.sub(1, p, out=q)
            # softplus(m) = max(m, 0) - log(max(p, 1 - p)), exact where either probability has been rounded to 0
            torch.maximum(p, q, out=larger).log_()
            value = m.clamp_(min=0).sub_(larger).mul_(c)
            slope = p.mul_(c)
            curvature = q.mul_(slope)
            first, last = int(latent[0]), int(latent[-1]) + 1
            bounds = (columns.offsets[first : last + 1] - begin).clamp(0, len(a))
            places = torch.arange(len(a))
            for number, (of, by) in enumerate(
                ((value, None), (slope, a), (slope, None), (curvature, a * a), (curvature, a), (curvature, None))
            ):
                by = torch.ones_like(a) if by is None else by
                out[number, first:last] += embedding_bag(
                    places, of, bounds, mode="sum", per_sample_weights=by, include_last_offset=True
                )


def _newton(objective: _Objective, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run Newton's method with step halving from a point `(F, T)`; return w, b and value of the optimum."""
    best = torch.stack([w, b])
    now = objective.at(w, b)
    optimum, value = best.clone(), now[0].clone()
    active = torch.arange(len(w))
    share = torch.ones_like(w)
    for _ in range(_STEPS):
        _, by_w, by_b, ww, wb, bb = now
        determinant = (ww * bb - wb.square()).clamp(min=1e-300)
        step = torch.stack([wb * by_b - bb * by_w, wb * by_w - ww * by_b]) / determinant
        gain = -(step[0] * by_w + step[1] * by_b)
        unfinished = (gain > _TOLERANCE).any(1)
        optimum[:, active], value[active] = best, now[0]
        if not unfinished.any():
            break
        if not unfinished.all():
            active, objective = active[unfinished], objective.select(unfinished.nonzero()[:, 0])
            best, now, step = best[:, unfinished], now[:, unfinished], step[:, unfinished]
            gain, share = gain[unfinished], share[unfinished]
        trial = best + share * step
        there = objective.at(*trial)
        # Up to rounding, a step must gain a share of what its slope predicts.
        good = there[0] <= now[0] - 1e-4 * share * gain + 1e-15
        best, now = torch.where(good, trial, best), torch.where(good, there, now)
        share = torch.where(good, 1.0, share / 2)
    return optimum[0], optimum[1], value
