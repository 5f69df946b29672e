"""Against a hook written here, that puts reconstructions in place of hidden states."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

from hf_matryoshka_sae.models import ReluSAE, ReluSAEConfig
from hf_matryoshka_sae.steering import reconstruct_text

from ..activations import tiny
from ..features import small


TEXT = "w3 w14 w15 w9 w26 w5 w35 w8"


@pytest.fixture(scope="module")
def lm():
    return small.language_model(), tiny.tokenizer()


@pytest.fixture(scope="module")
def sae():
    return small.make_sae()


def ids_of(tokenizer, text=TEXT) -> torch.Tensor:
    return torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])


def reconstructed(sae, states):
    """TopK by its equations, in float64."""
    weights = {name: tensor.double() for name, tensor in sae.state_dict().items()}
    pre = (states.double() - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]
    values, places = pre.topk(sae.config.k, dim=-1)
    acts = torch.zeros_like(pre).scatter_(-1, places, values.relu())
    return acts @ weights["W_dec"] + weights["b_dec"], acts


@contextmanager
def replacing(model, sae, first=1):
    """The layer gives reconstructions from the position `first` on."""

    def replaced(_, args, output):
        states = output[0] if isinstance(output, tuple) else output
        new = torch.cat([states[:, :first], reconstructed(sae, states[:, first:])[0].to(states)], 1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.get_submodule(small.HOOKPOINT).register_forward_hook(replaced)
    yield
    handle.remove()


@torch.no_grad()
def losses(model, ids):
    logits = model(ids, use_cache=False).logits[0, :-1].double()
    return F.cross_entropy(logits, ids[0, 1:], reduction="none")


@torch.no_grad()
def greedy(model, ids, count):
    """The likeliest tokens, the whole text read anew for each."""
    ends, start = model.generation_config.eos_token_id, ids.shape[1]
    for _ in range(count):
        new = model(ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, new[None]], 1)
        if int(new) == ends:
            break
    return ids[0, start:].tolist()


def test_losses_are_those_with_reconstructions_in_place_of_states(lm, sae):
    model, tokenizer = lm
    found = reconstruct_text(sae, *lm, TEXT)
    ids = ids_of(tokenizer)
    plain = losses(model, ids)
    with replacing(model, sae):
        spliced = losses(model, ids)
    assert found.read.tolist() == [False] + [True] * 8
    # The BOS token's state is kept, so what it predicts is nobody's loss.
    assert found.loss[:2].isnan().all() and found.spliced_loss[:2].isnan().all()
    torch.testing.assert_close(found.loss[2:].double(), plain[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.spliced_loss[2:].double(), spliced[1:], rtol=1e-4, atol=1e-5)
    assert (spliced[1:] - plain[1:]).abs().max() > 1e-3


def test_special_tokens_inside_a_text_keep_their_states(lm, sae):
    model, tokenizer = lm
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("w1 w2 </s> w3 w4")["input_ids"]]])
    found = reconstruct_text(sae, *lm, "w1 w2 </s> w3 w4", max_new_tokens=0)
    assert found.read.tolist() == [False, True, True, False, True, True]

    def replaced(_, args, output):
        states = output[0] if isinstance(output, tuple) else output
        new = states.clone()
        for place in (1, 2, 4, 5):
            new[:, place] = reconstructed(sae, states[:, place])[0].to(states)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.get_submodule(small.HOOKPOINT).register_forward_hook(replaced)
    spliced = losses(model, ids)
    handle.remove()
    predicted = [2, 3, 5]  # from places 1, 2 and 4
    assert (~found.spliced_loss.isnan()).nonzero().flatten().tolist() == predicted
    expected = spliced[[place - 1 for place in predicted]]
    torch.testing.assert_close(found.spliced_loss[predicted].double(), expected, rtol=1e-4, atol=1e-5)


def test_fvu_and_l0_are_those_of_the_text(lm, sae):
    model, tokenizer = lm
    found = reconstruct_text(sae, *lm, TEXT, max_new_tokens=0)
    with torch.no_grad():
        states = model(ids_of(tokenizer), output_hidden_states=True).hidden_states[2][0, 1:].double()
    reconstruction, acts = reconstructed(sae, states)
    fvu = (states - reconstruction).square().sum() / (states - states.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(fvu), rel=1e-4)
    assert found.l0 == pytest.approx(float((acts > 0).sum(1).double().mean()))


@pytest.mark.parametrize("cached", [True, False])
def test_the_continuation_is_that_of_a_greedy_loop(sae, cached):
    model, tokenizer = small.language_model(), tiny.tokenizer()
    model.generation_config.use_cache = model.config.use_cache = cached
    attention, lengths = model.model.layers[2].self_attn, []
    attention.v_proj.weight.data *= 40  # what stands before has a say
    attention.o_proj.weight.data *= 40
    model.model.embed_tokens.register_forward_hook(lambda _, args, output: lengths.append(args[0].shape[1]))
    kept = changed = 0
    for text in (TEXT, "w7", "w150 w2", "w44 w45 w46"):
        lengths.clear()
        found = reconstruct_text(sae, model, tokenizer, text, max_new_tokens=12)
        assert (1 in lengths) == cached
        ids = ids_of(tokenizer, text)
        plain = greedy(model, ids, 12)
        with replacing(model, sae):
            spliced = greedy(model, ids, 12)
        with replacing(model, sae, first=0):
            kept += greedy(model, ids, 12) != spliced
        assert found.plain == tokenizer.decode(plain, skip_special_tokens=True)
        assert found.spliced == tokenizer.decode(spliced, skip_special_tokens=True)
        changed += plain != spliced
    assert changed and kept  # which states are replaced makes a difference here


def test_a_perfect_sae_changes_nothing(lm):
    width = 16
    perfect = ReluSAE(ReluSAEConfig(d_in=width, num_latents=2 * width, hookpoint=small.HOOKPOINT)).eval()
    rows = torch.cat([torch.eye(width), -torch.eye(width)])
    perfect.W_enc.data, perfect.W_dec.data = rows.clone(), rows.clone()
    found = reconstruct_text(perfect, *lm, TEXT)
    torch.testing.assert_close(found.spliced_loss, found.loss, equal_nan=True)
    assert found.fvu == pytest.approx(0, abs=1e-10) and found.l0 == pytest.approx(width)
    assert found.spliced == found.plain != ""


def test_a_width_is_the_truncated_sae(lm, sae):
    found, expected = reconstruct_text(sae, *lm, TEXT, width=10), reconstruct_text(sae.truncate(10), *lm, TEXT)
    assert torch.equal(found.spliced_loss[2:], expected.spliced_loss[2:])
    assert (found.fvu, found.l0, found.spliced) == (expected.fvu, expected.l0, expected.spliced)
    assert not torch.equal(found.spliced_loss[2:], reconstruct_text(sae, *lm, TEXT).spliced_loss[2:])


def test_a_long_text_is_cut_and_says_so(lm, sae):
    found = reconstruct_text(sae, *lm, TEXT, max_tokens=5, max_new_tokens=4)
    start = reconstruct_text(sae, *lm, " ".join(TEXT.split()[:4]), max_new_tokens=4)
    assert found.left_out == 4 and start.left_out == 0 and found.tokens == start.tokens
    assert torch.equal(found.spliced_loss[2:], start.spliced_loss[2:])
    assert (found.plain, found.spliced) == (start.plain, start.spliced)
    # The model reads 64 tokens, those that come included.
    assert len(reconstruct_text(sae, *lm, "w1 " * 100, max_new_tokens=10).tokens) == 54


def test_one_token_is_enough(lm, sae):
    found = reconstruct_text(sae, *lm, "w7", max_new_tokens=3)
    assert [token.strip() for token in found.tokens] == ["<s>", "w7"] and found.read.tolist() == [False, True]
    assert found.fvu is None and found.loss.isnan().all() and found.spliced_loss.isnan().all()
    ids = ids_of(lm[1], "w7")
    with replacing(lm[0], sae):
        assert found.spliced == lm[1].decode(greedy(lm[0], ids, 3), skip_special_tokens=True)


def test_the_first_of_tokens_without_a_beginning_keeps_its_state(sae):
    model, tokenizer = small.language_model(), tiny.tokenizer("bare")
    found = reconstruct_text(sae, model, tokenizer, "w7", max_new_tokens=6)
    assert found.read.tolist() == [False] and found.fvu is None and found.l0 == 0
    ids = torch.tensor([tokenizer("w7")["input_ids"]])
    with replacing(model, sae):
        assert found.spliced == tokenizer.decode(greedy(model, ids, 6), skip_special_tokens=True)


def test_an_sae_stays_in_its_mode(lm):
    training = small.make_sae().train()
    reconstruct_text(training, *lm, TEXT, max_new_tokens=0)
    assert training.training


def test_hooks_are_gone_afterwards(lm, sae):
    model, tokenizer = lm
    before = losses(model, ids_of(tokenizer))
    reconstruct_text(sae, *lm, TEXT)
    assert torch.equal(losses(model, ids_of(tokenizer)), before)


def test_what_cannot_be_read_is_said(lm, sae):
    model, tokenizer = lm
    for options, message in [
        (dict(text=""), "empty"),
        (dict(text=" \n"), "empty"),
        (dict(text="<s>"), "special tokens alone"),
        (dict(max_new_tokens=-1), "max_new_tokens"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(max_new_tokens=64), "room"),
        (dict(hookpoint="model.layers.9"), "No module matches"),
        (dict(width=41), "width"),
    ]:
        with pytest.raises(ValueError, match=message):
            reconstruct_text(sae, *lm, **({"text": TEXT} | options))
    with pytest.raises(ValueError, match="generates no text"):
        reconstruct_text(sae, model.model, tokenizer, TEXT, hookpoint="layers.1")
    with pytest.raises(ValueError, match="no language-model head"):
        reconstruct_text(sae, model.model, tokenizer, TEXT, hookpoint="layers.1", max_new_tokens=0)
