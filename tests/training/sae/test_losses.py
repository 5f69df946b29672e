"""Each objective, value and gradients, against a dense float64 reference; each preset against its closed form."""

import pytest
import torch

from hf_matryoshka_sae.models import build_sae
from hf_matryoshka_sae.training.config.presets import PRESETS
from hf_matryoshka_sae.training.config.spec import SAESpec
from hf_matryoshka_sae.training.sae import losses
from hf_matryoshka_sae.training.sae.losses import Objective, level_weights, variance

from .. import reference


pytestmark = pytest.mark.usefixtures("way")

N, D, F, K = 40, 6, 32, 4
DEAD = torch.arange(F) % 5 == 3


def make(**fields):
    """A spec, and its SAE in float64 with random weights and biases."""
    fields = {"num_latents": F, "k": K, **fields}
    if fields.get("k") is None:
        del fields["k"]
    spec = SAESpec.from_dict(fields, "sae.")
    sae = build_sae(spec.sae_config(D, "lm", "layer")).double().train()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.dim() > 1 else 0.1))
        if "threshold" in dict(sae.named_parameters()):
            sae.threshold.copy_(torch.rand_like(sae.threshold) * 0.3)
        if not spec.train_b_enc:
            sae.b_enc.zero_()
    return spec, sae, torch.randn(N, D, dtype=torch.float64) + 0.5


def run(spec, sae, x, dead=None, sparsity=0.0, widths=None):
    widths = widths or sae.prefix_widths
    dead = None if dead is None else dead.nonzero().squeeze(1)
    loss, statistics = Objective(sae, spec)(x, dead, widths, level_weights(spec, len(widths)), sparsity)
    return loss, statistics


