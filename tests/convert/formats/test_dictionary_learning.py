"""dictionary_learning: its classes, told apart by their tensors; backups, missing thresholds, missing configs."""

import json
import logging

import pytest
import torch

from hf_matryoshka_sae import convert

from ...axes import each
from ..reference import SHAPES, assert_computes, encode_decode, inputs, jumprelu, relu, topk, weights


PLACES = {"lm_name": "EleutherAI/pythia-70m-deduped", "layer": 2, "submodule_name": "resid_post_layer_2"}


def linear(tensors):
    return {
        "encoder.weight": tensors["W_enc"],
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T.contiguous(),
    }


def named(tensors):
    names = ("W_dec", "b_enc", "b_dec")
    return {"W_enc": tensors["W_enc"].T.contiguous()} | {name: tensors[name] for name in names}


def write(folder, state, kind=None, name="ae.pt", **trainer):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / name)
    if kind is not None:
        config = {"trainer": {"dict_class": kind} | PLACES | trainer, "buffer": {"io": "out"}}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def scalars(k=5, threshold=0.3):
    return {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(threshold)}


@each(shape=SHAPES, with_config=[True, False])
def test_autoencoder(tmp_path, shape, with_config):
    tensors, x = weights(*shape), inputs(shape[0])
    write(tmp_path, linear(tensors) | {"bias": tensors["b_dec"]}, "AutoEncoder" if with_config else None)
    sae = convert.load(tmp_path)
    assert_computes(sae, x, *encode_decode(x, tensors, relu))
    assert sae.config.hookpoint == ("gpt_neox.layers.2" if with_config else None)


@pytest.mark.parametrize("shape", SHAPES)
def test_april_update_does_not_subtract_b_dec(tmp_path, shape):
    tensors, x = weights(*shape), inputs(shape[0])
    write(tmp_path, linear(tensors) | {"decoder.bias": tensors["b_dec"]})
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, relu, subtract=False))


@pytest.mark.parametrize("shape", SHAPES)
def test_gated(tmp_path, shape):
    tensors, x = weights(*shape, r_mag=shape[1:], mag_bias=shape[1:]), inputs(shape[0])
    state = {name: tensors[name] for name in ("r_mag", "mag_bias")} | linear(tensors)
    state |= {"gate_bias": state.pop("encoder.bias"), "decoder_bias": tensors["b_dec"]}
    write(tmp_path, state)

    def activation(pre):
        magnitude = (pre - tensors["b_enc"]) * tensors["r_mag"].double().exp() + tensors["mag_bias"]
        return relu(magnitude) * (pre > 0)

    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, activation))


@pytest.mark.parametrize("shape", SHAPES)
def test_jumprelu_does_not_subtract_b_dec(tmp_path, shape):
    tensors, x = weights(*shape), inputs(shape[0])
    write(tmp_path, named(tensors) | {"threshold": tensors["threshold"]})
    activation = jumprelu(tensors["threshold"])
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, activation, subtract=False))


@pytest.mark.parametrize("shape", SHAPES)
def test_topk_ignores_its_threshold(tmp_path, shape):
    tensors, x = weights(*shape), inputs(shape[0])
    write(tmp_path, linear(tensors) | {"b_dec": tensors["b_dec"]} | scalars(k=3), "AutoEncoderTopK", k=3)
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, topk(3)))


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_topk_uses_it(tmp_path, shape):
    tensors, x = weights(*shape), inputs(shape[0])
    write(tmp_path, linear(tensors) | {"b_dec": tensors["b_dec"]} | scalars(), "BatchTopKSAE", k=5)
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, jumprelu(0.3)))


def test_without_a_config_the_two_look_alike_which_is_said(tmp_path, caplog):
    tensors = weights(16, 64)
    write(tmp_path, linear(tensors) | {"b_dec": tensors["b_dec"]} | scalars())
    with caplog.at_level(logging.WARNING):
        assert type(convert.load(tmp_path)).__name__ == "BatchTopKSAE"
    assert "may be a TopK or a BatchTopK SAE" in caplog.text


