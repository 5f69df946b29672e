"""One dictionary in training: counters, sorting, projection, accumulation, averages, resuming."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_matryoshka_sae.models import build_sae
from hf_matryoshka_sae.training.config.spec import SAESpec
from hf_matryoshka_sae.training.sae.initialization import geometric_median, initialize
from hf_matryoshka_sae.training.sae.learner import Learner

from ...axes import each


D, F, K, N, STEPS = 8, 64, 4, 128, 40
SMALLEST = {"weights_dtype": "bfloat16", "optimizer_dtype": "int8"}


def learner(accumulation=1, steps=STEPS, d_in=D, device="cpu", mixed_precision=None, **fields):
    spec = SAESpec.from_dict({"num_latents": F, "k": K, "lr": 1e-2, "lr_decay_fraction": 0.2, **fields}, "")
    if fields.get("k", K) is None:
        spec.k = None
    sae = build_sae(spec.sae_config(d_in, "lm", "layer"))
    initialize(sae, spec, torch.randn(64, d_in), torch.zeros(d_in), seed=0)
    AcceleratorState._reset_state(reset_partial_state=True)  # each may be on another device, in another precision
    accelerator = Accelerator(
        cpu=device == "cpu", mixed_precision=mixed_precision, gradient_accumulation_steps=accumulation
    )
    mean, scale = (torch.full((D,), 0.5), 2.0) if d_in == D else (torch.zeros(d_in), 1.0)
    return Learner("sae", "layer", sae, spec, mean, scale, accelerator, steps=steps, batch_size=N)


def batches(count=STEPS, size=N):
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(24, D, generator=generator)
    for _ in range(count):
        chosen = (torch.rand(size, 24, generator=generator) < 0.15).float()
        yield chosen @ directions * 2 + 0.5


def train(one, count=STEPS, start=0):
    for step, x in enumerate(batches(count)):
        if step < start:
            continue
        with one.accelerator.accumulate(one.objective):
            one.accumulate(x, step)
        one.step(step)
    return one


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "relu", "k": None, "target_l0": 4.0},
        {"type": "topk"},
        {"type": "topk", "multi_topk": True},
        {"type": "batch_topk"},
        {"type": "jumprelu", "k": None, "target_l0": 4.0},
        {"type": "gated", "k": None, "target_l0": 4.0},
        {"type": "matryoshka"},
        {"type": "matryoshka", "random_prefixes": 4},
        {"type": "matryoshka", "activation": "topk"},
        {"type": "matryoshka", "activation": "jumprelu", "k": None, "target_l0": 4.0},
        {"preset": "saelens"},
        # Its target is met: with 4 latents by then FVU would be that of the 32 random ones at the start.
        {"preset": "nabeshima", "k": None, "target_l0": 16.0},
    ],
    ids=str,
)
def test_every_family_learns(fields):
    one = learner(steps=60, **fields)
    train(one, 1)
    before = one.statistics(0).fvu[-1]
    train(one, 60)
    after = one.statistics(59)
    assert after.fvu[-1] < 0.4 * before
    assert 0 < after.l0 < F


@pytest.mark.parametrize("fields", [{"type": "gated"}, {"preset": "nabeshima", "lr": 1e-2}], ids=str)
def test_the_controller_comes_to_rest_at_the_target_l0(fields):
    one = learner(steps=400, k=None, target_l0=4.0, **fields)
    reached = []
    for step, x in enumerate(batches(400)):
        one.accumulate(x, step)
        one.step(step)
        reached.append(one.last["l0"].item())
    assert sum(reached[-40:]) / 40 == pytest.approx(4.0, rel=0.1)
    assert sum(reached[-100:]) / 100 == pytest.approx(4.0, rel=0.1)  # it does not swing either


@pytest.mark.parametrize("ema", [None, 0.9])
def test_sorting_changes_nothing_but_the_order(ema):
    """With one prefix; needs the moments, averages and counters to move with the weights."""
    fields = {"type": "batch_topk", "ema_decay": ema, "dead_tokens": 5 * N, "auxk_coefficient": 1.0}
    plain, sorting = train(learner(**fields)), train(learner(**fields, sort_every=3))
    a, b = plain.finished(), sorting.finished()
    order = torch.cdist(b.W_dec, a.W_dec).argmin(1)
    assert len(order.unique()) == F
    assert not torch.equal(order, torch.arange(F))
    assert torch.allclose(b.W_dec, a.W_dec[order], atol=1e-3)
    assert torch.allclose(b.W_enc, a.W_enc[order], atol=1e-3)
    assert torch.equal(sorting.tokens_since_fired, plain.tokens_since_fired[order])


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_sorting_moves_every_tensor_of_the_moments(moments):
    one = train(learner(type="batch_topk", optimizer_dtype=moments, auxk_coefficient=0.0), 5)
    one.energy = torch.rand(F)
    order = one.energy.argsort(descending=True)
    state = one.optimizer.state[one.sae.W_dec]
    before = {key: value.clone() for key, value in state.items()}
    one._sort()
    assert len(before) == (5 if moments == "int8" else 3)
    for key, value in before.items():
        assert torch.equal(state[key], value if key == "step" else value[order]), key


def test_sorting_orders_by_energy():
    one = train(learner(type="batch_topk", sort_every=1))
    assert (one.energy.diff() <= 0).all()
    assert one.energy[0] > 0


def test_decoder_rows_stay_unit_and_the_gradient_has_no_part_along_them():
    one = train(learner(type="matryoshka"), 5)
    assert torch.allclose(one.sae.W_dec.norm(dim=1), torch.ones(F), atol=1e-6)
    one.accumulate(next(batches(1)), 5)
    one._project_gradient()
    along = (one.sae.W_dec.grad * one.sae.W_dec).sum(1)
    assert along.abs().max() < 1e-6


@pytest.mark.parametrize("fields", [{"type": "batch_topk"}, {"type": "matryoshka"}], ids=str)
def test_batch_topk_begins_with_places_for_each_token_and_goes_on_with_those_of_the_batch(fields, monkeypatch):
    one, counts = learner(steps=4, topk_fraction=0.5, lr=1e-6, **fields), []
    statistics = one.objective._statistics

    def counted(pairs, *rest):
        counts.append(torch.bincount(pairs.rows, minlength=N))
        return statistics(pairs, *rest)

    monkeypatch.setattr(one.objective, "_statistics", counted)
    (x,) = batches(1)
    x[: N // 2] = x[: N // 2] * 4  # of a large norm: with places of the batch these take most
    for step in range(4):
        one.accumulate(x, step)
        one.step(step)
    for begun in counts[:2]:
        assert (begun == K).all()
    for later in counts[2:]:
        assert later.sum() == K * N
        assert later[: N // 2].sum() > later[N // 2 :].sum() + N
    assert one.sae.k == K and one.finished().family is learner(**fields).sae.family


def test_the_threshold_of_a_dead_latent_comes_down_until_it_fires():
    fields = {"type": "jumprelu", "k": None, "target_l0": float(K), "topk_fraction": 0.0}
    one = learner(lr=1e-6, dead_tokens=2 * N, dead_threshold_decay=0.5, **fields)
    with torch.no_grad():
        one.sae.threshold[5] = 100.0
    (x,) = batches(1)
    heights = []
    for step in range(16):
        one.accumulate(x, step)
        one.step(step)
        heights.append(one.sae.threshold[5].item())
    assert heights[0] == pytest.approx(100)
    assert heights[1:4] == pytest.approx([50, 25, 12.5], rel=1e-4)
    assert one.tokens_since_fired[5] < 2 * N and heights[-1] == pytest.approx(heights[-2], rel=1e-3)


@pytest.mark.parametrize("nested", [False, True])
def test_jumprelu_begins_as_topk_and_its_thresholds_take_over_at_the_target(nested):
    fields = {"type": "matryoshka", "activation": "jumprelu"} if nested else {"type": "jumprelu"}
    one = learner(steps=4, topk_fraction=0.5, k=None, target_l0=float(K), lr=1e-6, **fields)
    begun = one.sae.threshold.detach().clone()
    (x,) = batches(1)
    for step in range(3):
        one.accumulate(x, step)
        fired = one._micro[-1]["l0"].item()
        assert fired == pytest.approx(K, rel=0.05)
        if step < 2:
            assert torch.equal(one.sae.threshold, begun)
        one.step(step)
    firing = ((x - one.mean) / one.scale - one.sae.b_dec) @ one.sae.W_enc.T + one.sae.b_enc > one.sae.threshold
    assert firing.sum().item() == pytest.approx(K * N, rel=0.05)


def test_accumulation_of_two_halves_is_one_step_where_tokens_do_not_compete():
    x = next(batches(1))
    whole = learner(type="topk", auxk_coefficient=0.0)
    whole.accumulate(x, 0)
    torch.manual_seed(0)
    halves = learner(2, type="topk", auxk_coefficient=0.0)  # Accelerators share their gradient state: made after
    for half in x.split(N // 2):
        with halves.accelerator.accumulate(halves.objective):
            halves.accumulate(half, 0)
    for a, b in zip(whole.sae.parameters(), halves.sae.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)
    whole.step(0), halves.step(0)
    assert whole.last["l0"] == pytest.approx(halves.last["l0"])
    assert torch.allclose(whole.last["sse"], halves.last["sse"], rtol=1e-5)


def test_dead_latents_are_those_silent_for_a_number_of_tokens():
    one = learner(type="batch_topk", dead_tokens=3 * N, auxk_coefficient=0.0)
    with torch.no_grad():
        one.sae.b_enc[7] = -1e4
    for step in range(4):
        one.accumulate(next(batches(1)), step)
        one.step(step)
        assert one.tokens_since_fired[7] == (step + 1) * N
        assert (one.tokens_since_fired[7] >= one.spec.dead_tokens) == (step >= 2)


@pytest.mark.parametrize("fields", [{}, SMALLEST], ids=str)
def test_a_gradient_that_is_not_finite_leaves_the_weights(fields):
    one = train(learner(type="matryoshka", **fields), 3)
    before = [parameter.clone() for parameter in one.sae.parameters()]
    one.accumulate(torch.full((N, D), torch.nan), 3)
    one.step(3)
    assert one.skipped() == (1, 0, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, one.sae.parameters(), strict=True))
    train(one, 4, start=3)
    assert one.skipped() == (1, 0, 0)


def test_the_average_is_the_bias_corrected_running_mean_of_the_weights():
    one = learner(type="topk", ema_decay=0.8, unit_norm_decoder=False)
    seen = []
    for step, x in enumerate(batches(6)):
        one.accumulate(x, step)
        one.step(step)
        seen.append(one.sae.b_dec.detach().double().clone())
    weights = torch.tensor([0.2 * 0.8**age for age in range(6)][::-1], dtype=torch.float64)
    expected = (weights[:, None] * torch.stack(seen)).sum(0) / weights.sum()
    assert torch.allclose(one.finished().b_dec.double(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "matryoshka", "sort_every": 2, "ema_decay": 0.9},
        {"type": "jumprelu", "k": None},
        {"type": "matryoshka", "sort_every": 2, "ema_decay": 0.9, **SMALLEST},
        {"type": "jumprelu", "k": None, "optimizer_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_resumed_learner_goes_on_bit_for_bit(fields):
    whole = train(learner(**fields), 12)
    part = train(learner(**fields), 7)
    resumed = learner(**fields)
    resumed.load_state_dict(part.state_dict())
    train(resumed, 12, start=7)
    for (name, a), (_, b) in zip(
        whole.finished().named_parameters(), resumed.finished().named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_geometric_median_survives_a_guess_on_a_data_point():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert torch.allclose(geometric_median(points), torch.zeros(2), atol=1e-6)


def test_geometric_median_is_the_point_of_least_total_distance():
    points = torch.cat([torch.randn(200, 3), torch.full((20, 3), 50.0)])
    found = geometric_median(points)
    total = (points - found).norm(dim=1).sum()
    for _ in range(50):
        assert total <= (points - found - 0.05 * torch.randn(3)).norm(dim=1).sum() + 1e-3


# Fewer bits


@each(
    moments=["float32", "bfloat16", "int8"],
    weights=["float32", "bfloat16"],
    fields=[
        {"type": "matryoshka", "ema_decay": 0.9, "sort_every": 5},
        {"type": "topk", "auxk_coefficient": 1.0, "dead_tokens": 3 * N, "grad_clip": 1.0},
        {"type": "jumprelu", "k": None, "target_l0": 4.0},
        {"type": "gated", "k": None, "target_l0": 4.0},
        {"preset": "saelens"},
    ],
)
def test_fewer_bits_learn_as_well(fields, weights, moments):
    """Within what another seed's first weights would change, of steps as large as these."""
    fvus = []
    for bits in ({}, {"weights_dtype": weights, "optimizer_dtype": moments}):
        torch.manual_seed(0)
        one = train(learner(steps=60, **fields, **bits), 60)
        fvus.append(one.statistics(59).fvu[-1])
    assert fvus[1] < 1.2 * fvus[0]
    assert one.sae.W_enc.dtype == one.sae.W_dec.dtype == getattr(torch, weights)
    assert one.sae.b_enc.dtype == one.sae.b_dec.dtype == torch.float32
    if one.spec.unit_norm_decoder:
        rounding = 1e-6 if weights == "float32" else 2**-7
        assert (one.sae.W_dec.float().norm(dim=1) - 1).abs().max() < rounding


