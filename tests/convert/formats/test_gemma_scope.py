"""Gemma Scope 1 and 2: JumpReLU, `b_dec` only added; places from paths; what is not stored is not guessed."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_matryoshka_sae import convert

from ...axes import each
from ..reference import SHAPES, assert_computes, encode_decode, inputs, jumprelu, weights


NAMES = ("W_dec", "b_enc", "b_dec", "threshold")


def write(folder, tensors, lower=False, **more):
    arrays = {"W_enc": tensors["W_enc"].T} | {name: tensors[name] for name in NAMES} | more
    arrays = {name.lower() if lower else name: tensor.numpy() for name, tensor in arrays.items()}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **arrays)
    return folder


def write_2(folder, tensors, config=None, **more):
    state = {"w_enc": tensors["W_enc"].T.contiguous(), "w_dec": tensors["W_dec"]} | more
    state |= {name: tensors[name] for name in NAMES[1:]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state | more, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu"} | config))
    return folder


@each(lower=[True, False], shape=SHAPES)
def test_jumprelu(tmp_path, shape, lower):
    tensors, x = weights(*shape), inputs(shape[0])
    write(tmp_path, tensors, lower)
    expected = encode_decode(x, tensors, jumprelu(tensors["threshold"]), subtract=False)
    for source in (tmp_path, tmp_path / "params.npz"):
        assert_computes(convert.load(source), x, *expected)


def test_scaling_factors_come_after_the_activation(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    factors = torch.rand(64) + 0.5
    write(tmp_path, tensors, scaling_factor=factors)
    latents, _ = encode_decode(x, tensors, jumprelu(tensors["threshold"]), subtract=False)
    latents = latents * factors
    reconstruction = latents @ tensors["W_dec"].double() + tensors["b_dec"].double()
    assert_computes(convert.load(tmp_path), x, latents, reconstruction)
    write(tmp_path, tensors, scaling_factor=-factors)
    with pytest.raises(ValueError, match="should be positive"):
        convert.load(tmp_path)


def test_embedding_sae_is_scaled(tmp_path):
    tensors, x = weights(16, 64), inputs(16) * 4
    write(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6", tensors)
    sae = convert.load(tmp_path)
    scaled = tensors | {"W_enc": tensors["W_enc"] / 4, "W_dec": tensors["W_dec"] * 4}
    assert sae.config.hookpoint == "model.embed_tokens"
    assert_computes(sae, x, *encode_decode(x, scaled, jumprelu(tensors["threshold"]), subtract=False))


@pytest.mark.parametrize(
    "repository, model, hookpoint, output",
    [
        ("gemma-scope-2b-pt-res", "google/gemma-2-2b", "model.layers.7", None),
        ("gemma-scope-9b-it-res", "google/gemma-2-9b-it", "model.layers.7", None),
        ("gemma-scope-2b-pt-att", "google/gemma-2-2b", "model.layers.7.self_attn.o_proj:input", None),
        ("gemma-scope-27b-pt-mlp", "google/gemma-2-27b", "model.layers.7.post_feedforward_layernorm", None),
        ("gemma-scope-2b-pt-transcoders", "google/gemma-2-2b", "model.layers.7.pre_feedforward_layernorm",
         "model.layers.7.post_feedforward_layernorm"),
    ],
)  # fmt: skip
def test_place_from_the_path(tmp_path, repository, model, hookpoint, output):
    folder = write(tmp_path / repository / "layer_7" / "width_16k" / "average_l0_70", weights(16, 64))
    config = convert.load(folder).config
    assert (config.base_model, config.hookpoint, config.output_hookpoint) == (model, hookpoint, output)


@pytest.mark.parametrize("shape", SHAPES)
def test_gemma_scope_2_with_and_without_a_config(tmp_path, shape, caplog):
    tensors, x = weights(*shape), inputs(shape[0])
    expected = encode_decode(x, tensors, jumprelu(tensors["threshold"]), subtract=False)
    folder = "gemma-scope-2-1b-pt/resid_post/layer_12_width_16k_l0_medium"
    write_2(tmp_path / folder, tensors)
    with caplog.at_level(logging.WARNING):
        sae = convert.load(tmp_path)
    assert "no file says at which widths" in caplog.text and sae.prefix_widths == [shape[1]]
    assert (sae.config.base_model, sae.config.hookpoint) == ("google/gemma-3-1b-pt", "model.layers.12")
    assert_computes(sae, x, *expected)
    write_2(
        tmp_path / "other", tensors, {"model_name": "gemma-v3-270m-pt", "hf_hook_point_in": "model.layers.5.output"}
    )
    sae = convert.load(tmp_path / "other", prefix_widths=[2, shape[1]])
    assert (sae.config.base_model, sae.config.hookpoint) == ("google/gemma-3-270m", "model.layers.5")
    assert sae.prefix_widths == [2, shape[1]] and sae.config.activation == "jumprelu"
    assert_computes(sae, x, *expected)


def test_gemma_scope_2_transcoders(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    name = "gemma-scope-2-1b-pt/transcoder/layer_3_width_16k_l0_small"
    write_2(tmp_path / name, tensors)
    sae = convert.load(tmp_path)
    assert sae.config.hookpoint == "model.layers.3.pre_feedforward_layernorm"
    assert sae.config.output_hookpoint == "model.layers.3.post_feedforward_layernorm"
    assert_computes(sae, x, *encode_decode(x, tensors, jumprelu(tensors["threshold"]), subtract=False))
    write_2(tmp_path / "affine", tensors, affine_skip_connection=torch.randn(16, 16))
    with pytest.raises(ValueError, match="affine connection"):
        convert.load(tmp_path / "affine")
    layers = tensors | {"W_dec": torch.randn(64, 3, 16)}
    write_2(tmp_path / "clt", layers)
    with pytest.raises(ValueError, match="cross-layer transcoder"):
        convert.load(tmp_path / "clt")


def test_examples_beside_are_never_read(tmp_path):
    folder = write_2(tmp_path, weights(16, 64), {"model_name": "gemma-3-1b-pt"})
    (folder / "examples.safetensors").write_bytes(b"a gigabyte of something else")
    assert convert.load(tmp_path).config.num_latents == 64


def test_export(tmp_path):
    tensors = weights(16, 64)
    sae = convert.load(write(tmp_path / "a", tensors))
    convert.save(sae, tmp_path / "b", "gemma_scope")
    with np.load(tmp_path / "b" / "params.npz", allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["W_dec", "W_enc", "b_dec", "b_enc", "threshold"]
        np.testing.assert_array_equal(arrays["W_enc"], tensors["W_enc"].T.numpy())
