"""Sums over tokens from which each latent's parent is derived; `tree` has the formula.

Shapes: F latents of all levels, E pairs of latents that fire together.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...common.distributed import processes
from ...evaluation.firing import FiringSums
from ...models import SAEModel
from ...models.sparse_ops import LatentPairs, PairIndex


logger = logging.getLogger(__name__)

MAX_EDGES = 2**26
"""Largest number of pairs of latents of two levels that fire together; more would take over 2 GiB."""

THRESHOLD = 0.6
LEAST, MOST = 0.2, 8
"""Least score of a candidate that is kept, and how many candidates a latent keeps."""

_PRODUCTS_AT_ONCE = 2**22  # co-firing pairs that are listed at a time, or kept before they are added up


class EdgeSums:
    """Sums over tokens from which each latent's parent is derived.

    Only latents that fire together take memory: 24 bytes for each such pair of two levels, whatever the size of the
    dictionaries.

    Args:
        sae ([`SAEModel`]): SAE whose levels are the groups between its prefix widths; with `other` it is one level.
        other ([`SAEModel`] or `list[SAEModel]`, *optional*): Further SAEs, each of which is one level.
        max_edges (`int`, *optional*, defaults to `MAX_EDGES`): Largest number of such pairs that are kept. Where more
            fire together, those with the lowest scores so far are dropped and a warning says so. A pair that
            comes again counts from there on, so that its score is as a rule too low.

    Raises:
        `ValueError`: if there is one level only.
    """

    def __init__(
        self, sae: SAEModel, other: SAEModel | Sequence[SAEModel] | None = None, max_edges: int = MAX_EDGES
    ) -> None:
        others = [] if other is None else [other] if isinstance(other, SAEModel) else list(other)
        saes = [sae, *others]
        sizes = [one.config.num_latents for one in saes]
        levels = sizes if others else torch.tensor([0, *sae.prefix_widths]).diff().tolist()
        if len(levels) < 2:
            raise ValueError(
                "A tree needs two levels: an SAE with several prefix widths, or a second SAE as `other`. This one has "
                f"the widths {sae.prefix_widths}."
            )
        self.max_edges = max_edges
        self.starts = torch.tensor([0, *sizes[:-1]]).cumsum(0).tolist()  # of each SAE's latents among all
        self.total = sum(sizes)
        self.level = torch.arange(len(levels)).repeat_interleave(torch.tensor(levels))
        self.firing, self.maximum = FiringSums(self.total), torch.zeros(self.total, dtype=torch.float64)
        self._edges: list[tuple[Tensor, Tensor]] = []  # keys parent * total + child, and (product, parent's square)
        self._kept = self._merged = 0
        self.limited = False

    def add(self, *pairs: LatentPairs) -> None:
        """Add the latents of some tokens: one list of pairs for each SAE, over the same tokens.

        Raises:
            `ValueError`: if the lists do not belong to these SAEs.
        """
        if len(pairs) != len(self.starts) or len({one.num_rows for one in pairs}) != 1:
            raise ValueError(f"Expected the latents of {len(self.starts)} SAEs on the same tokens.")
        rows = torch.cat([one.rows for one in pairs]).cpu()
        cols = torch.cat([one.cols + start for one, start in zip(pairs, self.starts, strict=True)]).cpu()
        values = torch.cat([one.values for one in pairs]).double().cpu()
        fires = values > 0  # a value below 0 is no firing, and has no place in a cosine of firings
        rows, cols, values = rows[fires], cols[fires], values[fires]
        self.firing.add(LatentPairs(PairIndex(rows, cols, pairs[0].num_rows, self.total), values))
        self.maximum.scatter_reduce_(0, cols, values, "amax")
        levels = self.level[cols]
        for level in range(1, int(self.level[-1]) + 1):
            above, below = levels < level, levels == level
            self._add_level(
                (rows[above], cols[above], values[above]), (rows[below], cols[below], values[below]), pairs[0].num_rows
            )

    def _add_level(self, above: tuple[Tensor, ...], below: tuple[Tensor, ...], num_rows: int) -> None:
        """Add all pairs of a latent above and one below that fire on the same token; both are sorted by token."""
        offsets = torch.searchsorted(below[0], torch.arange(num_rows + 1))
        counts = offsets.diff()[above[0]]  # partners of each latent above
        ends = counts.cumsum(0)
        start = 0
        while start < len(counts):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(torch.searchsorted(ends, torch.tensor(before + _PRODUCTS_AT_ONCE), right=True)))
            left = torch.arange(start, stop).repeat_interleave(counts[start:stop])
            right = offsets[above[0][left]] + torch.arange(len(left)) - (ends - counts)[left] + before
            a, b = above[2][left], below[2][right]
            self._keep(above[1][left] * self.total + below[1][right], torch.stack([a * b, a.square()], 1))
            start = stop

    def _keep(self, keys: Tensor, sums: Tensor) -> None:
        self._edges.append((keys, sums))
        self._kept += len(keys)
        # Merging when the list has doubled since the last time costs no more than listing the pairs did.
        if self._kept > max(_PRODUCTS_AT_ONCE, 2 * self._merged):
            self._merge()

    def _merge(self) -> None:
        """Add up the entries of each edge."""
        if not self._edges:
            return
        keys, inverse = torch.cat([keys for keys, _ in self._edges]).unique(return_inverse=True)
        sums = torch.zeros(len(keys), 2, dtype=torch.float64)
        sums.index_add_(0, inverse, torch.cat([sums for _, sums in self._edges]))
        if len(keys) > self.max_edges:
            keys, sums = self._strongest(keys, sums)
        self._edges = [(keys, sums)]
        self._kept = self._merged = len(keys)

    def _strongest(self, keys: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return the half of `max_edges` with the largest cosines so far; a pair that is dropped begins again at 0."""
        if not self.limited:
            logger.warning(
                "More than %s pairs of latents of two levels fire together, the limit set by `max_edges`. Those with "
                "the lowest scores so far are dropped: scores of parents may come out too low.",
                f"{self.max_edges:,}",
            )
        self.limited = True
        cosine = sums[:, 0] / (sums[:, 1] * self.firing.moments[1, keys % self.total]).sqrt()
        kept = cosine.topk(max(1, self.max_edges // 2)).indices.sort().values
        return keys[kept], sums[kept]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums as tensors by name."""
        self._merge()
        empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.float64)
        keys, sums = self._edges[0] if self._edges else empty
        return {**self._counted(), "keys": keys, "sums": sums}

    def _counted(self) -> dict[str, Tensor]:
        firing = self.firing
        counts = {"square": firing.moments[1], "fires": firing.fired, "tokens": firing.tokens}
        return {"maximum": self.maximum, **counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from the sums of [`state_dict`]."""
        for name, tensor in self._counted().items():
            tensor.copy_(state[name].view_as(tensor))
        self._edges = [(state["keys"], state["sums"])]
        self._kept = self._merged = len(state["keys"])

    def reduce(self) -> None:
        """Add up over processes."""
        self._merge()
        self.firing.reduce()
        _, world = processes()
        if world > 1:
            gathered: list[Any] = [None] * world
            dist.all_gather_object(gathered, (self.maximum, self._edges))
            self.maximum = torch.stack([maximum for maximum, _ in gathered]).amax(0)
            self._edges = [edge for _, edges in gathered for edge in edges]
            self._merge()

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return parent `(E,)`, child `(E,)` and score `(E,)` of every pair of latents that fire together."""
        self._merge()
        if not self._edges:
            empty = torch.zeros(0, dtype=torch.int64)
            return empty, empty, torch.zeros(0, dtype=torch.float64)
        ((keys, sums),) = self._edges
        parent, child = keys // self.total, keys % self.total
        cosine = sums[:, 0] / (sums[:, 1] * self.firing.moments[1, child]).sqrt()
        return parent, child, cosine * (self.maximum[child] / self.maximum[parent]).clamp(max=1)

    def candidates(self, least: float = LEAST, most: int = MOST) -> tuple[Tensor, Tensor, Tensor]:
        """Return the candidates for the parent of each latent, best first; of equal scores the lowest latent first.

        Args:
            least (`float`, *optional*, defaults to 0.2): Least score.
            most (`int`, *optional*, defaults to 8): Largest number of candidates of a latent.

        Returns:
            `tuple[Tensor, Tensor, Tensor]`: child, parent and score of the C candidates, `(C,)` each, by child.
        """
        parent, child, score = self.scores()
        inside = score >= least
        parent, child, score = parent[inside], child[inside], score[inside]
        order = score.argsort(descending=True, stable=True)  # edges are sorted by parent
        order = order[child[order].argsort(stable=True)]
        parent, child, score = parent[order], child[order], score[order]
        counts = torch.bincount(child, minlength=self.total)
        rank = torch.arange(len(child)) - (counts.cumsum(0) - counts)[child]
        inside = rank < most
        return child[inside], parent[inside], score[inside]

    def best(self) -> tuple[Tensor, Tensor]:
        """Return each latent's best candidate for a parent `(F,)`, -1 for none, and its score `(F,)`, 0 for none.

        Of candidates with equal scores the lowest is taken. With several SAEs, F counts the latents of all.
        """
        child, parent, score = self.candidates(least=0.0, most=1)
        best, scores = torch.full((self.total,), -1), torch.zeros(self.total, dtype=torch.float64)
        best[child], scores[child] = parent, score
        return best, scores

    def parents(self, threshold: float = THRESHOLD) -> tuple[Tensor, Tensor]:
        """Return each latent's parent `(F,)`, -1 for none, and the score `(F,)` of its best candidate, 0 for none."""
        check_threshold(threshold)
        best, score = self.best()
        return torch.where(score >= threshold, best, -1), score


def check_threshold(threshold: float) -> None:
    """Raise `ValueError` where a least score of parents is out of range."""
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must lie above 0 and be at most 1, got {threshold}.")
