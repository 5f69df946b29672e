"""sparsify: both matrices latent by latent; groups; names of places; what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_matryoshka_sae import convert
from hf_matryoshka_sae.progressive import prune

from ...axes import each
from ..reference import SHAPES, assert_computes, encode_decode, groupmax, inputs, topk, weights


def write(folder, tensors, **config):
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    names = {theirs: tensors[ours] for theirs, ours in names.items()}
    names |= {name: tensors[name] for name in ("W_skip",) if name in tensors}
    config = {"activation": "topk", "num_latents": len(tensors["b_enc"]), "d_in": len(tensors["b_dec"])} | config
    folder.mkdir(parents=True, exist_ok=True)
    save_file(names, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@each(normalize_decoder=[True, False], shape=SHAPES)
def test_topk(tmp_path, shape, normalize_decoder):
    tensors, x = weights(*shape), inputs(shape[0])
    write(tmp_path, tensors, k=4, normalize_decoder=normalize_decoder)
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, topk(4)))


@pytest.mark.parametrize("shape", SHAPES)
def test_groupmax(tmp_path, shape):
    tensors, x = weights(*shape), inputs(shape[0])
    write(tmp_path, tensors, k=2, activation="groupmax")
    sae = convert.load(tmp_path)
    assert sae.config.group_size == shape[1] // 2
    assert_computes(sae, x, *encode_decode(x, tensors, groupmax(2)))


def test_num_latents_0_means_the_expansion_factor(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    write(tmp_path, tensors, k=4, num_latents=0, expansion_factor=4)
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, topk(4)))
    write(tmp_path, tensors, k=4, num_latents=0, expansion_factor=8)
    with pytest.raises(ValueError, match="64 latents where its cfg.json says 128|num_latents 128"):
        convert.load(tmp_path)


def test_transcoder_reads_what_goes_into_its_module(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    write(tmp_path / "layers.3.mlp", tensors, k=4, transcode=True)
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    sae = convert.load(tmp_path / "layers.3.mlp")
    assert sae.config.hookpoint == "gpt_neox.layers.3.mlp:input"
    assert sae.config.output_hookpoint == "gpt_neox.layers.3.mlp"
    assert_computes(sae, x, *encode_decode(x, tensors, topk(4), subtract=False))


@pytest.mark.parametrize(
    "model, folder, hookpoint",
    [
        ("meta-llama/Llama-3.2-1B", "layers.10", "model.layers.10"),
        ("meta-llama/Llama-3.2-1B", "embed_tokens", "model.embed_tokens"),
        ("openai-community/gpt2", "h.3.attn", "transformer.h.3.attn"),
        ("EleutherAI/pythia-160m", "layers.5.mlp", "gpt_neox.layers.5.mlp"),
        (None, "h.3", "transformer.h.3"),
        (None, "layers.3", "layers.3"),
    ],
)
def test_places(tmp_path, model, folder, hookpoint):
    write(tmp_path / folder, weights(16, 64), k=4)
    if model:
        (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    config = convert.load(tmp_path / folder).config
    assert (config.base_model, config.hookpoint) == (model, hookpoint)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"signed": True, "k": 4}, "signed"),
        ({"skip_connection": True, "k": 4}, "skip connection"),
        ({"activation": "relu", "k": 4}, "'relu'"),
        ({}, "pass `k`"),
        ({"activation": "groupmax", "k": 5}, "do not fall into k = 5 groups"),
    ],
)
def test_other_maths_is_refused(tmp_path, config, message):
    write(tmp_path, weights(16, 64), **config)
    with pytest.raises(ValueError, match=message):
        convert.load(tmp_path)


def test_a_skip_matrix_is_refused_whatever_the_config_says(tmp_path):
    write(tmp_path, weights(16, 64, W_skip=(16, 16)), k=4)
    with pytest.raises(ValueError, match="skip connection"):
        convert.load(tmp_path)


def test_export_of_groups(tmp_path):
    tensors = weights(16, 64)
    sae = convert.load(write(tmp_path / "a", tensors, k=8, activation="groupmax"))
    convert.save(sae, tmp_path / "b", "sparsify")
    config = json.loads((tmp_path / "b" / "cfg.json").read_text())
    assert (config["activation"], config["k"], config["num_latents"]) == ("groupmax", 8, 64)
    torch.testing.assert_close(load_file(tmp_path / "b" / "sae.safetensors")["W_dec"], tensors["W_dec"])
    for width in (64, 40):  # no runs of neighbours any more; not even of one size
        with pytest.raises(ValueError, match="pruned"):
            convert.save(prune(sae, width=width, by="decoder-spectrum"), tmp_path / "c", "sparsify")
    assert not (tmp_path / "c").exists()
