"""Against hidden states changed by hand, and the language model's own generation."""

import math
from contextlib import nullcontext

import pytest
import torch

from hf_matryoshka_sae.activations import load_language_model
from hf_matryoshka_sae.models import MatryoshkaSAE, MatryoshkaSAEConfig, TopKSAE, TopKSAEConfig
from hf_matryoshka_sae.steering import Part, steer, steered


HOOKPOINT = "model.layers.1"
PROMPT = "Return a new list"


@pytest.fixture(scope="module")
def lm():
    return load_language_model("embedded")


def build(**fields) -> MatryoshkaSAE:
    torch.manual_seed(1)
    fields = dict(d_in=128, num_latents=96, prefix_widths=[32, 96], k=12, activation="topk", hookpoint=HOOKPOINT) | (
        fields
    )
    return MatryoshkaSAE(MatryoshkaSAEConfig(**fields)).eval()


def prompt_ids(tokenizer) -> torch.Tensor:
    return torch.tensor([[tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]])


def generated(model, ids, count=8, **options) -> list[int]:
    options = {"do_sample": False} | options
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, pad_token_id=0, **options)[0][
        ids.shape[1] :
    ].tolist()


def states_of(model, ids, *change, **options):
    """What the next layer is given, steered by `change`."""
    seen = []
    with steered(model, *change, **options) if change else nullcontext(), torch.no_grad():
        handle = model.model.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(ids)
        handle.remove()
    return seen[0]


def firing_latent(sae, states) -> int:
    return int(sae.encode(states).to_dense()[0].sum(0).argmax())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("mode, amount", [("add", 3.0), ("add", -1.5), ("clamp", 2.5), ("remove", 0.0)])
def test_the_difference_of_the_decodes_is_added(lm, mode, amount, scaled):
    model, tokenizer = lm
    sae = build(scale_by_decoder_norm=scaled)
    sae.W_dec.data *= torch.linspace(0.5, 2, 96)[:, None]
    ids = prompt_ids(tokenizer)
    with torch.no_grad():
        states = states_of(model, ids)
        latent = firing_latent(sae, states)
        acts = sae.encode(states).to_dense()
        changed = acts.clone()
        changed[..., latent] = changed[..., latent] + amount if mode == "add" else amount
        rows = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True) if scaled else sae.W_dec
        expected = states + (changed - acts) @ rows  # and the SAE's error stays in
    found = states_of(model, ids, sae, {latent: amount}, mode)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    untouched = (changed == acts).all(-1)
    assert torch.equal(found[untouched], states[untouched])
    assert torch.equal(states_of(model, ids), states)  # the hook is gone


def test_an_sae_that_normalises_moves_states_in_their_units(lm):
    model, tokenizer = lm
    sae = TopKSAE(TopKSAEConfig(d_in=128, num_latents=64, k=8, input_normalization="constant_norm")).eval()
    ids = prompt_ids(tokenizer)
    states = states_of(model, ids)
    found = states_of(model, ids, sae, {3: 2.0}, hookpoint=HOOKPOINT)
    scale = states.norm(dim=-1, keepdim=True) / 128**0.5
    torch.testing.assert_close(found, states + 2.0 * scale * sae.W_dec[3], rtol=1e-5, atol=1e-5)


def test_only_new_positions_change(lm):
    model, tokenizer = lm
    ids = prompt_ids(tokenizer)
    start = ids.shape[1] - 1
    before, after = states_of(model, ids), states_of(model, ids, build(), {5: 4.0}, positions="new")
    assert torch.equal(after[:, :start], before[:, :start]) and not torch.equal(after[:, start], before[:, start])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_without_a_change_is_the_plain_one(lm, temperature):
    model, tokenizer = lm
    found = steer(build(), *lm, PROMPT, 5, strength=0.0, unit=1.0, max_new_tokens=8, temperature=temperature, seed=3)
    assert found.steered_ids == found.plain_ids and found.steered == found.plain
    torch.manual_seed(3)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    assert found.plain_ids == generated(model, prompt_ids(tokenizer), **sampling)
    assert found.plain == tokenizer.decode(found.plain_ids)


@pytest.mark.parametrize("positions", ["all", "new"])
def test_steered_tokens_are_those_of_steering_without_a_cache(lm, positions):
    model, tokenizer = lm
    sae, ids = build(), prompt_ids(tokenizer)
    latent = firing_latent(sae, states_of(model, ids))
    found = steer(sae, *lm, PROMPT, latent, "clamp", 40.0, unit=1.0, positions=positions, max_new_tokens=8)
    assert found.amount == 40.0 and found.plain_ids != found.steered_ids
    with steered(model, sae, {latent: 40.0}, "clamp", positions=positions):
        assert generated(model, ids, use_cache=False) == found.steered_ids


def test_the_unit_is_the_largest_activation(lm):
    model, tokenizer = lm
    sae, ids = build(), prompt_ids(tokenizer)
    latent = firing_latent(sae, states_of(model, ids))
    found = steer(sae, *lm, PROMPT, latent, strength=2.0, width=32 if latent < 32 else None, max_new_tokens=4)
    whole = torch.tensor([[*ids[0].tolist(), *found.plain_ids[:-1]]])
    narrow = sae.truncate(32) if latent < 32 else sae
    with torch.no_grad():
        largest = float(narrow.encode(states_of(model, whole)).to_dense()[..., latent].max())
    assert found.amount == pytest.approx(2 * largest, rel=1e-4)


def count_hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_go_after_an_exception(lm, monkeypatch):
    model, _ = lm
    before = count_hooks(model)
    with monkeypatch.context() as patched:
        patched.setattr(Part, "difference", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            steer(build(), *lm, PROMPT, 5, unit=1.0)
    assert count_hooks(model) == before


def test_what_cannot_be_steered_is_said(lm):
    model, tokenizer = lm
    sae = build()
    for options, message in [
        (dict(mode="push"), "`mode`"),
        (dict(positions="last"), "`positions`"),
        (dict(max_new_tokens=0), "new tokens"),
        (dict(temperature=-1), "temperature"),
        (dict(latent=96), "0 to 95, got 96"),
        (dict(latent=40, width=32), "0 to 31, got 40"),
        *((dict(latent=latent), "0 to 95") for latent in (1.5, "1", True, None)),
        *((dict(strength=value), "`strength` must be a finite") for value in (math.nan, math.inf, None, "1", True)),
        *((dict(unit=value), "`unit` must be a finite") for value in (math.nan, -math.inf, "1")),
        (dict(strength=1e300, unit=1e300), "too large"),
        (dict(temperature=math.nan), "temperature"),
        (dict(max_new_tokens=1.5), "new tokens"),
        (dict(seed="a"), "`seed`"),
        (dict(prompt=tokenizer.bos_token), "special tokens alone"),
        (dict(prompt="name " * 300), "too long"),
        (dict(prompt=" "), "empty"),
        (dict(max_new_tokens=400), "no room"),
        (dict(hookpoint="layers.9"), "No module matches"),
    ]:
        with pytest.raises(ValueError, match=message):
            steer(sae, *lm, **(dict(prompt=PROMPT, latent=5, unit=1.0) | options))
    sae.b_enc.data[7] = -1e6
    with pytest.raises(ValueError, match="Latent 7 does not fire.*pass `unit`"):
        steer(sae, *lm, PROMPT, 7, max_new_tokens=2)
    with pytest.raises(ValueError, match="generates no text"):
        steer(sae, model.model, tokenizer, PROMPT, 5)
