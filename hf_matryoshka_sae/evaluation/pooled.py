"""What becomes of whole texts when reconstructions take the place of hidden states, for models without a loss.

An encoder is used for the embedding of a text: the mean of its last hidden states. With e the embedding of a window
and e^ that of the same window with hidden states at the hookpoint replaced at all kept tokens:

    pooled_cosine   mean over windows of cos(e, e^)
    neighbours      share of the k nearest windows by cosine, among all others, that stay: k is 10, or a fifth of the
                    windows where they are few

Embeddings of most encoders lie close together, so that a cosine near 1 says little: beside it stand those where hidden
states are replaced by their mean. Neighbours are the stricter figure; by chance k of all windows stay.

Shapes: W windows, D `d_in`, H width of the last hidden states.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations import TokenBatch
from ..activations.hookpoints import hooked, run_model
from ..activations.splice import Splice
from ..common.distributed import gathered
from .data import HeldOut
from .subjects import Subject


NEIGHBOURS = 10
_LEAST_WINDOWS = 10


@torch.no_grad()
def pooled_metrics(
    data: HeldOut, mean: Tensor, subjects: Sequence[Subject]
) -> tuple[dict[str, Any], list[list[dict[str, float | None]]]]:
    """Return similarity and neighbours of pooled embeddings after splicing, for each subject and width.

    Args:
        data ([`HeldOut`]): An encoder and tokens; every process runs its share of the batches.
        mean (`Tensor` of shape `(D,)`): Mean of the hidden states.
        subjects (`Sequence[Subject]`): What reconstructs.

    Returns:
        Facts of the text (`windows`, `pooled_cosine` and `neighbours` where hidden states are replaced by their mean),
        and rows with `pooled_cosine` and `neighbours`; `None` where there are fewer than ten windows.
    """
    clean: list[Tensor] = []
    flat: list[Tensor] = []
    spliced: list[list[list[Tensor]]] = [[[] for _ in subject.widths] for subject in subjects]
    for batch in data.share():
        batch, states = data.finite(batch)
        if not len(states):
            continue
        clean.append(_embeddings(data, batch, None))
        flat.append(_embeddings(data, batch, lambda x: mean.to(x).expand_as(x)))
        for subject, parts in zip(subjects, spliced, strict=True):
            for part, output in zip(parts, subject.reconstruct(states), strict=True):
                part.append(_embeddings(data, batch, lambda x, output=output: output.to(x)))
    everything = gathered([(clean, flat, spliced)])
    whole = _joined([each[0] for each in everything])
    if whole is None or len(whole) < _LEAST_WINDOWS:
        none = {"pooled_cosine": None, "neighbours": None}
        return {"windows": 0 if whole is None else len(whole), **none}, [
            [none] * len(each.widths) for each in subjects
        ]
    base = _row(whole, _joined([each[1] for each in everything]))
    rows = [
        [_row(whole, _joined([each[2][s][w] for each in everything])) for w in range(len(subject.widths))]
        for s, subject in enumerate(subjects)
    ]
    return {"windows": len(whole), **base}, rows


def _joined(parts: Sequence[Sequence[Tensor]]) -> Tensor | None:
    """Return the embeddings of all processes' batches, in the same order for each replacement."""
    batches = [batch for part in parts for batch in part]
    return torch.cat(batches) if batches else None


def _embeddings(data: HeldOut, batch: TokenBatch, replace: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return the pooled embedding of each window, of length 1, `(W, H)` in float64 on the CPU."""
    hooks = [] if replace is None else [(data.hookpoint, Splice(batch.keep, replace))]
    with hooked(data.model, hooks):
        output = run_model(data.model, batch.input_ids, batch.attention_mask if batch.padded else None)
    weights = batch.attention_mask.to(output.last_hidden_state)[..., None]
    pooled = (output.last_hidden_state * weights).sum(1) / weights.sum(1)
    return F.normalize(pooled.double(), dim=1).cpu()


def _row(clean: Tensor, other: Tensor) -> dict[str, float]:
    """Return both figures of embeddings `(W, H)` against the clean ones."""
    near, now = (_nearest(each) for each in (clean, other))
    kept = (near[:, :, None] == now[:, None, :]).any(2).double().mean()
    return {"pooled_cosine": (clean * other).sum(1).mean().item(), "neighbours": kept.item()}


def _nearest(embeddings: Tensor) -> Tensor:
    """Return the nearest others of each of W embeddings, `(W, k)`."""
    cosines = embeddings @ embeddings.T
    cosines.fill_diagonal_(-torch.inf)
    return cosines.topk(min(NEIGHBOURS, len(embeddings) // 5), dim=1).indices