def same_gradients(sae, loss, expected):
    parameters = [p for p in sae.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    for name, a, b in zip([n for n, p in sae.named_parameters() if p.requires_grad], ours, theirs, strict=True):
        a = torch.zeros(1) if a is None else a
        b = torch.zeros(1) if b is None else b
        assert torch.allclose(a, b.to(a.dtype), atol=1e-9), name


def activations(sae, x):
    pre = reference.encode(x, sae.W_enc, sae.b_enc, sae.b_dec)
    return pre, reference.batch_topk(pre, K)


def errors(sae, x, a):
    return reference.prefix_errors(x, a, sae.W_dec, sae.b_dec, sae.prefix_widths)


def residual(sae, x, a):
    return x - a @ sae.W_dec - sae.b_dec


def gao_auxk(sae, x, pre, a, k_aux):
    """AuxK as Gao et al. and dictionary_learning have it: residual detached, over its variance."""
    e = residual(sae, x, a).detach()
    return reference.auxk(x, e, pre, sae.W_dec, DEAD, k_aux) / reference.variance(e)


def paper(sae, x):
    pre, a = activations(sae, x)
    return errors(sae, x, a).sum() + gao_auxk(sae, x, pre, a, 512) / 32


def dictionary_learning(sae, x):
    pre, a = activations(sae, x)
    levels = errors(sae, x, a)
    return (levels / len(levels)).mean() + gao_auxk(sae, x, pre, a, D // 2) / 32


def saelens(sae, x):
    norms = sae.W_dec.norm(dim=1)
    pre = reference.encode(x, sae.W_enc, sae.b_enc, sae.b_dec) * norms
    units = sae.W_dec / norms[:, None]
    a = reference.batch_topk(pre, K)
    levels = reference.prefix_errors(x, a, units, sae.b_dec, sae.prefix_widths)
    e = (x - a @ units - sae.b_dec).detach()
    scale = min(int(DEAD.sum()) / (D // 2), 1.0)
    return levels.sum() + scale * reference.auxk(x, e, pre, units, DEAD, D // 2, rectify=False)


def bussmann(sae, x):
    pre, a = activations(sae, x)
    levels = torch.cat([(x - sae.b_dec).square().sum(1).mean()[None], errors(sae, x, a)]) / D
    e = residual(sae, x, a)  # not detached
    return levels.mean() + reference.auxk(x, e, pre, sae.W_dec, DEAD, 512) / D / 32


def nabeshima(sae, x):
    """The mean over prefixes of squared error and of the L1 of what the prefix holds, weighted by decoder norms."""
    pre = x @ sae.W_enc.T + sae.b_enc
    a = pre.clamp(min=0)
    widths = [3, 9, 20, F]
    levels = reference.prefix_errors(x, a, sae.W_dec, sae.b_dec, widths)
    l1 = torch.stack([(a * sae.W_dec.norm(dim=1))[:, :m].sum(1).mean() for m in widths])
    return levels.mean() + 1.2 * l1.mean()


def balance(sae, x):
    pre, a = activations(sae, x)
    levels = errors(sae, x, a)
    weights = torch.tensor([0.75 ** (len(levels) - i) for i in range(1, len(levels) + 1)], dtype=torch.float64)
    return (weights * levels).sum() + gao_auxk(sae, x, pre, a, D // 2) / 32


CLOSED_FORMS = {
    "paper": paper,
    "dictionary_learning": dictionary_learning,
    "saebench": dictionary_learning,
    "saelens": saelens,
    "bussmann": bussmann,
    "nabeshima": nabeshima,
    "balance": balance,
}


def test_every_preset_has_a_closed_form_here():
    assert set(CLOSED_FORMS) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_equals_its_closed_form_with_gradients(name):
    spec, sae, x = make(preset=name, **({"k": None} if name == "nabeshima" else {}))
    widths = [3, 9, 20, F] if name == "nabeshima" else None
    loss, _ = run(spec, sae, x, DEAD, sparsity=1.2 if name == "nabeshima" else 0.0, widths=widths)
    expected = CLOSED_FORMS[name](sae, x)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    sae.b_enc.requires_grad_(spec.train_b_enc)
    same_gradients(sae, loss, expected)


@pytest.mark.parametrize("kind", ["relu", "topk", "batch_topk", "jumprelu"])
def test_one_prefix_has_the_plain_familys_loss_and_gradients_bit_for_bit(kind):
    k = None if kind in ("relu", "jumprelu") else K
    spec, plain, x = make(type=kind, k=k)
    nested_spec, nested, _ = make(type="matryoshka", activation=kind, k=k, prefix_widths=[F])
    nested.load_state_dict(plain.state_dict())
    dead = DEAD if spec.auxk_coefficient else None
    results = []
    for one_spec, sae in ((spec, plain), (nested_spec, nested)):
        loss, _ = run(one_spec, sae, x, dead, sparsity=0.1)
        loss.backward()
        results.append((loss, [p.grad for p in sae.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_multi_topk_adds_an_eighth_of_the_loss_at_four_k():
    spec, sae, x = make(type="topk", multi_topk=True, auxk_coefficient=0.0)
    pre = reference.encode(x, sae.W_enc, sae.b_enc, sae.b_dec)
    expected = sum(
        weight * reference.prefix_errors(x, reference.topk(pre, k), sae.W_dec, sae.b_dec, [F])[0]
        for weight, k in ((1, K), (1 / 8, 4 * K))
    )
    loss, statistics = run(spec, sae, x)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert statistics["l0"] <= K
    same_gradients(sae, loss, expected)


@pytest.mark.parametrize("target", [None, 3.0])
def test_jumprelu_penalty_moves_thresholds_by_the_kernel(target):
    spec, sae, x = make(type="jumprelu", k=None, bandwidth=0.5, target_l0=target, auxk_coefficient=0.0)
    pre = reference.encode(x, sae.W_enc, sae.b_enc, sae.b_dec)
    theta = sae.threshold.detach().double()
    l0 = (pre > theta).double().sum(1).mean()
    a = torch.where(pre > theta, pre, 0.0)
    sse = reference.prefix_errors(x, a, sae.W_dec, sae.b_dec, [F])[0]
    penalty = l0 if target is None else (l0 / target - 1) ** 2
    loss, _ = run(spec, sae, x, sparsity=0.7)
    assert loss.item() == pytest.approx((sse + 0.7 * penalty).item(), rel=1e-6)
    # d loss / d theta_i: the kernel times what a jump of latent i costs (arXiv 2407.14435, eq. 11-12).
    window = ((pre - theta).abs() < 0.25).double() / 0.5
    grad_a = torch.autograd.grad(sse, a, retain_graph=True)[0]
    slope = 0.7 * (1 if target is None else 2 * (l0 / target - 1) / target)
    expected = -(window * (theta * grad_a + slope / N)).sum(0)
    (ours,) = torch.autograd.grad(loss, sae.threshold)
    assert ours.abs().max() > 0
    assert torch.allclose(ours.double(), expected.detach(), atol=1e-5)


def test_gated_loss_is_error_plus_gate_l1_plus_frozen_decoder_error():
    spec, sae, x = make(type="gated", k=None)
    projection = (x - sae.b_dec) @ sae.W_enc.T
    gate = (projection + sae.b_enc).clamp(min=0)
    magnitude = (sae.r_mag.exp() * projection + sae.b_mag).clamp(min=0)
    a = torch.where(gate > 0, magnitude, 0.0)
    frozen = gate @ sae.W_dec.detach() + sae.b_dec.detach()
    expected = (
        (x - a @ sae.W_dec - sae.b_dec).square().sum(1).mean()
        + 0.3 * (gate * sae.W_dec.norm(dim=1)).sum(1).mean()
        + (x - frozen).square().sum(1).mean()
    )
    loss, _ = run(spec, sae, x, sparsity=0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    same_gradients(sae, loss, expected)


@pytest.mark.parametrize("nested", [1.0, 0.25, 0.0])
def test_a_latent_pays_in_every_prefix_that_holds_it_and_once(nested):
    spec, sae, x = make(
        type="matryoshka",
        activation="relu",
        sparsity_penalty="l1",
        k=None,
        nested_penalty=nested,
        level_weights=[0.5, 0.3, 0.2],
    )
    widths = [4, 9, F]
    a = reference.encode(x, sae.W_enc, sae.b_enc, sae.b_dec).clamp(min=0)
    paid = torch.cat([torch.full((4,), 1.0), torch.full((5,), 0.5), torch.full((F - 9,), 0.2)])
    paid = nested * paid + 1 - nested
    expected = 0.7 * ((a * sae.W_dec.norm(dim=1)).sum(0) * paid).sum() / len(x)
    losses = [run(spec, sae, x, sparsity=strength, widths=widths)[0] for strength in (0.7, 0.0)]
    assert (losses[0] - losses[1]).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("k_aux", [1, 2, None])
def test_auxk_is_the_same_from_pairs_and_from_dense_products(k_aux, monkeypatch):
    spec, sae, x = make(type="batch_topk", auxk_coefficient=1.0, auxk_k=k_aux)
    seen = []
    for limit in (10**6, 0):
        monkeypatch.setattr(losses, "_DENSE_AUXK", limit)
        loss, statistics = run(spec, sae, x, DEAD)
        assert statistics["auxk"] > 0
        parameters = [parameter for parameter in sae.parameters() if parameter.requires_grad]
        seen.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for dense, pairs in zip(*seen, strict=True):
        assert torch.allclose(dense, pairs, rtol=1e-9, atol=1e-12)


def test_auxk_of_no_residual_is_zero_not_nan():
    spec, sae, _ = make(type="batch_topk")
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)  # nothing fires, and every token is exactly b_dec
    loss, statistics = run(spec, sae, sae.b_dec.detach().expand(N, D).clone(), DEAD)
    assert loss.item() == 0
    assert statistics["auxk"].item() == 0


def test_fvu_unit_divides_by_the_batch_variance():
    spec, sae, x = make(type="batch_topk", error_unit="fvu", auxk_coefficient=0.0)
    plain, _ = run(SAESpec.from_dict({"type": "batch_topk", "auxk_coefficient": 0.0}, ""), sae, x)
    loss, _ = run(spec, sae, x)
    assert loss.item() == pytest.approx(plain.item() / reference.variance(x).item(), rel=1e-5)
    assert variance(x, None).item() == pytest.approx(reference.variance(x).item(), rel=1e-5)


def test_level_weights_move_linearly_from_start_to_end():
    spec = SAESpec.from_dict({"level_weights": "mean", "level_weights_end": [0, 0, 0, 0.2, 0.8]}, "")
    assert level_weights(spec, 5, 0.0) == pytest.approx([0.2] * 5)
    assert level_weights(spec, 5, 1.0) == pytest.approx([0, 0, 0, 0.2, 0.8])
    assert level_weights(spec, 5, 0.25) == pytest.approx([0.15, 0.15, 0.15, 0.2, 0.35])


def test_the_default_recipe_moves_weight_from_inner_prefixes_to_the_whole_dictionary():
    spec = SAESpec.from_dict({"type": "matryoshka"}, "")
    start, end = level_weights(spec, 5, 0.0), level_weights(spec, 5, 1.0)
    assert sum(start) == pytest.approx(1) == sum(end)
    assert (start[-1], end[-1]) == pytest.approx((0.32, 0.65))
    assert [w / start[0] for w in start[:-1]] == pytest.approx([1, 2**-0.4, 3**-0.4, 4**-0.4 / 2])
    assert [w / end[0] for w in end[:-1]] == pytest.approx([1, 1, 1, 0.5])
    assert level_weights(spec, 2, 0.5) == pytest.approx([0.515, 0.485])
    assert level_weights(spec, 1, 0.3) == [1.0]


@pytest.mark.parametrize("unit_norm", [True, False])
def test_the_energy_that_latents_are_sorted_by_is_that_of_their_contributions(unit_norm):
    spec, sae, x = make(type="batch_topk", sort_every=1, unit_norm_decoder=unit_norm)
    if unit_norm:
        sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    _, statistics = run(spec, sae, x)
    _, a = activations(sae, x)
    expected = (a[..., None] * sae.W_dec).square().sum(-1).mean(0)
    assert torch.allclose(statistics["energy"].double(), expected, rtol=1e-5)


def test_level_weights_of_another_length_are_refused():
    spec = SAESpec.from_dict({"level_weights": [1.0, 2.0]}, "")
    with pytest.raises(ValueError, match="5 numbers"):
        level_weights(spec, 5)


@pytest.mark.parametrize("auxk_k", [2, 20], ids=["pairs", "all dead latents"])
def test_errors_of_large_float16_states_are_finite(auxk_k):
    spec, sae, x = make(type="topk", bias_level=True, auxk_k=auxk_k, sort_every=50)
    x[:, 0] *= 1e4
    with torch.no_grad():
        sae.W_enc.mul_(1e-3)
    expected = run(spec, sae, x, DEAD)
    loss, statistics = run(spec, sae.half(), x.half(), DEAD)
    assert loss.item() == pytest.approx(expected[0].item(), rel=0.02)
    for name, value in statistics.items():
        torch.testing.assert_close(value.double(), expected[1][name].double(), rtol=0.05, atol=0.05)
