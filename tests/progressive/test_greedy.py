import pytest
import torch

from hf_matryoshka_sae.progressive import greedy as module
from hf_matryoshka_sae.progressive.greedy import greedy_order

from ..axes import each
from ..models.reference import OPTIONS, PREFIXES, VARIANTS, F, assert_close, dense_latents, hidden_states, make_sae


def _brute_force(sae, x, widths=(F,)):
    """Try every latent that is left, reconstruct, keep the best."""
    acts = dense_latents(sae, dict(sae.state_dict()), x, F, "restrict").detach()
    rows = sae.W_dec.detach()
    if sae.config.scale_by_decoder_norm:
        rows = rows / rows.norm(dim=1, keepdim=True)
    order, errors = [], [(x - sae.b_dec.detach()).square().sum(1).mean().item()]
    for width in widths:
        while len(order) < width:
            tried = {}
            for i in set(range(width)) - set(order):
                chosen = [*order, i]
                tried[i] = (x - sae.b_dec.detach() - acts[:, chosen] @ rows[chosen]).square().sum(1).mean().item()
            best = min(tried, key=lambda i: (round(tried[i], 9), i))
            order.append(best)
            errors.append(tried[best])
    return torch.tensor(order), torch.tensor(errors, dtype=torch.float64)


@each(options=OPTIONS, variant=list(VARIANTS))
def test_the_order_equals_brute_force(variant, options, way, monkeypatch):
    monkeypatch.setattr(module, "_PRODUCTS_AT_ONCE", 20)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 5)
    sae, x = make_sae(variant, **options), hidden_states(50)
    found = greedy_order(sae, x.split(17))
    order, errors = _brute_force(sae, x)
    assert torch.equal(found.order, order)
    assert_close(found.error, errors)
    assert_close(found.fvu, errors / (x - x.mean(0)).square().sum(1).mean())


def test_narrower_prefixes_come_first():
    sae, x = make_sae("matryoshka-topk"), hidden_states(50)
    found = greedy_order(sae, [x], PREFIXES)
    order, errors = _brute_force(sae, x, PREFIXES)
    assert torch.equal(found.order, order)
    assert_close(found.error, errors)


def test_silent_latents_come_before_harmful_ones():
    sae, x = make_sae("relu"), hidden_states(50)
    with torch.no_grad():
        sae.b_enc[4] = -1e6
        sae.W_dec[9] *= -20
    order = greedy_order(sae, [x]).order.tolist()
    assert order.index(4) < order.index(9) == F - 1


def test_bad_input_is_refused(monkeypatch):
    sae = make_sae("topk")
    with pytest.raises(ValueError, match="activations are empty"):
        greedy_order(sae, [])
    with pytest.raises(ValueError, match="not finite"):
        greedy_order(sae, [torch.full((2, 6), torch.nan)])
    monkeypatch.setattr(module, "MAX_GREEDY_LATENTS", 12)
    with pytest.raises(ValueError, match="at most 12 latents; this SAE has 13"):
        greedy_order(sae, [hidden_states(3)])


def _one_of_two(rank, x):
    return greedy_order(make_sae("topk"), x.split(16)[rank::2])


def test_two_processes_agree_with_one(two_processes):
    x = hidden_states(80)
    torch.manual_seed(0)
    one = greedy_order(make_sae("topk"), [x])
    for found in two_processes.run(_one_of_two, x):
        assert torch.equal(found.order, one.order)
        assert_close(found.error, one.error)
