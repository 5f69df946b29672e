"""The rows of all seeds, intervals over seeds, and what is claimed of the ways to make an SAE progressive."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats


PLAIN = {"topk": "TopK", "batch_topk": "BatchTopK"}
SELECTIONS = {"mask": "native L0 (mask)", "restrict": "matched L0 (restrict)"}
METRICS = {
    "fvu": ("FVU", ".4f"),
    "l0": ("L0", ".2f"),
    "recaptured_zero": ("Recaptured loss", ".4f"),
    "rsa": ("RSA (Spearman)", ".4f"),
    "delta_ce": ("Growth of the cross-entropy, nats", ".4f"),
    "ce": ("Cross-entropy, nats", ".4f"),
    "kl": ("KL divergence from the clean model, nats", ".4f"),
}
BETTER = {"fvu": -1, "recaptured_zero": 1, "rsa": 1}  # sign of an improvement


@dataclass
class Interval:
    """A mean over seeds with the half-width of its 95% t-interval (`None` for one seed)."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: np.ndarray) -> "Interval":
        count = len(values)
        spread = None
        if count > 1:
            spread = float(stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5)
        return cls(float(values.mean()), spread)

    def text(self, form: str = ".4f") -> str:
        if np.isnan(self.mean):
            return "-"
        return f"{self.mean:{form}}" + ("" if self.half is None else f" ± {self.half:{form.replace('+', '')}}")

    @property
    def above_zero(self) -> bool:
        return self.half is not None and self.mean - self.half > 0


@dataclass
class Claim:
    """That one way is better than another, at one width.

    Args:
        base (`str`), selection (`str`), metric (`str`), better (`str`), worse (`str`), width (`int`): What is claimed.
        gain (`Interval`): Of the paired differences; above 0 where the claim holds.
        held (`int`), seeds (`int`): In how many of all seeds it holds.
    """

    base: str
    selection: str
    metric: str
    better: str
    worse: str
    width: int
    gain: Interval
    held: int
    seeds: int


class Results:
    """The rows of all seeds, by method, ranking, selection and width.

    Args:
        seeds (`list[dict]`): What was found for each seed; all have the same rows.
    """

    def __init__(self, seeds: list[dict[str, Any]]):
        self.seeds = seeds
        keys = ("method", "ranking", "selection", "width")
        self._rows = [{tuple(row[key] for key in keys): row for row in seed["rows"]} for seed in seeds]
        self.widths = sorted({key[-1] for key in self._rows[0]})
        self.rankings = list(dict.fromkeys(key[1] for key in self._rows[0] if key[0] in PLAIN))

    def values(self, method: str, ranking: str, selection: str, width: int, metric: str) -> np.ndarray:
        """One number for each seed; NaN where it was not defined."""
        key = (method, ranking, "mask" if method == "separate" else selection, width)
        found = [rows[key][metric] for rows in self._rows]
        return np.array([np.nan if value is None else value for value in found], dtype=float)

    def label(self, base: str, ranking: str) -> str:
        """A ranking's name, with those that are the same in every seed."""
        same = [
            other
            for other in self.rankings
            if all(seed["same_ranking"][base][other] == ranking for seed in self.seeds) and other != ranking
        ]
        name = "unsorted" if ranking == "trained" else ranking
        return " = ".join([name, *same])

    def distinct(self, base: str) -> list[str]:
        """Rankings that are not the same as one before in every seed."""
        return [r for r in self.rankings if any(seed["same_ranking"][base][r] == r for seed in self.seeds)]


def claims(results: Results) -> list[Claim]:
    """Matryoshka better than pruned by energy, and that better than unsorted, at every inner width."""
    found = []
    for base in PLAIN:
        ways = [("matryoshka", "trained"), (base, "energy"), (base, "trained")]
        for selection in SELECTIONS:
            for metric, sign in BETTER.items():
                for better, worse in zip(ways, ways[1:], strict=False):
                    for width in results.widths[:-1]:
                        left, right = (results.values(*way, selection, width, metric) for way in (better, worse))
                        gains = sign * (left - right)
                        names = [_way(results, *way) for way in (better, worse)]
                        held = int((gains > 0).sum())
                        where = (base, selection, metric, *names, width)
                        found.append(Claim(*where, Interval.of(gains), held, len(gains)))
    return found


def _way(results: Results, method: str, ranking: str) -> str:
    if method == "matryoshka":
        return "Matryoshka"
    return "unsorted" if ranking == "trained" else f"pruned by {ranking}"


def grouped(found: list[Claim]) -> Iterator[tuple[tuple[str, ...], list[Claim]]]:
    """The widths of each claim."""
    groups: dict[tuple[str, ...], list[Claim]] = {}
    for claim in found:
        groups.setdefault((claim.base, claim.selection, claim.metric, claim.better, claim.worse), []).append(claim)
    yield from groups.items()
