"""The sparse operations against dense float64 references: slots, decoding, gradients."""

import pytest
import torch
from torch.autograd import gradcheck

from hf_matryoshka_sae import SparseLatents
from hf_matryoshka_sae.models.families import jumprelu
from hf_matryoshka_sae.models.sparse_ops import (
    LatentPairs,
    PairIndex,
    decode_prefixes,
    encode_pairs,
    pairs_from_slots,
    prefix_errors,
)

from ..axes import each


pytestmark = pytest.mark.usefixtures("way")


# Slots and pairs


def random_pairs(num_rows: int, num_latents: int, density: float = 0.3) -> LatentPairs:
    rows, cols = (torch.rand(num_rows, num_latents) < density).nonzero(as_tuple=True)
    return LatentPairs(PairIndex(rows, cols, num_rows, num_latents), torch.rand(len(rows), dtype=torch.float64) + 0.1)


def dense_of(pairs: LatentPairs) -> torch.Tensor:
    dense = torch.zeros(pairs.num_rows, pairs.num_latents, dtype=pairs.values.dtype)
    for row, col, value in zip(pairs.rows.tolist(), pairs.cols.tolist(), pairs.values.tolist(), strict=True):
        dense[row, col] += value
    return dense


@pytest.mark.parametrize(("num_rows", "density"), [(9, 0.3), (1, 0.5), (5, 0.0), (0, 0.3), (5, 1.0)])
def test_pairs_come_back_from_slots(num_rows, density):
    pairs = random_pairs(num_rows, 13, density)
    slots = pairs.to_slots()
    assert (
        slots.values.shape == slots.indices.shape == (num_rows, dense_of(pairs).gt(0).sum(1).max() if num_rows else 0)
    )
    assert torch.equal(slots.to_dense(), dense_of(pairs))
    assert torch.equal(slots.l0, dense_of(pairs).gt(0).sum(1))
    back = pairs_from_slots(slots.values, slots.indices, 13)
    for name in ("rows", "cols", "values"):
        assert torch.equal(getattr(back, name), getattr(pairs, name))


def test_padding_never_overwrites_latent_0():
    latents = SparseLatents(torch.tensor([[7.0, 0.0, 0.0]]), torch.tensor([[0, 0, 0]]), 3)
    assert latents.to_dense().tolist() == [[7.0, 0.0, 0.0]]


def test_dense_form_keeps_every_leading_dimension_and_gradients():
    values = torch.rand(2, 3, 4, requires_grad=True)
    indices = torch.stack([torch.randperm(9)[:4] for _ in range(6)]).view(2, 3, 4)
    dense = SparseLatents(values, indices, 9).to_dense()
    assert dense.shape == (2, 3, 9)
    weights = torch.randn(2, 3, 9)
    (dense * weights).sum().backward()
    assert torch.equal(values.grad, weights.gather(-1, indices))


def test_slots_in_any_order_are_the_same_pairs():
    values, indices = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[5, 0, 3]])
    pairs = pairs_from_slots(values, indices, 8)
    assert pairs.cols.tolist() == [3, 5] and pairs.values.tolist() == [2.0, 1.0]


# Gradients


def encoder(num_rows: int = 5, num_latents: int = 7, d_in: int = 3):
    shapes = ((num_rows, d_in), (num_latents, d_in), (num_latents,), (d_in,))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def preactivations(x, W_enc, b_enc, b_dec, scale=None):
    pre = (x if b_dec is None else x - b_dec) @ W_enc.T + b_enc
    return pre if scale is None else pre * scale


@each(
    subtract={"b_dec subtracted": True, "b_dec unused": False},
    scaled={"scaled": True, "plain": False},
    density=[0.4, 0.0, 1.0],
)
def test_encoder_gradients_match_finite_differences(density, scaled, subtract):
    x, W_enc, b_enc, b_dec = encoder()
    pairs = random_pairs(5, 7, density)

    def function(x, W_enc, b_enc, b_dec, scale):
        b_dec = b_dec if subtract else None
        scale = scale if scaled else None
        pre = preactivations(x, W_enc, b_enc, b_dec, scale)[pairs.rows, pairs.cols]
        return encode_pairs(x, W_enc, b_enc, b_dec, pre, pairs.index, scale)

    assert gradcheck(function, (x, W_enc, b_enc, b_dec, torch.rand(7, dtype=torch.float64, requires_grad=True) + 0.5))


