"""Where each latent of a tree is drawn: a row for each level, and each block under the latent that it refines.

A block is as wide as what is below it, in columns; families stand side by side on shelves of so many columns.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from .tree import LatentTree


@dataclass(frozen=True)
class Block:
    """A latent, or an ellipsis that stands for some.

    Args:
        latent (`int`): Number in the tree; of an ellipsis, that of the latent above.
        row (`int`): Level.
        column (`int`): Column on the shelf.
        columns (`int`): Width.
        parent (`int`, *optional*): Latent that it refines.
        more (`int`, *optional*, defaults to 0): Number of latents that an ellipsis stands for.
    """

    latent: int
    row: int
    column: int
    columns: int
    parent: int | None
    more: int = 0


@dataclass
class Shelf:
    """Families side by side.

    Args:
        used (`int`): Number of columns.
        blocks (`list[Block]`): Their latents.
    """

    used: int = 0
    blocks: list[Block] = field(default_factory=list)

    @property
    def rows(self) -> range:
        """Levels from the narrowest to the widest that is there."""
        rows = [block.row for block in self.blocks]
        return range(min(rows), max(rows) + 1)


@dataclass
class Nesting:
    """A tree as it is drawn.

    Args:
        shelves (`list[Shelf]`): Families of the narrowest level first, the largest of each level first.
        joined (`int`): Number of latents with a parent.
        drawn (`int`): Number of these that have a block.
        families (`int`): Number of latents with children and no parent.
        drawn_families (`int`): Number of these that have a block.
    """

    shelves: list[Shelf]
    joined: int
    drawn: int
    families: int
    drawn_families: int


def nesting(tree: "LatentTree", most: int, columns: int) -> Nesting:
    """Place the largest families of a tree.

    Args:
        tree ([`LatentTree`]): The tree.
        most (`int`): Number of latents that are drawn at most.
        columns (`int`): Columns of a shelf. A family that is wider is cut: latents with the lowest scores are left out
            and an ellipsis says how many.
    """
    level, parent = tree.level.numpy(), tree.parent.numpy()
    below, needed = np.zeros(len(tree), np.int64), np.zeros(len(tree), np.int64)
    for latent in np.argsort(-level, kind="stable"):
        needed[latent] = max(needed[latent], 1)
        if parent[latent] >= 0:
            below[parent[latent]] += below[latent] + 1
            needed[parent[latent]] += needed[latent]
    roots = np.flatnonzero((parent < 0) & (below > 0))
    roots = roots[np.lexsort((roots, -below[roots], level[roots]))]
    layout = Nesting([], int((parent >= 0).sum()), 0, len(roots), 0)
    room = most
    for root in roots.tolist():
        family = Shelf()
        _place(tree, needed, below, family, root, 0, min(int(needed[root]), columns), None)
        if len(family.blocks) > room:
            break
        room -= len(family.blocks)
        shelf = next((shelf for shelf in layout.shelves if shelf.used + family.used <= columns), None)
        if shelf is None:
            shelf = Shelf()
            layout.shelves.append(shelf)
        shelf.blocks += [replace(block, column=block.column + shelf.used) for block in family.blocks]
        shelf.used += family.used
        layout.drawn += sum(not block.more and block.parent is not None for block in family.blocks)
        layout.drawn_families += 1
    return layout


def _place(
    tree: "LatentTree",
    needed: np.ndarray,
    below: np.ndarray,
    family: Shelf,
    latent: int,
    column: int,
    room: int,
    parent: int | None,
) -> None:
    """Place a latent and what is below it in `room` columns; no deeper than there are levels."""
    row = int(tree.level[latent])
    family.blocks.append(Block(latent, row, column, room, parent))
    family.used = max(family.used, column + room)
    children = tree.node(latent).children
    rooms = [int(needed[child]) for child in children]
    if sum(rooms) > room:
        spare = room - 1  # the last column is the ellipsis's
        children = children[:spare]
        spare -= len(children)
        rooms = [1] * len(children)
        for number, child in enumerate(children):
            more = min(spare, int(needed[child]) - 1)
            rooms[number] += more
            spare -= more
    for child, columns in zip(children, rooms, strict=True):
        _place(tree, needed, below, family, child, column, columns, latent)
        column += columns
    left_out = int(below[latent] - sum(below[child] + 1 for child in children))
    if left_out and room > 1:
        family.blocks.append(Block(latent, row + 1, column, 1, latent, left_out))
