"""Trees of latents: one latent of a narrow dictionary and the latents into which a wider one splits it.

Between a latent A and a latent B of a wider level, with T_B the tokens on which B fires,

    s(A -> B) = cos(a_A on T_B, a_B on T_B) * min(1, max a_B / max a_A)

The cosine is high where A varies on B's tokens as B does. The ratio is low for a latent B that fires much more weakly
than A ever does. It is cut off at 1, so that a latent A that hardly fires does not become the parent of all that fire
more strongly. A latent's parent is the one with the highest score in any narrower level, if that is 0.6 or more: a
tree may be looked at with another threshold.

Levels are the groups between prefix widths of one SAE, or several SAEs on the same hidden states.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...common.distributed import processes
from ...common.files import write_text
from ...evaluation.data import HasActivations, activation_batches
from ...models import SAEModel
from ...progressive.statistics import encoded, firing_blocks
from .page import tree_page
from .sums import MAX_EDGES, THRESHOLD, EdgeSums, check_threshold


__all__ = ["MAX_EDGES", "THRESHOLD", "EdgeSums", "LatentTree", "TreeNode", "build_tree"]


@dataclass(frozen=True)
class TreeNode:
    """A latent in a tree.

    Args:
        latent (`int`): Number in the tree: its position in the SAE; latents of further SAEs are numbered behind those.
        level (`int`): Number of the level; 0 is the narrowest.
        parent (`int`, *optional*): Latent of a narrower level that it refines.
        score (`float`): Score of the best candidate for a parent, even where it is below the threshold.
        frequency (`float`): Share of tokens on which it fires.
        maximum (`float`): Largest activation.
        children (`list[int]`): Latents of wider levels that refine it, highest score first.
        candidate (`int`, *optional*): Best candidate for a parent, even where its score is below the threshold.
    """

    latent: int
    level: int
    parent: int | None
    score: float
    frequency: float
    maximum: float
    children: list[int]
    candidate: int | None = None


@dataclass
class LatentTree:
    """Latents with one parent each; made by [`build_tree`].

    Args:
        level (`Tensor` of shape `(F,)`): Level of each latent, int64.
        parent (`Tensor` of shape `(F,)`): Parent of each latent, int64; -1 for none.
        score (`Tensor` of shape `(F,)`): Score of the best candidate for a parent, float64.
        frequency (`Tensor` of shape `(F,)`): Share of tokens on which each latent fires, float64.
        maximum (`Tensor` of shape `(F,)`): Largest activation of each latent, float64.
        threshold (`float`): Least score of a parent.
        tokens (`int`): Number of tokens of the data.
        starts (`list[int]`): Number of the first latent of each SAE; `[0]` for one SAE.
        candidate (`Tensor` of shape `(F,)`, *optional*): Best candidate for the parent of each latent, -1 for none; by
            default its parent.
    """

    level: Tensor
    parent: Tensor
    score: Tensor
    frequency: Tensor
    maximum: Tensor
    threshold: float
    tokens: int
    starts: list[int]
    candidate: Tensor = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        self.candidate = self.parent if self.candidate is None else self.candidate

    def __len__(self) -> int:
        return len(self.parent)

    def at(self, threshold: float) -> "LatentTree":
        """Return the tree with another least score of a parent.

        Where a tree of an earlier version is read, which kept no candidates, no parents come in below its threshold.

        Raises:
            `ValueError`: if the threshold does not lie above 0 and at most at 1.
        """
        check_threshold(threshold)
        parent = torch.where(self.score >= threshold, self.candidate, -1)
        return replace(self, parent=parent, threshold=threshold)

    @cached_property
    def _children(self) -> dict[int, list[int]]:
        children: dict[int, list[int]] = {}
        for latent in self.score.argsort(descending=True, stable=True).tolist():
            if self.parent[latent] >= 0:
                children.setdefault(int(self.parent[latent]), []).append(latent)
        return children

    def node(self, latent: int) -> TreeNode:
        """Return one latent.

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
            candidate=None if self.candidate[latent] < 0 else int(self.candidate[latent]),
        )

    def children(self, latent: int, level: int | None = None) -> list[tuple[int, float]]:
        """Return the latents below one, as a flat list.

        Args:
            latent (`int`): The latent above.
            level (`int`, *optional*): Level of the latents to return, which may be reached through levels between; by
                default the latents that refine it directly, of whatever level.

        Returns:
            `list[tuple[int, float]]`: Latents and their scores with their own parents, highest first.
        """
        direct = self.node(latent).children
        latents = direct if level is None else [n for n in self.descendants(latent) if self.level[n] == level]
        return sorted(((child, float(self.score[child])) for child in latents), key=lambda item: -item[1])

    def descendants(self, latent: int) -> list[int]:
        """Return all latents below one, those that refine it directly first."""
        below = list(self._children.get(latent, []))
        for child in below:  # which grows meanwhile: parents are narrower than their children, so it ends
            below += self._children.get(child, [])
        return below

    def ancestors(self, latent: int) -> list[int]:
        """Return a latent's parent, that one's parent, and so on."""
        above: list[int] = []
        while (latent := int(self.parent[latent])) >= 0:
            above.append(latent)
        return above

    def roots(self) -> list[int]:
        """Return the latents without a parent, by level."""
        return (self.parent < 0).nonzero().flatten().tolist()

    def to_json(self) -> dict[str, Any]:
        """Return the tree as values for JSON."""
        nodes = (self.node(latent) for latent in range(len(self)))
        return {
            "format": "hf_matryoshka_sae.latent_tree/1",
            "threshold": self.threshold,
            "tokens": self.tokens,
            "starts": self.starts,
            "nodes": [vars(node) for node in nodes],
        }

    def save(self, path: str | os.PathLike) -> Path:
        """Write the tree as JSON; return the path."""
        write_text(Path(path), json.dumps(self.to_json(), allow_nan=False))
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LatentTree":
        """Read a tree that [`save`] wrote.

        Args:
            path (`str` or `os.PathLike`): The JSON file.

        Raises:
            `ValueError`: if the file does not exist or holds no tree.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            nodes = content["nodes"]
            if content["format"] != "hf_matryoshka_sae.latent_tree/1":
                raise KeyError(content["format"])
            _check_nodes(nodes, content["starts"])
            numbers = [torch.tensor([node[key] for node in nodes], dtype=torch.float64) for key in _NUMBERS]
            return cls(
                torch.tensor([node["level"] for node in nodes], dtype=torch.int64),
                torch.tensor([-1 if node["parent"] is None else node["parent"] for node in nodes], dtype=torch.int64),
                *numbers,
                content["threshold"],
                content["tokens"],
                content["starts"],
                torch.tensor([_candidate(node) for node in nodes], dtype=torch.int64),
            )
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} holds no tree of latents ({error!r}). Write it with `LatentTree.save`."
            ) from error

    def page(self, path: str | os.PathLike, labels: Mapping[int, str] | None = None) -> Path:
        """Write an HTML page that unfolds the tree and needs no other file; return its path.

        Args:
            path (`str` or `os.PathLike`): The HTML file.
            labels (`dict[int, str]`, *optional*): Text beside latents, without markup.
        """
        write_text(Path(path), tree_page(self, labels or {}))
        return Path(path)


_NUMBERS = ("score", "frequency", "maximum")


def _candidate(node: dict[str, Any]) -> int:
    best = node["parent"] if node.get("candidate") is None else node["candidate"]
    return -1 if best is None else best


def _check_nodes(nodes: list[dict[str, Any]], starts: list[int]) -> None:
    """Raise `ValueError` where nodes are no tree; a parent is in a narrower level, so that there are no cycles."""
    if not nodes or not isinstance(nodes, list):
        raise ValueError("there are no nodes")
    for place, node in enumerate(nodes):
        level = node["level"]
        if node["latent"] != place:
            raise ValueError(f"node {place} is of latent {node['latent']!r}")
        if not _is_place(level):
            raise ValueError(f"latent {place} has the level {level!r}")
        for parent in (node["parent"], node.get("candidate")):
            if parent is None:
                continue
            if not _is_place(parent) or parent >= len(nodes):
                raise ValueError(f"latent {place} has the parent {parent!r}; there are {len(nodes)} latents")
            if not nodes[parent]["level"] < level:
                above = nodes[parent]["level"]
                raise ValueError(f"latent {place} is in level {level}, its parent {parent} in {above!r}")
    if not starts or starts[0] != 0 or starts != sorted(set(starts)) or not all(map(_is_place, starts)):
        raise ValueError(f"the latents of SAEs begin at {starts!r}")


def _is_place(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def build_tree(
    sae: SAEModel,
    data: HasActivations,
    threshold: float = THRESHOLD,
    other: SAEModel | Sequence[SAEModel] | None = None,
    show: bool = True,
) -> LatentTree:
    """Find the parent of each latent on data in one pass; return the tree.

    Args:
        sae ([`SAEModel`]): SAE whose levels are the groups between its prefix widths, encoded at full width.
        data ([`HeldOut`] or an iterable of `(n, D)` tensors): Hidden states; each process brings its share.
        threshold (`float`, *optional*, defaults to 0.6): Least score of a parent.
        other ([`SAEModel`] or `list[SAEModel]`, *optional*): Wider SAEs on the same hidden states. Then each SAE is
            one level, and the latents of the second are numbered behind those of the first.
        show (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Raises:
        `ValueError`: if there is one level only, there are no hidden states, or the SAEs take different ones.
    """
    check_threshold(threshold)
    sums = EdgeSums(sae, other)
    others = [] if other is None else [other] if isinstance(other, SAEModel) else list(other)
    if {one.config.d_in for one in others} - {sae.config.d_in}:
        raise ValueError(f"SAEs in a tree read the same hidden states, got d_in {sae.config.d_in} and another.")
    batches = tqdm(activation_batches(data), desc="tree", disable=not show or processes()[0] != 0, leave=False)
    for x in batches:
        # The largest SAE decides the number of rows in a block, as blocks must be cut alike for all SAEs.
        largest = max([sae, *others], key=lambda one: one.config.num_latents)
        start = 0
        for _, _, pairs in firing_blocks(largest, [x]):
            rows = x[start : start + pairs.num_rows]
            start += pairs.num_rows
            sums.add(*(pairs if one is largest else encoded(one, rows) for one in [sae, *others]))
    sums.reduce()
    if not sums.firing.tokens:
        raise ValueError("The data has no hidden states to build a tree on. Pass activations with at least one row.")
    candidate, score = sums.best()
    return LatentTree(
        level=sums.level,
        parent=candidate,
        score=score,
        frequency=sums.firing.frequency,
        maximum=sums.maximum,
        threshold=0.0,
        tokens=int(sums.firing.tokens),
        starts=sums.starts,
        candidate=candidate,
    ).at(threshold)
