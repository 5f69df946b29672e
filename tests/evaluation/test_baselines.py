"""Principal components against numpy's SVD; random dictionaries against what they promise: L0, directions, scale."""

import numpy as np
import pytest
import torch

from hf_matryoshka_sae import CONFIGS, TopKSAEConfig, build_sae
from hf_matryoshka_sae.evaluation import baselines
from hf_matryoshka_sae.evaluation.baselines import Identity, PrincipalComponents, random_dictionary
from hf_matryoshka_sae.training import SAESpec
from hf_matryoshka_sae.training.sae.initialization import initialize

from ..axes import each


D, F, PREFIXES = 8, 40, [6, 15, 40]

VARIANTS = {
    "relu": {"type": "relu"},
    "topk": {"type": "topk", "k": 4},
    "batch_topk": {"type": "batch_topk", "k": 4.5},
    "jumprelu": {"type": "jumprelu"},
    "gated": {"type": "gated"},
    "matryoshka-relu": {"type": "matryoshka", "activation": "relu"},
    "matryoshka-topk": {"type": "matryoshka", "activation": "topk", "k": 5},
    "matryoshka-batch_topk": {"type": "matryoshka", "activation": "batch_topk", "k": 5},
    "matryoshka-jumprelu": {"type": "matryoshka", "activation": "jumprelu"},
}


def _data(count=400):
    """Hidden states whose directions differ in variance, with a mean."""
    return torch.randn(count, D) * torch.linspace(2, 0.2, D) @ torch.linalg.qr(torch.randn(D, D)).Q + 3 * torch.randn(
        D
    )


def _sae(variant, x, **fields):
    fields = {"d_in": D, "num_latents": F} | VARIANTS[variant] | fields
    kind = fields.pop("type")
    if kind == "matryoshka":
        fields["prefix_widths"] = PREFIXES
    sae = build_sae(CONFIGS[kind](**fields)).eval()
    with torch.no_grad():
        sae.W_dec.normal_()
        sae.W_enc.normal_()
        sae.b_enc.normal_()
        if sae.config.apply_b_dec_to_input:
            sae.b_dec.copy_(x.mean(0))
        else:
            sae.b_enc.sub_(sae.W_enc @ x.mean(0))
        sae.b_enc[::3] -= 2
        if hasattr(sae, "threshold"):
            sae.threshold.uniform_(1, 3)
    return sae


def _l0(sae, x, widths):
    fires = sae.encode(x).to_dense() > 0
    return [fires[:, :width].sum().item() / len(x) for width in widths]


def _square_errors(sae, x, widths):
    return (sae.decode_pairs(sae.encode_pairs(x), widths) - x).double().square().sum((1, 2))


@each(
    fields={"": {}, "no b_dec": {"apply_b_dec_to_input": False}, "norms": {"scale_by_decoder_norm": True}},
    variant=list(VARIANTS),
)
def test_a_random_dictionary_fires_as_often_at_every_width(variant, fields):
    x, widths = _data(), [6, 15, 40]
    sae = _sae(variant, x, **fields)
    random = random_dictionary(sae, x.split(90), widths)
    # A value at the very threshold may fall on either side.
    assert _l0(random, x, widths) == pytest.approx(_l0(sae, x, widths), abs=2.5 / len(x))
    assert not random.training
    assert random.config.num_latents == F
    assert random.prefix_widths == sae.prefix_widths
    if "topk" not in variant.split("-")[-1]:
        assert type(random) is type(sae)
    torch.testing.assert_close(random.W_dec.norm(dim=1), torch.ones(F))
    torch.testing.assert_close(torch.cosine_similarity(random.W_enc, random.W_dec), torch.ones(F))


@pytest.mark.parametrize("variant", ["relu", "matryoshka-batch_topk", "gated"])
def test_each_width_is_scaled_for_least_error_and_is_no_worse_than_the_one_before(variant):
    x = _data()
    random = random_dictionary(_sae(variant, x), x, PREFIXES)
    best = _square_errors(random, x, PREFIXES)
    total = (x - x.mean(0)).double().square().sum()
    assert (best.diff() <= 0).all() and best[0] < total
    for p, group in enumerate([slice(0, 6), slice(6, 15), slice(15, 40)]):
        for factor in (0.9, 1.1):
            other = random.truncate(F)
            with torch.no_grad():  # scales the group's reconstruction and changes nothing else
                other.W_dec[group] *= factor
            assert _square_errors(other, x, PREFIXES)[p] > best[p]


