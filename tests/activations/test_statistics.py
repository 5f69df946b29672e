import pytest
import torch

from hf_matryoshka_sae.activations import ActivationStream, TokenStream, estimate_statistics

from . import tiny


def _rows(count=1000, width=6):
    return torch.randn(count, width) * torch.arange(1.0, width + 1) + torch.tensor([100.0, 0, 1, -2, 0, 0])[:width]


def _batches(rows, size=128):
    return [{"h": part} for part in rows.split(size)]


def _check(found, rows):
    rows = rows.double()
    mean, std = rows.mean(0), rows.std(0, correction=0)
    torch.testing.assert_close(found.mean, mean.float())
    assert found.scale == pytest.approx(std.square().mean().sqrt().item(), rel=1e-6)
    assert found.outlier_ratio == pytest.approx((mean.abs() / std).max().item(), rel=1e-6)


def test_statistics_equal_the_reference_and_give_the_stated_unit():
    rows = _rows()
    found = estimate_statistics(_batches(rows), 1000)["h"]
    _check(found, rows)
    scaled = (rows - found.mean) / found.scale
    assert scaled.square().sum(1).mean().item() == pytest.approx(6, rel=1e-4)


def test_only_the_tokens_asked_for_are_measured():
    rows = _rows()
    _check(estimate_statistics(_batches(rows), 300)["h"], rows[:300])


def test_a_large_mean_costs_no_precision():
    rows = torch.randn(2000, 3) + 1e4
    _check(estimate_statistics(_batches(rows), 2000)["h"], rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_left_out(value):
    rows = _rows()
    dirty = rows.clone()
    dirty[::7, 2] = value
    _check(estimate_statistics(_batches(dirty), 1000)["h"], rows[torch.arange(1000) % 7 != 0])


def test_half_precision_rows_are_summed_in_float64():
    rows = _rows().half()
    _check(estimate_statistics(_batches(rows), 1000)["h"], rows)


def test_errors_name_the_hookpoint():
    with pytest.raises(ValueError, match="No hidden state at 'h' is finite"):
        estimate_statistics(_batches(torch.full((10, 2), torch.nan)), 10)
    with pytest.raises(ValueError, match="'h' do not vary"):
        estimate_statistics(_batches(torch.full((10, 2), 0.3)), 10)
    with pytest.raises(ValueError, match="stream is empty"):
        estimate_statistics([], 10)


def test_a_stream_is_measured_without_using_it_up():
    tokens = TokenStream(tiny.texts(100), tiny.tokenizer(), 16, 4)
    stream = ActivationStream(tiny.llama(), tokens, ["model.layers.1"], 32, 400)
    found = estimate_statistics(stream, 128)["model.layers.1"]
    _check(found, torch.cat([next(stream)["model.layers.1"] for _ in range(4)]))


def _one_of_two(rank: int, rows: torch.Tensor):
    return estimate_statistics(_batches(rows[rank::2]), 1000)["h"]


def test_two_processes_agree_with_one(two_processes):
    rows = _rows()
    one = estimate_statistics(_batches(rows), 1000)["h"]
    for found in two_processes.run(_one_of_two, rows):
        torch.testing.assert_close(found.mean, one.mean)
        assert [found.scale, found.outlier_ratio] == pytest.approx([one.scale, one.outlier_ratio], rel=1e-6)
