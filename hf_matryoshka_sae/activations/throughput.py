"""What harvesting costs beside the language model's own work."""

import time
from collections.abc import Callable

import torch

from .hookpoints import harvest
from .stream import ActivationStream


def harvest_throughput(stream: ActivationStream, batches: int = 50, repeats: int = 3) -> dict[str, float]:
    """Compares an activation stream with the bare forward passes it makes.

    The bare pass stops at the same module and keeps nothing; the stream also reads and tokenises text, selects rows,
    writes them into its buffer and draws them. Both are timed in turns and the best of each counts, so that other work
    on the machine weighs little.

    Args:
        stream ([`ActivationStream`]): endless; it is used up by the measurement.
        batches (`int`, *optional*, defaults to `50`): forward passes per timing.
        repeats (`int`, *optional*, defaults to `3`): timings of each.

    Returns:
        `dict[str, float]`: `bare_tokens_per_second` and `stream_tokens_per_second` (tokens read by the model), and
        `ratio`, the second over the first.
    """
    device = next(stream.model.parameters()).device
    inputs = [next(stream.token_stream) for _ in range(batches)]
    tokens = sum(batch.input_ids.numel() for batch in inputs)

    def bare() -> None:
        for batch in inputs:
            attention_mask = batch.attention_mask.to(device) if batch.padded else None
            harvest(stream.model, batch.input_ids.to(device), attention_mask, stream.hookpoints)

    kept = sum(int(batch.keep.sum()) for batch in inputs)

    def streamed() -> None:
        for _ in range(kept // stream.batch_size):
            next(stream)

    next(stream)  # fills the buffer
    bare_seconds, stream_seconds = [], []
    for _ in range(repeats):
        bare_seconds.append(_timed(bare, device))
        stream_seconds.append(_timed(streamed, device))
    rates = tokens / min(bare_seconds), tokens / min(stream_seconds)
    return {"bare_tokens_per_second": rates[0], "stream_tokens_per_second": rates[1], "ratio": rates[1] / rates[0]}


def _timed(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
