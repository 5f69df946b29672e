"""Names of hooks and models in each vocabulary, both ways."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig

from hf_matryoshka_sae.convert.hook_names import (
    from_module_path,
    from_sparsify,
    from_transformer_lens,
    hf_model_id,
    kept_with_warning,
    to_module_path,
    to_sparsify,
    to_transformer_lens,
    transformer_lens_model,
)


LLAMA, GEMMA2, GPT2, NEOX = (
    "meta-llama/Llama-3.2-1B",
    "google/gemma-2-2b",
    "openai-community/gpt2",
    "EleutherAI/pythia-70m",
)

TABLE = [
    (LLAMA, "hook_embed", "model.embed_tokens"),
    (LLAMA, "blocks.3.hook_resid_post", "model.layers.3"),
    (LLAMA, "blocks.3.hook_resid_pre", "model.layers.3:input"),
    (LLAMA, "blocks.3.attn.hook_z", "model.layers.3.self_attn.o_proj:input"),
    (LLAMA, "blocks.3.hook_attn_out", "model.layers.3.self_attn.o_proj"),
    (LLAMA, "blocks.3.hook_resid_mid", "model.layers.3.post_attention_layernorm:input"),
    (LLAMA, "blocks.3.ln2.hook_normalized", "model.layers.3.post_attention_layernorm"),
    (LLAMA, "blocks.3.mlp.hook_post", "model.layers.3.mlp.down_proj:input"),
    (LLAMA, "blocks.3.hook_mlp_out", "model.layers.3.mlp"),
    ("Qwen/Qwen2.5-0.5B", "blocks.11.hook_resid_post", "model.layers.11"),
    ("google/gemma-2b", "blocks.11.hook_mlp_out", "model.layers.11.mlp"),
    (GEMMA2, "hook_embed", "model.embed_tokens"),
    (GEMMA2, "blocks.12.hook_resid_post", "model.layers.12"),
    (GEMMA2, "blocks.12.attn.hook_z", "model.layers.12.self_attn.o_proj:input"),
    (GEMMA2, "blocks.12.hook_attn_out", "model.layers.12.post_attention_layernorm"),
    (GEMMA2, "blocks.12.ln2.hook_normalized", "model.layers.12.pre_feedforward_layernorm"),
    (GEMMA2, "blocks.12.hook_mlp_out", "model.layers.12.post_feedforward_layernorm"),
    ("google/gemma-3-1b-pt", "blocks.12.hook_mlp_out", "model.layers.12.post_feedforward_layernorm"),
    (GPT2, "hook_embed", "transformer.wte"),
    (GPT2, "blocks.0.hook_resid_post", "transformer.h.0"),
    (GPT2, "blocks.0.hook_resid_pre", "transformer.h.0:input"),
    (GPT2, "blocks.0.attn.hook_z", "transformer.h.0.attn.c_proj:input"),
    (GPT2, "blocks.0.hook_attn_out", "transformer.h.0.attn"),
    (GPT2, "blocks.0.ln2.hook_normalized", "transformer.h.0.ln_2"),
    (GPT2, "blocks.0.mlp.hook_post", "transformer.h.0.mlp.c_proj:input"),
    (GPT2, "blocks.0.hook_mlp_out", "transformer.h.0.mlp"),
    (NEOX, "hook_embed", "gpt_neox.embed_in"),
    (NEOX, "blocks.5.hook_resid_post", "gpt_neox.layers.5"),
    (NEOX, "blocks.5.hook_resid_pre", "gpt_neox.layers.5:input"),
    (NEOX, "blocks.5.attn.hook_z", "gpt_neox.layers.5.attention.dense:input"),
    (NEOX, "blocks.5.hook_attn_out", "gpt_neox.layers.5.attention"),
    (NEOX, "blocks.5.mlp.hook_post", "gpt_neox.layers.5.mlp.dense_4h_to_h:input"),
    (NEOX, "blocks.5.hook_mlp_out", "gpt_neox.layers.5.mlp"),
]


@pytest.mark.parametrize("model, hook, hookpoint", TABLE)
def test_transformer_lens_both_ways(model, hook, hookpoint):
    assert from_transformer_lens(hook, model) == hookpoint
    assert to_transformer_lens(hookpoint, model) == hook


@pytest.mark.parametrize("model", [LLAMA, GEMMA2, GPT2, NEOX])
def test_the_paths_are_modules_of_transformers(model):
    """On tiny models of each family, every site that is translated exists."""
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=10)
    config = {
        LLAMA: LlamaConfig(**sizes, num_key_value_heads=2),
        GEMMA2: Gemma2Config(**sizes, num_key_value_heads=2, head_dim=4),
        NEOX: GPTNeoXConfig(**sizes),
        GPT2: GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10),
    }[model]
    with torch.device("meta"):
        modules = dict(AutoModelForCausalLM.from_config(config).named_modules())
    hooks = {hook.replace(hook.split(".")[1], "0", 1) if "." in hook else hook for _, hook, _ in TABLE}
    found = [path for hook in hooks if (path := from_transformer_lens(hook, model)) is not None]
    assert len(found) >= 8
    assert not [path for path in found if path.split(":")[0] not in modules]


def test_what_is_not_known_is_not_guessed(caplog):
    assert from_transformer_lens("blocks.3.hook_resid_post", "unheard-of") is None
    assert from_transformer_lens("blocks.3.hook_resid_post", None) is None
    assert from_transformer_lens("blocks.3.hook_resid_mid", NEOX) is None  # attention and MLP are parallel
    assert from_transformer_lens("blocks.3.attn.hook_pattern", LLAMA) is None
    assert to_transformer_lens("encoder.layer.3", "bert-base-uncased") is None
    assert to_transformer_lens("model.layers.3.mlp.up_proj", LLAMA) is None
    with caplog.at_level(logging.WARNING):
        assert kept_with_warning("blocks.3.x", None, "unheard-of") == "blocks.3.x"
    assert "'blocks.3.x' of unheard-of is kept" in caplog.text
    assert kept_with_warning(None, None, None) is None


def test_paths_alone_say_what_they_can():
    assert to_transformer_lens("transformer.h.2.mlp") == "blocks.2.hook_mlp_out"
    assert to_transformer_lens("gpt_neox.layers.2:input") == "blocks.2.hook_resid_pre"
    assert to_transformer_lens("model.layers.2") == "blocks.2.hook_resid_post"
    assert to_transformer_lens("model.layers.2.mlp") is None  # another place in Gemma 2 than in Llama


@pytest.mark.parametrize(
    "name, hookpoint",
    [
        ("model.layers.3.output", "model.layers.3"),
        ("model.layers.3.self_attn.o_proj.input", "model.layers.3.self_attn.o_proj:input"),
    ],
)
def test_module_paths_of_gemma_scope_2(name, hookpoint):
    assert from_module_path(name) == hookpoint and to_module_path(hookpoint) == name
    assert from_module_path("model.layers.3") == "model.layers.3"


@pytest.mark.parametrize(
    "name, model, hookpoint",
    [
        ("layers.10", LLAMA, "model.layers.10"),
        ("layers.5.mlp", NEOX, "gpt_neox.layers.5.mlp"),
        ("h.3.attn", GPT2, "transformer.h.3.attn"),
        ("embed_tokens", LLAMA, "model.embed_tokens"),
    ],
)
def test_sparsify_both_ways(name, model, hookpoint):
    assert from_sparsify(name, model) == hookpoint and to_sparsify(hookpoint) == name


def test_sparsify_without_a_model():
    assert from_sparsify("h.3", None) == "transformer.h.3"
    assert from_sparsify("layers.3", None) is None  # Llama or GPT-NeoX
    assert from_sparsify("blocks.3", GPT2) is None
    assert to_sparsify("model.layers.3:input") is None


@pytest.mark.parametrize(
    "short, full",
    [
        ("gpt2-small", "openai-community/gpt2"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("Llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
    ],
)
def test_models(short, full):
    assert hf_model_id(short) == full and transformer_lens_model(full) == short
    assert hf_model_id(full) == full


@pytest.mark.parametrize(
    "short, full",
    [
        ("Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("Qwen3-1.7B-Base", "Qwen/Qwen3-1.7B-Base"),
        ("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
    ],
)
def test_models_that_transformer_lens_names_with_their_owners(short, full):
    assert hf_model_id(short) == full and transformer_lens_model(full) == full


def test_models_that_are_not_known(caplog):
    with caplog.at_level(logging.WARNING):
        assert hf_model_id("gelu-2l") == "gelu-2l"
    assert "Hub id is not known" in caplog.text
    assert hf_model_id(None) is None and transformer_lens_model(None) is None
    assert hf_model_id("gpt2") == "openai-community/gpt2"
    assert transformer_lens_model("someone/model") == "someone/model"
