"""Llama Scope, llamascopium, Qwen-Scope, Bussmann's, Nabeshima's, mlsae, CSR, Goodfire: each against its equations."""

import json
import logging
import math

import pytest
import torch
from safetensors.torch import save_file

from hf_matryoshka_sae import convert

from ...axes import each
from ..reference import SHAPES, assert_computes, encode_decode, inputs, jumprelu, relu, topk, weights


def contiguous(tensors):
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def linear(tensors, suffix=""):
    return contiguous(
        {
            f"encoder{suffix}.weight": tensors["W_enc"],
            f"encoder{suffix}.bias": tensors["b_enc"],
            f"decoder{suffix}.weight": tensors["W_dec"].T,
            f"decoder{suffix}.bias": tensors["b_dec"],
        }
    )


def matrices(tensors, names=("W_enc", "b_enc", "W_dec", "b_dec")):
    return contiguous(
        dict(zip(names, (tensors["W_enc"].T, *(tensors[n] for n in ("b_enc", "W_dec", "b_dec"))), strict=True))
    )


def write(folder, state, name, config=None, config_name="config.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (save_file if name.endswith(".safetensors") else torch.save)(state, folder / name)
    if config is not None:
        (folder / config_name).write_text(json.dumps(config))
    return folder


# Llama Scope


@each(shape=SHAPES, by_contribution=[True, False])
def test_llama_scope(tmp_path, shape, by_contribution):
    tensors, x = weights(*shape), inputs(shape[0])
    config = {
        "d_model": shape[0],
        "d_sae": shape[1],
        "jump_relu_threshold": 0.3,
        "dataset_average_activation_norm": {"in": 7.0, "out": 7.0},
        "norm_activation": "dataset-wise",
        "hook_point_in": "blocks.5.hook_resid_post",
        "hook_point_out": "blocks.5.hook_resid_post",
        "sparsity_include_decoder_norm": by_contribution,
    }
    folder = tmp_path / "Llama3_1-8B-Base-L5R-8x"
    write(folder / "checkpoints", linear(tensors), "final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps(config))
    sae = convert.load(tmp_path)
    assert (sae.config.base_model, sae.config.hookpoint) == ("meta-llama/Llama-3.1-8B", "model.layers.5")
    factor = math.sqrt(shape[0]) / 7.0
    lengths = tensors["W_dec"].double().norm(dim=1) if by_contribution else torch.ones(shape[1]).double()
    latents, reconstruction = encode_decode(x * factor, tensors, jumprelu(0.3 / lengths), subtract=False)
    assert_computes(sae, x, latents / factor, reconstruction / factor)  # in units of the raw hidden states


def test_llama_scope_r1_distill(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    state = linear(tensors) | {"log_jumprelu_threshold": tensors["threshold"].log()}
    write(tmp_path, state, "sae_weights.safetensors", {"d_model": 16, "hook_point_in": "blocks.2.hook_resid_post"})
    expected = encode_decode(x, tensors, jumprelu(tensors["threshold"]), subtract=False)
    assert_computes(convert.load(tmp_path), x, *expected)


NAMES = ("W_E", "b_E", "W_D", "b_D")


@each(
    activation=["relu", "topk", "jumprelu"],
    norm=["token-wise", "dataset-wise", "inference"],
    by_contribution=[True, False],
)
def test_llamascopium(tmp_path, activation, norm, by_contribution):
    tensors, x = weights(16, 64), inputs(16)
    hook = "blocks.2.hook_resid_post"
    state = matrices(tensors, NAMES) | {f"dataset_average_activation_norm.{hook}": torch.tensor(7.0)}
    state["activation_function.log_jumprelu_threshold"] = tensors["threshold"].log()
    config = {"sae_type": "sae", "d_model": 16, "act_fn": activation, "top_k": 5, "norm_activation": norm}
    config |= {"hook_point_in": hook, "hook_point_out": hook, "sparsity_include_decoder_norm": by_contribution}
    write(tmp_path, state, "sae_weights.safetensors", config | {"model_name": "meta-llama/Llama-3.1-8B"})
    lengths = tensors["W_dec"].double().norm(dim=1) if by_contribution else torch.ones(64).double()
    act = {"relu": relu, "topk": topk(5), "jumprelu": jumprelu(tensors["threshold"])}[activation]
    factor = math.sqrt(16) / 7.0 if norm == "dataset-wise" else 1.0
    latents, reconstruction = encode_decode(
        x * factor,
        tensors,
        lambda pre: act(pre * lengths) / lengths,
        subtract=False,
        norm="constant_norm" if norm == "token-wise" else None,
    )
    units = lengths if activation == "topk" else 1.0
    sae = convert.load(tmp_path)
    assert sae.config.hookpoint == "model.layers.2"
    assert_computes(sae, x, latents * units / factor, reconstruction / factor)


def test_llamascopium_transcoder(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    hooks = {"hook_point_in": "blocks.2.ln2.hook_normalized", "hook_point_out": "blocks.2.hook_mlp_out"}
    state = matrices(tensors, NAMES)
    for hook, length in zip(hooks.values(), (7.0, 3.0), strict=True):
        state[f"dataset_average_activation_norm.{hook}"] = torch.tensor(length)
    config = {"sae_type": "transcoder", "d_model": 16, "act_fn": "relu", "sparsity_include_decoder_norm": False}
    write(tmp_path, state, "sae_weights.safetensors", config | hooks | {"model_name": "meta-llama/Llama-3.1-8B"})
    sae = convert.load(tmp_path)
    assert sae.config.output_hookpoint == "model.layers.2.mlp"
    latents, reconstruction = encode_decode(x * 4 / 7.0, tensors, relu, subtract=False)
    assert_computes(sae, x, latents * 7.0 / 4, reconstruction * 3.0 / 4)


def test_llamascopium_refusals(tmp_path):
    tensors = weights(16, 64)
    for config, message in (
        ({"sae_type": "crosscoder"}, "crosscoder"),
        ({"norm_activation": "batch-wise"}, "batch-wise"),
        ({"act_fn": "batchtopk"}, "batchtopk"),
        ({"use_glu_encoder": True}, "second encoder"),
    ):
        write(tmp_path, matrices(tensors, NAMES), "sae_weights.safetensors", {"norm_activation": "inference"} | config)
        with pytest.raises(ValueError, match=message):
            convert.load(tmp_path)


# Qwen-Scope


@pytest.mark.parametrize("shape", SHAPES)
def test_qwen_scope(tmp_path, shape):
    tensors, x = weights(*shape), inputs(shape[0])
    state = contiguous({name: tensors[name] for name in ("W_enc", "b_enc", "b_dec")})
    state["W_dec"] = tensors["W_dec"].T.contiguous()
    folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
    for layer in (0, 11):
        write(folder, state, f"layer{layer}.sae.pt")
    with pytest.raises(ValueError, match="layer0.sae.pt, layer11.sae.pt"):
        convert.load(folder)
    sae = convert.load(folder, subfolder="layer11.sae.pt")
    assert (sae.config.base_model, sae.config.hookpoint) == ("Qwen/Qwen3-1.7B-Base", "model.layers.11")
    assert_computes(sae, x, *encode_decode(x, tensors, topk(5), subtract=False))


def test_qwen_scope_without_its_name_needs_k(tmp_path):
    tensors, x = weights(16, 64), inputs(16)
    state = {name: tensors[name] for name in ("W_enc", "b_enc", "b_dec")} | {"W_dec": tensors["W_dec"].T.contiguous()}
    write(tmp_path, state, "layer3.sae.pt")
    with pytest.raises(ValueError, match="pass `k`"):
        convert.load(tmp_path)
    assert_computes(convert.load(tmp_path, k=3), x, *encode_decode(x, tensors, topk(3), subtract=False))


# Bussmann


@each(
    shape=SHAPES, kind=["vanilla", "topk", "batchtopk", "jumprelu", "global-matryoshka-topk"], unit_norm=[True, False]
)
def test_bussmann(tmp_path, shape, kind, unit_norm):
    tensors, x = weights(*shape), inputs(shape[0])
    state, groups = matrices(tensors), [3, 2, shape[1] - 5]
    if kind in ("batchtopk", "global-matryoshka-topk"):
        state["threshold"] = torch.tensor(0.3)
    if kind == "jumprelu":
        state["jumprelu.log_threshold"] = tensors["threshold"].log()
    config = {"sae_type": kind, "act_size": shape[0], "dict_size": shape[1], "top_k": 4, "model_name": "gpt2-small"}
    config |= {"input_unit_norm": unit_norm, "hook_point": "blocks.8.hook_resid_pre", "group_sizes": str(groups)}
    write(tmp_path / "checkpoints" / "a_1000", state, "sae.pt", config)
    sae = convert.load(tmp_path)
    act = {"vanilla": relu, "topk": topk(4), "jumprelu": jumprelu(tensors["threshold"])}.get(kind, jumprelu(0.3))
    used = tensors if kind in ("vanilla", "jumprelu") else tensors | {"b_enc": torch.zeros(shape[1])}
    norm = "layer_norm" if unit_norm else None
    assert_computes(sae, x, *encode_decode(x, used, act, subtract=kind != "jumprelu", norm=norm))
    nested = kind == "global-matryoshka-topk"
    assert sae.prefix_widths == ([3, 5, shape[1]] if nested else [shape[1]])
    assert sae.config.hookpoint == "transformer.h.8:input"


def test_bussmann_stringified_list_is_read_not_run(tmp_path):
    config = {"sae_type": "global-matryoshka-topk", "act_size": 16, "group_sizes": "__import__('os').getcwd()"}
    state = matrices(weights(16, 64)) | {"threshold": torch.tensor(0.3)}
    write(tmp_path, state, "sae.pt", config | {"top_k": 4})
    with pytest.raises(ValueError, match="Expected a list of whole numbers"):
        convert.load(tmp_path)


# Nabeshima


@pytest.mark.parametrize("shape", SHAPES)
def test_nabeshima(tmp_path, shape, caplog):
    tensors, x = weights(*shape), inputs(shape[0])
    state = matrices(tensors) | {"normalizer.running_avg": torch.tensor([5.0])}
    write(tmp_path, state, "matryoshka.pt")
    with caplog.at_level(logging.WARNING):
        sae = convert.load(tmp_path)
    assert "prefixes of random widths" in caplog.text
    factor = math.sqrt(shape[0]) / 5.0
    latents, reconstruction = encode_decode(x * factor, tensors, relu, subtract=False)
    assert_computes(sae, x, latents * tensors["W_dec"].norm(dim=1) / factor, reconstruction / factor)
    assert convert.load(tmp_path, prefix_widths=[4, shape[1]]).prefix_widths == [4, shape[1]]


# mlsae, CSR


@each(shape=SHAPES, standardize=[True, False])
def test_mlsae(tmp_path, shape, standardize):
    tensors, x = weights(*shape) | {"b_enc": torch.zeros(shape[1])}, inputs(shape[0])
    state = {name: value for name, value in linear(tensors).items() if name.endswith("weight")}
    state |= {"pre_encoder_bias": tensors["b_dec"], "last_nonzero": torch.zeros(shape[1], dtype=torch.int64)}
    config = {"n_inputs": shape[0], "n_latents": shape[1], "k": 4, "standardize": standardize}
    write(tmp_path, state, "model.safetensors", config)
    norm = "layer_norm" if standardize else None
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, topk(4), norm=norm))


@each(name=["decoder.linear.weight", "encoder.weight"], shape=SHAPES, normalize=[True, False])
def test_csr_has_one_matrix_under_either_name(tmp_path, shape, name, normalize):
    tensors, x = weights(*shape), inputs(shape[0])
    tensors["W_dec"] = tensors["W_enc"]
    state = {name: tensors["W_enc"], "pre_bias": tensors["b_dec"], "latent_bias": tensors["b_enc"]}
    config = {"input_dim": shape[0], "hidden_dim": shape[1], "k": 4, "k_aux": 8, "normalize": normalize}
    write(tmp_path / "1_SparseAutoEncoder", state, "model.safetensors", config)
    norm = "layer_norm" if normalize else None
    assert_computes(convert.load(tmp_path), x, *encode_decode(x, tensors, topk(4), norm=norm))
    assert convert.load(tmp_path, k=2).config.k == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_loaded_is_memory_of_its_own(tmp_path, dtype):
    encoder = torch.randn(64, 16).to(dtype)
    state = {"encoder.weight": encoder, "pre_bias": torch.zeros(16, dtype=dtype), "latent_bias": torch.zeros(64)}
    write(tmp_path, state, "model.safetensors", {"input_dim": 16, "hidden_dim": 64, "k": 4})
    sae = convert.load(tmp_path)
    sae.W_enc.data.zero_()  # neither the decoder's, although they are tied
    assert torch.equal(sae.W_dec, encoder.float())
    content = (tmp_path / "model.safetensors").read_bytes()
    with open(tmp_path / "model.safetensors", "r+b") as file:  # nor the file's
        file.write(bytes(len(content)))
    assert torch.equal(sae.W_dec, encoder.float())


# Goodfire, DeepSeek


@pytest.mark.parametrize(
    "file, suffix, model, layer",
    [
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", "_linear", "meta-llama/Llama-3.1-8B-Instruct", 19),
        ("DeepSeek-R1-Distill-Llama-8B-SAE-l7.pt", "", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 7),
    ],
)
def test_two_linear_layers(tmp_path, file, suffix, model, layer):
    tensors, x = weights(16, 64), inputs(16)
    write(tmp_path, linear(tensors, suffix), file)
    sae = convert.load(tmp_path)
    assert (sae.config.base_model, sae.config.hookpoint) == (model, f"model.layers.{layer}")
    assert_computes(sae, x, *encode_decode(x, tensors, relu, subtract=False))
