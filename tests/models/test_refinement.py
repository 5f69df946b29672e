"""Refined codes: against the equations in float64, and what they share with all others."""

import pytest
import torch
from torch import Tensor

from hf_matryoshka_sae import SAEModel, TopKSAEConfig

from .reference import PREFIXES, VARIANTS, F, assert_close, dense_latents, hidden_states, make_sae


N, SIZE = 7, 0.3
variants = pytest.mark.parametrize("variant", VARIANTS)


def refined_reference(sae: SAEModel, x: Tensor, steps: int, width: int = F) -> Tensor:
    """Activations (N, F), token by token: what a step adds to a pre-activation stands in that token's biases."""
    state, W_dec = dict(sae.state_dict()), sae.W_dec[:width]
    rows = []
    for token in x.split(1):
        shift = torch.zeros(F, dtype=x.dtype)
        for step in range(steps + 1):
            moved = state | {"b_enc": state["b_enc"] + shift}
            if "b_mag" in state:
                moved["b_mag"] = state["b_mag"] + state["r_mag"].exp() * shift
            acts = dense_latents(sae, moved, token, width, "restrict")
            if step < steps:
                residual = token - acts[:, :width] @ W_dec - state["b_dec"]
                shift[:width] += SIZE * (residual @ W_dec.T)[0] / W_dec.square().sum(1)
        rows.append(acts)
    return torch.cat(rows)


@pytest.mark.usefixtures("way")
@variants
@pytest.mark.parametrize("fields", [{}, {"apply_b_dec_to_input": False}], ids=["", "b_dec unused"])
def test_codes_follow_the_equations(variant, fields):
    sae, x = make_sae(variant, refine_steps=2, refine_step_size=SIZE, **fields), hidden_states(N)
    with torch.no_grad():
        expected = refined_reference(sae, x, steps=2)
        output = sae(x)
    assert not torch.allclose(expected, refined_reference(sae, x, steps=1))
    assert_close(output.latents.to_dense(), expected)
    assert_close(output.reconstruction, expected @ sae.W_dec + sae.b_dec)


@variants
def test_a_prefix_refines_by_itself(variant):
    sae, x = make_sae(variant, refine_steps=1, refine_step_size=SIZE), hidden_states(N)
    with torch.no_grad():
        for width in PREFIXES:
            expected = refined_reference(sae, x, 1, width)[:, :width]
            assert_close(sae.encode(x, width=width).to_dense()[:, :width], expected)
            assert_close(sae.truncate(width).encode(x).to_dense(), expected)


@variants
def test_units_change_nothing(variant):
    sae, x = make_sae(variant, refine_steps=2, refine_step_size=SIZE), hidden_states(N)
    mean, scale = torch.randn(x.shape[1], dtype=x.dtype), 3.5
    with torch.no_grad():
        expected = sae(x)
        sae.fold_normalization_(mean, scale)
        moved = sae(x * scale + mean)
    assert_close(moved.reconstruction, expected.reconstruction * scale + mean)
    if "topk" not in variant or "batch" in variant:  # which k are largest depends on the lengths of rows
        sae.fold_decoder_norm_()
        with torch.no_grad():
            assert_close(sae(x * scale + mean).reconstruction, moved.reconstruction)


def test_every_place_of_a_token_that_is_not_finite_is_nan_and_no_other():
    sae, x = make_sae("matryoshka-batch_topk", refine_steps=2), hidden_states(N)
    expected = sae(x).reconstruction
    x[2, 1] = torch.inf
    found = sae(x).reconstruction
    others = torch.arange(N) != 2
    assert found[2].isnan().all() and torch.equal(found[others], expected[others])


def test_it_is_saved_with_the_sae(tmp_path):
    sae, x = make_sae("matryoshka-jumprelu", torch.float32, refine_steps=3, refine_step_size=0.1), hidden_states(N)
    sae.save_pretrained(tmp_path)
    again = type(sae).from_pretrained(tmp_path)
    assert (again.config.refine_steps, again.config.refine_step_size) == (3, 0.1)
    assert torch.equal(again(x.float()).reconstruction, sae(x.float()).reconstruction)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"refine_steps": -1}, "at least 0"),
        ({"refine_steps": 1, "refine_step_size": 0.0}, r"\(0, 1\]"),
        ({"refine_steps": 1, "refine_step_size": 1.5}, r"\(0, 1\]"),
        ({"refine_steps": 1, "scale_by_decoder_norm": True}, "fold_decoder_norm_"),
    ],
)
def test_what_cannot_be_refined_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        TopKSAEConfig(d_in=4, num_latents=8, k=2, **fields)
