"""Ablation sparsity: against ablations done one by one in float64, and models whose answer is known."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from hf_matryoshka_sae.activations import TokenBatch
from hf_matryoshka_sae.evaluation import HeldOut
from hf_matryoshka_sae.models import ReluSAE, ReluSAEConfig
from hf_matryoshka_sae.studies import ablation_sparsity


LAYER = "model.layers.0"


def tokens_of(vocabulary: int, rows: int = 3, length: int = 12, seed: int = 0) -> TokenBatch:
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    keep = torch.ones(rows, length, dtype=torch.bool)
    keep[:, 0] = False
    return TokenBatch(ids, torch.ones_like(ids), keep, padded=False)


@pytest.fixture(scope="module")
def llama() -> HeldOut:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return HeldOut(LlamaForCausalLM(config).eval(), [tokens_of(31), tokens_of(31, seed=1)], LAYER)


def relu_sae(d_in: int, num_latents: int, seed: int = 0) -> ReluSAE:
    torch.manual_seed(seed)
    sae = ReluSAE(ReluSAEConfig(d_in=d_in, num_latents=num_latents))
    for parameter in sae.parameters():
        nn.init.normal_(parameter, std=0.5)
    return sae.eval()


def by_hand(data: HeldOut, sae: ReluSAE, positions: int) -> dict[tuple[int, int, int], tuple[float, float]]:
    """(fraction, size) of every latent that fires at every token, one ablation at a time, in float64."""
    model = LlamaForCausalLM(data.model.config).double().eval()
    model.load_state_dict({name: value.double() for name, value in data.model.state_dict().items()})
    weights = {name: value.double().numpy() for name, value in sae.state_dict().items()}
    found = {}
    for number, batch in enumerate(data.batches):
        for row, ids in enumerate(batch.input_ids):
            for place in range(1, len(ids) - positions + 1):

                def run(change, ids=ids, place=place):
                    seen = {}

                    def hook(module, inputs, output):
                        states = output[0] if isinstance(output, tuple) else output
                        seen["x"] = states[0, place].numpy().copy()
                        states = states.clone()
                        states[0, place] -= torch.from_numpy(change)
                        return (states, *output[1:]) if isinstance(output, tuple) else states

                    handle = model.model.layers[0].register_forward_hook(hook)
                    with torch.no_grad():
                        logits = model(input_ids=ids[None]).logits[0].numpy()
                    handle.remove()
                    return seen["x"], logits[place : place + positions]

                x, clean = run(np.zeros(16))
                shift = weights["b_dec"] if sae.config.apply_b_dec_to_input else 0
                values = np.maximum(weights["W_enc"] @ (x - shift) + weights["b_enc"], 0)
                for latent in np.flatnonzero(values > 0):
                    _, ablated = run(values[latent] * weights["W_dec"][latent])
                    delta = ablated - clean
                    delta = delta - np.sort(delta, axis=1)[:, (delta.shape[1] - 1) // 2, None]
                    l1, l2 = np.abs(delta).sum(), np.sqrt((delta**2).sum())
                    found[number * 100 + row, place, int(latent)] = (l1 / l2) ** 2 / delta.size, l2
    return found


def test_every_ablation_done_by_hand(llama):
    sae = relu_sae(16, 10)
    expected = by_hand(llama, sae, positions=4)
    found = ablation_sparsity(
        {"it": sae}, llama, [4, 10], tokens=1000, per_group=100, positions=4, baselines=False, show=False
    )
    for row in found.subject("it"):
        inside = [value for (_, _, latent), value in expected.items() if latent < row["width"]]
        assert row["pairs"] == len(inside) > 20
        assert row["fraction"] == pytest.approx(np.mean([fraction for fraction, _ in inside]), rel=1e-4)
        assert row["size"] == pytest.approx(np.mean([size for _, size in inside]), rel=1e-4)
        low, high = row["fraction_interval"]
        assert low < row["fraction"] < high
    for latent, entry in found.latents["it"].items():
        own = [fraction for (_, _, which), (fraction, _) in expected.items() if which == latent]
        assert entry["pairs"] == len(own)
        assert entry["fraction"] == pytest.approx(np.mean(own), rel=1e-4)


class Straight(nn.Module):
    """A language model whose logits at a place are its hidden state there: V = D, and no token sees another."""

    def __init__(self, size: int):
        super().__init__()
        self.embed = nn.Embedding(size, size)
        self.layer = nn.Identity()
        self.head = nn.Linear(size, size, bias=False)
        nn.init.eye_(self.head.weight)
        self.config = LlamaConfig()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None):
        return CausalLMOutput(logits=self.head(self.layer(self.embed(input_ids))))


def planted(size: int, rows: torch.Tensor) -> tuple[HeldOut, ReluSAE]:
    """A straight model, and latents that fire on every token and write the given rows."""
    torch.manual_seed(0)
    sae = ReluSAE(ReluSAEConfig(d_in=size, num_latents=len(rows))).eval()
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(2.0)
        sae.W_dec.copy_(rows)
    return HeldOut(Straight(size).eval(), [tokens_of(size)], "layer"), sae


def test_a_latent_that_writes_one_logit_affects_one():
    one, all_alike = torch.zeros(2, 20)
    one[3] = 1
    all_alike[:10], all_alike[10:] = 1, -1  # the median of these is one of both: half of them move by 2
    data, sae = planted(20, torch.stack([one, all_alike]))
    found = ablation_sparsity({"it": sae}, data, [1, 2], positions=5, baselines=False, show=False)
    assert found.latents["it"][0]["fraction"] == pytest.approx(1 / (20 * 5))
    assert found.latents["it"][1]["fraction"] == pytest.approx(10 / (20 * 5))
    first, both = found.subject("it")
    assert first["fraction"] == pytest.approx(1 / 100)
    assert both["fraction"] == pytest.approx(5.5 / 100)
    assert first["size"] == pytest.approx(2.0)


def test_what_changes_every_logit_alike_changes_nothing():
    data, sae = planted(20, torch.stack([torch.ones(20), torch.eye(20)[0]]))
    first, both = ablation_sparsity({"it": sae}, data, [1, 2], positions=5, baselines=False, show=False).subject("it")
    assert first["no_effect"] == first["pairs"] > 0
    assert first["fraction"] == 0
    assert both["fraction"] == pytest.approx(1 / 100)


def test_tokens_on_which_nothing_fires_are_passed_over(llama):
    sae = relu_sae(16, 10)
    with torch.no_grad():
        sae.b_enc.sub_(3.0)
    options = dict(per_group=100, positions=4, baselines=False, show=False)
    states = torch.cat(list(llama.activations()))
    assert 0 < (sae.encode(states).to_dense() > 0).any(1).float().mean() < 0.9
    found = ablation_sparsity({"it": sae}, llama, tokens=1000, **options)
    expected = by_hand(llama, sae, positions=4)
    assert found.subject("it")[-1]["pairs"] == len(expected)
    with torch.no_grad():
        sae.b_enc.sub_(100.0)
    with pytest.raises(ValueError, match="Nothing fires on the sampled tokens"):
        ablation_sparsity({"it": sae}, llama, tokens=1000, **options)


def test_the_same_call_gives_the_same_result_and_a_plot(llama, tmp_path):
    sae = relu_sae(16, 24)
    first, again = (ablation_sparsity({"it": sae}, llama, [8, 24], tokens=8, positions=4, show=False) for _ in "ab")
    assert first.to_dict() == again.to_dict()
    assert list(first.subjects()) == ["it", "random (it)", "neurons"]
    assert "random (it)" in str(first)
    first.plot(tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").stat().st_size > 10_000


def test_what_cannot_be_done_is_said(llama):
    sae = relu_sae(16, 10)
    with pytest.raises(ValueError, match="No window has 40 tokens"):
        ablation_sparsity({"it": sae}, llama, positions=40, show=False)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        ablation_sparsity({"it": sae}, llama, tokens=0, show=False)
    with pytest.raises(ValueError, match="at least one SAE"):
        ablation_sparsity({}, llama, positions=4, show=False)
    with pytest.raises(ValueError, match="`head` is a Linear"):
        ablation_sparsity({"head": llama.model.lm_head}, llama, positions=4, show=False)
    damaged = relu_sae(16, 10)
    with torch.no_grad():
        damaged.W_dec[3] = torch.nan
    with pytest.raises(ValueError, match="weights of `sae` are not all finite"):
        ablation_sparsity(damaged, llama, positions=4, show=False)
    headless = HeldOut(llama.model.model, llama.batches, "layers.0")
    with pytest.raises(ValueError, match="predicts no next token"):
        ablation_sparsity({"it": sae}, headless, show=False)