@pytest.mark.parametrize(
    ("fields", "each"),
    [
        ({}, 16),
        ({"optimizer_dtype": "bfloat16"}, 12),
        ({"optimizer_dtype": "int8"}, 10),
        ({"weights_dtype": "bfloat16", "optimizer_dtype": "bfloat16"}, 8),
        (SMALLEST, 6),
    ],
)
def test_memory_really_falls(fields, each):
    """Bytes for each entry of the matrices: weight, gradient, two moments; then a row's scales and the biases."""
    one = learner(type="topk", d_in=256, **fields)
    for step in range(2):
        one.accumulate(torch.randn(N, 256), step)
        if step == 0:
            one.step(step)
    tensors = [*one.sae.parameters(), *(parameter.grad for parameter in one.sae.parameters())]
    tensors += [tensor for state in one.optimizer.state.values() for tensor in state.values()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    rest = 16 * (F + 256) + (2 * 2 * 4 * F if "int8" in fields.values() else 0) + 4 * 4
    assert held == each * 2 * F * 256 + rest


@pytest.mark.parametrize("fields", [{}, {"unit_norm_decoder": False}, {"ema_decay": 0.5}], ids=str)
def test_bfloat16_weights_are_saved_as_they_are(fields, tmp_path):
    one = train(learner(type="matryoshka", apply_b_dec_to_input=False, **fields, **SMALLEST), 20)
    sae, x = one.finished(), next(batches(1))
    with torch.no_grad():
        sae.threshold.fill_(0.1)
        inside = sae.float().eval()((x - one.mean) / one.scale)
        sae = one.finished().eval()
        sae.threshold.fill_(0.1)
        sae.fold_normalization_(one.mean, one.scale)
        sae.save_pretrained(tmp_path)
        loaded = type(sae).from_pretrained(tmp_path)
        assert loaded.W_dec.dtype == torch.bfloat16
        assert loaded.threshold.dtype == torch.float32
        assert torch.equal(loaded.W_dec, sae.W_dec) and torch.equal(loaded.W_enc, sae.W_enc)
        if one.spec.unit_norm_decoder:
            assert torch.allclose(loaded.W_dec.float().norm(dim=1), torch.ones(F), atol=2**-7)
        wide = type(sae).from_pretrained(tmp_path, dtype=torch.float32)
        expected = inside.reconstruction * one.scale + one.mean
        assert torch.allclose(wide(x).reconstruction, expected, atol=1e-4)
        error = (loaded(x).reconstruction.float() - expected).norm() / expected.norm()
        assert error < 0.03


def test_every_tensor_of_a_gated_encoder_has_the_encoders_rates():
    one = learner(type="gated", k=None, target_l0=float(K), encoder_lr_scale=0.4, encoder_bias_lr_scale=0.2)
    rates = {id(group["params"][0]): group["lr_scale"] for group in one.optimizer.param_groups}
    names = {name: rates[id(parameter)] for name, parameter in one.sae.named_parameters()}
    assert names == {"W_enc": 0.4, "r_mag": 0.4, "b_enc": 0.2, "b_mag": 0.2, "b_dec": 0.03, "W_dec": 1.0}
