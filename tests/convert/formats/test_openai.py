"""OpenAI's autoencoders: the hidden states of TopK ones are normalised, those of ReLU ones are not."""

from collections import OrderedDict

import pytest
import torch

from hf_matryoshka_sae import convert

from ...axes import each
from ..reference import SHAPES, assert_computes, encode_decode, inputs, relu, topk, weights


def write(file, tensors, activation=None, k=None):
    state = {
        "pre_bias": tensors["b_dec"],
        "latent_bias": tensors["b_enc"],
        "encoder.weight": tensors["W_enc"],
        "decoder.weight": tensors["W_dec"].T.contiguous(),
        "stats_last_nonzero": torch.zeros(len(tensors["b_enc"]), dtype=torch.int64),
    }
    if activation is not None:
        inner = OrderedDict(k=k, postact_fn="ReLU") if k else OrderedDict()
        state |= {"activation": activation, "activation_state_dict": inner}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    return file


@each(activation=["ReLU", None], shape=SHAPES)
def test_relu(tmp_path, shape, activation):
    tensors, x = weights(*shape), inputs(shape[0])
    write(tmp_path / "5.pt", tensors, activation)
    for source in (tmp_path, tmp_path / "5.pt"):
        assert_computes(convert.load(source), x, *encode_decode(x, tensors, relu))


@each(k=[1, 6], shape=SHAPES)
def test_topk_normalises(tmp_path, shape, k):
    tensors, x = weights(*shape), inputs(shape[0]) * 3 + 1
    write(tmp_path / "5.pt", tensors, "TopK", k)
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, topk(k), norm="layer_norm"))


def test_tied_decoder(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    tensors["W_dec"] = tensors["W_enc"]
    file = write(tmp_path / "5.pt", tensors, "ReLU")
    state = torch.load(file, weights_only=True)
    state["decoder.linear.weight"] = state.pop("decoder.weight").T
    torch.save(state, file)
    assert_computes(convert.load(file), x, *encode_decode(x, tensors, relu))


@pytest.mark.parametrize(
    "location, hookpoint",
    [
        ("resid_post_mlp_v5_32k", "transformer.h.8"),
        ("resid_delta_attn_v5_128k", "transformer.h.8.attn"),
        ("mlp_post_act", "transformer.h.8.mlp.c_proj:input"),
        ("resid_delta_mlp_v4", "transformer.h.8.mlp"),
        ("resid_post_attn_v5_32k", "transformer.h.8.ln_2:input"),
    ],
)
def test_place_from_the_path(tmp_path, location, hookpoint):
    file = write(tmp_path / "gpt2-small" / location / "autoencoders" / "8.pt", weights(16, 64))
    config = convert.load(file).config
    assert (config.base_model, config.hookpoint) == ("openai-community/gpt2", hookpoint)


def test_unknown_activation(tmp_path):
    with pytest.raises(ValueError, match="'TiedTopK'"):
        convert.load(write(tmp_path / "5.pt", weights(16, 64), "TiedTopK", 4))


def test_export_has_the_libraries_names(tmp_path):
    tensors = weights(16, 64)
    sae = convert.load(write(tmp_path / "a" / "5.pt", tensors, "TopK", 6), hookpoint="transformer.h.7")
    convert.save(sae, tmp_path / "b", "openai")
    state = torch.load(tmp_path / "b" / "7.pt", weights_only=True)
    assert state["activation"] == "TopK" and dict(state["activation_state_dict"]) == {"k": 6, "postact_fn": "ReLU"}
    torch.testing.assert_close(state["decoder.weight"], tensors["W_dec"].T)
    convert.save(sae, tmp_path / "c.pt", "openai")
    assert convert.load(tmp_path / "c.pt").config.input_normalization == "layer_norm"
