"""One frontier for all families, against a direct computation; two seeds matched."""

import pytest
import torch

from hf_matryoshka_sae.evaluation import open_heldout
from hf_matryoshka_sae.models import MatryoshkaSAEConfig, TopKSAEConfig, build_sae
from hf_matryoshka_sae.studies import agreement, sparsity_frontier

from ..evaluation.planted import EMBEDDING


@pytest.fixture(scope="module")
def saes():
    torch.manual_seed(0)
    shape = {"d_in": 128, "num_latents": 64, "hookpoint": EMBEDDING}
    made = {
        "eight": build_sae(TopKSAEConfig(**shape, k=8)),
        "four": build_sae(MatryoshkaSAEConfig(**shape, k=4, prefix_widths=[16, 64], activation="topk")),
    }
    for sae in made.values():
        sae.eval()
        with torch.no_grad():
            sae.W_dec.mul_(torch.rand(64, 1) + 0.5)
    return made


def test_each_sae_is_read_at_the_l0_of_the_sparsest(saes):
    data = open_heldout("embedded", EMBEDDING, tokens=600)
    found = sparsity_frontier(data, saes, shares=(0.5, 1.0))
    assert found.about["equal_l0"] == pytest.approx(4, abs=0.3)
    x = torch.cat(list(data.activations()))
    for name, sae in saes.items():
        half, whole = found.subject(name)
        dense = sae.encode(x).to_dense().detach()
        sizes = dense * sae.W_dec.detach().norm(dim=1)
        cut = sizes[sizes > 0].quantile(0.5)
        for row, kept in ((half, dense * (sizes >= cut)), (whole, dense)):
            error = (x - kept @ sae.W_dec.detach() - sae.b_dec.detach()).square().sum()
            assert row["fvu"] == pytest.approx(float(error / (x - x.mean(0)).square().sum()), rel=1e-4)
            assert row["l0"] == pytest.approx(float((kept > 0).sum() / len(x)), abs=0.01)
        assert half["fvu_equal"] is None
    assert found.subject("four")[-1]["fvu_equal"] == pytest.approx(found.subject("four")[-1]["fvu"])
    assert {"random (eight)", "random (four)"} < set(found.subjects())
    with pytest.raises(ValueError, match="at least one SAE"):
        sparsity_frontier(data, {})


def test_an_sae_agrees_with_itself_and_not_with_another_seed(saes):
    one = saes["four"]
    shuffled = build_sae(one.config).eval()
    with torch.no_grad():
        shuffled.W_dec.copy_(one.W_dec[torch.cat([torch.randperm(16), 16 + torch.randperm(48)])])
    same = agreement({"a": one, "b": shuffled})
    assert [row["width"] for row in same] == [16, 64]
    assert all(row["matched_cosine"] == pytest.approx(1, abs=1e-5) and row["random"] < 0.5 for row in same)
