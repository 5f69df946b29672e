"""The ideal rate against loops written from its formulas, and the model against scipy's log-normal."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import lognorm

from hf_matryoshka_sae.models.sparse_ops import LatentPairs, PairIndex
from hf_matryoshka_sae.progressive import rate
from hf_matryoshka_sae.progressive.rate import CodeModel, RateSums, bits_per_token, default_step, naive_bits


F, WIDTHS, STEP = 12, [3, 7, 12], 0.4


def random_pairs(num_rows: int = 40) -> LatentPairs:
    """Each latent with another frequency; one always, one never; some pairs with the value 0."""
    chance = torch.linspace(0, 1, F)
    rows, cols = (torch.rand(num_rows, F) < chance).nonzero(as_tuple=True)
    values = torch.rand(len(rows)) * 4 * (torch.rand(len(rows)) < 0.9)
    return LatentPairs(PairIndex(rows, cols, num_rows, F), values)


def statistics_of(pairs: LatentPairs) -> SimpleNamespace:
    dense = torch.zeros(pairs.num_rows, F, dtype=torch.float64)
    dense[pairs.rows, pairs.cols] = pairs.values.double()
    moments = dict(frequency=(dense > 0).double(), mean=dense, mean_square=dense.square())
    return SimpleNamespace(tokens=pairs.num_rows, **{name: moment.mean(0) for name, moment in moments.items()})


def code_model(statistics: SimpleNamespace, latent: int) -> tuple[float, float, float]:
    """Probability of firing, and location and spread of the log-normal, from the moments."""
    tokens, seen = statistics.tokens, statistics.tokens * statistics.frequency[latent].item()
    firings = statistics.frequency.sum().item()
    mean, square = statistics.mean.sum().item() / firings, statistics.mean_square.sum().item() / firings
    mean = (tokens * statistics.mean[latent].item() + mean) / (seen + 1)
    square = (tokens * statistics.mean_square[latent].item() + square) / (seen + 1)
    spread = math.sqrt(max(math.log(square / mean**2), 0.05**2))
    return (seen + 0.5) / (tokens + 1), math.log(mean) - spread**2 / 2, spread


def reference(pairs: LatentPairs, statistics: SimpleNamespace, width: int) -> dict[str, float]:
    entries = zip(pairs.rows.tolist(), pairs.cols.tolist(), pairs.values.tolist(), strict=True)
    values = {(row, latent): value for row, latent, value in entries}
    bits = dict(index_bits=0.0, value_bits=0.0, l0=0.0)
    for latent in range(width):
        fires, location, spread = code_model(statistics, latent)
        of_values = lognorm(spread, scale=math.exp(location))
        for token in range(pairs.num_rows):
            value = values.get((token, latent), 0.0)
            bits["index_bits"] -= math.log2(fires if value > 0 else 1 - fires)
            if value > 0:
                number = math.floor(value / STEP)
                mass = of_values.cdf((number + 1) * STEP) - of_values.cdf(number * STEP)
                bits["value_bits"] -= math.log2(max(mass, 2.0**-20))
                bits["l0"] += 1
    per_token = {name: total / pairs.num_rows for name, total in bits.items()}
    return {**per_token, "bits": per_token["index_bits"] + per_token["value_bits"]}


def test_the_rate_of_every_width_is_that_of_a_loop_over_tokens_and_latents():
    pairs, statistics = random_pairs(), statistics_of(random_pairs(200))
    found = bits_per_token(pairs, statistics, WIDTHS, STEP)
    assert found.keys() == {"index_bits", "value_bits", "bits", "l0"}
    for place, width in enumerate(WIDTHS):
        for name, expected in reference(pairs, statistics, width).items():
            assert found[name][place].item() == pytest.approx(expected, rel=1e-9), (name, width)


def test_batches_and_processes_add_up(monkeypatch):
    whole, statistics = random_pairs(), statistics_of(random_pairs(200))
    sums = RateSums(statistics, WIDTHS, STEP)
    for begin, end in ((0, 15), (15, 40)):
        inside = (whole.rows >= begin) & (whole.rows < end)
        index = PairIndex(whole.rows[inside] - begin, whole.cols[inside], end - begin, F)
        sums.add(LatentPairs(index, whole.values[inside]))
    expected = bits_per_token(whole, statistics, WIDTHS, STEP)
    torch.testing.assert_close(sums.bits_per_token(), expected)
    # A second process with the same data doubles firings and tokens alike, however often it is asked.
    monkeypatch.setattr(rate, "reduce_sum", lambda *tensors: tuple(tensor.mul_(2) for tensor in tensors))
    for _ in range(2):
        torch.testing.assert_close(sums.bits_per_token(), expected)


def test_the_model_has_the_moments_of_the_statistics():
    statistics = statistics_of(random_pairs(100_000))
    model = CodeModel.of(statistics)
    for latent in range(1, F):
        values = lognorm(model.spread[latent].item(), scale=math.exp(model.location[latent].item()))
        frequency = statistics.frequency[latent].item()
        assert model.fires[latent].item() == pytest.approx(frequency, rel=1e-3)
        assert values.mean() == pytest.approx(statistics.mean[latent].item() / frequency, rel=1e-3)
        assert values.moment(2) == pytest.approx(statistics.mean_square[latent].item() / frequency, rel=1e-3)


def test_what_was_never_or_always_seen_stays_codable():
    statistics = statistics_of(random_pairs(30))
    statistics.frequency[-1] = 1.0
    model = CodeModel.of(statistics)
    assert statistics.frequency[0] == 0
    assert ((model.fires > 0) & (model.fires < 1)).all()
    assert model.location.isfinite().all() and (model.spread > 0).all()
    for value in (1e-30, 1e-3, 1.0, 1e3, 1e30):
        latents, values = torch.arange(F), torch.full((F,), value, dtype=torch.float64)
        assert (model.value_bits(latents, values, STEP) <= 20).all()


def test_a_bin_is_read_as_the_mean_of_the_values_in_it():
    model = CodeModel.of(statistics_of(random_pairs(200)))
    for latent, number in ((2, 0), (5, 1), (11, 4)):
        values = lognorm(model.spread[latent].item(), scale=math.exp(model.location[latent].item()))
        expected = values.expect(lb=number * STEP, ub=(number + 1) * STEP, conditional=True)
        found = model.read(torch.tensor([latent]), torch.tensor([number]), STEP)
        assert found.item() == pytest.approx(expected, rel=1e-6)


def test_a_bin_is_read_as_a_value_inside_it_wherever_it_is():
    model = CodeModel.of(statistics_of(random_pairs(200)))
    numbers = torch.cat([torch.arange(200), torch.tensor([10**6, 2**24 - 1])])
    for latent in range(F):
        for step in (1e-6, STEP, 100.0):
            found = model.read(torch.full_like(numbers, latent), numbers, step)
            assert torch.equal((found / step).floor().clamp(max=numbers), numbers.double())
            assert (found > 0).all()


def test_the_naive_codes_are_counted_by_their_formulas():
    found = naive_bits(torch.tensor([2.0, 5.0]), [8, 60])
    sets = [math.log2(math.comb(8, 2)) + 64, math.log2(math.comb(60, 5)) + 160]
    assert found["set_bits"].tolist() == pytest.approx(sets)
    assert found["list_bits"].tolist() == pytest.approx([2 * (3 + 32), 5 * (math.log2(60) + 32)])


def test_the_default_step_is_half_of_the_root_mean_square_value():
    pairs = random_pairs(200)
    statistics = statistics_of(pairs)
    fires = pairs.values[pairs.values > 0].double()
    assert default_step(statistics) == pytest.approx(fires.square().mean().sqrt().item() / 2)
    by_default, given = (bits_per_token(pairs, statistics, WIDTHS, step) for step in (None, default_step(statistics)))
    torch.testing.assert_close(by_default, given)


@pytest.mark.parametrize("widths", [[], [0, 3], [3, 3], [5, 3], [3, F + 1]])
def test_widths_must_increase_within_the_dictionary(widths):
    with pytest.raises(ValueError, match="strictly increase between 1 and num_latents"):
        RateSums(statistics_of(random_pairs()), widths, STEP)


@pytest.mark.parametrize("step", [0.0, -1.0, math.inf, math.nan])
def test_a_step_must_be_positive(step):
    with pytest.raises(ValueError, match="`step` must be a positive number"):
        RateSums(statistics_of(random_pairs()), WIDTHS, step)


def test_pairs_must_be_finite_and_of_the_same_dictionary():
    sums = RateSums(statistics_of(random_pairs()), WIDTHS, STEP)
    with pytest.raises(ValueError, match="No token"):
        sums.bits_per_token()
    pairs = random_pairs()
    with pytest.raises(ValueError, match="not finite"):
        sums.add(pairs.with_values(pairs.values * torch.nan))
    with pytest.raises(ValueError, match="12 latents, the pairs of 13"):
        sums.add(LatentPairs(PairIndex(pairs.rows, pairs.cols, pairs.num_rows, F + 1), pairs.values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tokens=0), "give no probabilities"),
        (dict(frequency=torch.zeros(F, dtype=torch.float64)), "give no probabilities"),
        (dict(frequency=torch.full((F,), 1.5, dtype=torch.float64)), "give no probabilities"),
        (dict(mean=torch.full((F,), math.nan, dtype=torch.float64)), "`mean` must be float64, finite"),
        (dict(mean_square=torch.ones(F)), "`mean_square` must be float64"),
        (dict(mean=torch.ones(F + 1, dtype=torch.float64)), r"must be `\[F\]` each"),
    ],
)
def test_statistics_that_give_no_probabilities_are_refused(change, message):
    statistics = statistics_of(random_pairs())
    vars(statistics).update(change)
    with pytest.raises(ValueError, match=message):
        CodeModel.of(statistics)
