"""Shuffled activations: token batches go through the language model to the last hookpoint, then into a buffer.

    for rows in ActivationStream(model, tokens, ["model.layers.1"], batch_size=2048, buffer_tokens=2**17):
        rows["model.layers.1"]  # [2048, D], tokens from many sequences

Shapes: B windows of S tokens, N rows in a batch, D width of a hookpoint.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .hookpoints import harvest
from .shuffled import ShuffledStream
from .text.tokens import TokenBatch, TokenStream
from .text.windows import WindowShuffle


class ActivationStream(ShuffledStream):
    """Iterator over batches of hidden states, shuffled across sequences, resumable bit for bit.

    Tokens whose hidden state at some hookpoint is not finite (NaN or infinite) are left out before they are shuffled
    and counted: one of them in a batch would make the whole batch useless.

    Args:
        model (`nn.Module`): a transformers model; it is put in `eval` mode.
        token_stream ([`TokenStream`] or [`WindowShuffle`]): tokens to read; its batches are those of the forward pass.
        hookpoints (`list[str]`): as [`resolve_hookpoints`] returns them.
        batch_size (`int`): rows in a batch, in this process.
        buffer_tokens (`int`): rows the shuffle buffer holds, per hookpoint. It is refilled when half empty.
        device (`torch.device`, *optional*): device of the rows; by default the model's.
        dtype (`torch.dtype`, *optional*): type of the rows; by default the model's.
        seed (`int`, *optional*, defaults to `0`): seed of the shuffle.
        max_norm_factor (`float`, *optional*): leave out tokens whose norm at some hookpoint exceeds this many times
            the median norm of their token batch.

    Attributes:
        tokens_seen (`int`): rows given out by this process.
        num_outliers (`int`): rows left out by `max_norm_factor`.
        num_not_finite (`int`): rows left out because they are not finite.

    Raises:
        `ValueError`: the buffer cannot hold a batch beside one forward pass, or the windows are longer than the model
            can read; while reading, the hidden states of many forward passes in a row are not finite.
    """

    _reads = "forward passes"
    _remedy = (
        "Load the language model in another type (`model_dtype: float32` or bfloat16), or choose another hookpoint."
    )

    def __init__(
        self,
        model: nn.Module,
        token_stream: TokenStream | WindowShuffle,
        hookpoints: Sequence[str],
        batch_size: int,
        buffer_tokens: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        max_norm_factor: float | None = None,
    ) -> None:
        _check_context_length(model, token_stream.context_length)
        tokens_per_forward = token_stream.batch_size_sequences * token_stream.context_length
        super().__init__(hookpoints, batch_size, buffer_tokens, tokens_per_forward, seed)
        self.model, self.token_stream = model.eval(), token_stream
        self._device, self._dtype, self._max_norm_factor = device, dtype, max_norm_factor
        self.num_outliers = 0

    def _read(self) -> dict[str, Tensor] | None:
        batch = next(self.token_stream, None)
        if batch is None:
            return None
        rows = harvest_rows(self.model, batch, self.hookpoints)
        if self._max_norm_factor is not None:
            rows = self._without_outliers(rows)
        return {name: to_device(values, self._device or values.device, self._dtype) for name, values in rows.items()}

    def _without_outliers(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        outlier = torch.stack([_is_outlier(values, self._max_norm_factor) for values in rows.values()]).any(0)
        kept = (~outlier).nonzero()[:, 0]
        self.num_outliers += len(outlier) - len(kept)
        return {name: values.index_select(0, kept) for name, values in rows.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the rows."""
        return self._dtype or next(self.model.parameters()).dtype

    def _row_device(self) -> torch.device | str:
        return self._device or self._read_device()

    def _read_device(self) -> torch.device:
        return next(self.model.parameters()).device

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue: token position, waiting rows, generator."""
        state = super().state_dict()  # which ends the thread that reads ahead, and counts
        return state | {"num_outliers": self.num_outliers, "token_stream": self.token_stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, given the same model, data and options."""
        super().load_state_dict(state)
        self.token_stream.load_state_dict(state["token_stream"])
        self.num_outliers = state["num_outliers"]


def harvest_rows(model: nn.Module, batch: TokenBatch, hookpoints: Sequence[str]) -> dict[str, Tensor]:
    """Return the hidden states at the kept positions of a token batch.

    Args:
        model (`nn.Module`): the language model.
        batch ([`TokenBatch`]): tokens, on any device.
        hookpoints (`list[str]`): hookpoints, as [`resolve_hookpoints`] returns them.

    Returns:
        `dict[str, Tensor]`: `[N, D]` for each hookpoint, in reading order, on the model's device.
    """
    device = next(model.parameters()).device
    kept = to_device(batch.keep.flatten().nonzero()[:, 0], device)  # counted on the CPU: no wait for the device
    attention_mask = to_device(batch.attention_mask, device) if batch.padded else None
    states = harvest(model, to_device(batch.input_ids, device), attention_mask, hookpoints)
    return {name: values.flatten(0, 1).index_select(0, kept.to(values.device)) for name, values in states.items()}


def to_device(values: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Move a tensor to a device and a type; from the CPU to a GPU through pinned memory, without waiting for it.

    Args:
        values (`Tensor`): the tensor, which is returned as it is where nothing changes.
        device (`torch.device`): device of the result.
        dtype (`torch.dtype`, *optional*): type of the result; by default that of `values`.
    """
    if values.device.type == "cpu" and torch.device(device).type == "cuda":
        return values.to(dtype or values.dtype).pin_memory().to(device, non_blocking=True)
    return values.to(device, dtype or values.dtype)


def _is_outlier(rows: Tensor, factor: float) -> Tensor:
    norms = torch.linalg.vector_norm(rows.float(), dim=1)
    finite = norms.isfinite()
    return finite & (norms > factor * norms.where(finite, torch.nan).nanmedian())


def _check_context_length(model: nn.Module, context_length: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and context_length > limit:
        raise ValueError(f"`context_length` is {context_length}, but the model reads at most {limit} tokens.")
