"""Generate text with one latent changed, beside the plain text: [`steered`] on one prompt."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from ..activations import resolve_hookpoints
from ..activations.hookpoints import first_tensor, hooked
from ..features.continuing import continued, prompt_tokens
from ..features.firings import values_of
from ..features.text import checked_latent, longest, own_hookpoint
from ..models import SAEModel
from ..progressive.statistics import encoded
from .applying import applied
from .change import Change
from .parts import part_of


MODES = ("add", "clamp", "remove")
"""What the page offers; `"erase"` is no change of one latent's value."""


@dataclass(frozen=True)
class Steered:
    """Two continuations of a prompt.

    Args:
        prompt (`str`): The prompt.
        plain (`str`): Continuation of the unchanged model, without special tokens; text, not markup.
        steered (`str`): Continuation with the latent changed.
        plain_ids (`list[int]`): Token ids of the plain continuation.
        steered_ids (`list[int]`): Token ids of the steered continuation.
        latent (`int`): The latent.
        mode (`str`): Kind of change: `"add"`, `"clamp"` or `"remove"`.
        amount (`float`): Value that was added (`"add"`) or set (`"clamp"`); 0 for `"remove"`.
    """

    prompt: str
    plain: str
    steered: str
    plain_ids: list[int]
    steered_ids: list[int]
    latent: int
    mode: str
    amount: float


def steer(
    sae: SAEModel,
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    latent: int,
    mode: str = "add",
    strength: float = 1.0,
    width: int | None = None,
    hookpoint: str | None = None,
    unit: float | None = None,
    positions: str = "all",
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> Steered:
    """Continue a prompt twice: with the unchanged model, and with a latent changed.

    Args:
        sae ([`SAEModel`]): The SAE, encoded as at inference.
        model (`nn.Module`): A causal language model, in `eval` mode.
        tokenizer: The language model's tokenizer.
        prompt (`str`): Text to continue; like training text it gets the tokenizer's BOS token before it.
        latent (`int`): Latent to change.
        mode (`str`, *optional*, defaults to `"add"`): `"add"` adds `strength * unit` to the latent's value, `"clamp"`
            sets it to that, `"remove"` sets it to 0.
        strength (`float`, *optional*, defaults to 1.0): Size of the change, as a multiple of `unit`; may be negative.
        width (`int`, *optional*): Encode with the first `width` latents alone; all by default.
        hookpoint (`str`, *optional*): Module whose output is changed; by default the one in the SAE's config.
        unit (`float`, *optional*): Activation that `strength` multiplies, such as the latent's largest on data, from a
            feature index. By default its largest activation on the prompt and the plain continuation.
        positions (`str`, *optional*, defaults to `"all"`): Positions to change: `"all"`, or `"new"`, which are those
            from the prompt's last token on, which decides the first new token.
        max_new_tokens (`int`, *optional*, defaults to 40): Largest number of new tokens.
        temperature (`float`, *optional*, defaults to 0): Temperature of sampling; 0 takes the likeliest token.
        seed (`int`, *optional*, defaults to 0): Seed of the sampling, the same for both continuations.

    Returns:
        [`Steered`]: Both continuations.

    Raises:
        `ValueError`: if an option is out of range or not finite, the model generates no text, the prompt is too long,
            or `unit` is missing and the latent never fires.
    """
    if mode not in MODES or positions not in ("all", "new"):
        raise ValueError(f"Expected `mode` in {MODES} and `positions` 'all' or 'new', got {mode!r} and {positions!r}.")
    _check_numbers(strength, unit, max_new_tokens, temperature, seed)
    if not getattr(model, "can_generate", lambda: False)():
        raise ValueError(f"{type(model).__name__} generates no text; steering needs a causal language model.")
    sae = sae if width is None else sae.truncate(width)
    latent = checked_latent(latent, sae.config.num_latents)
    (hookpoint,) = resolve_hookpoints(model, [own_hookpoint(sae, hookpoint)])
    ids = prompt_tokens(tokenizer, prompt, longest(model) - max_new_tokens).to(next(model.parameters()).device)

    def generate(context: AbstractContextManager) -> list[int]:
        with context:
            return continued(model, tokenizer, ids, max_new_tokens, temperature, seed)[0]

    if mode == "remove" or unit is not None:
        plain = generate(nullcontext())
    else:
        watch = _Watch(sae, latent)
        plain, unit = generate(hooked(model, [(hookpoint, watch)])), watch.largest
        if not unit > 0:
            raise ValueError(
                f"Latent {latent} does not fire on this prompt or its continuation, so its own activation is not "
                "known there: pass `unit`, its largest activation on data."
            )
    amount = 0.0 if mode == "remove" else strength * unit
    part = part_of(sae, {latent: amount}, Change(mode, hookpoint, positions=positions))
    steered = generate(applied(model, [part], quiet=True))
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (plain, steered)]
    return Steered(prompt, *texts, plain, steered, latent, mode, amount)


class _Watch:
    """A hook for [`hooked`] that records the largest activation of a latent."""

    def __init__(self, sae: SAEModel, latent: int) -> None:
        self.sae, self.latent, self.largest = sae, torch.tensor([latent]), 0.0

    def __call__(self, hookpoint: str, value: Any) -> None:
        states = first_tensor(value)
        if states is None or states.ndim != 3:
            raise ValueError(f"Hookpoint '{hookpoint}' does not carry hidden states [batch, sequence, width].")
        pairs = encoded(self.sae, states.flatten(0, 1))
        self.largest = max(self.largest, float(values_of(pairs, self.latent).max()))


def _check_numbers(strength: float, unit: float | None, max_new_tokens: int, temperature: float, seed: int) -> None:
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise ValueError(f"Expected one or more new tokens, got `max_new_tokens` {max_new_tokens!r}.")
    if not _is_finite(temperature) or temperature < 0:
        raise ValueError(f"`temperature` must be a finite number of at least 0, got {temperature!r}.")
    if not isinstance(seed, Integral):
        raise ValueError(f"`seed` must be a whole number, got {seed!r}.")
    if not _is_finite(strength):
        raise ValueError(f"`strength` must be a finite number, got {strength!r}.")
    if unit is not None and not _is_finite(unit):
        raise ValueError(f"`unit` must be a finite number such as the latent's largest activation, got {unit!r}.")
    if unit is not None and not _is_finite(strength * unit):
        raise ValueError(f"`strength` times `unit` is too large: {strength!r} and {unit!r}.")


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
