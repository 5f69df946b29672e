"""Pooled embeddings after splicing, against transformers alone."""

import pytest
import torch
from transformers import BertConfig, BertModel

from hf_matryoshka_sae.activations import TokenBatch
from hf_matryoshka_sae.evaluation import HeldOut
from hf_matryoshka_sae.evaluation.baselines import Identity
from hf_matryoshka_sae.evaluation.fidelity import evaluate_fidelity
from hf_matryoshka_sae.evaluation.pooled import pooled_metrics


@pytest.fixture(scope="module")
def data() -> HeldOut:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, vocab_size=50, initializer_range=0.5)).eval()
    batches = []
    for size in (30, 20):
        ids = torch.randint(1, 50, (size, 8))
        mask = torch.ones_like(ids)
        mask[::3, 5:] = 0
        keep = mask.bool().clone()
        keep[:, 0] = False
        batches.append(TokenBatch(ids, mask, keep))
    return HeldOut(model, batches, "encoder.layer.0")


class Shifted:
    """Adds something to every hidden state."""

    widths = [1]

    def __init__(self, by: float) -> None:
        self.by = by

    def reconstruct(self, x):
        return (x + self.by * torch.arange(x.shape[1]) % 3)[None]


def test_the_identity_keeps_everything_and_noise_loses_neighbours(data):
    mean = torch.cat(list(data.activations())).mean(0)
    facts, ((same,), (shifted,)) = pooled_metrics(data, mean, [Identity([16]), Shifted(2.0)])
    assert same["pooled_cosine"] == pytest.approx(1) and same["neighbours"] == 1
    assert facts["windows"] == 50 and facts["neighbours"] < shifted["neighbours"] < 1
    found = evaluate_fidelity(data, {"same": Identity([16])}, show=False)
    assert found["pooled"]["windows"] == 50 and found["subjects"]["same"][0]["neighbours"] == 1


def test_cosines_are_those_of_hidden_states_replaced_by_hand(data):
    # The next layer's input put in by hand.
    mean = torch.cat(list(data.activations())).mean(0)
    facts, _ = pooled_metrics(data, mean, [])
    cosines = []
    for batch in data.batches:
        with torch.no_grad():
            whole = data.model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
            states = whole.hidden_states[1].clone()
            states[batch.keep] = mean
            hook = data.model.encoder.layer[1].register_forward_pre_hook(
                lambda _m, inputs, states=states: (states, *inputs[1:])
            )
            after = data.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
            hook.remove()
        weights = batch.attention_mask[..., None]
        one, two = ((each * weights).sum(1) / weights.sum(1) for each in (whole.last_hidden_state, after))
        cosines += torch.cosine_similarity(one, two, dim=1).tolist()
    assert facts["pooled_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


def test_few_texts_have_no_neighbours(data):
    few = HeldOut(
        data.model,
        [TokenBatch(*(t[:5] for t in vars(data.batches[0]).values() if isinstance(t, torch.Tensor)))],
        data.hookpoint,
    )
    facts, ((row,),) = pooled_metrics(few, torch.zeros(16), [Identity([16])])
    assert facts["neighbours"] is row["neighbours"] is None
