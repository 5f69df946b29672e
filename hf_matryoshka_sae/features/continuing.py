"""Let a language model continue a text, as it is or with hidden states that a hook replaces."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.hookpoints import first_tensor
from .text import read_text


def prompt_tokens(tokenizer: Any, prompt: str, room: int) -> Tensor:
    """Return the prompt's tokens `(1, S)`, with the special tokens that begin a text but not those that end it."""
    if room < 1:
        raise ValueError("`max_new_tokens` leaves no room for a prompt in this model's context. Ask for fewer.")
    batch, left_out = read_text(tokenizer, prompt, room)
    if left_out:
        raise ValueError(
            f"The prompt is {left_out} tokens too long: beside the new tokens the model can read {room}. Shorten it, "
            "or ask for fewer new tokens."
        )
    ids = batch.input_ids[0].tolist()
    text = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    # An encoder's closing token, or an EOS that the tokenizer appends, would end the text before it goes on.
    end = next((end for end in range(len(ids), 0, -1) if ids[:end][-len(text) :] == text), len(ids))
    return torch.tensor([ids[:end]])


def continued(
    model: nn.Module, tokenizer: Any, ids: Tensor, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """Return the model's continuation of each row of `ids` `(B, S)`, sampled with `seed` unless the temperature is 0.

    Where a row ends before others it is filled with padding.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, pad_token_id=pad, **options
        )
    return tokens[:, ids.shape[1] :].tolist()


class Reconstructing:
    """A hook that replaces hidden states while text is generated: at the prompt's kept positions and every new one.

    Args:
        replace (`Callable`): Maps hidden states `(n, D)`, row by row, to what takes their place.
        keep (`Tensor` of shape `(B, S)`): bool; the prompt's positions whose states are replaced.
        rows (`Tensor` of shape `(B,)`, *optional*): bool; rows whose new positions are replaced; by default all.
    """

    def __init__(self, replace: Callable[[Tensor], Tensor], keep: Tensor, rows: Tensor | None = None) -> None:
        self.replace, self.keep, self.started = replace, keep, False
        self.rows = torch.ones(len(keep), dtype=torch.bool) if rows is None else rows

    def __call__(self, hookpoint: str, value: Any) -> Tensor | None:
        """Return a module's output with hidden states replaced."""
        states = first_tensor(value)
        if states is None or states.ndim != 3:
            raise ValueError(f"Hookpoint '{hookpoint}' does not carry hidden states [batch, sequence, width].")
        keep = self.rows.to(states.device)[:, None].repeat(1, states.shape[1])
        # The prompt comes in one piece (in every step where the model has no cache), new tokens one by one.
        if not self.started or states.shape[1] > 1:
            keep[:, : self.keep.shape[1]] = self.keep.to(keep.device)
        self.started = True
        states = states.clone()
        states[keep] = self.replace(states[keep]).to(states)
        return states
