"""The width found keeps the budget, the one below does not."""

import pytest
import torch

from hf_matryoshka_sae.evaluation import Dictionary, evaluate_fidelity, open_heldout
from hf_matryoshka_sae.models import BatchTopKSAEConfig, TopKSAEConfig, build_sae
from hf_matryoshka_sae.progressive import Budget, latent_statistics, prune, sort_latents, width_for_budget


@pytest.fixture
def case():
    """A dictionary that knows its data: every sample is a few of its decoder rows, the first ones the strongest."""
    sae = build_sae(TopKSAEConfig(d_in=40, num_latents=40, k=4)).eval()
    basis = torch.linalg.qr(torch.randn(40, 40)).Q
    sae.W_dec.data, sae.W_enc.data = basis.clone(), basis.clone()
    values = torch.rand(600, 40) * (torch.rand(600, 40) < 0.1) * torch.linspace(2, 0.1, 40)
    return sae, values @ basis


def fvu(sae, x) -> float:
    rows = evaluate_fidelity([x], {"it": Dictionary(sae)}, similarity_tokens=0, show=False)["subjects"]["it"]
    return rows[0]["fvu"]


@pytest.mark.parametrize("limit", [0.6, 0.3, 0.1])
def test_fvu(case, limit):
    sae, x = case
    width = width_for_budget(sae, f"FVU at most {limit}", [x], show=False)
    assert fvu(sae.truncate(width), x) <= limit < fvu(sae.truncate(width - 1), x)
    pruned = prune(sae, budget=f"FVU at most {limit}", activations=[x])
    assert fvu(pruned, x) <= limit and pruned.config.num_latents <= width + 2


def test_megabytes_are_those_of_the_file(case, tmp_path):
    sae, _ = case
    pruned = prune(sae, by="trained", budget="at most 0.005 MB")
    pruned.save_pretrained(tmp_path)
    tensors = sum(tensor.nbytes for tensor in pruned.state_dict().values())
    larger = sum(tensor.nbytes for tensor in sae.truncate(pruned.config.num_latents + 1).state_dict().values())
    assert tensors <= 5000 < larger
    assert (tmp_path / "model.safetensors").stat().st_size - tensors < 1000


def test_recaptured_loss():
    data = open_heldout(hookpoint="model.layers.1", tokens=300, context_length=30)
    x = torch.cat(list(data.activations()))
    sae = build_sae(BatchTopKSAEConfig(d_in=128, num_latents=256, k=20)).eval()
    basis = torch.linalg.qr(torch.randn(128, 128)).Q
    sae.W_dec.data = torch.cat([basis, -basis])
    sae.W_enc.data, sae.b_dec.data = sae.W_dec.data.clone(), x.mean(0)
    ordered = sort_latents(sae, statistics=latent_statistics(sae, data))
    width = width_for_budget(ordered, "keep 80% of recaptured loss", data, show=False)

    def recaptured(width: int) -> float:
        subject = {"it": Dictionary(ordered.truncate(width))}
        found = evaluate_fidelity(data, subject, similarity_tokens=0, show=False)["subjects"]["it"]
        return found[0]["recaptured_zero"]

    assert recaptured(width) >= 0.8 * recaptured(256) > recaptured(width - 1)
    assert width_for_budget(ordered, Budget("recaptured", 0.8 * recaptured(256)), data, show=False) == width


def test_what_does_not_fit_is_said(case):
    sae, x = case
    with pytest.raises(ValueError, match="Cannot read the budget 'half of it'"):
        prune(sae, budget="half of it")
    with pytest.raises(ValueError, match="either a `width` or a `budget`"):
        prune(sae)
    with pytest.raises(ValueError, match="either a `width` or a `budget`"):
        prune(sae, 3, budget="at most 1 MB")
    with pytest.raises(ValueError, match="needs a HeldOut"):
        width_for_budget(sae, "keep 90% of recaptured loss", [x])
    with pytest.raises(ValueError, match="needs hidden states"):
        width_for_budget(sae, "FVU at most 0.1")
    with pytest.raises(ValueError, match="cannot be kept"):
        width_for_budget(sae, "FVU at most 0.000001", [x], show=False)
    with pytest.raises(ValueError, match="One latent alone"):
        width_for_budget(sae, "at most 0.0001 MB")
