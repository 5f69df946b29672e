"""What is read from a run's config, against models that are really built."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_matryoshka_sae.assets import load_embedded_lm
from hf_matryoshka_sae.models import build_sae
from hf_matryoshka_sae.planning import read_workload

from .workloads import config, workload


def test_language_model_is_counted_without_its_weights(monkeypatch):
    real, _ = load_embedded_lm()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    lm = workload(context_length=64).lm
    assert lm.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert lm.widths == {"model.layers.2": 128} and lm.bytes_each == 4
    # Three layers: four projections of D x D, three of D x 384, and every token against the window, twice.
    layer = 2 * (4 * 128 * 128 + 3 * 128 * 384) + 4 * 64 * 128
    assert lm.flops_per_token == pytest.approx(3 * layer, rel=0.01)


def test_flops_end_at_the_last_hookpoint():
    ends = [workload(hookpoints=[f"model.layers.{last}"]).lm.flops_per_token for last in range(4)]
    layers = [after - before for before, after in pairwise(ends)]
    assert workload(hookpoints=["model.layers.*"]).lm.flops_per_token == ends[3]
    assert layers == pytest.approx([layers[0]] * 3)
    # Before the first layer nothing is multiplied but, in some versions of transformers, positions.
    assert 0 <= ends[0] - layers[0] < 1e-3 * layers[0]


def test_width_of_a_hookpoint_inside_a_layer():
    assert workload(hookpoints=["model.layers.1.mlp.down_proj:input"]).lm.widths == {
        "model.layers.1.mlp.down_proj:input": 384
    }


def test_a_models_folder_needs_no_weights(tmp_path):
    LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    lm = workload(model=str(tmp_path), hookpoints=["layers.1"]).lm
    assert lm.widths == {"layers.1": 64} and lm.bytes_each == 2 and lm.vocabulary == 100


@pytest.mark.parametrize("family", ["relu", "topk", "batch_topk", "jumprelu", "gated", "matryoshka"])
def test_parameters_are_those_of_the_model(family):
    entry = {"type": family, "num_latents": 256} | ({"k": 4} if "topk" in family or family == "matryoshka" else {})
    run = config(entry)
    (shape,) = read_workload(run).dictionaries
    sae = build_sae(run.saes[0].sae_config(128, "embedded", "model.layers.2"))
    assert shape.parameters == sum(parameter.numel() for parameter in sae.parameters())
    assert shape.prefixes == len(sae.prefix_widths) and shape.activation == sae.config.activation_name
    assert shape.dense == (family in ("relu", "jumprelu", "gated"))


def test_dictionaries_at_their_hookpoints():
    saes = {"type": "topk", "num_latents": 64, "k": 4}, {"num_latents": 96, "k": 4, "hookpoints": ["*.1"]}
    found = workload(*saes, hookpoints=["model.layers.*"]).dictionaries
    assert [shape.num_latents for shape in found] == [64] * 4 + [96]
    assert found[-1].name.endswith("at model.layers.1")


def test_types_and_options_are_read():
    entry = {"type": "topk", "num_latents": 64, "k": 4, "optimizer_dtype": "int8", "weights_dtype": "bfloat16"}
    (shape,) = workload(entry | {"ema_decay": 0.9, "auxk_k": 7, "multi_topk": True}).dictionaries
    assert (shape.moment_bytes, shape.weight_bytes, shape.averaged, shape.auxk) == (1, 2, True, 7)
    assert shape.k == 16 and shape.decodes == 2


def test_given_sizes_stand_in_for_a_model():
    work = read_workload(config(model="nobody/nothing", hookpoints=["layers.9"]), 512, 10**9)
    assert work.dictionaries[0].d_in == 512 and work.lm.parameters == 10**9 and work.lm.flops_per_token == 2e9


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"model": "nobody/nothing"}, {}, "(?s)cannot be read.*--d_in"),
        ({}, {"d_in": 8}, "give both"),
        ({}, {"dead_share": 2.0}, "between 0 and 1"),
        ({"hookpoints": ["model.layers.9"]}, {}, "No module matches"),
        ({"hookpoints": ["layers.*"]}, {"d_in": 8, "lm_parameters": 0}, "names, not globs"),
    ],
)
def test_what_does_not_fit_is_said(fields, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_workload(config(**fields), **arguments)


def test_no_dictionary_at_any_hookpoint():
    with pytest.raises(ValueError, match="No dictionary is trained"):
        workload({"type": "topk", "num_latents": 64, "k": 4, "hookpoints": ["elsewhere"]})


def test_nothing_is_computed():
    """A model too large for this machine is planned for."""
    assert torch.get_default_dtype() == torch.float32
    entry = {"type": "topk", "num_latents": 2**34, "k": 8}
    assert workload(entry).dictionaries[0].parameters > 10**12


def test_embeddings_of_texts_are_made_before_the_first_step():
    work = workload({"type": "topk", "num_latents": 64, "k": 4}, hookpoints=["sentence_embedding"])
    assert work.dictionaries[0].d_in == 128 and not work.lm.parameters and work.buffer_tokens == work.tokens
