"""The latents of a text: which fire on each token, and each latent's activations along it."""

import logging
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import TokenBatch, TokenStream, harvest, resolve_hookpoints
from ..common.checks import check_at_least
from ..common.token_text import token_texts
from ..models import SAEModel
from ..models.sparse_ops import LatentPairs
from ..progressive.statistics import encoded
from .firings import values_of


logger = logging.getLogger(__name__)

_NO_LIMIT = 10**9


@dataclass
class TextFeatures:
    """The latents of a text.

    Args:
        tokens (`list[str]`): The text of each of the T tokens, not escaped: a page that shows it has to do that.
        token_ids (`Tensor` of shape `(T,)`): Token ids, int64.
        read (`Tensor` of shape `(T,)`): bool; `False` at special tokens and the first token, whose hidden states are
            unlike all others, so that their latents are left out.
        top (`list[list[tuple[int, float]]]`): For each token its strongest latents with their values, strongest first.
        left_out (`int`): Number of tokens cut off at the end of the text.
        width (`int`): Number of latents that were encoded.
        pairs ([`LatentPairs`]): All latents that fire; row t is token t.
    """

    tokens: list[str]
    token_ids: Tensor
    read: Tensor
    top: list[list[tuple[int, float]]]
    left_out: int
    width: int
    pairs: LatentPairs

    def activations(self, latent: int) -> Tensor:
        """Return the activations `(T,)` of one latent along the text.

        Raises:
            `ValueError`: if there is no such latent at this width.
        """
        latent = checked_latent(latent, self.width)
        return values_of(self.pairs, torch.tensor([latent]))[:, 0]

    def top_latents(self, count: int = 10, by: str = "max") -> list[tuple[int, float]]:
        """Return the strongest latents of the whole text.

        Args:
            count (`int`, *optional*, defaults to 10): Number of latents.
            by (`str`, *optional*, defaults to `"max"`): Strength: the largest activation (`"max"`) or the `"sum"`.

        Returns:
            `list[tuple[int, float]]`: Latents with their strengths, largest first.
        """
        if by not in ("max", "sum"):
            raise ValueError(f"`by` must be 'max' or 'sum', got {by!r}.")
        reduce = {"max": "amax", "sum": "sum"}[by]
        strength = torch.zeros(self.width).scatter_reduce_(0, self.pairs.cols, self.pairs.values.float(), reduce)
        order = strength.argsort(descending=True, stable=True)[:count]
        return [(int(latent), float(strength[latent])) for latent in order if strength[latent] > 0]


def text_features(
    sae: SAEModel,
    model: nn.Module,
    tokenizer: Any,
    text: str,
    hookpoint: str | None = None,
    width: int | None = None,
    top: int = 5,
    max_tokens: int = 2048,
) -> TextFeatures:
    """Encode a text as in the SAE's training, with the tokenizer's special tokens around it; return its latents.

    Args:
        sae ([`SAEModel`]): The SAE, encoded as at inference.
        model (`nn.Module`): The language model, in `eval` mode.
        tokenizer: The language model's tokenizer.
        text (`str`): Any text.
        hookpoint (`str`, *optional*): Module whose hidden states the SAE reads; by default the one in its config.
        width (`int`, *optional*): Encode with the first `width` latents alone; all by default.
        top (`int`, *optional*, defaults to 5): Number of latents in `top` for each token.
        max_tokens (`int`, *optional*, defaults to 2048): A text with more tokens than this, or than the model can
            read, is cut off there; a warning and `left_out` say so.

    Raises:
        `ValueError`: if the text is empty or special tokens alone, or the model has no such hookpoint.
    """
    check_at_least(1, top=top, max_tokens=max_tokens)
    sae = sae if width is None else sae.truncate(width)
    (hookpoint,) = resolve_hookpoints(model, [own_hookpoint(sae, hookpoint)])
    batch, left_out = read_text(tokenizer, text, min(max_tokens, longest(model)))
    if left_out:
        logger.warning("The text is %d tokens too long; they were left out at its end.", left_out)
    batch = batch.to(next(model.parameters()).device)
    states = harvest(model, batch.input_ids, batch.attention_mask, [hookpoint])[hookpoint]
    read = batch.keep[0].cpu()
    firing = encoded(sae, states[batch.keep].float().to(sae.W_enc.device))
    places = read.nonzero().flatten()  # of the read tokens among all
    rows, cols, values = places[firing.rows.cpu()], firing.cols.cpu(), firing.values.float().cpu()
    index = type(firing.index)(rows, cols, len(read), firing.num_latents)
    pairs = LatentPairs(index, values)
    return TextFeatures(
        tokens=token_texts(tokenizer, batch.input_ids[0].tolist()),
        token_ids=batch.input_ids[0].cpu(),
        read=read,
        top=strongest(pairs, top),
        left_out=left_out,
        width=firing.num_latents,
        pairs=pairs,
    )


def checked_latent(latent: int, width: int) -> int:
    """Return a latent's number as `int`; raise `ValueError` if there is no such latent."""
    if isinstance(latent, bool) or not isinstance(latent, Integral) or not 0 <= latent < width:
        raise ValueError(f"At this width latents are numbered 0 to {width - 1}, got {latent!r}.")
    return int(latent)


def own_hookpoint(sae: SAEModel, hookpoint: str | None) -> str:
    """Return the hookpoint, by default that of the SAE's config; raise `ValueError` where neither names one."""
    if hookpoint is None and sae.config.hookpoint is None:
        raise ValueError("This SAE's config names no hookpoint; pass one, for example 'model.layers.2'.")
    return hookpoint or sae.config.hookpoint


def longest(model: nn.Module) -> int:
    """Return the largest number of tokens a model can read; a huge number where its config does not say."""
    return getattr(model.config, "max_position_embeddings", None) or _NO_LIMIT


def read_text(tokenizer: Any, text: str, max_tokens: int) -> tuple[TokenBatch, int]:
    """Tokenise a text into a batch of one row; return it with the number of tokens cut off at its end.

    Raises:
        `ValueError`: if the text has no tokens but special ones, or there is no room for others.
    """
    if not isinstance(text, str):
        raise ValueError(f"Expected a text, got {text!r:.80} of type {type(text).__name__}.")
    if not text.strip():
        raise ValueError("Expected a text with something in it; this one is empty.")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if set(ids) <= _special(tokenizer):
        raise ValueError(
            f"The text {text!r:.80} consists of special tokens alone, at which no latents are read. Add other text."
        )
    whole = next(TokenStream([text], tokenizer, _NO_LIMIT, 1, pack=False, num_epochs=1))
    left_out = max(0, whole.input_ids.shape[1] - max_tokens)
    if not left_out:
        return whole, 0
    return next(TokenStream([text], tokenizer, max_tokens, 1, pack=False, num_epochs=1)), left_out


def _special(tokenizer: Any) -> set[int]:
    """Return the special tokens; the unknown token counts as text, unless it also has another job."""
    jobs = {getattr(tokenizer, f"{job}_token_id", None) for job in ("bos", "eos", "sep", "cls", "pad", "mask")}
    return set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - jobs)


def strongest(pairs: LatentPairs, top: int) -> list[list[tuple[int, float]]]:
    """Return the strongest latents of each token with their values, strongest first."""
    by_token: list[list[tuple[int, float]]] = [[] for _ in range(pairs.num_rows)]
    for place in pairs.values.argsort(descending=True, stable=True).tolist():
        row = by_token[int(pairs.rows[place])]
        if len(row) < top and pairs.values[place] > 0:
            row.append((int(pairs.cols[place]), float(pairs.values[place])))
    return by_token
