"""Errors of half-precision hidden states, of which a few are very large, as massive activations are."""

import pytest
import torch

from ..axes import each
from .reference import VARIANTS, D, dense_forward, make_sae


def large_states(dtype: torch.dtype) -> torch.Tensor:
    """Norms of 3e4 in float16 and 1e6 in bfloat16, nearly all of it in one dimension."""
    x = torch.randn(40, D)
    x[:, 0] = 3e4 if dtype == torch.float16 else 1e6
    return x.to(dtype)


@each(dtype=[torch.float16, torch.bfloat16], variant=list(VARIANTS))
def test_squared_errors_are_summed_in_float32(variant, dtype):
    sae, x = make_sae(variant, dtype), large_states(dtype)
    with torch.no_grad():
        sae.W_enc.mul_(1e-3)  # latents that float16 can hold
    exact = make_sae(variant)
    exact.load_state_dict(sae.state_dict())
    expected = dense_forward(exact, x.double())[2].item()
    output = sae(x)
    assert output.loss.dtype == output.losses["sse"].dtype == torch.float32 and output.reconstruction.dtype == dtype
    assert output.loss.item() == pytest.approx(expected, rel=0.02)
    sse, residual = sae.prefix_errors(sae.encode_pairs(x), x, sae.prefix_widths)
    assert sse.dtype == torch.float32 and residual.dtype == dtype
    assert sse.mean().item() == pytest.approx(expected, rel=0.02)
    (sse.mean() / 1e6).backward()
    assert all(parameter.grad.isfinite().all() for parameter in (sae.W_dec, sae.b_dec))


def test_lengths_are_measured_in_float32():
    x = torch.full((2, D), 6e4).half()
    x[1] = 0
    normalised, (_, scale) = make_sae("relu", torch.float16, input_normalization="constant_norm").normalized(x)
    torch.testing.assert_close(normalised[0], torch.ones(D).half())
    assert scale[0].item() == pytest.approx(6e4, rel=1e-3) and not normalised[1].any()
