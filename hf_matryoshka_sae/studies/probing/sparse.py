"""k-sparse probes, which read k latents, and probes of all channels.

The k latents whose means differ most between the classes, |mean of positives - mean of negatives|, are chosen on the
train part, and a logistic regression (C = 1) is fitted to them there, each class weighing one half; it is
scored on the test part. This is SAEBench's sparse probing (Karvonen et al. 2025, arXiv 2503.09532; Gurnee et al.
2023, arXiv 2305.01610), with weights in place of equally many examples. The ceiling, a probe of the whole hidden
state, must not suffer from a poor choice of ridge: its C is chosen on a part of the train examples.

Shapes: N examples, D width of hidden states, F latents, T tasks, P widths, K values of k.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.distributed import processes, reduce_sum
from .columns import LatentColumns, own_latents
from .logistic import fit_logistic
from .newton import class_weights, cross_entropy


SCORES = ("accuracy", "f1", "auc")
_RIDGES = (1.0, 0.1, 0.01, 0.001)  # C, on channels of variance 1 on average


def sparse_probes(
    columns: LatentColumns,
    targets: Tensor,
    test: Tensor,
    widths: Sequence[int],
    ks: Sequence[int],
) -> Tensor:
    """Return accuracy, F1 and AUC of k-sparse probes among the first latents of each width.

    Args:
        columns ([`LatentColumns`]): Activations; each process brings its own latents.
        targets (`Tensor` of shape `(N, T)`): Labels, bool.
        test (`Tensor` of shape `(N,)`): Examples of the test part, bool.
        widths (`Sequence[int]`): The P widths.
        ks (`Sequence[int]`): The K numbers of latents.

    Returns:
        `Tensor` of shape `(P, K, T, 3)`: The [`SCORES`]; in the first two each class weighs one half.
    """
    chosen = _chosen(columns, targets, ~test, widths, max(ks))
    latents, places = chosen.unique(return_inverse=True)
    x = shown_latents(columns, latents)
    rank, world = processes()
    scores = torch.zeros(len(widths), len(ks), targets.shape[1], len(SCORES), dtype=torch.float64)
    for task in range(rank, targets.shape[1], world):
        known: dict[tuple[int, ...], Tensor] = {}  # the same latents may be chosen at several widths
        for p in range(len(widths)):
            for number, k in enumerate(ks):
                some = tuple(places[p, : min(k, widths[p]), task].sort().values.tolist())
                if some not in known:
                    known[some] = _score(x[:, list(some)], targets[:, task], test)
                scores[p, number, task] = known[some]
    return reduce_sum(scores)[0]


def _chosen(columns: LatentColumns, targets: Tensor, train: Tensor, widths: Sequence[int], k: int) -> Tensor:
    """Return the k latents whose means differ most, `(P, k, T)`, largest difference first; -1 past a width below k."""
    weights = class_weights(targets, train)
    difference = columns.sums(torch.where(targets, weights, -weights)).abs()
    reduce_sum(difference)
    chosen = torch.full((len(widths), k, targets.shape[1]), -1)
    for p, width in enumerate(widths):
        # The sort is stable, so that of equal latents the first win, whatever the width.
        order = difference[:width].sort(dim=0, descending=True, stable=True).indices[:k]
        chosen[p, : len(order)] = order
    return chosen


def shown_latents(columns: LatentColumns, latents: Tensor) -> Tensor:
    """Return the activations of some latents `(N, len(latents))` in all processes; those of latent -1 are 0."""
    x = columns.values.new_zeros(columns.num_rows, len(latents))
    mine = torch.isin(latents, own_latents(columns.num_latents))
    x[:, mine] = columns.dense(latents[mine])
    return reduce_sum(x)[0]


def _score(x: Tensor, target: Tensor, test: Tensor) -> Tensor:
    probe = fit_logistic(x[~test], target[~test, None], own_units=True)
    return classifier_scores(probe.scores(x[test])[:, 0], target[test])


def dense_probes(hidden: Tensor, targets: Tensor, test: Tensor, validation: Tensor) -> Tensor:
    """Return the log-odds `(N, T)` of logistic regressions on all channels.

    Each task's C is that of the least loss on the validation part when fitted to the other train examples; the probe
    is then fitted to all of them. Tasks without both classes in the validation part have C = 1.

    Args:
        hidden (`Tensor` of shape `(N, D)`): Hidden states.
        targets (`Tensor` of shape `(N, T)`): Labels, bool.
        test (`Tensor` of shape `(N,)`): Examples of the test part, bool.
        validation (`Tensor` of shape `(N,)`): Examples of the validation part, bool; none of them is a test example.
    """
    rank, world = processes()
    x = hidden.double()
    mean = x[~test].mean(0)
    x = (x - mean) / (x[~test] - mean).square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    scores = torch.zeros(targets.shape, dtype=torch.float64)
    rest = ~test & ~validation
    for task in range(rank, targets.shape[1], world):
        target = targets[:, task]

        def fitted(strength: float, part: Tensor, target: Tensor = target) -> Tensor:
            return fit_logistic(x[part], target[part, None], 1 / strength, own_units=True).scores(x)[:, 0]

        best = _RIDGES[0]
        if all(0 < target[part].sum() < part.sum() for part in (rest, validation)):
            weights = class_weights(target[:, None], validation)
            losses = [cross_entropy(fitted(c, rest)[:, None], target[:, None], weights).item() for c in _RIDGES]
            best = _RIDGES[losses.index(min(losses))]
        scores[:, task] = fitted(best, ~test)
    return reduce_sum(scores)[0]


def classifier_scores(log_odds: Tensor, target: Tensor) -> Tensor:
    """Return the [`SCORES`] of log-odds `(n,)`: balanced accuracy, F1 with balanced classes, area under the ROC."""
    predicted, positives, negatives = log_odds > 0, target.sum(), (~target).sum()
    hits, false_alarms = (predicted & target).sum() / positives, (predicted & ~target).sum() / negatives
    accuracy = (hits + 1 - false_alarms) / 2
    f1 = 2 * hits / (1 + hits + false_alarms)
    # A rank sum; equal log-odds share the mean of their ranks.
    _, place, counts = log_odds.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place].double()
    auc = (ranks[target].sum() - positives * (positives + 1) / 2) / (positives * negatives)
    return torch.stack([accuracy.double(), f1.double(), auc.double()])
