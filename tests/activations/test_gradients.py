import pytest
import torch
from transformers import BertModel

from hf_matryoshka_sae.activations import TokenStream, harvest, spliced_losses
from hf_matryoshka_sae.activations.gradients import loss_gradients

from . import tiny


def _batch(kind="bos", pack=True):
    return next(TokenStream(tiny.texts(40), tiny.tokenizer(kind), 16, 4, pack=pack))


def _check_by_differences(model, batch, hookpoint, **options):
    """The loss of hidden states moved a little along some directions, from `spliced_losses`."""
    states, gradients = loss_gradients(model, batch, hookpoint, **options)
    kept = harvest(model, batch.input_ids, None, [hookpoint])[hookpoint][batch.keep]
    assert states.shape == gradients.shape == kept.shape
    for _ in range(3):
        direction, step = torch.randn_like(states, dtype=torch.float64), 1e-2

        def moved(x, by, direction=direction):
            return x + by * direction.to(x)

        losses = [
            spliced_losses(model, batch, hookpoint, lambda x, by=by: moved(x, by), **options)[0]
            for by in (step, -step)
        ]
        slope = ((losses[0] - losses[1]) / (2 * step)).item()
        assert (gradients.double() * direction).sum().item() == pytest.approx(
            slope, rel=5e-3, abs=1e-3
        )  # the loss is float32's
    return states, gradients


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_gradients_equal_differences_of_the_loss(name):
    build, layers = tiny.ARCHITECTURES[name]
    options = {"mask_token_id": 4, "seed": 1} if name == "bert" else {}
    batch = _batch("encoder" if name == "bert" else "bos")
    model = build().double()
    for hookpoint in (f"{layers}.1", f"{layers}.2:input"):
        _check_by_differences(model, batch, hookpoint, **options)


def test_states_are_those_that_are_harvested():
    model, batch = tiny.llama(), _batch(pack=False)
    states, _ = loss_gradients(model, batch, "model.layers.1")
    harvested = harvest(model, batch.input_ids, batch.attention_mask, ["model.layers.1"])["model.layers.1"]
    assert torch.equal(states, harvested[batch.keep])


def test_the_last_position_gets_no_gradient_at_the_last_layer():
    model, batch = tiny.llama(), _batch()
    _, gradients = loss_gradients(model, batch, "model.layers.2")
    last = torch.zeros_like(batch.keep)
    last[:, -1] = True
    last = last[batch.keep]
    assert (gradients[last] == 0).all() and (gradients[~last].abs().sum(1) > 0).all()


def test_parameters_get_no_gradient_and_no_hook_stays():
    model, batch = tiny.llama(), _batch()
    with torch.no_grad():
        first = loss_gradients(model, batch, "model.layers.1")
    assert all(p.grad is None for p in model.parameters())
    assert not model.model.layers[1]._forward_hooks
    frozen = loss_gradients(model.requires_grad_(False), batch, "model.layers.1")
    assert torch.equal(first[1], frozen[1]) and not frozen[0].requires_grad and not frozen[1].requires_grad


def test_bfloat16_models_give_float32():
    states, gradients = loss_gradients(tiny.llama().bfloat16(), _batch(), "model.layers.1")
    assert states.dtype == gradients.dtype == torch.float32 and gradients.isfinite().all()


def test_errors_say_what_is_missing():
    batch = _batch()
    with pytest.raises(ValueError, match="no language-model head"):
        loss_gradients(BertModel(tiny.bert().config), batch, "encoder.layer.1")
    with pytest.raises(ValueError, match="mask_token_id"):
        loss_gradients(tiny.bert(), _batch("encoder"), "bert.encoder.layer.1")
    with pytest.raises(ValueError, match="does not carry hidden states"):
        loss_gradients(tiny.llama(), batch, "model.rotary_emb")


def test_hidden_states_without_a_part_in_the_loss_are_an_error():
    model = tiny.llama()
    model.model.layers[1].register_forward_hook(lambda _, args, output: torch.zeros_like(output))
    with pytest.raises(ValueError, match="does not depend on the hidden states"):
        loss_gradients(model, _batch(), "model.layers.0")
