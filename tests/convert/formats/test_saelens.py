"""SAELens: its architectures, its older configs, what it normalises, and what is refused."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_matryoshka_sae import convert

from ...axes import each
from ..reference import SHAPES, assert_computes, encode_decode, inputs, jumprelu, relu, topk, weights


V6 = {"dtype": "float32", "device": "cpu", "normalize_activations": "none", "reshape_activations": "none"}


def write(folder, tensors, config, metadata=None, names=("W_enc", "W_dec", "b_enc", "b_dec"), **renamed):
    """A SAELens folder; `W_enc` is stored `(D, F)`. `metadata` None writes a config of the versions before 6."""
    state = {name: tensors[name].clone() for name in names} | renamed
    state["W_enc"] = tensors["W_enc"].T.contiguous()
    sizes = {"d_in": len(tensors["b_dec"]), "d_sae": len(tensors["b_enc"])}
    if metadata is not None:
        config = V6 | config | {"metadata": {"sae_lens_version": "6.54.12"} | metadata}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(sizes | config))
    return folder


@each(shape=SHAPES, subtract=[True, False])
def test_standard(tmp_path, shape, subtract):
    tensors, x = weights(*shape), inputs(shape[0])
    write(tmp_path, tensors, {"architecture": "standard", "apply_b_dec_to_input": subtract}, {})
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, relu, subtract))


@each(kind=["layer_norm", "constant_norm_rescale"], shape=SHAPES)
def test_normalised_hidden_states(tmp_path, shape, kind):
    tensors, x = weights(*shape), inputs(shape[0])
    write(tmp_path, tensors, {"architecture": "standard", "normalize_activations": kind}, {})
    expected = encode_decode(x, tensors, relu, norm=kind.removesuffix("_rescale"))
    assert_computes(convert.load(tmp_path), x, *expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_jumprelu_with_thresholds_of_both_signs(tmp_path, shape):
    tensors, x = weights(*shape), inputs(shape[0])
    tensors["threshold"] -= 0.3
    assert (tensors["threshold"] < 0).any()
    write(tmp_path, tensors, {"architecture": "jumprelu"}, {}, threshold=tensors["threshold"])
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, jumprelu(tensors["threshold"])))


@each(k=[1, 5], shape=SHAPES)
def test_topk(tmp_path, shape, k):
    tensors, x = weights(*shape), inputs(shape[0])
    write(tmp_path, tensors, {"architecture": "topk", "k": k}, {})
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, topk(k)))


def test_topk_in_units_of_the_contribution(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    write(tmp_path, tensors, {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True}, {})
    lengths = tensors["W_dec"].norm(dim=1)
    unit = tensors | {
        "W_enc": tensors["W_enc"] * lengths[:, None],
        "b_enc": tensors["b_enc"] * lengths,
        "W_dec": tensors["W_dec"] / lengths[:, None],
    }
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, unit, topk(5)))


@pytest.mark.parametrize("shape", SHAPES)
def test_gated(tmp_path, shape):
    tensors, x = weights(*shape, r_mag=shape[1:], b_mag=shape[1:]), inputs(shape[0])
    gated = {name: tensors[name] for name in ("r_mag", "b_mag")} | {"b_gate": tensors["b_enc"]}
    write(tmp_path, tensors, {"architecture": "gated"}, {}, names=("W_dec", "b_dec"), **gated)

    def activation(pre):
        magnitude = (pre - tensors["b_enc"]) * tensors["r_mag"].double().exp() + tensors["b_mag"]
        return relu(magnitude) * (pre > 0)

    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, activation))


MATRYOSHKA = {"training_architecture": "matryoshka_batchtopk"}


@pytest.mark.parametrize("widths", [[4, 16, 64], [4, 16], "[4, 16, 64]"])
def test_matryoshka_is_known_by_its_metadata(tmp_path, widths):
    tensors, x = weights(16, 64), inputs(16)
    threshold = torch.full((64,), 0.3)
    details = MATRYOSHKA | {"training_architecture_details": {"k": 6.0, "matryoshka_widths": widths}}
    write(tmp_path, tensors, {"architecture": "jumprelu"}, details, threshold=threshold)
    sae = convert.load(tmp_path)
    assert sae.config.activation == "batch_topk" and sae.prefix_widths == [4, 16, 64] and sae.config.k == 6
    assert_computes(sae, x, *encode_decode(x, tensors, jumprelu(0.3)))


def test_widths_from_the_runs_config_or_the_user_but_never_guessed(tmp_path, caplog):
    tensors = weights(16, 64)
    details = MATRYOSHKA | {"training_architecture_details": {"k": 6.0}}
    write(tmp_path, tensors, {"architecture": "jumprelu"}, details, threshold=tensors["threshold"])
    with caplog.at_level(logging.WARNING):
        assert type(convert.load(tmp_path)).__name__ == "BatchTopKSAE"
    assert "nothing says at which widths" in caplog.text
    assert convert.load(tmp_path, prefix_widths=[8, 64]).prefix_widths == [8, 64]
    run = {"sae": {"architecture": "matryoshka_batchtopk", "matryoshka_widths": [2, 64], "k": 6}}
    (tmp_path / "runner_cfg.json").write_text(json.dumps(run))
    assert convert.load(tmp_path).prefix_widths == [2, 64]


def test_without_a_k_it_is_what_it_computes(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    details = MATRYOSHKA | {"training_architecture_details": {"matryoshka_widths": [4, 64]}}
    write(tmp_path, tensors, {"architecture": "jumprelu"}, details, threshold=tensors["threshold"])
    sae = convert.load(tmp_path)
    assert (sae.config.activation, sae.prefix_widths) == ("jumprelu", [4, 64])
    assert_computes(sae, x, *encode_decode(x, tensors, jumprelu(tensors["threshold"])))
    assert convert.load(tmp_path, k=7).config.activation == "batch_topk"


@pytest.mark.parametrize("rescaled", [True, False])
def test_checkpoint_of_training_with_its_running_threshold(tmp_path, rescaled):
    tensors, x = weights(16, 64), inputs(16)
    config = {"architecture": "batchtopk", "k": 6.0, "rescale_acts_by_decoder_norm": rescaled}
    write(tmp_path, tensors, config, {}, topk_threshold=torch.tensor(0.3, dtype=torch.float64))
    lengths = tensors["W_dec"].norm(dim=1) if rescaled else torch.ones(64)
    latents, reconstruction = encode_decode(x, tensors, jumprelu(0.3 / lengths.double()))
    assert_computes(convert.load(tmp_path), x, latents * lengths, reconstruction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(tmp_path, dtype):
    tensors, x = {name: tensor.to(dtype) for name, tensor in weights(16, 64).items()}, inputs(16)
    write(tmp_path, tensors, {"architecture": "standard"}, {})
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, relu))
    assert convert.load(tmp_path, dtype=torch.bfloat16).W_enc.dtype == torch.bfloat16


# Before version 6


def test_flat_config_means_that_b_dec_is_subtracted(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    config = {"hook_point": "blocks.3.hook_resid_pre", "model_name": "gpt2-small", "activation_fn_str": "relu"}
    write(tmp_path, tensors, config | {"normalize_activations": False})
    sae = convert.load(tmp_path)
    assert (sae.config.base_model, sae.config.hookpoint) == ("openai-community/gpt2", "transformer.h.3:input")
    assert_computes(sae, x, *encode_decode(x, tensors, relu))


def test_flat_topk_is_stored_as_standard(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    config = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    write(tmp_path, tensors, config)
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, topk(4)))


def test_boolean_normalisation_is_a_factor_that_is_kept_elsewhere(tmp_path, caplog):
    tensors, x = weights(16, 64), inputs(16)
    write(tmp_path, tensors, {"normalize_activations": True})
    with caplog.at_level(logging.WARNING):
        assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, relu))
    assert "not among its files" in caplog.text
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 2.5}))
    latents, reconstruction = encode_decode(x * 2.5, tensors, relu)
    assert_computes(convert.load(tmp_path), x, latents, reconstruction / 2.5)


def test_finetuning_factors(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    factors = torch.rand(64) + 0.5
    write(tmp_path, tensors, {"finetuning_scaling_factor": True}, scaling_factor=factors)
    scaled = tensors | {"W_dec": tensors["W_dec"] * factors[:, None]}
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, scaled, relu))
    write(tmp_path, tensors, {"finetuning_scaling_factor": False}, scaling_factor=factors)
    with pytest.raises(ValueError, match="scaling_factor"):
        convert.load(tmp_path)


def test_log_thresholds_of_older_jumprelu(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    write(tmp_path, tensors, {"architecture": "jumprelu"}, log_threshold=tensors["threshold"].log())
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, jumprelu(tensors["threshold"])))


# Transcoders


def test_transcoder_names_both_places(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    places = {"model_name": "gemma-2-2b", "hook_name": "blocks.4.ln2.hook_normalized"}
    places["hook_name_out"] = "blocks.4.hook_mlp_out"
    write(tmp_path, tensors, {"architecture": "transcoder", "apply_b_dec_to_input": False, "d_out": 16}, places)
    sae = convert.load(tmp_path)
    assert sae.config.hookpoint == "model.layers.4.pre_feedforward_layernorm"
    assert sae.config.output_hookpoint == "model.layers.4.post_feedforward_layernorm"
    assert_computes(sae, x, *encode_decode(x, tensors, relu, subtract=False))


def test_transcoder_into_another_width_is_refused(tmp_path):
    tensors = weights(16, 64) | {"W_dec": torch.randn(64, 20), "b_dec": torch.randn(20)}
    write(tmp_path, tensors, {"architecture": "transcoder", "apply_b_dec_to_input": False, "d_out": 20}, {})
    with pytest.raises(ValueError, match="transcoder into another width"):
        convert.load(tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"architecture": "skip_transcoder"}, "adds a matrix"),
        ({"architecture": "temporal"}, "tokens before"),
        ({"architecture": "abstopk", "k": 4}, "negative"),
        ({"architecture": "standardd"}, "Did you mean 'standard'"),
        ({"architecture": "topk"}, "pass `k`"),
        ({"architecture": "standard", "normalize_activations": "covariance_whitening"}, "whitening"),
        ({"architecture": "standard", "activation_fn": "tanh-relu"}, "activation function 'tanh-relu'"),
    ],
)
def test_other_maths_is_refused_with_the_reason(tmp_path, config, message):
    write(tmp_path, weights(16, 64), config, {})
    with pytest.raises(ValueError, match=message):
        convert.load(tmp_path)


def test_tensors_that_the_architecture_lacks_are_refused(tmp_path):
    tensors = weights(16, 64)
    write(tmp_path, tensors, {"architecture": "standard"}, {}, threshold=tensors["threshold"])
    with pytest.raises(ValueError, match="holds threshold, which its architecture"):
        convert.load(tmp_path)
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(ValueError, match="no cfg.json beside"):
        convert.load(tmp_path, "saelens")


# Places


@pytest.mark.parametrize(
    "metadata, model, hookpoint",
    [
        ({"model_name": "pythia-70m-deduped", "hook_name": "blocks.3.hook_resid_post"},
         "EleutherAI/pythia-70m-deduped", "gpt_neox.layers.3"),
        ({"model_name": "gemma-2-2b", "hook_name": "blocks.3.attn.hook_z"},
         "google/gemma-2-2b", "model.layers.3.self_attn.o_proj:input"),
        ({"model_name": "google/gemma-3-1b-pt", "hook_name": "x", "hf_hook_name": "model.layers.5.mlp.input"},
         "google/gemma-3-1b-pt", "model.layers.5.mlp:input"),
    ],
)  # fmt: skip
def test_places_in_our_vocabulary(tmp_path, metadata, model, hookpoint):
    write(tmp_path, weights(16, 64), {"architecture": "standard"}, metadata)
    config = convert.load(tmp_path).config
    assert (config.base_model, config.hookpoint) == (model, hookpoint)
    config = convert.load(tmp_path, base_model="a/b", hookpoint="c.d").config
    assert (config.base_model, config.hookpoint) == ("a/b", "c.d")


def test_what_cannot_be_translated_is_kept_with_a_warning(tmp_path, caplog):
    metadata = {"model_name": "some-model", "hook_name": "blocks.3.hook_resid_post"}
    write(tmp_path, weights(16, 64), {"architecture": "standard"}, metadata)
    with caplog.at_level(logging.WARNING):
        config = convert.load(tmp_path).config
    assert (config.base_model, config.hookpoint) == ("some-model", "blocks.3.hook_resid_post")
    assert "some-model" in caplog.text and "hook_resid_post" in caplog.text


def test_export_says_what_it_was(tmp_path):
    tensors = weights(16, 64)
    details = MATRYOSHKA | {"training_architecture_details": {"k": 6.0, "matryoshka_widths": [4, 64]}}
    places = {"model_name": "pythia-70m", "hook_name": "blocks.3.hook_resid_pre"}
    threshold = torch.full((64,), 0.3)
    write(tmp_path / "a", tensors, {"architecture": "jumprelu"}, details | places, threshold=threshold)
    convert.save(convert.load(tmp_path / "a"), tmp_path / "b", "saelens")
    config = json.loads((tmp_path / "b" / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    metadata = config["metadata"]
    assert metadata["training_architecture"] == "matryoshka_batchtopk"
    assert metadata["training_architecture_details"]["matryoshka_widths"] == [4, 64]
    assert metadata["model_name"] == "pythia-70m" and metadata["hook_name"] == "blocks.3.hook_resid_pre"
    assert metadata["hf_hook_name"] == "gpt_neox.layers.3.input"
    state = load_file(tmp_path / "b" / "sae_weights.safetensors")
    torch.testing.assert_close(state["W_enc"], tensors["W_enc"].T)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
