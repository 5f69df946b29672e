"""Adam in fewer bits, against Adam in float64 and against PyTorch's."""

import math

import pytest
import torch
from accelerate import Accelerator

from hf_matryoshka_sae.training.config.spec import SAESpec
from hf_matryoshka_sae.training.run.checkpoints import load_tree, save_tree
from hf_matryoshka_sae.training.sae import optimizer as module
from hf_matryoshka_sae.training.sae.optimizer import LowPrecisionAdam, build_optimizer

from ...axes import each


F, D = 24, 40
BETAS, EPS, LR = (0.9, 0.99), 1e-8, 1e-3
MOMENTS = ("float32", "bfloat16", "int8")


def weights(rows=F, columns=D, dtype=torch.float32, seed=0):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter((values / values.norm(dim=1, keepdim=True)).to(dtype))


def made(parameter, moments, seed=0, **group):
    optimizer = LowPrecisionAdam([{"params": [parameter], **group}], LR, BETAS, EPS, moments, seed)
    optimizer.found_inf = torch.zeros(())
    return optimizer


def gradients(step, rows=F, columns=D):
    """Noise about a direction, of very unlike size: rows by 10^4, columns by 10^3; some rows get none."""
    generator = torch.Generator().manual_seed(step)
    direction = torch.randn(rows, columns, generator=torch.Generator().manual_seed(77))
    noise = torch.randn(rows, columns, generator=generator)
    sizes = torch.logspace(-6, -2, rows)[:, None] * torch.logspace(-3, 0, columns)
    present = torch.rand(rows, 1, generator=generator) < 0.7
    return (0.3 * direction + noise) * sizes * present


def run(parameter, optimizer, steps, start=0, rows=slice(None), count=F):
    for step in range(start, start + steps):
        parameter.grad = gradients(step, count)[rows].to(parameter.dtype)
        optimizer.step()


