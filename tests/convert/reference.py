"""Encoders, activations and decoders in float64, from the formats' equations; and random weights for them.

Nothing here is shared with the package. Matrices are `(F, D)`; a test stores them as the format does.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_matryoshka_sae import SAEModel


SHAPES = [(16, 64), (48, 96), (32, 32), (24, 10)]  # D, F: also as many, and fewer, latents than dimensions
TOLERANCE = 1e-5


def weights(d_in: int, num_latents: int, **more: tuple[int, ...]) -> dict[str, Tensor]:
    """Random weights: no bias is 0, decoder rows have different lengths, thresholds lie between 0.1 and 0.6."""
    drawn = {
        "W_enc": torch.randn(num_latents, d_in) * d_in**-0.5,
        "W_dec": torch.randn(num_latents, d_in) * d_in**-0.5,
        "b_enc": torch.randn(num_latents) * 0.3,
        "b_dec": torch.randn(d_in) * 0.3,
        "threshold": torch.rand(num_latents) * 0.5 + 0.1,
    }
    return drawn | {name: torch.randn(*shape) * 0.3 for name, shape in more.items()}


def inputs(d_in: int) -> Tensor:
    return torch.randn(120, d_in) * 1.5 + 0.2


def relu(pre: Tensor) -> Tensor:
    return pre * (pre > 0)


def jumprelu(threshold: Tensor | float) -> Callable[[Tensor], Tensor]:
    return lambda pre: pre * (pre > 0) * (pre > threshold)


def topk(k: int) -> Callable[[Tensor], Tensor]:
    def activation(pre: Tensor) -> Tensor:
        order = pre.argsort(dim=-1, descending=True)
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(pre.shape[-1]).expand(pre.shape))
        return pre * (pre > 0) * (rank < k)

    return activation


def groupmax(k: int) -> Callable[[Tensor], Tensor]:
    def activation(pre: Tensor) -> Tensor:
        groups = pre.reshape(len(pre), k, -1)
        return (groups * (groups == groups.amax(-1, keepdim=True)) * (groups > 0)).reshape(pre.shape)

    return activation


def encode_decode(
    x: Tensor,
    tensors: dict[str, Tensor],
    activation: Callable[[Tensor], Tensor],
    subtract: bool = True,
    norm: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction; `norm` is `"layer_norm"` or `"constant_norm"`, which is undone at the end."""
    x = x.double()
    W_enc, W_dec, b_enc, b_dec = (tensors[name].double() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    shift, scale = 0.0, 1.0
    if norm == "layer_norm":
        shift = x.mean(-1, keepdim=True)
        scale = x.std(-1, keepdim=True)
        x = (x - shift) / (scale + 1e-5)
    if norm == "constant_norm":
        scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        x = x / scale
    latents = activation((x - b_dec if subtract else x) @ W_enc.T + b_enc)
    return latents, (latents @ W_dec + b_dec) * scale + shift


def assert_computes(sae: SAEModel, x: Tensor, latents: Tensor, reconstruction: Tensor) -> None:
    """Both, by every way of asking, to 1e-5 (also relative to values above 1)."""
    with torch.no_grad():
        found = sae.encode(x)
        pairs = (
            (found.to_dense(), latents),
            (sae.decode(found), reconstruction),
            (sae(x).reconstruction, reconstruction),
        )
    for actual, expected in pairs:
        torch.testing.assert_close(actual.double(), expected.double(), atol=TOLERANCE, rtol=TOLERANCE)
