"""Trees of latents: what a narrow dictionary has as one latent, a wider one has as several.

Between a latent A and a latent B of the next level, with T_B the tokens on which B fires,

    s(A -> B) = cos(a_A on T_B, a_B on T_B) * min(1, max a_B / max a_A)

The cosine says that A does on B's tokens what B does. The ratio keeps apart what fires much more weakly than A ever
does. It is cut off at 1: a latent that hardly fires is no parent of everything that fires more strongly. A latent's
parent is the one with the highest score, if that is 0.6 or more.

Levels are the groups between prefix widths of one SAE, or several SAEs on the same hidden states.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.data import HasActivations, activation_batches
from ..evaluation.distributed import processes, reduce_sum
from ..models import SAEModel
from ..models.sparse_ops import LatentPairs
from ..progressive.statistics import encoded, firing_blocks
from .tree_page import tree_page


MAX_EDGES = 2**26
"""Latents that fire together, from one level to the next: more of them than this would take over 2 GiB."""

THRESHOLD = 0.6
_PRODUCTS_AT_ONCE = 2**22  # co-firing pairs that are listed, or kept before they are added up


class EdgeSums:
    """What is added up over tokens to find each latent's parent.

    Only latents that fire together take memory: 24 bytes for each such pair of consecutive levels, whatever the size
    of the dictionaries.

    Args:
        sae ([`SAEModel`]): Its levels are the groups between its prefix widths; with `other` it is one level.
        other ([`SAEModel`] or a list of them, *optional*): Further levels, one each.
        max_edges (`int`, *optional*, defaults to `MAX_EDGES`): How many such pairs may be kept.

    Raises:
        `ValueError`: if there is one level only.
    """

    def __init__(self, sae: SAEModel, other: SAEModel | Sequence[SAEModel] | None = None, max_edges: int = MAX_EDGES):
        others = [] if other is None else [other] if isinstance(other, SAEModel) else list(other)
        saes = [sae, *others]
        sizes = [one.config.num_latents for one in saes]
        if others:
            levels = sizes
        else:
            levels = torch.tensor([0, *sae.prefix_widths]).diff().tolist()
        if len(levels) < 2:
            raise ValueError(
                "A tree needs two levels: an SAE with several prefix widths, or a second SAE as `other`. This one has "
                f"the widths {sae.prefix_widths}."
            )
        self.max_edges = max_edges
        self.starts = torch.tensor([0, *sizes[:-1]]).cumsum(0).tolist()  # of each SAE's latents among all
        self.total = sum(sizes)
        self.level = torch.arange(len(levels)).repeat_interleave(torch.tensor(levels))
        self.maximum, self.square, self.fires = (torch.zeros(self.total, dtype=torch.float64) for _ in range(3))
        self.tokens = torch.zeros(1, dtype=torch.float64)
        self._edges: list[tuple[Tensor, Tensor]] = []  # keys parent * total + child, and (product, parent's square)
        self._kept = self._merged = 0

    def add(self, *pairs: LatentPairs) -> None:
        """Add the latents of some tokens: one list of pairs for each SAE, over the same tokens.

        Raises:
            `ValueError`: if the lists do not belong to these SAEs, or too many latents fire together.
        """
        if len(pairs) != len(self.starts) or len({one.num_rows for one in pairs}) != 1:
            raise ValueError(f"Expected the latents of {len(self.starts)} SAEs on the same tokens.")
        rows = torch.cat([one.rows for one in pairs]).cpu()
        cols = torch.cat([one.cols + start for one, start in zip(pairs, self.starts, strict=True)]).cpu()
        values = torch.cat([one.values for one in pairs]).double().cpu()
        fires = values > 0  # a value below 0 is no firing, and has no place in a cosine of firings
        rows, cols, values = rows[fires], cols[fires], values[fires]
        self.tokens += pairs[0].num_rows
        self.fires.index_add_(0, cols, torch.ones_like(values))
        self.square.index_add_(0, cols, values.square())
        self.maximum.scatter_reduce_(0, cols, values, "amax")
        levels = self.level[cols]
        for level in range(int(self.level[-1])):
            above, below = levels == level, levels == level + 1
            self._add_level(
                (rows[above], cols[above], values[above]), (rows[below], cols[below], values[below]), pairs[0].num_rows
            )

    def _add_level(self, above: tuple[Tensor, ...], below: tuple[Tensor, ...], num_rows: int) -> None:
        """All pairs of a latent above and one below that fire on the same token; both sides sorted by token."""
        offsets = torch.searchsorted(below[0], torch.arange(num_rows + 1))
        counts = offsets.diff()[above[0]]  # partners of each latent above
        ends = counts.cumsum(0)
        start = 0
        while start < len(counts):
            done = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(torch.searchsorted(ends, torch.tensor(done + _PRODUCTS_AT_ONCE), right=True)))
            left = torch.arange(start, stop).repeat_interleave(counts[start:stop])
            right = offsets[above[0][left]] + torch.arange(len(left)) - (ends - counts)[left] + done
            a, b = above[2][left], below[2][right]
            self._keep(above[1][left] * self.total + below[1][right], torch.stack([a * b, a.square()], 1))
            start = stop

    def _keep(self, keys: Tensor, sums: Tensor) -> None:
        self._edges.append((keys, sums))
        self._kept += len(keys)
        # Twice what was left last time: adding up then costs no more than listing did.
        if self._kept > max(_PRODUCTS_AT_ONCE, 2 * self._merged):
            self._merge()

    def _merge(self) -> None:
        """Add up what belongs to the same edge."""
        if not self._edges:
            return
        keys, inverse = torch.cat([keys for keys, _ in self._edges]).unique(return_inverse=True)
        if len(keys) > self.max_edges:
            raise ValueError(
                f"More than {self.max_edges:,} pairs of latents of consecutive levels fire together, which is more "
                "than is kept. Use fewer tokens, a narrower prefix (`sae.truncate`), or raise `max_edges`."
            )
        sums = torch.zeros(len(keys), 2, dtype=torch.float64)
        sums.index_add_(0, inverse, torch.cat([sums for _, sums in self._edges]))
        self._edges = [(keys, sums)]
        self._kept = self._merged = len(keys)

    def state_dict(self) -> dict[str, Tensor]:
        """All that was added up, as tensors by name."""
        self._merge()
        empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.float64)
        keys, sums = self._edges[0] if self._edges else empty
        counted = {name: getattr(self, name) for name in ("maximum", "square", "fires", "tokens")}
        return {**counted, "keys": keys, "sums": sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what [`state_dict`] gave."""
        for name in ("maximum", "square", "fires", "tokens"):
            getattr(self, name).copy_(state[name])
        self._edges = [(state["keys"], state["sums"])]
        self._kept = self._merged = len(state["keys"])

    def reduce(self) -> None:
        """Add up over processes."""
        self._merge()
        reduce_sum(self.tokens, self.fires, self.square)
        _, world = processes()
        if world > 1:
            gathered: list[Any] = [None] * world
            dist.all_gather_object(gathered, (self.maximum, self._edges))
            self.maximum = torch.stack([maximum for maximum, _ in gathered]).amax(0)
            self._edges = [edge for _, edges in gathered for edge in edges]
            self._merge()

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """Parent `(E,)`, child `(E,)` and score `(E,)` of every pair of latents that fire together."""
        self._merge()
        if not self._edges:
            empty = torch.zeros(0, dtype=torch.int64)
            return empty, empty, torch.zeros(0, dtype=torch.float64)
        ((keys, sums),) = self._edges
        parent, child = keys // self.total, keys % self.total
        cosine = sums[:, 0] / (sums[:, 1] * self.square[child]).sqrt()
        return parent, child, cosine * (self.maximum[child] / self.maximum[parent]).clamp(max=1)

    def parents(self, threshold: float = THRESHOLD) -> tuple[Tensor, Tensor]:
        """Each latent's parent `(F,)`, -1 for none, and the score `(F,)` of the best candidate, 0 where there is none.

        Of several with the same score the lowest is taken. With several SAEs, F counts the latents of all.
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"`threshold` must lie above 0 and be at most 1, got {threshold}.")
        parent, child, score = self.scores()
        best = torch.zeros(self.total, dtype=torch.float64).scatter_reduce_(0, child, score, "amax")
        winner = score == best[child]
        none = self.total
        found = torch.full((self.total,), none).scatter_reduce_(0, child[winner], parent[winner], "amin")
        return torch.where((found < none) & (best >= threshold), found, -1), best


@dataclass(frozen=True)
class TreeNode:
    """A latent in a tree.

    Args:
        latent (`int`): Its number in the tree: its place in the dictionary; of further SAEs, behind those before.
        level (`int`): 0 for the narrowest.
        parent (`int`, *optional*): The latent of the level before.
        score (`float`): Of the best candidate for a parent, also where that is below the threshold.
        frequency (`float`): Share of tokens on which it fires.
        maximum (`float`): Its largest activation.
        children (`list[int]`): Those of the next level, highest score first.
    """

    latent: int
    level: int
    parent: int | None
    score: float
    frequency: float
    maximum: float
    children: list[int]


@dataclass
class LatentTree:
    """Latents with one parent each; made by [`build_tree`].

    Args:
        level (`Tensor` of shape `(F,)`), parent (`Tensor` of shape `(F,)`): int64; -1 for no parent.
        score, frequency, maximum (`Tensor` of shape `(F,)`): As in [`TreeNode`], float64.
        threshold (`float`): What the score of a parent had to reach.
        tokens (`int`): What it was measured on.
        starts (`list[int]`): Where the latents of each SAE begin; `[0]` for one SAE.
    """

    level: Tensor
    parent: Tensor
    score: Tensor
    frequency: Tensor
    maximum: Tensor
    threshold: float
    tokens: int
    starts: list[int]

    def __len__(self) -> int:
        return len(self.parent)

    @cached_property
    def _children(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for latent in self.score.argsort(descending=True, stable=True).tolist():
            if self.parent[latent] >= 0:
                found.setdefault(int(self.parent[latent]), []).append(latent)
        return found

    def node(self, latent: int) -> TreeNode:
        """One latent.

        Raises:
            `ValueError`: if there is no such latent.
        """
        if not 0 <= latent < len(self):
            raise ValueError(f"This tree has latents 0 to {len(self) - 1}, got {latent}.")
        parent = int(self.parent[latent])
        return TreeNode(
            latent=latent,
            level=int(self.level[latent]),
            parent=None if parent < 0 else parent,
            score=float(self.score[latent]),
            frequency=float(self.frequency[latent]),
            maximum=float(self.maximum[latent]),
            children=list(self._children.get(latent, [])),
        )

    def children(self, latent: int, level: int | None = None) -> list[tuple[int, float]]:
        """The latents below one, as a flat list.

        Args:
            latent (`int`): Whose.
            level (`int`, *optional*): The level they are in, by default the next; those of deeper levels are reached
                through the levels between.

        Returns:
            `list[tuple[int, float]]`: latents and their scores (with their own parents), highest first.
        """
        own = self.node(latent).level
        level = own + 1 if level is None else level
        found = [latent]
        for _ in range(own, level):
            found = [child for one in found for child in self._children.get(one, [])]
        found = found if level > own else []
        return sorted(((child, float(self.score[child])) for child in found), key=lambda item: -item[1])

    def roots(self) -> list[int]:
        """Latents without a parent, by level."""
        return (self.parent < 0).nonzero().flatten().tolist()

    def to_json(self) -> dict[str, Any]:
        """The tree as JSON-able values."""
        keys = ("latent", "level", "parent", "score", "frequency", "maximum", "children")
        nodes = (self.node(latent) for latent in range(len(self)))
        return {
            "format": "hf_matryoshka_sae.latent_tree/1",
            "threshold": self.threshold,
            "tokens": self.tokens,
            "starts": self.starts,
            "nodes": [{key: getattr(node, key) for key in keys} for node in nodes],
        }

    def save(self, path: str | os.PathLike) -> Path:
        """Write the JSON; returns its path."""
        return _write(path, json.dumps(self.to_json(), allow_nan=False))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LatentTree":
        """Read what [`save`] wrote.

        Raises:
            `ValueError`: if the file is not there or holds something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            nodes = found["nodes"]
            if found["format"] != "hf_matryoshka_sae.latent_tree/1":
                raise KeyError(found["format"])
            numbers = [torch.tensor([node[key] for node in nodes], dtype=torch.float64) for key in _NUMBERS]
            return cls(
                torch.tensor([node["level"] for node in nodes], dtype=torch.int64),
                torch.tensor([-1 if node["parent"] is None else node["parent"] for node in nodes], dtype=torch.int64),
                *numbers,
                found["threshold"],
                found["tokens"],
                found["starts"],
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} holds no tree of latents ({error!r}). Write it with `LatentTree.save`."
            ) from error

    def page(self, path: str | os.PathLike, labels: Mapping[int, str] | None = None) -> Path:
        """Write a page that unfolds the tree; it needs no network and no other file.

        Args:
            path (`str` or `os.PathLike`): Of the HTML file.
            labels (`dict[int, str]`, *optional*): What to write beside latents; text, not markup.
        """
        return _write(path, tree_page(self, labels or {}))


