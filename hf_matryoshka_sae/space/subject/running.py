"""Whatever runs a language model for the page: each call in its lane, and where a GPU is lent, on that.

Arguments and results are plain values, as they may go to another process; what the arguments say is checked before.
"""

from typing import Any

import torch

from ...features import PatternHit, search_latents, search_words, text_features
from ...steering import Steered, reconstruct_text, steer
from ..limits import on_gpu, wanted
from .indexes import build
from .library import Library
from .opened import Opened, Pruning
from .texts import search_texts


_ALL: list["Runner"] = []
_WHOLE = Pruning()


def _made(number: int) -> "Runner":
    return _ALL[number]


class Runner:
    """Runs the language models of a library.

    Args:
        library ([`Library`]): Opens SAEs.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self._number = len(_ALL)
        _ALL.append(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # To a forked process (see `on_gpu`) goes which one this is, not what it has open.
        return _made, (self._number,)

    def have(self, opened: Opened, kind: str, pruning: Pruning = _WHOLE) -> None:
        """See to it that an open SAE has what must be measured: see [`Opened.compute`]."""
        if not opened.has(kind, pruning):
            opened.keep(kind, pruning, self.compute(opened.source, opened.place, kind, vars(pruning)))

    @on_gpu
    def compute(self, sae: str, place: str, kind: str, pruning: dict[str, Any]) -> Any:
        """Measure what [`Opened.compute`] says."""
        return self.library.open(sae, place).compute(kind, Pruning(**pruning))

    @on_gpu
    def read(self, sae: str, place: str, text: str, width: int, top: int, latent: int | None = None) -> dict[str, Any]:
        """A text's latents: the strongest of each token and of all, or one latent's activations."""
        opened = self.library.open(sae, place)
        with opened.running("text") as data:
            features = text_features(opened.sae, data.model, opened.tokenizer, text, data.hookpoint, width, top, 512)
        if latent is not None:
            return {"tokens": features.tokens, "activations": features.activations(latent).tolist()}
        return {
            "tokens": features.tokens,
            "read": features.read.tolist(),
            "top": [[[latent, value] for latent, value in token] for token in features.top],
            "latents": [
                {"latent": latent, "max": value, "activations": features.activations(latent).tolist()}
                for latent, value in features.top_latents(10)
            ],
            "left_out": features.left_out,
            "width": features.width,
        }

    @on_gpu
    def reconstruct(self, sae: str, place: str, pruning: dict[str, Any], text: str, new_tokens: int) -> dict[str, Any]:
        """A text as a pruned SAE leaves it."""
        opened = self.library.open(sae, place)
        pruned = opened.pruned(Pruning(**pruning))
        with opened.running("generation") as data:
            text_left = reconstruct_text(
                pruned, data.model, data.tokenizer, text, hookpoint=data.hookpoint, max_new_tokens=new_tokens
            )
        lost = text_left.spliced_loss - text_left.loss
        predicted = ~torch.isnan(lost)
        return {
            "tokens": text_left.tokens,
            "lost": [value if ok else None for value, ok in zip(lost.tolist(), predicted.tolist(), strict=True)],
            "ce": _mean(text_left.loss[predicted]),
            "spliced_ce": _mean(text_left.spliced_loss[predicted]),
            "fvu": text_left.fvu,
            "l0": text_left.l0,
            "plain": text_left.plain,
            "spliced": text_left.spliced,
            "left_out": text_left.left_out,
        }

    @on_gpu
    def steer(self, sae: str, place: str, text: str, latent: int, options: dict[str, Any]) -> Steered:
        """A text continued twice: `options` are those of [`steer`]."""
        opened = self.library.open(sae, place)
        with opened.running("generation") as data:
            return steer(opened.sae, data.model, opened.tokenizer, text, latent, hookpoint=data.hookpoint, **options)

    @on_gpu
    def search(self, sae: str, place: str, query: str | list[str], width: int, top: int) -> list[PatternHit]:
        """Latents that fire where a pattern matches, or one of some words."""
        opened = self.library.open(sae, place)
        find = search_latents if isinstance(query, str) else search_words
        with opened.running("search") as data:
            return find(query, opened.sae, data, top, width, show=True)

    @on_gpu
    def search_texts(
        self, sae: str, place: str, texts: tuple[str, ...], query: str, width: int, top: int
    ) -> list[dict[str, Any]]:
        """Texts that answer a query, and the latents that answered."""
        opened = self.library.look(sae, place)
        with self.library.lanes["text"].turn(wanted):
            return search_texts(opened, texts, query, width, top)

    @on_gpu(seconds=300)
    def build_index(self, sae: str, place: str, tokens: int) -> int:
        """Build an SAE's feature index; returns of how many tokens it is."""
        return build(self.library.open(sae, place), tokens)


def _mean(values: torch.Tensor) -> float | None:
    return float(values.mean()) if len(values) else None
