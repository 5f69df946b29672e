"""Steering in place, against hidden states changed by hand; batches, beams, caches, nesting, exceptions, types."""

import copy

import pytest
import torch
from torch import nn

from hf_matryoshka_sae.models import TopKSAE, TopKSAEConfig
from hf_matryoshka_sae.steering import Part, Steering, steered

from .architectures import ARCHITECTURES, WIDTH, logits, make_sae, model_of, tokens


@pytest.fixture(scope="module")
def llama():
    model, hookpoint = model_of("llama")
    model.generation_config.eos_token_id = None
    return model, hookpoint, make_sae(hookpoint)


def by_hand(model, hookpoint, ids, change, **options):
    """Logits with `change` of the module's output, in one hook."""

    def hook(_, __, output):
        states = output[0] if isinstance(output, tuple) else output
        new = change(states)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.get_submodule(hookpoint).register_forward_hook(hook)
    try:
        return logits(model, ids, **options)
    finally:
        handle.remove()


def continued(model, ids, mask=None, **options):
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 5} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)


def hooks_of(model) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_several_latents_are_added_and_clamped_on_every_architecture(name):
    model, hookpoint = model_of(name)
    sae, ids = make_sae(hookpoint), tokens()
    values = {3: 1.5, 20: -2.0}
    with torch.no_grad():
        rows, amounts = sae.W_dec[[3, 20]], torch.tensor([1.5, -2.0])
        added = by_hand(model, hookpoint, ids, lambda x: x + amounts @ rows)
        clamped = by_hand(
            model, hookpoint, ids, lambda x: x + (amounts - sae.encode(x).to_dense()[..., [3, 20]]) @ rows
        )
    for mode, expected in (("add", added), ("clamp", clamped)):
        with steered(model, sae, values, mode):
            torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(added, logits(model, ids), atol=1e-2)


def test_erasing_leaves_nothing_along_the_direction_in_any_block():
    model, hookpoint = model_of("gpt_neox")
    sae, seen = make_sae(hookpoint), []
    with steered(model, sae, [3, 20], "erase"):
        handles = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in model.gpt_neox.layers]
        logits(model, tokens())
    for handle in handles:
        handle.remove()
    for output in seen:
        states = output[0] if isinstance(output, tuple) else output
        assert (states @ sae.W_dec[[3, 20]].T).abs().max() < 1e-5 < states.abs().max()


@pytest.mark.parametrize("mode", ["add", "clamp"])
@pytest.mark.parametrize("positions", ["all", "new", "generated"])
def test_a_padded_batch_gives_what_each_text_gives_alone_with_and_without_cache(llama, mode, positions):
    model, _, sae = llama
    ids = tokens(2, 9)
    ids[1, :4] = 5
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    with steered(model, sae, {3: 1.5, 20: 2.0}, mode, positions=positions):
        whole = continued(model, ids, mask)[:, 9:]
        alone = [continued(model, ids[:1])[0, 9:], continued(model, ids[1:, 4:])[0, 5:]]
        uncached = continued(model, ids, mask, use_cache=False)[:, 9:]
    assert torch.equal(whole, torch.stack(alone)) and torch.equal(whole, uncached)
    assert not torch.equal(whole, continued(model, ids, mask)[:, 9:])


def test_positions_count_without_padding_and_begin_where_they_say(llama):
    model, hookpoint, sae = llama
    ids, vector = tokens(2, 9), 2.0 * sae.W_dec[3].detach()
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    place = mask.cumsum(1) - 1

    def late(states):
        return states + (place >= 2)[..., None] * vector

    with steered(model, sae, {3: 2.0}, from_position=2):
        found = logits(model, ids, attention_mask=mask)
    expected = by_hand(model, hookpoint, ids, late, attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


def test_only_where_another_latent_fires(llama):
    model, hookpoint, sae = llama
    ids, often = tokens(), []

    def change(states):
        fires = sae.encode(states).to_dense() > 0
        often.append(int((fires.float().mean((0, 1)) - 0.5).abs().argmin()))  # fires on about half of the tokens
        return states + fires[..., often[0], None] * 2.0 * sae.W_dec[3]

    with torch.no_grad():
        expected = by_hand(model, hookpoint, ids, change)
    assert not torch.allclose(expected, logits(model, ids), atol=1e-2)
    with steered(model, sae, {3: 2.0}, condition=often[0]):
        torch.testing.assert_close(logits(model, ids), expected)


@pytest.mark.parametrize("mode", ["add", "clamp", "remove"])
def test_nested_contexts_do_what_one_does(llama, mode):
    model, _, sae = llama
    ids = tokens()
    with steered(model, sae, {3: 1.5, 20: 2.0}, mode):
        expected = logits(model, ids)
    with steered(model, sae, {3: 1.5}, mode), steered(model, sae, {20: 2.0}, mode):
        torch.testing.assert_close(logits(model, ids), expected)
    parts = Steering.from_latents(sae, {3: 1.5}, mode) + Steering.from_latents(sae, {20: 2.0}, mode)
    with parts.applied(model):
        torch.testing.assert_close(logits(model, ids), expected)


def test_several_saes_at_several_hookpoints(llama):
    model, hookpoint, sae = llama
    other = TopKSAE(TopKSAEConfig(d_in=WIDTH, num_latents=24, k=4, hookpoint="model.layers.2:input")).eval()
    ids = tokens()
    with steered(model, sae, {3: 1.5}), steered(model, other, {9: 1.0}, hookpoint="model.layers.0.mlp"):
        found = logits(model, ids)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: out + other.W_dec[9])
    with torch.no_grad():
        expected = by_hand(model, hookpoint, ids, lambda x: x + 1.5 * sae.W_dec[3])
    handle.remove()
    torch.testing.assert_close(found, expected)