_NUMBERS = ("score", "frequency", "maximum")


def build_tree(
    sae: SAEModel,
    data: HasActivations,
    threshold: float = THRESHOLD,
    other: SAEModel | Sequence[SAEModel] | None = None,
    show: bool = True,
) -> LatentTree:
    """Find the parent of each latent on data, in one pass.

    Args:
        sae ([`SAEModel`]): Its levels are the groups between its prefix widths, at its full width.
        data ([`HeldOut`] or an iterable of `(n, D)` tensors): Hidden states; each process brings its share.
        threshold (`float`, *optional*, defaults to 0.6): The least score of a parent.
        other ([`SAEModel`] or a list of them, *optional*): Wider SAEs on the same hidden states. Then each SAE is one
            level, and the latents of the second are numbered behind those of the first.
        show (`bool`, *optional*, defaults to `True`): A progress bar.

    Raises:
        `ValueError`: if there is one level only, there are no hidden states, or the SAEs take different ones.
    """
    sums = EdgeSums(sae, other)
    others = [] if other is None else [other] if isinstance(other, SAEModel) else list(other)
    if {one.config.d_in for one in others} - {sae.config.d_in}:
        raise ValueError(f"SAEs in a tree read the same hidden states, got d_in {sae.config.d_in} and another.")
    batches = tqdm(activation_batches(data), desc="tree", disable=not show or processes()[0] != 0, leave=False)
    for x in batches:
        # As many rows at once as suit the largest SAE: blocks are cut alike for all.
        largest = max([sae, *others], key=lambda one: one.config.num_latents)
        start = 0
        for _, _, pairs in firing_blocks(largest, [x]):
            rows = x[start : start + pairs.num_rows]
            start += pairs.num_rows
            sums.add(*(pairs if one is largest else encoded(one, rows) for one in [sae, *others]))
    sums.reduce()
    if not sums.tokens:
        raise ValueError("There are no hidden states to build a tree on: the activations are empty.")
    parent, score = sums.parents(threshold)
    return LatentTree(
        level=sums.level,
        parent=parent,
        score=score,
        frequency=sums.fires / sums.tokens,
        maximum=sums.maximum,
        threshold=threshold,
        tokens=int(sums.tokens),
        starts=sums.starts,
    )


def _write(path: str | os.PathLike, text: str) -> Path:
    """A file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return path
