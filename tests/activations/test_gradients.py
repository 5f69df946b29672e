import pytest
import torch
from transformers import BertModel

from hf_matryoshka_sae.activations import TokenStream, harvest
from hf_matryoshka_sae.activations.gradients import loss_gradients

from . import tiny


def _batch(kind="bos", pack=True):
    return next(TokenStream(tiny.texts(40), tiny.tokenizer(kind), 16, 4, pack=pack))


def _reference(model, batch, path, side, masked=None):
    """The gradient with respect to something added to the kept hidden states, over the whole graph."""
    states = harvest(model, batch.input_ids, None, [path if side == "output" else f"{path}:input"])
    added = torch.zeros_like(next(iter(states.values())), requires_grad=True)
    module = model.get_submodule(path)

    def after(_, args, output):
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    def before(_, args):
        return (args[0] + added, *args[1:])

    handle = module.register_forward_hook(after) if side == "output" else module.register_forward_pre_hook(before)
    logits = model(batch.input_ids if masked is None else batch.input_ids.masked_fill(masked, 4)).logits
    handle.remove()
    loss = 0
    for row in range(len(logits)):
        for position in range(logits.shape[1]):
            if masked is not None and masked[row, position]:
                loss = loss - logits[row, position].log_softmax(0)[batch.input_ids[row, position]]
            elif masked is None and batch.keep[row, position] and position + 1 < logits.shape[1]:
                loss = loss - logits[row, position].log_softmax(0)[batch.input_ids[row, position + 1]]
    (gradient,) = torch.autograd.grad(loss, added)
    return gradient[batch.keep]


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_gradients_equal_the_reference(name, side):
    build, layers = tiny.ARCHITECTURES[name]
    model, batch, path = build(), _batch(), f"{layers}.1"
    _, gradients = loss_gradients(model, batch, path if side == "output" else f"{path}:input")
    torch.testing.assert_close(gradients, _reference(model, batch, path, side), rtol=1e-4, atol=1e-6)
    assert gradients.abs().max() > 1e-3


def test_gradients_of_a_masked_model_are_those_of_its_guesses():
    model, batch, path = tiny.bert(), _batch("encoder"), "bert.encoder.layer.1"
    masked = torch.rand(batch.keep.shape, generator=torch.Generator().manual_seed(1)) < 0.15
    masked &= batch.keep
    states, gradients = loss_gradients(model, batch, path, mask_token_id=4, seed=1)
    torch.testing.assert_close(gradients, _reference(model, batch, path, "output", masked), rtol=1e-4, atol=1e-6)
    seen = harvest(model, batch.input_ids.masked_fill(masked, 4), None, [path])[path][batch.keep]
    assert torch.equal(states, seen) and gradients.abs().max() > 1e-3


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
