"""Adapters beside the hook they stand for, and PEFT's own saving, loading, swapping and merging of them."""

import pytest
import torch

from hf_matryoshka_sae.steering import Steering, steered

from .architectures import ARCHITECTURES, logits, make_sae, model_of, tokens


peft = pytest.importorskip("peft", reason="needs the extra `steering`")

NO_BIAS = {"mixtral": "No bias adds a vector", "gemma2": "No bias adds a vector"}
NO_ERASURE = {
    "gpt2": "has a bias that writes",
    "gpt_neox": "has a bias that writes",
    "mixtral": "gives more than its input",
    "gemma2": "gives more than its input",
    "bert": "is no sum of embeddings",
}
EXACT = {torch.float32: 1e-4, torch.float64: 1e-5}


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("mode", ["add", "erase"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapter_and_hook_give_the_same_logits_or_the_adapter_is_refused(name, mode, dtype):
    if name == "mixtral" and dtype == torch.float64:
        pytest.skip("torch multiplies no grouped matrices of float64")
    model, hookpoint = model_of(name, dtype)
    steering, ids = Steering.from_latents(make_sae(hookpoint), {3: 0.5, 20: -0.7}, mode), tokens()
    plain = logits(model, ids)
    refusal = (NO_BIAS if mode == "add" else NO_ERASURE).get(name)
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal):
            steering.to_peft(model)
        assert torch.equal(logits(model, ids), plain)
        return
    with steering.applied(model):
        expected = logits(model, ids)
    adapted = steering.to_peft(model)
    torch.testing.assert_close(logits(adapted, ids), expected, rtol=0, atol=EXACT[dtype])
    assert (expected - plain).abs().max() > 1e-2
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, ids), plain)


@pytest.mark.parametrize("place", ["model.layers.2:input", "model.layers.1.mlp", "model.layers.1.self_attn"])
def test_other_places_have_carriers_too(place):
    model, _ = model_of("llama")
    steering = Steering.from_latents(make_sae(place), {3: 1.5})
    with steering.applied(model):
        expected = logits(model, tokens())
    torch.testing.assert_close(logits(steering.to_peft(model), tokens()), expected, rtol=0, atol=1e-4)


def test_two_hookpoints_make_one_adapter():
    model, hookpoint = model_of("qwen2")
    both = Steering.from_latents(make_sae(hookpoint), {3: 1.5}) + Steering.from_latents(
        make_sae("model.layers.0"), {4: 1.0, 5: 1.0}
    )
    with both.applied(model):
        expected = logits(model, tokens())
    torch.testing.assert_close(logits(both.to_peft(model), tokens()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, mode", [("llama", "add"), ("gpt2", "add"), ("bert", "add"), ("llama", "erase")])
def test_peft_saves_loads_and_swaps_it(name, mode, tmp_path):
    model, hookpoint = model_of(name)
    sae, ids = make_sae(hookpoint), tokens()
    first, second = (Steering.from_latents(sae, {latent: 1.5}, mode) for latent in (3, 20))
    expected = []
    for number, steering in enumerate((first, second)):
        with steering.applied(model):
            expected.append(logits(model, ids))
        steering.export(tmp_path / str(number), "peft", model)
    from peft.utils.hotswap import hotswap_adapter

    loaded = peft.PeftModel.from_pretrained(model_of(name)[0], tmp_path / "0")
    torch.testing.assert_close(logits(loaded, ids), expected[0], rtol=0, atol=1e-4)
    if name != "bert" and mode == "add":  # PEFT hot-swaps LoRA alone, and not that of embeddings
        hotswap_adapter(loaded, tmp_path / "1", "default")
        torch.testing.assert_close(logits(loaded, ids), expected[1], rtol=0, atol=1e-4)
    loaded.load_adapter(tmp_path / "0", "other")
    loaded.set_adapter("other")
    torch.testing.assert_close(logits(loaded, ids), expected[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, mode", [("gpt2", "add"), ("gpt_neox", "add"), ("bert", "add"), ("mistral", "erase")])
def test_peft_merges_it(name, mode):
    model, hookpoint = model_of(name)
    if name == "mistral":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    steering = Steering.from_latents(make_sae(hookpoint), {3: 1.5}, mode)
    with steering.applied(model):
        expected = logits(model, tokens())
    merged = steering.to_peft(model).merge_and_unload()
    assert not any("peft" in type(module).__module__ for module in merged.modules())
    torch.testing.assert_close(logits(merged, tokens()), expected, rtol=0, atol=1e-4)


def test_a_steered_model_with_another_adapter_is_steered_in_place():
    model, hookpoint = model_of("llama")
    sae = make_sae(hookpoint)
    adapted = Steering.from_latents(sae, {3: 1.5}).to_peft(model)
    with steered(adapted, sae, {20: 1.0}):
        found, sampled = logits(adapted, tokens()), adapted.generate(tokens(), max_new_tokens=3, do_sample=False)
    plain, _ = model_of("llama")
    with steered(plain, sae, {3: 1.5, 20: 1.0}):
        torch.testing.assert_close(found, logits(plain, tokens()), rtol=0, atol=1e-4)
        assert torch.equal(sampled, plain.generate(tokens(), max_new_tokens=3, do_sample=False))
    with pytest.raises(ValueError, match="has an adapter already"):
        Steering.from_latents(sae, {3: 1.5}).to_peft(adapted)


def test_what_depends_on_activations_or_positions_has_no_adapter():
    model, hookpoint = model_of("llama")
    sae = make_sae(hookpoint)
    for options, message in [
        (dict(mode="clamp"), "'clamp' depends on what fires"),
        (dict(mode="remove"), "'remove' depends on what fires"),
        (dict(condition=7), "only where latent 7 fires"),
        (dict(positions="new"), "at some positions alone"),
        (dict(from_position=3), "at some positions alone"),
    ]:
        with pytest.raises(ValueError, match=message):
            Steering.from_latents(sae, {3: 1.0}, **options).to_peft(model)
    normal = make_sae(hookpoint, input_normalization="constant_norm")
    with pytest.raises(ValueError, match="normalises its input"):
        Steering.from_latents(normal, {3: 1.0}).to_peft(model)
    with pytest.raises(ValueError, match="nothing, as no projection lies before it"):
        Steering.from_latents(sae, {3: 1.0}, hookpoint="model.embed_tokens").to_peft(model)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["add", "erase"])
def test_a_trained_model_has_exact_adapters(shared, mode):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shared / "lm").eval()
    torch.manual_seed(0)
    sae = type(make_sae("x"))(type(make_sae("x").config)(d_in=128, num_latents=64, k=4, hookpoint="model.layers.1"))
    steering = Steering.from_latents(sae, {3: 2.0}, mode)
    ids = torch.randint(1, 4000, (2, 40))
    with steering.applied(model):
        expected = logits(model, ids)
    torch.testing.assert_close(logits(steering.to_peft(model), ids), expected, rtol=0, atol=1e-4)
