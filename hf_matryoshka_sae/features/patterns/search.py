"""Rank latents by how well the mask of a token pattern describes their activations.

With mask m (0 or 1 for each token) and activation a, over the kept tokens of held-out data:

    cosine    = sum a m / sqrt(sum a^2 * sum m)
    precision = share of the tokens on which the latent fires that the pattern matches
    recall    = share of the tokens that the pattern matches on which the latent fires
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import regex
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...activations import TokenBatch
from ...common.checks import check_at_least
from ...common.distributed import processes, reduce_sum
from ...evaluation.data import HeldOut
from ...models import SAEModel
from ...models.sparse_ops import LatentPairs
from ...progressive.statistics import firing_blocks
from .matching import TokenPattern
from .parser import Names
from .vocabulary import Vocabulary, vocabulary_of


@dataclass(frozen=True)
class PatternHit:
    """A latent, and how well a mask describes it.

    Args:
        latent (`int`): Position of the latent in the SAE.
        cosine (`float`): Cosine of mask and activations.
        precision (`float`): Share of the tokens on which the latent fires that the pattern matches.
        recall (`float`): Share of the tokens that the pattern matches on which the latent fires.
        tokens_matched (`int`): Number of tokens that the pattern matches, the same for all latents.
    """

    latent: int
    cosine: float
    precision: float
    recall: float
    tokens_matched: int


class MaskSums:
    """Sums over tokens that compare latents with a mask.

    Args:
        num_latents (`int`): Number F of latents.
        device (`torch.device`, *optional*): Device of the sums.
    """

    def __init__(self, num_latents: int, device: torch.device | str = "cpu") -> None:
        # sum a m, sum a^2, tokens on which it fires, tokens on which it fires and the mask is 1
        self.sums = torch.zeros(4, num_latents, dtype=torch.float64, device=device)
        self.matched = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, pairs: LatentPairs, mask: Tensor) -> None:
        """Add the latents of n tokens and the mask `(n,)` over them."""
        mask = mask.to(self.sums)
        values, inside = pairs.values.double(), mask[pairs.rows]
        fires = (values > 0).double()
        for total, what in zip(self.sums, (values * inside, values.square(), fires, fires * inside), strict=True):
            total.index_add_(0, pairs.cols, what)
        self.matched += mask.sum()

    def reduce(self) -> None:
        """Add up over processes."""
        reduce_sum(self.sums, self.matched)

    def hits(self, top: int) -> list[PatternHit]:
        """Return the latents with the largest cosines above 0, best first; ties go to the lower latent."""
        product, square, fires, both = self.sums.cpu()
        matched = self.matched.cpu()
        cosine = product / (square * matched).sqrt()
        cosine = torch.where(product > 0, cosine, 0.0)
        order = cosine.argsort(descending=True, stable=True)[:top]
        return [
            PatternHit(
                latent=int(latent),
                cosine=float(cosine[latent]),
                precision=float(both[latent] / fires[latent]),
                recall=float(both[latent] / matched),
                tokens_matched=int(matched),
            )
            for latent in order
            if cosine[latent] > 0
        ]


def search_latents(
    pattern: str | TokenPattern,
    sae: SAEModel,
    data: HeldOut,
    top: int = 20,
    width: int | None = None,
    show: bool = True,
    names: Names | None = None,
    timeout: float = 2.0,
) -> list[PatternHit]:
    """Return the latents whose activations are most like a pattern's mask.

    Hidden states are harvested once and nothing is kept but sums; each process takes its share of the data.

    Args:
        pattern (`str` or [`TokenPattern`]): The pattern; [`TokenPattern.compile`] reads it.
        sae ([`SAEModel`]): The SAE, encoded as at inference.
        data ([`HeldOut`]): Language model, tokens and hookpoint; for a pattern as `str` with its tokenizer.
        top (`int`, *optional*, defaults to 20): Largest number of latents.
        width (`int`, *optional*): Encode with the first `width` latents alone; all by default.
        show (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        names (`dict`, *optional*): More named patterns (`str`), and sets of texts (`list[str]`).
        timeout (`float`, *optional*, defaults to 2.0): Seconds that matching may take on a batch of the data.

    Returns:
        `list[PatternHit]`: The latents, best first.

    Raises:
        `ValueError`: if the pattern cannot be read, takes too long, or matches no token of the data.
    """
    if not isinstance(pattern, TokenPattern):
        pattern = TokenPattern.compile(pattern, _tokenizer(data), names)

    def mask(batch: TokenBatch) -> Tensor:
        return pattern.mask(batch.input_ids, timeout, batch.attention_mask if batch.padded else None)

    return _search(mask, sae, data, top, width, show, f"the pattern {pattern.source!r}")


def search_words(
    words: str | Sequence[str],
    sae: SAEModel,
    data: HeldOut,
    top: int = 20,
    width: int | None = None,
    show: bool = True,
) -> list[PatternHit]:
    """Return the latents whose activations are most like the mask of some words.

    Args:
        words (`str` or `list[str]`): Words or phrases, matched whole and in any case. Every token of a word is in the
            mask, not only its last.
        sae ([`SAEModel`]): The SAE, encoded as at inference.
        data ([`HeldOut`]): Language model with its tokenizer, tokens and hookpoint.
        top (`int`, *optional*, defaults to 20): Largest number of latents.
        width (`int`, *optional*): Encode with the first `width` latents alone; all by default.
        show (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Raises:
        `ValueError`: if there are no words, or none of them is in the data.
    """
    words = _checked_words(words)
    vocabulary = vocabulary_of(_tokenizer(data))

    def mask(batch: TokenBatch) -> Tensor:
        rows = batch.input_ids.cpu()
        real = batch.attention_mask.cpu().bool()
        batch_mask = torch.zeros(rows.shape, dtype=torch.bool)
        for number, row in enumerate(rows):
            places = real[number].nonzero().flatten()
            batch_mask[number, places] = word_mask(words, row[places].tolist(), vocabulary)
        return batch_mask

    return _search(mask, sae, data, top, width, show, f"the words {', '.join(words)}")


def _checked_words(words: Any) -> list[str]:
    words = [words] if isinstance(words, str) else list(words) if isinstance(words, Iterable) else words
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"Expected a word, or a list of words, got {words!r:.80}.")
    if not words:
        raise ValueError("Expected one or more words to look for, got an empty list.")
    if not all(word.strip() for word in words):
        raise ValueError(
            f"Expected one or more words to look for, got {words!r:.80}: an empty word is everywhere. Leave it out."
        )
    return words


def word_mask(words: Sequence[str], tokens: list[int], vocabulary: Vocabulary) -> Tensor:
    """Return a mask `(T,)` of the tokens of a row that are part of one of the words."""
    pieces = vocabulary.pieces(tokens)
    text = "".join(piece for piece, _ in pieces)
    any_word = "|".join(regex.escape(word.strip()) for word in words)
    # Not \b: a word may begin or end with a sign that is no letter.
    spans = [match.span() for match in regex.finditer(f"(?<!\\w)(?:{any_word})(?!\\w)", text, regex.IGNORECASE)]
    mask, token, start, now = torch.zeros(len(tokens), dtype=torch.bool), 0, 0, 0
    for piece, length in pieces:
        end = start + len(piece)
        while now < len(spans) and spans[now][1] <= start:
            now += 1
        # A token that only brings the space before a word is not part of it.
        overlap = text[max(start, spans[now][0]) : min(end, spans[now][1])] if now < len(spans) else ""
        mask[token : token + length] = bool(overlap)
        token, start = token + length, end
    return mask


def _tokenizer(data: HeldOut) -> Any:
    if data.tokenizer is None:
        raise ValueError("Searching for text needs the language model's tokenizer: `HeldOut(..., tokenizer=...)`.")
    return data.tokenizer


def _search(
    mask: Callable[[TokenBatch], Tensor],
    sae: SAEModel,
    data: HeldOut,
    top: int,
    width: int | None,
    show: bool,
    what: str,
) -> list[PatternHit]:
    check_at_least(1, top=top)
    sae = sae if width is None else sae.truncate(width)
    sums = MaskSums(sae.config.num_latents, sae.W_dec.device)
    masks, problem = [], None
    try:
        # All masks come before any hidden state, so that a pattern that takes too long fails at once.
        masks = [mask(batch) for batch in data.share()]
    except ValueError as error:
        problem = error
    failed = torch.tensor([float(problem is not None)])
    reduce_sum(failed)  # where one process stops they all do, or the others would wait for it
    if failed:
        raise problem or ValueError(f"Looking for {what} failed in another process; its message says why.")
    _add_batches(sums, masks, sae, data, show)
    sums.reduce()
    if not sums.matched:
        raise ValueError(
            f"None of the {data.tokens} tokens of this data matches {what}. In patterns a leading space counts."
        )
    return sums.hits(top)


def _add_batches(sums: MaskSums, masks: list[Tensor], sae: SAEModel, data: HeldOut, show: bool) -> None:
    batches: Iterator = zip(data.share(), masks, strict=True)
    bar = tqdm(batches, desc="search", total=len(masks), disable=not show or processes()[0] != 0, leave=False)
    for batch, mask in bar:
        values, start = mask.to(batch.keep.device)[batch.keep], 0
        if not len(values):
            continue
        for _, _, pairs in firing_blocks(sae, [data.states(batch)]):
            sums.add(pairs, values[start : start + pairs.num_rows])
            start += pairs.num_rows
