"""Neuron to Graph: can what a latent fires on be written down as patterns of tokens?

After Foote et al. 2023 (arXiv 2305.19911), with the thresholds of Gao et al. 2024 (arXiv 2406.04093, section 4.3). Of
places where a latent fires:

1. *prune*: keep the shortest run of tokens around it on which the activation is at least half of what it was; where
   16 tokens are not enough these are the pattern, as they are;
2. *saliency*: 1 - activation with the token replaced by padding / activation; a token below 0.5 becomes a wildcard,
   but for the one on which the latent fires;
3. *start*: if padding before the run halves the activation, the run has to stand at the start of a context;
4. *substitutes*: salient tokens are exchanged for what the language model itself finds likely there; where the
   activation stays at least half, that is a pattern too.

Runs end on the token where the latent fires; where the model sees what follows (an encoder), they reach to both sides,
between the special tokens that the model expects around a text.

How many places are looked at is in proportion to how often the latent fires, drawn evenly over the ranks of its
activations. With a fixed number, latents that fire often are explained by too few examples, and the score measures
frequency: a latent on 12% of tokens gets little recall from 16 examples of it. Runs of one and two tokens are cheap,
as equal ones are read once: every firing is tried with them (up to 4,096 and 1,024). Of those that need more context
one in eight is followed, up to 96; what fires often and needs long contexts is therefore still explained in part
alone.

The patterns predict activations on other text; precision and recall are of firing, the correlation is Pearson's.

Shapes: N windows of S tokens, D `d_in`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...common.distributed import processes
from ...common.logs import progress
from ...evaluation.data import HeldOut
from ...features.firings import Firings, joined, span
from ...models import SAEModel
from .n2g_runs import Run, RunReader
from .n2g_trie import HERE, START, WILDCARD, PatternTrie


HALF = 0.5
PLACES, PAIRS, FOLLOWED = 4096, 1024, 96
"""Most places of a latent that are tried with their token alone, with the one before, and with longer contexts."""
_SHARE_FOLLOWED, _LEAST_FOLLOWED = 1 / 8, 16
_SIZES = (*range(3, 9), 10, 12, 16)


@dataclass(frozen=True)
class Explained:
    """How well a latent's patterns say where it fires.

    Args:
        latent (`int`): Its place in the dictionary.
        precision (`float`), recall (`float`), f1 (`float`): Of predicted against actual firing on the test text;
            precision is 0 where nothing is predicted, recall where it never fires.
        correlation (`float`): Pearson's, of predicted and actual activation; 0 where either does not vary.
        fired (`int`), predicted (`int`): Tokens of the test text.
        frequency (`float`): Share of the test text's tokens on which it fires.
        examples (`int`), patterns (`int`): Places in the other text at which it was looked, and what came of them.
    """

    latent: int
    precision: float
    recall: float
    f1: float
    correlation: float
    fired: int
    predicted: int
    frequency: float
    examples: int
    patterns: int


@dataclass(frozen=True)
class Examples:
    """Where some latents fire: windows, and for each latent places in them.

    Args:
        windows (`Tensor` of shape `(N, S)`): Token ids, int64.
        keep (`Tensor` of shape `(N, S)`): bool; positions that are read.
        fired (`dict[int, tuple[Tensor, Tensor]]`): By latent, flat places in the windows and activations there.
    """

    windows: Tensor
    keep: Tensor
    fired: dict[int, tuple[Tensor, Tensor]]

    def dense(self, latent: int) -> Tensor:
        """The latent's activations `(N, S)`."""
        values = torch.zeros(self.windows.numel())
        places, found = self.fired[latent]
        values[places] = found
        return values.view(self.windows.shape)


@torch.no_grad()
def firing_examples(sae: SAEModel, data: HeldOut, latents: Iterable[int], show: bool = True) -> Examples:
    """Where latents fire on data, in one pass.

    Args:
        sae ([`SAEModel`]): Used as it is at inference.
        data ([`HeldOut`]): Each process reads all of it.
        latents (`Iterable[int]`): Whose firings are kept.
        show (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Raises:
        `ValueError`: if there are no tokens.
    """
    wanted = sorted(set(latents))
    chosen = torch.zeros(sae.config.num_latents, dtype=torch.bool, device=sae.W_enc.device)
    chosen[wanted] = True
    parts, keeps, first = [], [], 0
    sae.eval()
    for batch in progress(data.batches, desc="examples", disable=not show or processes()[0] != 0, leave=False):
        batch = batch.to(data.device)
        pairs = sae.encode_pairs(data.states(batch).to(sae.W_enc))
        read = batch.keep.flatten().nonzero().flatten().to(sae.W_enc.device)
        parts.append(Firings.of(batch.input_ids.cpu(), first, read, pairs, chosen[pairs.cols]))
        keeps.append(batch.keep.cpu())
        first += len(batch.input_ids)
    if not first:
        raise ValueError("There are no tokens to take examples from.")
    if len({keep.shape[1] for keep in keeps}) > 1:
        raise ValueError("Examples need windows of one length; open the data with packed text.")
    firings = joined(parts)
    return Examples(firings.input_ids, torch.cat(keeps), firings.of_latents(wanted))