def reference(start, steps):
    """Adam in float64 as in Kingma & Ba 2015, algorithm 1."""
    w, m, v = start.double(), torch.zeros(F, D).double(), torch.zeros(F, D).double()
    for t in range(1, steps + 1):
        g = gradients(t - 1).double()
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g * g
        w = w - LR * (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
    return w, m, v


def read(optimizer, parameter, name):
    return module._read(optimizer.state[parameter], name, slice(None))


def tensors(optimizer, parameter):
    return {**optimizer.state[parameter], "weight": parameter.detach()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


def test_float32_is_the_fused_adam():
    parameter = weights()
    built = build_optimizer([{"params": [parameter]}], SAESpec(betas=[0.5, 0.9], adam_eps=1e-6), steps=9)
    assert type(built) is torch.optim.Adam
    assert built.defaults["fused"] and built.defaults["betas"] == (0.5, 0.9) and built.defaults["eps"] == 1e-6
    for fields in ({"optimizer_dtype": "int8"}, {"weights_dtype": "bfloat16"}):
        assert type(build_optimizer([{"params": [parameter]}], SAESpec(**fields), steps=9)) is LowPrecisionAdam


@pytest.mark.parametrize("moments", MOMENTS)
def test_the_first_step_is_that_of_the_fused_adam(moments):
    ours, theirs = weights(), weights()
    run(ours, made(ours, moments), 1)
    run(theirs, torch.optim.Adam([theirs], lr=LR, betas=BETAS, eps=EPS, fused=True), 1)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-7)
    assert (ours - weights()).abs().max() > 0.9 * LR


@pytest.mark.parametrize(("moments", "bound"), [("float32", 1e-4), ("bfloat16", 0.01), ("int8", 0.08)])
def test_many_steps_stay_near_adam_in_float64(moments, bound):
    parameter, steps = weights(), 300
    optimizer = made(parameter, moments)
    run(parameter, optimizer, steps)
    w, m, v = reference(weights().detach(), steps)
    moved = w - weights().double()
    assert (parameter - w).norm(dim=1).div(moved.norm(dim=1)).max() < bound
    assert (read(optimizer, parameter, "exp_avg") - m).norm() < 1.5 * bound * m.norm()
    # What is rounded at random is right in the mean, in each row of whatever size.
    ratio = (read(optimizer, parameter, "exp_avg_sq") / v).mean(1)
    assert (ratio - 1).abs().max() < 2 * bound


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_second_moment_follows_gradients_that_become_small(moments):
    """Rounded to the nearest it would stay where it is for ever: it falls by a thousandth a step."""
    beta, parameter, v = 0.999, weights(), 0.0
    optimizer = LowPrecisionAdam([parameter], LR, (0.9, beta), EPS, moments)
    for step in range(600):
        size = 1.0 if step < 200 else 0.1
        parameter.grad = size * torch.randn(F, D, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        v = beta * v + (1 - beta) * size**2
    assert read(optimizer, parameter, "exp_avg_sq").mean() == pytest.approx(v, rel=0.03)


@each(dtype=[torch.float32, torch.bfloat16], moments=MOMENTS)
def test_a_gradient_that_is_not_finite_changes_not_one_bit(moments, dtype):
    parameter = weights(dtype=dtype)
    optimizer = made(parameter, moments, unit_rows=True)
    run(parameter, optimizer, 5)
    before = {key: value.clone() for key, value in tensors(optimizer, parameter).items()}
    parameter.grad = torch.full_like(parameter, torch.nan)
    parameter.grad[0] = torch.inf
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert_same(before, tensors(optimizer, parameter))
    optimizer.found_inf = torch.zeros(())
    run(parameter, optimizer, 1, start=5)
    assert not torch.equal(before["weight"], parameter)
    assert optimizer.state[parameter]["step"] == 6


@pytest.mark.parametrize("moments", MOMENTS)
def test_grad_scale_divides_gradients(moments):
    scaled, plain = weights(), weights()
    one, other = made(scaled, moments), made(plain, moments)
    one.grad_scale = torch.tensor(8.0)
    for step in range(4):
        scaled.grad, plain.grad = 8 * gradients(step), gradients(step)
        one.step(), other.step()
    assert_same(tensors(one, scaled), tensors(other, plain))


@pytest.mark.parametrize("moments", MOMENTS)
def test_state_has_its_rows_first_and_moves_with_them(moments, monkeypatch):
    """With dice that always show the same: the real ones belong to a row's number."""
    monkeypatch.setattr(module._Dice, "__call__", lambda self, kind: torch.full((len(self.rows), D), 2**29 - 1).int())
    order = torch.randperm(F, generator=torch.Generator().manual_seed(3))
    first, second = weights(), weights()
    one, other = made(first, moments), made(second, moments)
    run(first, one, 6), run(second, other, 6)
    for key, value in tensors(other, second).items():
        assert key == "step" or len(value) == F
        if key != "step":
            value.copy_(value[order].clone())
    for step in range(6, 9):
        first.grad, second.grad = gradients(step), gradients(step)[order]
        one.step(), other.step()
    expected = {key: value if key == "step" else value[order] for key, value in tensors(one, first).items()}
    assert_same(expected, tensors(other, second))


@each(dtype=[torch.float32, torch.bfloat16], moments=MOMENTS)
def test_a_range_of_rows_alone_gets_the_same_values(moments, dtype):
    whole, rows = weights(dtype=dtype), slice(7, 19)
    part = torch.nn.Parameter(whole.detach()[rows].clone())
    one, other = made(whole, moments, unit_rows=True), made(part, moments, unit_rows=True, first_row=7)
    run(whole, one, 10), run(part, other, 10, rows=rows)
    expected = {key: value if key == "step" else value[rows] for key, value in tensors(one, whole).items()}
    assert_same(expected, tensors(other, part))
    if dtype == torch.bfloat16:
        run(again := weights(dtype=dtype), made(again, moments, seed=1, unit_rows=True), 10)
        assert not torch.equal(again, whole)  # another seed, other dice


def test_the_size_of_the_pieces_changes_nothing(monkeypatch):
    outcomes = []
    for piece in (2**18, 3 * D):
        monkeypatch.setattr(module, "_PIECE", {"cpu": piece})
        parameter = weights(dtype=torch.bfloat16)
        optimizer = made(parameter, "int8")
        run(parameter, optimizer, 4)
        outcomes.append(tensors(optimizer, parameter))
    assert_same(*outcomes)


@each(dtype=[torch.float32, torch.bfloat16], moments=MOMENTS)
def test_a_resumed_optimizer_goes_on_bit_for_bit(moments, dtype, tmp_path):
    whole, part = weights(dtype=dtype), weights(dtype=dtype)
    one, other = made(whole, moments), made(part, moments)
    run(whole, one, 9), run(part, other, 4)
    saved = other.state_dict()
    save_tree(tmp_path / "state", {str(index): entry for index, entry in saved["state"].items()})
    resumed = torch.nn.Parameter(part.detach().clone())
    last = Accelerator(cpu=True).prepare(made(resumed, moments))
    state = {int(index): entry for index, entry in load_tree(tmp_path / "state").items()}
    last.load_state_dict({**last.state_dict(), "state": state})
    assert_same(dict(other.state[part]), dict(last.state[resumed]))
    run(resumed, last.optimizer, 5, start=4)
    assert_same(tensors(one, whole), tensors(last.optimizer, resumed))


def test_one_dimensional_parameters_stay_float32():
    bias, theirs = torch.nn.Parameter(torch.zeros(F)), torch.nn.Parameter(torch.zeros(F))
    ours, fused = made(bias, "int8"), torch.optim.Adam([theirs], lr=LR, betas=BETAS, eps=EPS, fused=True)
    for step in range(50):
        bias.grad, theirs.grad = gradients(step)[:, 0].clone(), gradients(step)[:, 0].clone()
        ours.step(), fused.step()
    assert torch.allclose(bias, theirs, rtol=1e-4, atol=1e-6)
    assert {value.dtype for value in ours.state[bias].values()} == {torch.float32}


# Rounding


def test_a_row_without_gradient_decays_exactly():
    parameter = weights()
    optimizer = made(parameter, "int8")
    run(parameter, optimizer, 5)
    before = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    for _ in range(20):
        parameter.grad = torch.zeros(F, D)
        optimizer.step()
    after = optimizer.state[parameter]
    for name, beta in (("exp_avg", BETAS[0]), ("exp_avg_sq", BETAS[1])):
        assert (after[name] == before[name]).float().mean() > 0.999, name
        assert torch.allclose(after[f"{name}_scale"], before[f"{name}_scale"] * beta**20, rtol=1e-5)


def test_small_steps_of_bfloat16_weights_are_not_lost():
    """Each is a fiftieth of a last bit; unit rows stay as near to unit as rounding lets them."""
    parameter = torch.nn.Parameter(torch.full((400, 16), 0.25, dtype=torch.bfloat16))
    optimizer = LowPrecisionAdam([{"params": [parameter]}], 0.25 * 2**-7 / 50, BETAS, EPS, "bfloat16")
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter.detach().float().mean() == pytest.approx(0.25 - 2 * 0.25 * 2**-7, rel=1e-4)
    unit = weights(dtype=torch.bfloat16, columns=512)
    optimizer = made(unit, "int8", unit_rows=True)
    for step in range(20):
        unit.grad = gradients(step, columns=512).bfloat16()
        optimizer.step()
    assert (unit.float().norm(dim=1) - 1).abs().max() < 2**-7 / math.sqrt(512) * 5