def test_a_width_encodes_with_the_first_latents(llama):
    model, hookpoint, sae = llama
    ids, narrow = tokens(), sae.truncate(10)
    with torch.no_grad():
        expected = by_hand(model, hookpoint, ids, lambda x: x - narrow.encode(x).to_dense()[..., 3:4] * sae.W_dec[3])
    with steered(model, sae, [3], "remove", width=10):
        torch.testing.assert_close(logits(model, ids), expected)


def test_beams_and_samples_are_those_of_a_model_changed_by_hand(llama):
    model, hookpoint, sae = llama
    vector = 2.0 * sae.W_dec[3].detach()
    for options in (dict(num_beams=3, num_return_sequences=2), dict(do_sample=True, num_return_sequences=3)):
        torch.manual_seed(3)
        with steered(model, sae, {3: 2.0}):
            found = continued(model, tokens(), **options)
        handle = model.get_submodule(hookpoint).register_forward_hook(lambda _, __, out: out + vector)
        torch.manual_seed(3)
        assert torch.equal(found, continued(model, tokens(), **options))
        handle.remove()


def test_nothing_is_left_behind_after_an_exception(llama, monkeypatch):
    model, _, sae = llama
    before, ids = hooks_of(model), tokens()
    plain = logits(model, ids)
    for broken in (True, False):
        with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch:
            if broken:
                patch.setattr(Part, "difference", lambda *_: 1 / 0)
            with steered(model, sae, {3: 2.0}), steered(model, sae, {4: 2.0}):
                logits(model, ids)
                continued(model, ids)
                1 / 0  # noqa: B018
    with pytest.raises(ValueError, match="No module matches"), steered(model, sae, {3: 2.0}, hookpoint="layers.9"):
        pass
    assert hooks_of(model) == before and "generate" not in vars(model)
    assert torch.equal(logits(model, ids), plain)


def test_gradients_pass_through_a_steered_model(llama):
    model, _, sae = llama
    embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    with steered(model, sae, {3: 2.0}, "clamp"):
        model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0


def test_half_precision_keeps_its_type(llama):
    model, _, sae = llama
    half = copy.deepcopy(model).to(torch.bfloat16)
    with steered(half, sae, {3: 1.5, 20: 2.0}, "clamp"), steered(model, sae, {3: 1.5, 20: 2.0}, "clamp"):
        found, expected = logits(half, tokens()), logits(model, tokens())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.release
def test_a_compiled_model_is_steered_and_forgets_it(llama):
    model, hookpoint, sae = llama
    compiled, ids = torch.compile(copy.deepcopy(model), backend="eager"), tokens()
    plain = logits(compiled, ids)
    with steered(compiled, sae, {3: 2.0}), torch.no_grad():
        torch.testing.assert_close(
            logits(compiled, ids), by_hand(model, hookpoint, ids, lambda x: x + 2.0 * sae.W_dec[3])
        )
        assert not torch.allclose(logits(compiled, ids), plain)
    assert torch.equal(logits(compiled, ids), plain)


def test_a_model_in_pieces_is_steered_where_its_layer_is(llama):
    from accelerate import dispatch_model

    model, _, sae = llama
    ids = tokens()
    with steered(model, sae, {3: 2.0}, "clamp"):
        expected = logits(model, ids)
    pieces = dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True)
    with steered(pieces, sae, {3: 2.0}, "clamp"):
        torch.testing.assert_close(logits(pieces, ids), expected)


def test_what_does_not_fit_is_refused(llama, caplog):
    model, _, sae = llama
    for options, message in [
        (dict(values={40: 1.0}), "0 to 39, got 40"),
        (dict(values={12: 1.0}, width=10), "0 to 9, got 12"),
        (dict(values={3: float("nan")}), "latent 3 must be a finite number"),
        (dict(values={3: True}), "latent 3 must be a finite number"),
        (dict(values={}), "Expected latents with their values"),
        (dict(values=[3]), "needs a value for each latent"),
        (dict(mode="push"), "`mode`"),
        (dict(positions="last"), "`positions`"),
        (dict(from_position=-1), "`from_position`"),
        (dict(condition=99), "0 to 39, got 99"),
        (dict(mode="erase", positions="new"), "the whole model"),
        (dict(hookpoint="model.layers.*"), "names 3 modules"),
        (dict(hookpoint="model.layers.1.mlp.up_proj"), "width 32"),
    ]:
        options = {"values": {3: 1.0}} | options
        with pytest.raises(ValueError, match=message), steered(model, sae, **options):
            pass
    broken = make_sae("model.layers.1")
    broken.W_dec.data[3] = torch.nan
    with pytest.raises(ValueError, match="not finite"), steered(model, broken, {3: 1.0}):
        pass
    assert not caplog.records
    with steered(model, sae, {3: 100.0}):
        logits(model, tokens())
    assert "times as long as the hidden states" in caplog.text


def test_a_part_of_the_model_called_alone_is_steered_at_all_positions(llama):
    model, _, sae = llama
    inner: nn.Module = model.model
    with steered(model, sae, {3: 2.0}), torch.no_grad():
        whole = logits(model, tokens())
        torch.testing.assert_close(model.lm_head(inner(tokens()).last_hidden_state), whole)
