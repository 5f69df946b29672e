"""Two open SAEs, or two prunings of one, side by side."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...models import SAEModel
from .opened import Opened, Pruning


_BLOCK = 2048
SIMILAR = 0.7
"""Decoder rows with a cosine above this are taken for the same feature, as in studies of dictionaries of two seeds."""


def compare(left: tuple[Opened, Pruning], right: tuple[Opened, Pruning], shown: int = 20) -> dict[str, Any]:
    """Figures of both, which latents both hold, and which are alike.

    Args:
        left (`tuple[Opened, Pruning]`): An open SAE and its pruning.
        right (`tuple[Opened, Pruning]`): Another one, or the same SAE with another pruning.
        shown (`int`, *optional*, defaults to 20): Pairs, and latents without one, in each list.

    Returns:
        `dict`: `figures` of each; `same_sae`; with one SAE `kept`, the numbers of latents in `both` and in one alone
        with the first of these; else `matches`: mutual nearest latents by the cosine of their decoder rows.

    Raises:
        `ValueError`: if they read hidden states of different widths.
    """
    check_comparable(left, right)
    (one, first), (other, second) = left, right
    saes = [one.pruned(first), other.pruned(second)]
    same = one is other
    comparison: dict[str, Any] = {
        "figures": [_figures(one, first), _figures(other, second)],
        "same_sae": same,
        "same_place": (one.hookpoint, one.sae.config.base_model) == (other.hookpoint, other.sae.config.base_model),
    }
    if same:
        comparison["kept"] = _kept(one, first, second, shown)
    else:
        comparison["matches"] = _matches(
            saes[0], saes[1], one.order(first.ranking), other.order(second.ranking), shown
        )
    return comparison


def check_comparable(left: tuple[Opened, Pruning], right: tuple[Opened, Pruning]) -> None:
    """Raise `ValueError` if they read hidden states of different widths."""
    one, other = (opened.sae.config.d_in for opened, _ in (left, right))
    if one != other:
        raise ValueError(
            f"The one reads hidden states of width {one}, the other of {other}; compare SAEs of the same place in the "
            "same model."
        )


def _figures(opened: Opened, pruning: Pruning) -> dict[str, Any]:
    return {"sae": opened.source, "place": opened.place, **opened.figures(pruning)}


def _kept(opened: Opened, first: Pruning, second: Pruning, shown: int) -> dict[str, Any]:
    """Latents by their numbers in the SAE as it was trained."""
    left, right = (opened.order(pruning.ranking)[: pruning.width].tolist() for pruning in (first, second))
    only_left, only_right = [n for n in left if n not in set(right)], [n for n in right if n not in set(left)]
    return {
        "both": len(left) - len(only_left),
        "only_left": only_left[:shown],
        "only_right": only_right[:shown],
        "count_left": len(only_left),
        "count_right": len(only_right),
    }


def _matches(left: SAEModel, right: SAEModel, numbers: Tensor, other_numbers: Tensor, shown: int) -> dict[str, Any]:
    """Mutual nearest neighbours among decoder rows; latents by their numbers as trained."""
    forward, there = _nearest(left.W_dec, right.W_dec)
    backward, back = _nearest(right.W_dec, left.W_dec)
    places = torch.arange(len(forward))
    mutual = back[there] == places
    order = forward.where(mutual, -1.0).argsort(descending=True, stable=True)
    order = order[mutual[order]]
    alone = (forward < SIMILAR).nonzero().flatten()
    return {
        "mean_cosine": float(forward.mean()),
        "share_left": float((forward >= SIMILAR).double().mean()),
        "share_right": float((backward >= SIMILAR).double().mean()),
        "mutual": int(mutual.sum()),
        "pairs": [
            [int(numbers[place]), int(other_numbers[there[place]]), float(forward[place])]
            for place in order[:shown].tolist()
        ],
        "alone": [int(numbers[place]) for place in alone[:shown].tolist()],
        "count_alone": len(alone),
    }


@torch.no_grad()
def _nearest(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine of each row with any of the others, and whose it is."""
    others = normalize(others.float(), dim=1)
    blocks = [(normalize(block.float(), dim=1) @ others.T).max(1) for block in rows.split(_BLOCK)]
    return torch.cat([best.values for best in blocks]).cpu(), torch.cat([best.indices for best in blocks]).cpu()