class Explainer:
    """Writes down what latents fire on.

    Args:
        sae ([`SAEModel`]): Used as it is at inference.
        data ([`HeldOut`]): Its language model, tokenizer and hookpoint.
        substitutes (`int`, *optional*, defaults to 5): Likely tokens that are tried in place of each salient one; 0
            for none.
        effort (`float`, *optional*, defaults to 1.0): Scales how many places are looked at.
        seed (`int`, *optional*, defaults to 0): Of the drawn places.
    """

    def __init__(self, sae: SAEModel, data: HeldOut, substitutes: int = 5, effort: float = 1.0, seed: int = 0) -> None:
        if substitutes < 0 or not effort > 0:
            raise ValueError(f"Expected `substitutes` >= 0 and `effort` > 0, got {substitutes} and {effort}.")
        self.sae, self.data, self.substitutes, self.seed = sae.eval(), data, substitutes, seed
        self.places, self.pairs, self.followed = (max(1, round(effort * most)) for most in (PLACES, PAIRS, FOLLOWED))
        self.reader = RunReader(sae, data)
        self._text: tuple[Examples, np.ndarray, np.ndarray] | None = None  # windows, and where documents go on

    def explain(self, latent: int, examples: Examples) -> PatternTrie:
        """Return the patterns of a latent.

        Raises:
            `ValueError`: if there are no examples of it.
        """
        if latent not in examples.fired or not len(examples.fired[latent][0]):
            raise ValueError(f"There are no examples of latent {latent}: it does not fire, or was not looked for.")
        places, values = (each.numpy() for each in examples.fired[latent])
        generator = np.random.default_rng([self.seed, latent])
        trie = PatternTrie()
        left = evenly(values, self.places, generator)
        for size, most in ((1, self.places), (2, self.pairs)):
            left = left[evenly(values[left], most, generator)]
            if size == 1:
                runs: list[Run] = [((token,), 0) for token in examples.windows.flatten()[places[left]].tolist()]
            else:
                runs = [self._run(self._context(examples, place), size) for place in places[left]]
            left = left[self._short(trie, latent, runs, values[left])]
        count = min(self.followed, max(_LEAST_FOLLOWED, round(_SHARE_FOLLOWED * len(left))))
        followed = left[evenly(values[left], count, generator)]
        self._follow(trie, latent, [self._context(examples, place) for place in places[followed]], values[followed])
        return trie

    def _short(self, trie: PatternTrie, latent: int, runs: list[Run], values: np.ndarray) -> np.ndarray:
        """Add runs of one or two tokens that are enough; return the numbers of those that are not."""
        wholes = self.reader.activations(latent, runs)
        enough = (wholes >= HALF * values) & (wholes > 0)
        kept = np.flatnonzero(enough)
        self._add_salient(
            trie, latent, [runs[number] for number in kept], wholes[kept], values[kept], substitutes=False
        )
        return np.flatnonzero(~enough)

    def _context(self, examples: Examples, place: int) -> tuple[list[int], list[int]]:
        """Return the tokens up to a place, and those after it; what lies past a separator is of another document."""
        if self._text is None or self._text[0] is not examples:
            separators = [*self.reader.prefix, *self.reader.suffix]
            self._text = examples, examples.windows.numpy(), ~np.isin(examples.windows.numpy(), separators)
        _, windows, inside = self._text
        row, column = divmod(int(place), windows.shape[1])
        start, stop = span(inside[row], column, _SIZES[-1] - 1, _SIZES[-1] // 2 if self.reader.sees_ahead else 0)
        return windows[row, start : column + 1].tolist(), windows[row, column + 1 : stop].tolist()

    def _run(self, context: tuple[list[int], list[int]], size: int) -> Run:
        before, after = context
        behind = min(len(after), (size - 1) // 2) if self.reader.sees_ahead else 0
        return (*before[-max(1, size - behind) :], *after[:behind]), behind

    def _follow(
        self, trie: PatternTrie, latent: int, contexts: list[tuple[list[int], list[int]]], values: np.ndarray
    ) -> None:
        """Add what comes of runs of several tokens."""
        runs: dict[int, Run] = {}
        wholes = np.zeros(len(contexts))
        waiting = np.arange(len(contexts))
        for size in _SIZES:
            tried = [self._run(contexts[one], size) for one in waiting]
            activations = self.reader.activations(latent, tried)
            enough = activations >= HALF * values[waiting]
            for number in np.flatnonzero(enough):
                runs[int(waiting[number])], wholes[waiting[number]] = tried[number], activations[number]
            waiting = waiting[~enough]
        for number in waiting:  # what it saw reaches further
            run = self._run(contexts[number], _SIZES[-1])
            trie.add(_written(run, list(run[0])), float(values[number]))
        kept = sorted(runs)
        self._add_salient(trie, latent, [runs[number] for number in kept], wholes[kept], values[kept])

    def _add_salient(
        self,
        trie: PatternTrie,
        latent: int,
        runs: list[Run],
        wholes: np.ndarray,
        values: np.ndarray,
        substitutes: bool = True,
    ) -> None:
        changed = [
            variant
            for tokens, behind in runs
            for variant in (
                *(
                    ((*tokens[:place], self.reader.pad, *tokens[place + 1 :]), behind)
                    for place in range(len(tokens))
                    if place != len(tokens) - 1 - behind
                ),
                ((self.reader.pad, *tokens), behind),
            )
        ]
        left = iter(self.reader.activations(latent, changed).tolist())
        patterns, fronts = [], []
        for (tokens, behind), whole in zip(runs, wholes, strict=True):
            own = len(tokens) - 1 - behind  # a latent that fires on padding too would be said to fire on everything
            salient = [
                token if place == own or 1 - next(left) / whole >= HALF else WILDCARD
                for place, token in enumerate(tokens)
            ]
            patterns.append(salient)
            fronts.append([START] if next(left) < HALF * whole else [])
        for run, pattern, front, value in zip(runs, patterns, fronts, values, strict=True):
            trie.add([*front, *_written(run, pattern)], float(value))
        if substitutes and self.substitutes and self.data.has_loss and not self.reader.sees_ahead and runs:
            self._add_substitutes(trie, latent, runs, patterns, fronts, wholes, values)

    def _add_substitutes(
        self,
        trie: PatternTrie,
        latent: int,
        runs: list[Run],
        patterns: list[list[int]],
        fronts: list[list[int]],
        wholes: np.ndarray,
        values: np.ndarray,
    ) -> None:
        likely = self.reader.likely([tokens for tokens, _ in runs], self.substitutes)
        tried = [
            (number, place, token)
            for number, (tokens, _) in enumerate(runs)
            for place, key in enumerate(patterns[number])
            if key != WILDCARD
            for token in likely[number][place]
            if token != tokens[place]
        ]
        variants = [
            ((*runs[number][0][:place], token, *runs[number][0][place + 1 :]), 0) for number, place, token in tried
        ]
        for (number, place, token), found in zip(
            tried, self.reader.activations(latent, variants).tolist(), strict=True
        ):
            if found >= HALF * wholes[number]:
                changed = [*patterns[number][:place], token, *patterns[number][place + 1 :]]
                trie.add([*fronts[number], *changed], float(values[number] * found / wholes[number]))


def evenly(values: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return the numbers of `count` of the values, drawn evenly over their ranks; of all if there are fewer."""
    order = np.argsort(-values, kind="stable")
    if len(order) <= count:
        return order
    ranks = (np.arange(count) + generator.uniform(size=count)) * len(order) / count
    ranks[0] = 0  # the largest activation is always one of them
    return order[ranks.astype(int)]


def _written(run: Run, pattern: list[int]) -> list[int]:
    """Return a pattern with `HERE` after the token on which it fires, unless that is the last."""
    behind = run[1]
    return [*pattern[: len(pattern) - behind], HERE, *pattern[len(pattern) - behind :]] if behind else pattern


def score(latent: int, trie: PatternTrie, test: Examples, examples: int = 0) -> Explained:
    """How well patterns predict a latent on other text.

    Args:
        latent (`int`): Which one; its firings are in `test`.
        trie ([`PatternTrie`]): Its patterns.
        test ([`Examples`]): Text that they were not made from.
        examples (`int`, *optional*): From how many places they were made.
    """
    keep = test.keep.flatten().numpy()
    actual = test.dense(latent).flatten().numpy()[keep].astype(np.float64)
    predicted = trie.predict(test.windows.numpy()).reshape(-1)[keep]
    fires, said = actual > 0, predicted > 0
    both = float((fires & said).sum())
    precision = both / said.sum() if said.any() else 0.0
    recall = both / fires.sum() if fires.any() else 0.0
    varies = actual.std() > 0 and predicted.std() > 0
    return Explained(
        latent=latent,
        precision=float(precision),
        recall=float(recall),
        f1=float(2 * precision * recall / (precision + recall)) if both else 0.0,
        correlation=float(np.corrcoef(actual, predicted)[0, 1]) if varies else 0.0,
        fired=int(fires.sum()),
        predicted=int(said.sum()),
        frequency=float(fires.mean()),
        examples=examples,
        patterns=trie.patterns,
    )
