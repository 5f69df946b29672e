"""The tree of latents as an index has it: parents, scores, levels."""

from numbers import Integral

import numpy as np

from ...features import FeatureIndex


class IndexTree:
    """Who refines whom, from the columns of a feature index.

    Args:
        index ([`FeatureIndex`]): Of the SAE.
        widths (`list[int]`): The SAE's prefix widths: a latent's level is the first prefix that holds it.
    """

    def __init__(self, index: FeatureIndex, widths: list[int]) -> None:
        table = index.table(["parent", "parent_score", "frequency"])
        self.widths = widths
        self.parent: np.ndarray = table["parent"].to_numpy()
        self._score: np.ndarray = table["parent_score"].to_numpy()
        self.frequency: np.ndarray = table["frequency"].to_numpy()
        self.level: np.ndarray = np.searchsorted(np.array(widths), np.arange(len(self.parent)), side="right")
        self._children: dict[int, list[int]] = {}
        for latent in (-self._score).argsort(kind="stable").tolist():
            if self.parent[latent] >= 0:
                self._children.setdefault(int(self.parent[latent]), []).append(latent)

    def __len__(self) -> int:
        return len(self.parent)

    def check(self, latent: int) -> None:
        """Raises `ValueError` if there is no such latent."""
        if isinstance(latent, bool) or not isinstance(latent, Integral) or not 0 <= latent < len(self):
            raise ValueError(f"Latents are numbered 0 to {len(self) - 1}, got {latent!r}.")

    def score(self, latent: int) -> float:
        """How well its parent explains it."""
        return float(self._score[latent])

    def children(self, latent: int) -> list[int]:
        """The latents of the next level that refine it, highest score first."""
        return self._children.get(latent, [])

    def ancestors(self, latent: int) -> list[int]:
        """Its parent, that one's parent, and so on."""
        ancestors = []
        while self.parent[latent] >= 0 and len(ancestors) < len(self.widths):
            latent = int(self.parent[latent])
            ancestors.append(latent)
        return ancestors

    def levels_below(self, latent: int) -> list[list[int]]:
        """All latents below one, level by level."""
        levels, now = [], self.children(latent)
        while now:
            levels.append(now)
            now = [child for one in now for child in self.children(one)]
        return levels

    def size(self, latent: int) -> int:
        """How many latents are below it."""
        return sum(len(level) for level in self.levels_below(latent))

    def families(self) -> list[int]:
        """Latents without a parent and with children, by level, the largest families of each first."""
        roots = [latent for latent in self._children if self.parent[latent] < 0]
        return sorted(roots, key=lambda latent: (self.level[latent], -self.size(latent), latent))
