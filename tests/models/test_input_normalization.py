"""SAEs that normalise each hidden state, and group maxima, against references written from the equations."""

import pytest
import torch
from transformers import AutoModel

from hf_matryoshka_sae import SparseLatents, TopKSAE, TopKSAEConfig
from hf_matryoshka_sae.evaluation import Dictionary
from hf_matryoshka_sae.models import encoder_blocks
from hf_matryoshka_sae.progressive import calibrate_thresholds, latent_statistics, prune, refit
from hf_matryoshka_sae.progressive.codec import encode_progressive

from ..axes import each
from .reference import VARIANTS, D, F, assert_close, dense_forward, hidden_states, make_sae
from .test_saving import assert_same_tensors


def normalised(x, kind):
    """Shift, divisor, multiplier of each hidden state (Gao et al.'s code; constant norm: length sqrt(D))."""
    if kind == "constant_norm":
        scale = x.square().sum(-1, keepdim=True).sqrt() / D**0.5
        return torch.zeros_like(scale), scale, scale
    mean = x.sum(-1, keepdim=True) / D
    deviation = ((x - mean).square().sum(-1, keepdim=True) / (D - 1)).sqrt()
    return mean, deviation + 1e-5, deviation


@each(kind=["layer_norm", "constant_norm"], variant=list(VARIANTS))
def test_each_hidden_state_is_normalised_and_the_reconstruction_is_put_back(tmp_path, variant, kind, way):
    sae, x = make_sae(variant, input_normalization=kind), hidden_states(7) * 3 + 2
    shift, divisor, multiplier = normalised(x, kind)
    acts, prefixes, _ = dense_forward(sae, (x - shift) / divisor)
    expected = prefixes * multiplier + shift
    assert_close(sae.encode(x).to_dense(), acts)
    assert_close(sae.decode(sae.encode(x)), expected[-1])
    assert_close(sae.decode_prefixes(sae.encode(x)), expected)
    output = sae(x.view(7, 1, D))
    assert_close(output.reconstruction, expected[-1].view(7, 1, D))
    assert_close(sae.decode(output.latents), output.reconstruction)
    assert_close(output.losses["sse"], (expected - x).square().sum(-1).mean(-1))
    sae.float().save_pretrained(tmp_path)
    assert_same_tensors(AutoModel.from_pretrained(tmp_path), sae)
    assert AutoModel.from_pretrained(tmp_path, width=4).config.input_normalization == kind


def test_gradients_pass_through_the_normalisation():
    sae, x = make_sae("relu", input_normalization="layer_norm"), hidden_states(4).requires_grad_()
    shift, divisor, multiplier = normalised(x, "layer_norm")
    expected = dense_forward(sae, (x - shift) / divisor)[1][-1] * multiplier + shift
    (slope,) = torch.autograd.grad(expected.square().sum(), x)
    assert_close(torch.autograd.grad(sae(x).reconstruction.square().sum(), x)[0], slope)


def test_latents_that_do_not_say_how_they_were_normalised_are_not_decoded():
    sae = make_sae("topk", input_normalization="layer_norm")
    latents = sae.encode(hidden_states(3))
    with pytest.raises(ValueError, match="do not say how"):
        sae.decode(SparseLatents(latents.values, latents.indices, F))


def test_a_token_of_zeros_stays_finite():
    for kind in ("layer_norm", "constant_norm"):
        assert make_sae("relu", input_normalization=kind)(torch.zeros(2, D)).reconstruction.isfinite().all()


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="Unknown `input_normalization` 'layernorm'. Did you mean 'layer_norm'"):
        TopKSAEConfig(d_in=4, num_latents=8, k=2, input_normalization="layernorm")
    with pytest.raises(ValueError, match="for all"):
        make_sae("relu", input_normalization="layer_norm").fold_normalization_(torch.zeros(D), 2.0)


def test_statistics_thresholds_and_refits_are_those_of_what_the_encoder_sees():
    plain, x = make_sae("batch_topk"), hidden_states(300) + 1
    sae = make_sae("batch_topk", input_normalization="layer_norm")
    sae.load_state_dict(plain.state_dict())
    seen = sae.normalized(x)[0]
    ours, theirs = latent_statistics(sae, [x]), latent_statistics(plain, [seen])
    for name in ("mean_square", "contribution", "leave_one_out"):
        assert_close(getattr(ours, name), getattr(theirs, name))
    assert calibrate_thresholds(sae, [x], 2.0) == pytest.approx(calibrate_thresholds(plain, [seen], 2.0))
    after = refit(sae, [x]), refit(plain, [seen])
    assert_close(after[0].sae.b_dec, after[1].sae.b_dec)
    with pytest.raises(ValueError, match="holds latents alone"):
        encode_progressive(sae, x, ours)


def test_a_transcoder_is_not_measured_as_an_sae():
    with pytest.raises(ValueError, match="transcoder: from layers.1.mlp:input it predicts layers.1.mlp"):
        Dictionary(make_sae("relu", hookpoint="layers.1.mlp:input", output_hookpoint="layers.1.mlp"))


# Group maxima


def group_max(sae, x, groups):
    """The largest latent of each group, if positive, the first of equal ones; token by token, by hand."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    out = torch.zeros_like(pre)
    for row, values in enumerate(pre.tolist()):
        for group in set(groups):
            members = [i for i, g in enumerate(groups) if g == group]
            best = max(members, key=lambda i: (values[i], -i))
            out[row, best] = max(values[best], 0)
    return out


@each(block={"one block": None, "blocks of 32": 32}, order=["as it was", "shuffled"])
def test_the_largest_of_each_group_is_kept(monkeypatch, block, order):
    latents, size = 96, 12
    sae = TopKSAE(TopKSAEConfig(d_in=D, num_latents=latents, k=latents // size, group_size=size)).double()
    torch.nn.init.normal_(sae.b_enc)
    torch.nn.init.normal_(sae.b_dec)
    if order == "shuffled":
        sae.permute_(torch.randperm(latents))
    if block:
        monkeypatch.setitem(encoder_blocks.BLOCK_ENTRIES, "cpu", block * 20)
    x = torch.randn(20, D, dtype=torch.float64)
    groups = (sae.latent_ids // size).tolist()
    assert_close(sae.encode(x).to_dense(), group_max(sae, x, groups))
    part = sae.truncate(50)
    assert_close(sae.encode(x, width=50).to_dense()[:, :50], group_max(part, x, groups[:50]))
    pruned = prune(sae, 30, order=torch.randperm(latents))
    assert_close(pruned.encode(x).to_dense(), group_max(pruned, x, (pruned.latent_ids // size).tolist()))


def test_of_equal_entries_of_a_group_the_first_is_kept():
    sae = TopKSAE(TopKSAEConfig(d_in=2, num_latents=4, k=2, group_size=2))
    with torch.no_grad():
        for tensor in (sae.W_enc, sae.b_dec):
            tensor.zero_()
        sae.b_enc.copy_(torch.tensor([1.0, 1.0, -1.0, -1.0]))
    assert sae.encode(torch.zeros(1, 2)).to_dense().tolist() == [[1.0, 0.0, 0.0, 0.0]]