@each(shape=SHAPES, with_config=[True, False])
def test_matryoshka_groups_are_lengths(tmp_path, shape, with_config):
    tensors, x = weights(*shape), inputs(shape[0])
    groups = torch.tensor([3, 2, shape[1] - 5])
    kind = "MatryoshkaBatchTopKSAE" if with_config else None
    write(tmp_path, named(tensors) | scalars() | {"group_sizes": groups}, kind, k=5)
    sae = convert.load(tmp_path)
    assert sae.prefix_widths == [3, 5, shape[1]] and sae.config.k == 5
    latents, reconstruction = encode_decode(x, tensors, jumprelu(0.3))
    assert_computes(sae, x, latents, reconstruction)
    W_dec, b_dec = tensors["W_dec"].double(), tensors["b_dec"].double()
    with torch.no_grad():
        prefixes = sae.decode_prefixes(sae.encode(x)).double()
    for width, prefix in zip(sae.prefix_widths, prefixes, strict=True):
        torch.testing.assert_close(prefix, latents[:, :width] @ W_dec[:width] + b_dec, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, family", [("BatchTopKSAE", "TopKSAE"), ("MatryoshkaBatchTopKSAE", "MatryoshkaSAE")])
def test_a_threshold_that_was_never_set_means_topk(tmp_path, caplog, kind, family):
    tensors, x = weights(16, 64), inputs(16)
    state = linear(tensors) | {"b_dec": tensors["b_dec"]} if kind == "BatchTopKSAE" else named(tensors)
    if kind != "BatchTopKSAE":
        state["group_sizes"] = torch.tensor([16, 48])
    write(tmp_path, state | scalars(threshold=-1.0), kind, k=5)
    with caplog.at_level(logging.WARNING):
        sae = convert.load(tmp_path)
    assert "never set" in caplog.text and type(sae).__name__ == family
    assert_computes(sae, x, *encode_decode(x, tensors, topk(5)))


def test_backup_with_a_nested_state_dict(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    inner = linear(tensors) | {"b_dec": tensors["b_dec"]} | scalars()
    write(tmp_path, {"step": 100, "ae": inner, "optimizer": {"state": {}}, "norm_factor": 3.0}, "BatchTopKSAE", k=5)
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, jumprelu(0.3)))
    (tmp_path / "config.json").unlink()
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, jumprelu(0.3)))


def test_steps_of_training(tmp_path):
    tensors, other = weights(16, 64), weights(16, 64)
    write(tmp_path / "trainer_0", linear(tensors) | {"bias": tensors["b_dec"]}, "AutoEncoder")
    for step in (100, 200):
        state = linear(other) | {"bias": other["b_dec"]}
        write(tmp_path / "trainer_0" / "checkpoints", state, name=f"ae_{step}.pt")
    torch.testing.assert_close(convert.load(tmp_path).W_enc, tensors["W_enc"])  # the finished one
    step = convert.load(tmp_path / "trainer_0" / "checkpoints" / "ae_100.pt")
    torch.testing.assert_close(step.W_enc, other["W_enc"])
    assert step.config.hookpoint == "gpt_neox.layers.2"  # the config is above


def test_input_side(tmp_path):
    tensors = weights(16, 64)
    write(tmp_path, linear(tensors) | {"bias": tensors["b_dec"]}, "AutoEncoder")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"buffer": {"io": "in"}}))
    assert convert.load(tmp_path).config.hookpoint == "gpt_neox.layers.2:input"
    (tmp_path / "config.json").write_text(json.dumps(config | {"buffer": {"io": "in_and_out"}}))
    transcoder = convert.load(tmp_path).config
    assert (transcoder.hookpoint, transcoder.output_hookpoint) == ("gpt_neox.layers.2:input", "gpt_neox.layers.2")


def test_refusals(tmp_path):
    tensors = weights(16, 64)
    write(tmp_path, {}, "IdentityDict")
    with pytest.raises(ValueError, match="no latents of its own"):
        convert.load(tmp_path)
    write(tmp_path, linear(tensors), "AutoEncoder")
    with pytest.raises(ValueError, match="should be a AutoEncoder and lacks bias"):
        convert.load(tmp_path)
    write(tmp_path, linear(tensors), "FancyDict")
    with pytest.raises(ValueError, match="FancyDict"):
        convert.load(tmp_path)
    state = named(tensors) | scalars() | {"group_sizes": torch.tensor([16, 16])}
    write(tmp_path, state, "MatryoshkaBatchTopKSAE")
    with pytest.raises(ValueError, match="add up to its 64 latents"):
        convert.load(tmp_path)


def test_export_is_what_the_library_reads(tmp_path):
    tensors = weights(16, 64)
    state = named(tensors) | scalars() | {"group_sizes": torch.tensor([16, 16, 32])}
    write(tmp_path / "a", state, "MatryoshkaBatchTopKSAE", k=5)
    convert.save(convert.load(tmp_path / "a"), tmp_path / "b", "dictionary_learning")
    back = torch.load(tmp_path / "b" / "ae.pt", weights_only=True)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(back[name], tensor)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["trainer"]["dict_class"] == "MatryoshkaBatchTopKSAE" and config["trainer"]["layer"] == 2
    assert config["trainer"]["k"] == 5 and config["trainer"]["group_sizes"] == [16, 16, 32]
