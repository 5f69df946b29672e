"""A latent's family: its relatives down to low scores, and the part of the tree that a picture of it shows."""

from dataclasses import replace
from typing import Any

import torch

from ...features.tree.sums import LEAST
from ...features.tree.tree import LatentTree
from .opened import Opened


def family_of(opened: Opened, latent: int) -> dict[str, list[dict[str, Any]]]:
    """A latent's relatives with their labels, down to low scores: who shows them, says from which score on.

    A relative's score is the least of the links that lead to it; a link's is that of a latent with its parent.

    Returns:
        `dict[str, list[dict]]`: `ancestors`, nearest first; `siblings`; `children`; and `could_refine`, latents that
        have it among the candidates for their parent but are better explained by another. Highest scores first.
    """
    tree, candidates = opened.tree(LEAST), opened.could_refine()

    def named(relatives: list[tuple[int, float]]) -> list[dict[str, Any]]:
        return [{"latent": one, "label": opened.labels[one], "score": score} for one, score in relatives]

    above: list[tuple[int, float]] = []
    below, least = latent, 1.0
    for ancestor in tree.ancestors(latent):
        least = min(least, float(tree.score[below]))
        above.append((ancestor, least))
        below = ancestor
    siblings = [(one, min(score, above[0][1])) for one, score in tree.children(above[0][0])] if above else []
    children = tree.children(latent)
    taken = {one for one, _ in children}
    return {
        "ancestors": named(above),
        "siblings": named([one for one in siblings if one[0] != latent]),
        "children": named(children),
        "could_refine": named([one for one in candidates.get(latent, []) if one[0] not in taken]),
    }


def family_tree(opened: Opened, latent: int, threshold: float) -> LatentTree:
    """The tree with a latent's ancestors and all below it alone; what could refine it counts as below it.

    Raises:
        `ValueError`: if the threshold is out of range, or there is no such latent.
    """
    tree, candidates = opened.tree(threshold), opened.could_refine()
    tree.node(latent)  # or there is none
    parent, score = tree.parent.clone(), tree.score.clone()
    could = {one: value for one, value in candidates.get(latent, []) if value >= threshold}
    for one, value in could.items():
        if int(parent[one]) not in could:
            parent[one], score[one] = latent, value
    tree = replace(tree, parent=parent, candidate=parent, score=score)
    kept = torch.tensor([*tree.ancestors(latent), latent, *tree.descendants(latent)])
    alone = torch.full_like(parent, -1)
    alone[kept] = parent[kept]
    return replace(tree, parent=alone, candidate=alone)
