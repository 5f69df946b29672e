import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from hf_matryoshka_sae.features import logit_effects
from hf_matryoshka_sae.features.logits import final_norm, norm_gain

from ..activations import tiny
from . import small


def _gemma():
    config = {**tiny.SIZES, "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, "pad_token_id": 0}
    return Gemma2ForCausalLM(Gemma2Config(**config)).eval()


MODELS = {
    "llama": (tiny.llama, "model.norm"),
    "gpt2": (tiny.gpt2, "transformer.ln_f"),
    "gpt_neox": (tiny.gpt_neox, "gpt_neox.final_layer_norm"),
    "gemma": (_gemma, "model.norm"),
}


@pytest.mark.parametrize("name", MODELS)
def test_effects_are_slopes_of_the_logits(name):
    make, norm_name = MODELS[name]
    model, sae = make(), small.make_sae()
    norm = model.get_submodule(norm_name)
    for parameter in norm.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    assert final_norm(model) is norm
    effects = logit_effects(sae, model, count=5)
    # The norm's own output for rows, without its bias, times what it divided by: its gain and mean, no more.
    rows = sae.W_dec.detach()
    with torch.no_grad():
        linear = (norm(rows) - norm(-rows)) / 2
        centred = rows - rows.mean(1, keepdim=True) if name.startswith("gpt") else rows
        linear = linear * centred.square().mean(1, keepdim=True).sqrt()
    logits = linear @ model.get_output_embeddings().weight.detach().T
    torch.testing.assert_close(effects.promoted_logits, logits.topk(5).values, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(effects.suppressed_logits, logits.topk(5, largest=False).values, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits.gather(1, effects.promoted), effects.promoted_logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits.gather(1, effects.suppressed), effects.suppressed_logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("width", [8, 9])
def test_a_gain_is_asked_of_the_norm(width):
    for norm, centres in ((torch.nn.LayerNorm(width), True), (torch.nn.RMSNorm(width), False)):
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
        gain, found = norm_gain(norm, width)
        torch.testing.assert_close(gain, norm.weight, rtol=1e-4, atol=1e-5)
        assert found is centres


def test_models_without_an_unembedding_are_told_apart(tmp_path):
    sae = small.make_sae()
    with pytest.raises(ValueError, match="no unembedding"):
        logit_effects(sae, tiny.llama().model)
    with pytest.raises(ValueError, match="not linear"):
        logit_effects(sae, tiny.bert())
    with pytest.raises(ValueError, match="width"):
        sae.config.d_in = 4
        sae.W_dec = torch.nn.Parameter(sae.W_dec[:, :4].clone())
        logit_effects(sae, tiny.llama())


def test_an_index_without_logit_effects_says_why(tmp_path):
    index = small.build(tmp_path, model=tiny.llama().model, hookpoint="layers.1")
    assert "no unembedding" in index.about["logits"] and index.feature(0).promoted == []
