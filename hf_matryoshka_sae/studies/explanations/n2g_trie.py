"""The graph of a latent: patterns of tokens that end where it fires, as a trie read from the last token backwards.

A pattern is a run of tokens, some of which may be anything; it may have to stand at the start of a context. Where a
model sees what follows, `HERE` comes after the token on which the latent fires, and tokens after it. Matching looks
along every branch, a literal one and the wildcard beside it, so that no match is missed.

Shapes: N windows of S tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


WILDCARD, START, HERE = -1, -2, -3
"""Keys of the trie: any token, the place before the first token of a context, and "the token before this fires"."""


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
            pattern (`Sequence[int]`): Token ids, `WILDCARD`, `START` as its first entry or not at all, and `HERE`
                after the token that it tells of, unless that is the last.
            value (`float`): The activation on that token. A pattern that is there already predicts the mean.

        Raises:
            `ValueError`: if it has no token, `START` inside it, or `HERE` first, last or twice.
        """
        pattern = list(pattern)
        tokens = [key for key in pattern if key not in (START, HERE)]
        ends = pattern[:1] == [HERE] or pattern[-1:] == [HERE] or pattern[:2] == [START, HERE]
        if START in pattern[1:] or not tokens or ends or pattern.count(HERE) > 1:
            raise ValueError(f"A pattern is tokens, with START before the first at most; got {pattern}.")
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
            here = padded[now]
            order = here.argsort(kind="stable")
            ordered = here[order]
            for key, child in node.children.items():
                if not len(now):
                    break
                if key == HERE:  # what was walked over so far comes after the token on which it fires
                    stack.append((child, now, now, depth, literal))
                    continue
                # A wildcard stands for a token, and what is before START belongs to another window.
                bounds = [0, len(order)] if key == WILDCARD else ordered.searchsorted([key, key + 1])
                fits = order[slice(*bounds)]
                fits = fits[here[fits] != START] if key == WILDCARD else fits
                chosen = ends[fits]
                level, literals = depth + 1, literal + (key != WILDCARD)
                if child.values and len(chosen):
                    value, score = float(np.mean(child.values)), level * 1000 + literals
                    better = (score > rank[chosen]) | ((score == rank[chosen]) & (value > found[chosen]))
                    found[chosen[better]] = value
                    rank[chosen[better]] = score
                if child.children and key != START:
                    stack.append((child, chosen, now[fits] - 1, level, literals))
        return found.reshape(rows, length + 1)[:, 1:]