@pytest.mark.parametrize("wanted", range(4), ids=["x", "W_enc", "b_enc", "b_dec"])
def test_encoder_gradients_do_not_depend_on_which_are_asked_for(wanted):
    inputs, pairs = encoder(), random_pairs(5, 7)
    pre = preactivations(*inputs)
    weights = torch.randn(len(pairs.rows), dtype=torch.float64)
    (pre[pairs.rows, pairs.cols] * weights).sum().backward()
    alone = [tensor.detach().requires_grad_(i == wanted) for i, tensor in enumerate(inputs)]
    (encode_pairs(*alone, pre[pairs.rows, pairs.cols], pairs.index) * weights).sum().backward()
    torch.testing.assert_close(alone[wanted].grad, inputs[wanted].grad)
    assert all(tensor.grad is None for i, tensor in enumerate(alone) if i != wanted)


@pytest.mark.parametrize("widths", [[7], [1, 7], [2, 3, 7], [1, 2, 3, 4, 5, 6, 7]], ids=str)
@pytest.mark.parametrize(("num_rows", "density"), [(5, 0.4), (5, 0.0), (1, 1.0), (0, 0.4)])
def test_decoding_all_prefixes_equals_decoding_each_and_its_gradients_match_finite_differences(
    widths, num_rows, density
):
    pairs = random_pairs(num_rows, 7, density)
    W_dec = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    values = pairs.values.clone().requires_grad_()

    def function(values, W_dec):
        return decode_prefixes(pairs.with_values(values), W_dec, widths)

    direct = torch.stack([dense_of(pairs)[:, :width] @ W_dec[:width] for width in widths])
    out = function(values, W_dec)
    assert out.shape == (len(widths), num_rows, 3)
    torch.testing.assert_close(out, direct)
    if num_rows:
        assert gradcheck(function, (values, W_dec))


@pytest.mark.parametrize("widths", [[7], [2, 3, 7]], ids=str)
@pytest.mark.parametrize(("num_rows", "density"), [(5, 0.4), (5, 0.0), (1, 1.0)])
def test_prefix_errors_are_those_of_each_prefix_and_their_gradients_match_finite_differences(
    widths, num_rows, density
):
    pairs = random_pairs(num_rows, 7, density)
    shapes = {"W_dec": (7, 3), "b_dec": (3,), "x": (num_rows, 3)}
    W_dec, b_dec, x = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values())
    values = pairs.values.clone().requires_grad_()

    def function(values, W_dec, b_dec, x):
        return prefix_errors(pairs.with_values(values), W_dec, b_dec, x, widths)

    sse, residual = function(values, W_dec, b_dec, x)
    decoded = torch.stack([dense_of(pairs)[:, :width] @ W_dec[:width] + b_dec for width in widths])
    torch.testing.assert_close(sse, (x - decoded).square().sum(-1).mean(-1))
    torch.testing.assert_close(residual, x - decoded[-1])
    assert gradcheck(function, (values, W_dec, b_dec, x))
    # One of the two outputs alone
    assert gradcheck(lambda *inputs: function(*inputs)[0], (values, W_dec, b_dec, x))
    assert gradcheck(lambda *inputs: function(*inputs)[1], (values, W_dec, b_dec, x))


