"""The graph of a latent: patterns of tokens that end where it fires, as a trie read from the last token backwards.

A pattern is a run of tokens, some of which may be anything; it may have to stand at the start of a context. Matching
looks along every branch, a literal one and the wildcard beside it, so that no match is missed.

Shapes: N windows of S tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


WILDCARD, START = -1, -2
"""Keys of the trie that stand for any token, and for the place before the first token of a context."""


@dataclass
class _Node:
    children: dict[int, "_Node"] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)


class PatternTrie:
    """Patterns and the activation that each was seen with.

    A token on which several patterns end is predicted by the longest of them; of those of the same length by the one
    with most literal tokens, the largest value deciding last.
    """

    def __init__(self) -> None:
        self._root = _Node()
        self.patterns = 0

    def add(self, pattern: Sequence[int], value: float) -> None:
        """Add a pattern, in the order of the text.

        Args:
            pattern (`Sequence[int]`): Token ids, `WILDCARD`, and `START` as its first entry or not at all.
            value (`float`): The activation on its last token. A pattern that is there already predicts the mean.

        Raises:
            `ValueError`: if it has no token, or `START` inside it.
        """
        if START in pattern[1:] or not len(pattern) or pattern[-1] == START:
            raise ValueError(f"A pattern is tokens, with START before the first at most; got {list(pattern)}.")
        node = self._root
        for key in reversed(pattern):
            node = node.children.setdefault(int(key), _Node())
        self.patterns += not node.values
        node.values.append(float(value))

    def items(self) -> list[tuple[list[int], float]]:
        """The patterns, in the order of the text, and the activation each predicts; the largest first."""
        found, stack = [], [(self._root, ())]
        while stack:
            node, pattern = stack.pop()
            if node.values:
                found.append((list(pattern), float(np.mean(node.values))))
            stack += [(child, (key, *pattern)) for key, child in node.children.items()]
        return sorted(found, key=lambda item: -item[1])

    def predict(self, windows: np.ndarray) -> np.ndarray:
        """The activation on every token, 0 where no pattern ends.

        Args:
            windows (`np.ndarray` of shape `(N, S)`): Token ids.

        Returns:
            `np.ndarray` of shape `(N, S)`: float64.
        """
        rows, length = windows.shape
        padded = np.concatenate([np.full((rows, 1), START), windows], axis=1).reshape(-1)
        place = np.arange(len(padded))
        found, rank = np.zeros(len(padded)), np.full(len(padded), -1)
        positions = place[place % (length + 1) > 0]  # START is no token of its own
        stack = [(self._root, positions, positions, 0, 0)]
        while stack:
            node, ends, now, depth, literal = stack.pop()
            for key, child in node.children.items():
                if not len(now):
                    break
                # A wildcard stands for a token, and what is before START belongs to another window.
                here = padded[now]
                fits = here != START if key == WILDCARD else here == key
                chosen = ends[fits]
                level, literals = depth + 1, literal + (key != WILDCARD)
                if child.values and len(chosen):
                    value, order = float(np.mean(child.values)), level * 1000 + literals
                    better = (order > rank[chosen]) | ((order == rank[chosen]) & (value > found[chosen]))
                    found[chosen[better]] = value
                    rank[chosen[better]] = order
                if child.children and key != START:
                    stack.append((child, chosen, now[fits] - 1, level, literals))
        return found.reshape(rows, length + 1)[:, 1:]
