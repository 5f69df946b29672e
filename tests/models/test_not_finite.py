"""A hidden state with NaN or infinity comes out as NaN, in its own row alone."""

import pytest
import torch

from hf_matryoshka_sae.evaluation import Dictionary
from hf_matryoshka_sae.models import CONFIGS, MODELS

from ..axes import each


D, F = 16, 64
FAMILIES = {
    "relu": {},
    "topk": {"k": 4},
    "topk with groups": {"k": 8, "group_size": 8},
    "batch_topk": {"k": 4},
    "jumprelu": {},
    "gated": {},
    **{f"matryoshka {kind}": {"activation": kind, "k": 4} for kind in ("topk", "batch_topk")},
    **{f"matryoshka {kind}": {"activation": kind} for kind in ("relu", "jumprelu")},
}


def build(name, **fields):
    kind = name.split()[0]
    fields = {**FAMILIES[name], **fields}
    if kind == "matryoshka":
        fields["prefix_widths"] = [8, 24, F]
    config = CONFIGS[kind](d_in=D, num_latents=F, **fields)
    torch.manual_seed(0)
    sae = MODELS[type(config)](config).eval()
    sae.b_dec.data.normal_()
    sae.W_dec.data[0, ::2] = 0  # 0 times NaN is NaN too
    if hasattr(sae, "threshold"):
        sae.threshold.data.fill_(0.1)
    return sae


def states(dtype=torch.float32):
    x = torch.randn(4, 6, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    spoiled = x.clone()
    spoiled[0, 2, 5], spoiled[1, 0], spoiled[3, 5, 0] = torch.nan, torch.inf, -torch.inf
    return x, spoiled, (spoiled != x).any(-1)


@each(dtype=[torch.float32, torch.bfloat16], name=list(FAMILIES))
def test_every_family_gives_nan_for_that_row_alone(name, dtype):
    sae = build(name).to(dtype)
    x, spoiled, bad = states(dtype)
    for width in (None, 1, 24):
        expected, found = sae(x, width=width), sae(spoiled, width=width)
        again = sae.decode(sae.encode(spoiled, width=width), width=width)
        masked = sae.decode(sae.encode(spoiled, width=width, selection="mask"))
        for reconstruction in (found.reconstruction, again, masked):
            assert reconstruction[bad].isnan().all()
            assert reconstruction[~bad].isfinite().all()
        torch.testing.assert_close(found.reconstruction[~bad], expected.reconstruction[~bad])
        assert torch.equal(again[~bad], sae.decode(sae.encode(x, width=width), width=width)[~bad])
        assert found.loss.isnan()
    latents = sae.encode(spoiled)
    assert latents.to_dense()[bad].isnan().any(-1).all()
    assert torch.equal(latents.to_dense()[~bad], sae.encode(x).to_dense()[~bad])
    prefixes = sae.decode_prefixes(latents)
    assert prefixes[:, bad].isnan().all() and prefixes[:, ~bad].isfinite().all()


@each(
    fields=[{"scale_by_decoder_norm": True}, {"input_normalization": "constant_norm"}],
    name=["topk", "batch_topk", "relu"],
)
def test_scaled_and_normalised_saes_do_too(name, fields):
    sae = build(name, **fields)
    x, spoiled, bad = states()
    found = sae(spoiled).reconstruction
    assert found[bad].isnan().all() and found[~bad].isfinite().all()
    torch.testing.assert_close(found[~bad], sae(x).reconstruction[~bad])


@pytest.mark.parametrize("training", [False, True])
def test_many_rows_and_a_batch_of_nothing_else(training):
    """So many pairs that matmuls take the place of sums over pairs, and none at all."""
    sae = build("relu").train(training)
    x = torch.randn(8192, D)
    x[77, 3] = torch.nan
    found = sae(x).reconstruction
    assert found[77].isnan().all() and found.isnan().any(1).sum() == 1
    assert sae(x[77:78].expand(5, -1)).reconstruction.isnan().all()
    assert sae(x[:0]).reconstruction.shape == (0, D)


@pytest.mark.parametrize("selection", ["mask", "restrict"])
def test_what_is_spliced_into_a_model_is_nan_too(selection):
    sae = build("matryoshka topk")
    _, spoiled, bad = states()
    found = Dictionary(sae, [8, 64], selection).reconstruct(spoiled.flatten(0, 1))
    assert found[:, bad.flatten()].isnan().all() and found[:, ~bad.flatten()].isfinite().all()


def test_fp16_that_overflows_is_nan():
    sae = build("topk").half()
    x = torch.randn(3, D)
    x[1, 0] = 1e6
    found = sae(x).reconstruction
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