def test_prefix_errors_can_be_differentiated_twice_through_one_graph():
    pairs = random_pairs(5, 7)
    W_dec = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 3, dtype=torch.float64)
    loss = prefix_errors(pairs, W_dec, torch.zeros(3, dtype=torch.float64), x, [2, 7])[0].sum()
    first, second = (torch.autograd.grad(loss, W_dec, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# JumpReLU


def test_jumprelu_is_strict_and_its_values_pass_gradients_only_above_the_threshold():
    z = torch.tensor([0.5, 1.0, 1.5, -1.0], requires_grad=True)
    values, gate = jumprelu(z, torch.ones(4), 0.1)
    assert values.tolist() == [0.0, 0.0, 1.5, 0.0] and gate.tolist() == [0.0, 0.0, 1.0, 0.0]
    values.sum().backward()
    assert z.grad.tolist() == [0.0, 0.0, 1.0, 0.0]


@each(penalty={"reconstruction": 0.0, "with L0": 0.7}, theta=[0.3, 0.8])
def test_jumprelu_threshold_gradient_is_that_of_the_kernel_smoothed_loss(theta, penalty):
    # Convolved with a rectangle of width h, L has the derivative (L(theta + h/2) - L(theta - h/2)) / h.
    # The published estimator differs from it by theta h / 4 here: latents in the window's upper half already fire.
    bandwidth, target = 0.002, 0.1
    z = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)

    def hard_loss(theta):
        fires = (z > theta).double()
        return ((z * fires - target) ** 2 + penalty * fires).mean()

    expected = (hard_loss(theta + bandwidth / 2) - hard_loss(theta - bandwidth / 2)) / bandwidth
    learnt = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    values, gate = jumprelu(z, learnt.expand_as(z), bandwidth)
    ((values - target) ** 2 + penalty * gate).mean().backward()
    torch.testing.assert_close(learnt.grad, expected, rtol=0, atol=theta * bandwidth / 2)
    assert abs(expected) > 0.01


def test_jumprelu_compares_bf16_values_with_unrounded_thresholds():
    theta = torch.tensor([0.1000], requires_grad=True)
    z = theta.detach().bfloat16()  # rounds up, so z lies above theta
    assert z.float() > theta
    values, gate = jumprelu(z, theta, 0.5)
    assert gate.item() == 1 and torch.equal(values, z)
    values.float().sum().backward()
    assert theta.grad.dtype == torch.float32 and theta.grad.item() == pytest.approx(-0.1 / 0.5)


# Matrices of fewer bits


@each(widths=[[31], [3, 17, 31]], density=[0.1, 0.9])
def test_bfloat16_matrices_cost_their_own_rounding_alone(widths, density):
    """Sums are taken in float32 and rounded once: what comes out is within a few last bits of float64.

    Hidden states, biases and latents are float32, and so are the errors and the gradients of the biases.
    """
    num_rows, num_latents, d_in = 300, 31, 40
    rows, cols = (torch.rand(num_rows, num_latents) < density).nonzero(as_tuple=True)
    index = PairIndex(rows, cols, num_rows, num_latents)
    shapes = {"W_enc": (num_latents, d_in), "b_enc": (num_latents,), "b_dec": (d_in,), "W_dec": (num_latents, d_in)}
    weights = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    weights = {name: tensor.bfloat16() if name[0] == "W" else tensor for name, tensor in weights.items()}
    x, mix = torch.randn(num_rows, d_in), torch.rand(len(widths))

    def outcome(dtype):
        own = {name: (tensor.to(dtype) if dtype else tensor).requires_grad_() for name, tensor in weights.items()}
        W_enc, b_enc, b_dec, W_dec = own.values()
        states = x.to(dtype) if dtype else x
        pre = ((states - b_dec) @ W_enc.to(states.dtype).T + b_enc)[rows, cols]
        values = torch.relu(encode_pairs(states, W_enc, b_enc, b_dec, pre, index))
        sse, residual = prefix_errors(LatentPairs(index, values), W_dec, b_dec, states, widths)
        loss = (sse * mix.to(sse.dtype)).sum() + residual.square().mean()
        gradients = torch.autograd.grad(loss, own.values())
        assert all(gradient.dtype == tensor.dtype for gradient, tensor in zip(gradients, own.values(), strict=True))
        return values.detach(), sse.detach(), residual.detach(), *gradients

    found, expected = outcome(None), outcome(torch.float64)
    assert [part.dtype for part in found[:3]] == [torch.float32] * 3
    for part, exact in zip(found, expected, strict=True):
        assert (part.double() - exact).norm() < 0.006 * exact.norm()
