"""Trees of latents: one latent of a narrow dictionary and the latents into which a wider one splits it.

Between a latent A and a latent B of the next level, with T_B the tokens on which B fires,

    s(A -> B) = cos(a_A on T_B, a_B on T_B) * min(1, max a_B / max a_A)

The cosine is high where A varies on B's tokens as B does. The ratio is low for a latent B that fires much more weakly
than A ever does. It is cut off at 1, so that a latent A that hardly fires does not become the parent of all that fire
more strongly. A latent's parent is the one with the highest score, if that is 0.6 or more.

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
from torch import Tensor
from tqdm.auto import tqdm

from ...common.distributed import processes
from ...common.files import write_text
from ...evaluation.data import HasActivations, activation_batches
from ...models import SAEModel
from ...progressive.statistics import encoded, firing_blocks
from .page import tree_page
from .sums import MAX_EDGES, THRESHOLD, EdgeSums


__all__ = ["MAX_EDGES", "THRESHOLD", "EdgeSums", "LatentTree", "TreeNode", "build_tree"]


@dataclass(frozen=True)
class TreeNode:
    """A latent in a tree.

    Args:
        latent (`int`): Number in the tree: its position in the SAE; latents of further SAEs are numbered behind those.
        level (`int`): Number of the level; 0 is the narrowest.
        parent (`int`, *optional*): Latent of the level before that it refines.
        score (`float`): Score of the best candidate for a parent, even where it is below the threshold.
        frequency (`float`): Share of tokens on which it fires.
        maximum (`float`): Largest activation.
        children (`list[int]`): Latents of the next level that refine it, highest score first.
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
        level (`Tensor` of shape `(F,)`): Level of each latent, int64.
        parent (`Tensor` of shape `(F,)`): Parent of each latent, int64; -1 for none.
        score (`Tensor` of shape `(F,)`): Score of the best candidate for a parent, float64.
        frequency (`Tensor` of shape `(F,)`): Share of tokens on which each latent fires, float64.
        maximum (`Tensor` of shape `(F,)`): Largest activation of each latent, float64.
        threshold (`float`): Least score of a parent.
        tokens (`int`): Number of tokens of the data.
        starts (`list[int]`): Number of the first latent of each SAE; `[0]` for one SAE.
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
        )

    def children(self, latent: int, level: int | None = None) -> list[tuple[int, float]]:
        """Return the latents below one, as a flat list.

        Args:
            latent (`int`): The latent above.
            level (`int`, *optional*): Level of the latents to return, by default the next; deeper levels are reached
                through the levels between.

        Returns:
            `list[tuple[int, float]]`: Latents and their scores with their own parents, highest first.
        """
        own = self.node(latent).level
        level = own + 1 if level is None else level
        latents = [latent]
        for _ in range(own, level):
            latents = [child for one in latents for child in self._children.get(one, [])]
        latents = latents if level > own else []
        return sorted(((child, float(self.score[child])) for child in latents), key=lambda item: -item[1])

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


def _check_nodes(nodes: list[dict[str, Any]], starts: list[int]) -> None:
    """Raise `ValueError` where nodes are no tree: each parent is one level above, so there are no cycles either."""
    if not nodes or not isinstance(nodes, list):
        raise ValueError("there are no nodes")
    for place, node in enumerate(nodes):
        parent, level = node["parent"], node["level"]
        if node["latent"] != place:
            raise ValueError(f"node {place} is of latent {node['latent']!r}")
        if not _is_place(level):
            raise ValueError(f"latent {place} has the level {level!r}")
        if parent is None:
            continue
        if not _is_place(parent) or parent >= len(nodes):
            raise ValueError(f"latent {place} has the parent {parent!r}; there are {len(nodes)} latents")
        if nodes[parent]["level"] != level - 1:
            raise ValueError(f"latent {place} is in level {level}, its parent {parent} in {nodes[parent]['level']!r}")
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
    parent, score = sums.parents(threshold)
    return LatentTree(
        level=sums.level,
        parent=parent,
        score=score,
        frequency=sums.firing.frequency,
        maximum=sums.maximum,
        threshold=threshold,
        tokens=int(sums.firing.tokens),
        starts=sums.starts,
    )