def test_a_random_dictionary_is_the_same_for_a_seed_whatever_the_batches(monkeypatch):
    x = _data()
    sae = _sae("matryoshka-topk", x)
    first = random_dictionary(sae, x, seed=1).state_dict()
    monkeypatch.setattr(baselines, "_BLOCK_ENTRIES", 1000)
    second = random_dictionary(sae, x.split(33), seed=1).state_dict()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor)
    assert not torch.equal(random_dictionary(sae, x, seed=2).W_dec, first["W_dec"])


def test_calibration_on_a_sample_holds_on_the_rest():
    x = _data(6000)
    sae = _sae("matryoshka-jumprelu", x)
    random = random_dictionary(sae, x.split(500), tokens=2000)
    assert _l0(random, x, PREFIXES) == pytest.approx(_l0(sae, x, PREFIXES), rel=0.05)


def test_silent_groups_stay_silent_and_a_silent_sae_is_an_error():
    x = _data()
    sae = _sae("matryoshka-batch_topk", x)
    with torch.no_grad():
        sae.b_enc[6:15] = -1e3
    assert _l0(random_dictionary(sae, x), x, PREFIXES) == pytest.approx(_l0(sae, x, PREFIXES), abs=2.5 / len(x))
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    with pytest.raises(ValueError, match="no L0 to match"):
        random_dictionary(sae, x)


@pytest.mark.parametrize("seed", [0, 3])
def test_random_directions_are_not_those_that_training_with_the_seed_begins_with(seed):
    x = _data()
    sae = _sae("relu", x)
    spec = SAESpec.from_dict({"type": "relu", "num_latents": F}, "")
    initialize(sae, spec, x, x.mean(0), seed)
    sae.b_enc.detach().fill_(1.0)
    random = random_dictionary(sae, x, seed=seed)
    cosines = torch.cosine_similarity(random.W_dec, sae.W_dec, dim=1)
    assert cosines.mean().abs() < 0.3 and cosines.max() < 0.999


@pytest.mark.parametrize("batch", [64, 1000])
def test_components_equal_numpys_svd_and_fvu_has_its_closed_form(batch):
    x = _data().double()
    widths = [1, 3, 7, 8, 100]
    pca = PrincipalComponents.fit(x.split(batch), widths)
    centred = (x - x.mean(0)).numpy()
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    reconstructions = pca.reconstruct(x)
    assert reconstructions.shape == (5, 400, D)
    for width, fvu, reconstruction in zip(widths, pca.fvu(), reconstructions, strict=True):
        expected = u[:, :width] * s[:width] @ vt[:width] + x.mean(0).numpy()
        np.testing.assert_allclose(reconstruction.numpy(), expected, atol=1e-8)
        assert fvu == pytest.approx(((x - reconstruction).numpy() ** 2).sum() / (centred**2).sum(), abs=1e-10)
    assert pca.fvu([8, 100]) == [0, 0]
    torch.testing.assert_close(reconstructions[-1], x)
    torch.testing.assert_close(pca.variances, torch.from_numpy(s**2 / 400))


def test_a_large_mean_costs_the_components_no_precision():
    x = _data()
    before, after = (PrincipalComponents.fit(rows.split(50), [2, 5]).fvu() for rows in (x.double(), x.double() + 1e4))
    assert after == pytest.approx(before, rel=1e-5)


def test_the_identity_gives_back_what_it_gets():
    x = _data()
    identity = Identity([2, 5])
    assert torch.equal(identity.reconstruct(x), torch.stack([x, x]))


def test_wrong_input_is_named():
    x = _data()
    with pytest.raises(ValueError, match="empty"):
        PrincipalComponents.fit([], [2])
    with pytest.raises(ValueError, match="do not vary"):
        PrincipalComponents.fit(torch.full((50, D), 0.3), [2])
    with pytest.raises(ValueError, match="each at least 1"):
        PrincipalComponents.fit(x, [0, 2])
    with pytest.raises(ValueError, match=r"\(N, 8\), got \(5, 3\)"):
        PrincipalComponents.fit(x, [2]).reconstruct(torch.randn(5, 3))
    with pytest.raises(ValueError, match="holds NaN"):
        PrincipalComponents.fit(x * torch.nan, [2])
    sae = build_sae(TopKSAEConfig(d_in=D, num_latents=F, k=2))
    with pytest.raises(ValueError, match="d_in = 8"):
        random_dictionary(sae, torch.randn(5, 3))
    with pytest.raises(ValueError, match="strictly increase"):
        random_dictionary(sae, x, [3, 2])
    with pytest.raises(ValueError, match="empty"):
        random_dictionary(sae, [])
