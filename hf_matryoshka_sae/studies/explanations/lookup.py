"""Tables of the last token, and of the last two, as the plainest explanation of a latent: what any other has to beat.

From the text that examples come from: how often a latent fires, and how strongly on average, on each token; and on
each pair of the token before and the token. A pair's figure leans on its token's, a token's on that of all tokens, by
one occurrence each. A token is said to fire where its share reaches the threshold of the best F1 on that text, each
token judged by all others (leave one out), so that tokens seen once do not vouch for themselves.

Shapes: M positions that are read, V different tokens or pairs.
"""

import numpy as np

from .n2g import Examples


_ROUNDING = 1e-9
_LEAN = 1.0  # occurrences by which a pair counts as its token, and a token as all of them


class LookupTables:
    """Tables from one text, tested on another.

    Args:
        seen ([`Examples`]): Text that the tables are made from, with the firings of the latents to look up.
        test ([`Examples`]): Other text.
    """

    def __init__(self, seen: Examples, test: Examples) -> None:
        self._seen, self._test = seen, test
        own, other = _keys(seen), _keys(test)
        self._tables = [_Table(mine, others) for mine, others in zip(own, other, strict=True)]
        self._read = [np.flatnonzero(each.keep.numpy().reshape(-1)) for each in (seen, test)]

    def score(self, latent: int) -> dict[str, float]:
        """Return `token_f1`, `pair_f1`, `token_correlation` and `pair_correlation` on the test text."""
        seen, test = (
            part.dense(latent).reshape(-1).numpy()[read].astype(np.float64)
            for part, read in zip((self._seen, self._test), self._read, strict=True)
        )
        scores: dict[str, float] = {}
        fires = (seen > 0).astype(np.float64)
        shares, values = _Guess.flat(fires, len(test)), _Guess.flat(seen, len(test))
        for name, table in zip(("token", "pair"), self._tables, strict=True):
            shares, values = table.refined(shares, fires), table.refined(values, seen)
            said = shares.test >= best_threshold(shares.left_out, fires > 0)
            scores[f"{name}_f1"] = f1(said, test > 0)
            varies = np.ptp(test) > 0 and np.ptp(values.test) > _ROUNDING * np.abs(values.test).max()
            scores[f"{name}_correlation"] = float(np.corrcoef(test, values.test)[0, 1]) if varies else 0.0
        return scores


class _Guess:
    """What is expected at each position: of the text itself with the position left out, and of the test text."""

    def __init__(self, left_out: np.ndarray, test: np.ndarray) -> None:
        self.left_out, self.test = left_out, test

    @classmethod
    def flat(cls, y: np.ndarray, count: int) -> "_Guess":
        mean = y.mean()
        return cls(np.full(len(y), mean), np.full(count, mean))


class _Table:
    """Which key stands at each position of both texts, and how often each is seen in the first."""

    def __init__(self, seen: np.ndarray, test: np.ndarray) -> None:
        keys, self.seen = np.unique(seen, return_inverse=True)
        self.counts = np.bincount(self.seen)
        place = np.minimum(np.searchsorted(keys, test), len(keys) - 1)
        self.test = np.where(keys[place] == test, place, len(keys))  # the last entry: not seen

    def refined(self, guess: _Guess, y: np.ndarray) -> _Guess:
        sums = np.bincount(self.seen, y, len(self.counts))
        own = (sums[self.seen] - y + _LEAN * guess.left_out) / (self.counts[self.seen] - 1 + _LEAN)
        sums, counts = np.append(sums, 0), np.append(self.counts, 0)
        return _Guess(own, (sums[self.test] + _LEAN * guess.test) / (counts[self.test] + _LEAN))


def _keys(text: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Return the token at each position that is read, and the pair of it and the one before, as numbers."""
    windows, keep = text.windows.numpy().astype(np.int64), text.keep.numpy()
    before = np.concatenate([np.full((len(windows), 1), -1), windows[:, :-1]], axis=1)
    return windows[keep], ((before + 1) << 32 | windows)[keep]


def best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the threshold from which on scores `(M,)` say true with the best F1; infinite where nothing is true."""
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(truth[order])
    if not hits[-1]:
        return np.inf
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # equal scores are said together
    found = 2 * hits[ends] / (ends + 1 + hits[-1])
    return float(ordered[ends[found.argmax()]])


def f1(said: np.ndarray, truth: np.ndarray) -> float:
    """Return F1 of what is said against the truth, both `(M,)` bool; 0 where nothing is right."""
    right = float((said & truth).sum())
    return 2 * right / float(said.sum() + truth.sum()) if right else 0.0
