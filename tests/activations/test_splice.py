import json

import pytest
import torch
from torch.nn import functional as F
from transformers import BertModel

from hf_matryoshka_sae.activations import (
    DatasetConfig,
    TokenStream,
    harvest,
    has_lm_loss,
    heldout_batches,
    load_language_model,
    spliced_losses,
)

from ..axes import each
from . import tiny


def _batch(kind="bos", pack=True, exclude="special"):
    return next(TokenStream(tiny.texts(40), tiny.tokenizer(kind), 16, 4, pack=pack, exclude=exclude))


def _reference(model, batch, path, replace):
    """The same loss, one sequence and one prediction at a time."""
    total, count = 0.0, 0
    for i in range(len(batch.input_ids)):
        length = int(batch.attention_mask[i].sum())
        ids, keep = batch.input_ids[i : i + 1, :length], batch.keep[i, :length]

        def hook(module, args, output, keep=keep):
            output = output.clone()
            for position in keep.nonzero()[:, 0].tolist():
                output[0, position] = replace(output[0, position])
            return output

        handle = model.get_submodule(path).register_forward_hook(hook)
        with torch.no_grad():
            logits = model(ids).logits[0].double()
        handle.remove()
        for position in range(length - 1):
            if keep[position]:
                total += F.cross_entropy(logits[position], ids[0, position + 1]).item()
                count += 1
    return total, count


@each(pack=[True, False], replace=[lambda x: x, torch.zeros_like, lambda x: x + 1], name=["llama", "gpt2", "mixtral"])
def test_losses_equal_the_reference(name, replace, pack):
    build, layers = tiny.ARCHITECTURES[name]
    model, batch = build(), _batch(pack=pack)
    total, count = spliced_losses(model, batch, f"{layers}.1", replace)
    expected, expected_count = _reference(model, batch, f"{layers}.1", replace)
    assert total.item() == pytest.approx(expected, rel=1e-5) and count == expected_count


def test_replacing_nothing_gives_the_loss_of_the_model():
    model, batch = tiny.llama(), _batch(exclude="none")
    total, count = spliced_losses(model, batch, "model.layers.1", None)
    expected = model(batch.input_ids, labels=batch.input_ids).loss
    assert (total / count).item() == pytest.approx(expected.item(), rel=1e-5)


def test_inputs_can_be_replaced():
    model, batch = tiny.llama(), _batch()
    at_input = spliced_losses(model, batch, "model.layers.2:input", torch.zeros_like)
    at_output = spliced_losses(model, batch, "model.layers.1", torch.zeros_like)
    assert at_input == at_output


def test_replacement_sees_exactly_the_kept_positions():
    model, batch, seen = tiny.llama(), _batch(), []

    def replace(x):
        seen.append(x)
        return x

    spliced_losses(model, batch, "model.layers.1", replace)
    states = harvest(model, batch.input_ids, None, ["model.layers.1"])["model.layers.1"]
    assert len(seen) == 1 and torch.equal(seen[0], states[batch.keep])


def test_masked_models_guess_the_same_hidden_tokens_each_time():
    model, batch = tiny.bert(), _batch("encoder", pack=False)
    options = {"mask_token_id": 4, "seed": 1}
    clean, count = spliced_losses(model, batch, "bert.encoder.layer.1", None, **options)
    same, _ = spliced_losses(model, batch, "bert.encoder.layer.1", lambda x: x, **options)
    zero, zero_count = spliced_losses(model, batch, "bert.encoder.layer.1", torch.zeros_like, **options)
    assert clean == same != zero and count == zero_count
    assert 0 < count < 0.4 * batch.keep.sum()
    with pytest.raises(ValueError, match="mask_token_id"):
        spliced_losses(model, batch, "bert.encoder.layer.1", None)


def test_a_plain_encoder_has_no_loss():
    plain = BertModel(tiny.bert().config)
    assert has_lm_loss(tiny.llama()) and has_lm_loss(tiny.bert()) and not has_lm_loss(plain)
    with pytest.raises(ValueError, match="no language-model head"):
        spliced_losses(plain, _batch("encoder"), "encoder.layer.1", None)


def test_a_replacement_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="must keep the shape"):
        spliced_losses(tiny.llama(), _batch(), "model.layers.1", lambda x: x[:, :3])


@pytest.mark.slow
def test_published_losses_are_reproduced(shared):
    """`peer_quality.json`: BOS before each document and window, position 0 left out and left as it is."""
    published = json.loads((shared / "peer_quality.json").read_text())
    model, tokenizer = load_language_model(str(shared / "lm"))
    heldout = DatasetConfig(str(shared / "text" / "heldout.parquet"), streaming=True)
    batches = heldout_batches(heldout, tokenizer, published["context_length"], 59_925, exclude="first")
    assert sum(len(batch.input_ids) for batch in batches) == 235
    for key, replace in {"clean_ce": None, "zero_ce": torch.zeros_like}.items():
        sums = [spliced_losses(model, batch, published["hookpoint"], replace) for batch in batches]
        loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
        assert loss.item() == pytest.approx(published[key], abs=1e-5)
