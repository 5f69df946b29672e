"""Neuron to Graph: can what a latent fires on be written down as patterns of tokens?

After Foote et al. 2023 (arXiv 2305.19911), with the thresholds of Gao et al. 2024 (arXiv 2406.04093, section 4.3). For
each example, a context that ends on a token where the latent fires:

1. *prune*: keep the shortest run of last tokens on which the activation is at least half of what it was;
2. *saliency*: 1 - activation with the token replaced by padding / activation; a token below 0.5 becomes a wildcard,
   but for the last, on which the latent fires;
3. *start*: if padding before the run halves the activation, the run has to stand at the start of a context;
4. *substitutes*: salient tokens are exchanged for what the language model itself finds likely there; where the
   activation stays at least half, that is a pattern too.

The patterns predict activations on other text; precision and recall are of firing, the correlation is Pearson's.

Shapes: N windows of S tokens, D `d_in`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...activations import harvest
from ...common.distributed import processes
from ...evaluation.data import HeldOut
from ...features.firings import Firings, joined, span, values_of
from ...models import SAEModel
from .n2g_trie import START, WILDCARD, PatternTrie


HALF = 0.5
_LONGEST = 32
_TOKENS_AT_ONCE = 2**14


@dataclass(frozen=True)
class Explained:
    """How well a latent's patterns say where it fires.

    Args:
        latent (`int`): Its place in the dictionary.
        precision (`float`), recall (`float`), f1 (`float`): Of predicted against actual firing on the test text;
            precision is 0 where nothing is predicted, recall where it never fires.
        correlation (`float`): Pearson's, of predicted and actual activation; 0 where either does not vary.
        fired (`int`), predicted (`int`): Tokens of the test text.
        examples (`int`), patterns (`int`): From which its graph is made, and how many are in it.
    """

    latent: int
    precision: float
    recall: float
    f1: float
    correlation: float
    fired: int
    predicted: int
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
    for batch in tqdm(data.batches, desc="examples", disable=not show or processes()[0] != 0, leave=False):
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
        examples (`int`, *optional*, defaults to 16): For each latent; half of them where it fires most, half drawn.
        substitutes (`int`, *optional*, defaults to 5): Likely tokens that are tried in place of each salient one; 0
            for none.
        seed (`int`, *optional*, defaults to 0): Of the drawn examples.
    """

    def __init__(self, sae: SAEModel, data: HeldOut, examples: int = 16, substitutes: int = 5, seed: int = 0) -> None:
        if examples < 1 or substitutes < 0:
            raise ValueError(f"Expected `examples` >= 1 and `substitutes` >= 0, got {examples} and {substitutes}.")
        self.sae, self.data, self.count, self.substitutes, self.seed = sae.eval(), data, examples, substitutes, seed
        tokenizer = data.tokenizer
        if tokenizer is None:
            raise ValueError("Patterns need the language model's tokenizer: `HeldOut(..., tokenizer=...)`.")
        self.bos: int | None = tokenizer.bos_token_id
        fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, self.bos, 0)
        self.pad = next(token for token in fillers if token is not None)

    def explain(self, latent: int, found: Examples) -> PatternTrie:
        """The patterns of a latent.

        Raises:
            `ValueError`: if there are no examples of it.
        """
        trie = PatternTrie()
        for tokens, value in self._chosen(latent, found):
            self._add(trie, latent, tokens, value)
        return trie

    def _chosen(self, latent: int, found: Examples) -> list[tuple[list[int], float]]:
        """Contexts `(tokens up to the one it fires on, activation)`: the strongest, and some of the others."""
        if latent not in found.fired or not len(found.fired[latent][0]):
            raise ValueError(f"There are no examples of latent {latent}: it does not fire, or was not looked for.")
        places, values = found.fired[latent]
        inside = (found.windows != (WILDCARD if self.bos is None else self.bos)).numpy()
        order = values.argsort(descending=True, stable=True)
        top = order[: -(-self.count // 2)]
        rest = order[len(top) :]
        generator = torch.Generator().manual_seed(self.seed + latent)
        drawn = rest[torch.randperm(len(rest), generator=generator)[: self.count - len(top)]]
        contexts = []
        for index in torch.cat([top, drawn]).tolist():
            row, column = divmod(int(places[index]), inside.shape[1])
            # What stands before a separator is of another document.
            start, stop = span(inside[row], column, _LONGEST - 1, 0)
            contexts.append((found.windows[row, start:stop].tolist(), float(values[index])))
        return contexts

    def _add(self, trie: PatternTrie, latent: int, tokens: list[int], value: float) -> None:
        runs = [tokens[-size:] for size in range(1, len(tokens) + 1)]
        activations = self._activations(latent, runs)
        size = next((n for n, found in enumerate(activations, start=1) if found >= HALF * value), None)
        if size is None:  # what it saw reaches back further than the run
            size = len(tokens)
        run, whole = runs[size - 1], float(activations[size - 1])
        if whole <= 0:
            trie.add(run, value)
            return
        without = [[*run[:place], self.pad, *run[place + 1 :]] for place in range(size)]
        *salient, padded = self._activations(latent, [*without, [self.pad, *run]])
        pattern = [
            token if 1 - float(left) / whole >= HALF else WILDCARD for token, left in zip(run, salient, strict=True)
        ]
        pattern[-1] = run[-1]  # a latent that fires on padding too would be said to fire on everything
        front = [START] if padded < HALF * whole else []
        trie.add([*front, *pattern], value)
        self._add_substitutes(trie, latent, run, pattern, front, whole, value)

    def _add_substitutes(
        self,
        trie: PatternTrie,
        latent: int,
        run: list[int],
        pattern: list[int],
        front: list[int],
        whole: float,
        value: float,
    ) -> None:
        places = [place for place, key in enumerate(pattern) if key != WILDCARD]
        if not self.substitutes or not places or not self.data.has_loss:
            return
        likely = self._likely(run)
        tried = [(place, token) for place in places for token in likely[place] if token != run[place]]
        if not tried:  # what the model finds likely is what stands there
            return
        runs = [[*run[:place], token, *run[place + 1 :]] for place, token in tried]
        for (place, token), found in zip(tried, self._activations(latent, runs), strict=True):
            if found >= HALF * whole:
                changed = [*pattern[:place], token, *pattern[place + 1 :]]
                trie.add([*front, *changed], value * float(found) / whole)

    def _likely(self, run: list[int]) -> list[list[int]]:
        """The tokens that the language model finds likeliest at each place of a run."""
        ids = torch.tensor([[self._front(), *run]], device=self.data.device)
        logits = self.data.model(input_ids=ids).logits[0, :-1]
        return logits.topk(self.substitutes).indices.tolist()

    def _front(self) -> int:
        return self.pad if self.bos is None else self.bos

    def _activations(self, latent: int, runs: Sequence[Sequence[int]]) -> np.ndarray:
        """The latent's activation on the last token of each run, read as the start of a context."""
        front = [] if self.bos is None else [self.bos]
        longest = max(map(len, runs)) + len(front)
        found = []
        at_once = max(1, _TOKENS_AT_ONCE // longest)
        for start in range(0, len(runs), at_once):
            part = [[*front, *run] for run in runs[start : start + at_once]]
            # Padding stands behind: a token does not see what comes after it.
            ids = torch.tensor([[*run, *[self.pad] * (longest - len(run))] for run in part], device=self.data.device)
            states = harvest(self.data.model, ids, None, [self.data.hookpoint])[self.data.hookpoint]
            last = torch.tensor([len(run) - 1 for run in part], device=states.device)
            rows = states[torch.arange(len(part), device=states.device), last].float()
            found.append(latent_values(self.sae, rows, latent))
        return torch.cat(found).numpy()


@torch.no_grad()
def latent_values(sae: SAEModel, x: Tensor, latent: int) -> Tensor:
    """One latent's values `(n,)` on hidden states `(n, D)`, at inference."""
    return values_of(sae.encode_pairs(x.to(sae.W_enc)), torch.tensor([latent]))[:, 0]


def score(latent: int, trie: PatternTrie, test: Examples, examples: int = 0) -> Explained:
    """How well patterns predict a latent on other text.

    Args:
        latent (`int`): Which one; its firings are in `test`.
        trie ([`PatternTrie`]): Its patterns.
        test ([`Examples`]): Text that they were not made from.
        examples (`int`, *optional*): From how many they were made.
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
        examples=examples,
        patterns=trie.patterns,
    )
