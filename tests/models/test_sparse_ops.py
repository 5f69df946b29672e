"""The sparse operations against dense float64 references: selections, slots, gradients, two processes against one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.autograd import gradcheck

from hf_matryoshka_sae.models.sparse_ops import (
    LatentPairs,
    SparseLatents,
    decode_prefixes,
    encode_pairs,
    jumprelu,
    pairs_from_slots,
    preactivations,
    select_above,
    select_batch_topk,
    select_topk,
)

from .reference import batch_topk_mask, topk_mask


def mask_of(pairs: tuple[torch.Tensor, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """The pairs as a mask; fails where they are not sorted by token, then by latent, or hold one twice."""
    rows, cols = pairs
    flat = rows * shape[1] + cols
    assert (flat.diff() > 0).all()
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[rows, cols] = True
    return mask


def integers(num_rows: int, num_cols: int) -> torch.Tensor:
    """Pre-activations with many ties and many negatives."""
    return torch.randint(-3, 4, (num_rows, num_cols)).double()


PRE = {
    "plain": lambda: torch.randn(7, 13),
    "ties": lambda: integers(9, 13),
    "all equal": lambda: torch.ones(5, 11),
    "all negative": lambda: -torch.rand(5, 8) - 0.1,
    "few positive": lambda: torch.where(torch.rand(6, 17) < 0.1, 1.0, -1.0),
    "zeros": lambda: torch.zeros(4, 9),
    "one token": lambda: torch.randn(1, 13),
    "one latent": lambda: torch.randn(6, 1),
    "no token": lambda: torch.randn(0, 13),
    "bf16": lambda: torch.randn(16, 31).bfloat16(),
}


# Selections


@pytest.mark.parametrize("pre", PRE.values(), ids=PRE)
@pytest.mark.parametrize("k", [1, 3, 8, 13, 40])
def test_topk_keeps_the_largest_positive_and_the_lowest_latent_of_equals(pre, k):
    pre = pre()
    assert torch.equal(mask_of(select_topk(pre, k), pre.shape), topk_mask(pre, k))


@pytest.mark.parametrize("pre", PRE.values(), ids=PRE)
@pytest.mark.parametrize("k", [0.1, 1, 2.5, 8, 40])
def test_batch_topk_keeps_the_largest_positive_of_the_batch_and_the_first_of_equals(pre, k):
    pre = pre()
    assert torch.equal(mask_of(select_batch_topk(pre, k), pre.shape), batch_topk_mask(pre, k))


@pytest.mark.parametrize("make", [lambda: torch.randn(300, 700), lambda: torch.randn(300, 700).mul(4).round()])
@pytest.mark.parametrize("k", [0.01, 3.3, 350, 600])
def test_batch_topk_is_exact_where_the_threshold_comes_from_a_sample(make, k):
    pre = make()  # 210,000 entries: more than the 65,536 the sample holds
    assert torch.equal(mask_of(select_batch_topk(pre, k), pre.shape), batch_topk_mask(pre, k))


def test_batch_topk_is_exact_where_the_sample_misleads():
    pre = torch.full((300, 700), 1e-3)
    pre.view(-1)[::3] = torch.rand(70000) + 1  # the sample's stride: every drawn entry is large
    assert torch.equal(mask_of(select_batch_topk(pre, 400), pre.shape), batch_topk_mask(pre, 400))


def test_above_is_strict_and_takes_a_threshold_for_each_latent():
    pre = torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.0, -1.0]])
    rows, cols = select_above(pre, torch.tensor([0.5, 0.4, -2.0]))
    assert list(zip(rows.tolist(), cols.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 0), (1, 2)]
    assert mask_of(select_above(pre, 0.0), pre.shape).tolist() == [[True, True, True], [True, False, False]]


# Slots and pairs


def random_pairs(num_rows: int, num_latents: int, density: float = 0.3) -> LatentPairs:
    rows, cols = (torch.rand(num_rows, num_latents) < density).nonzero(as_tuple=True)
    return LatentPairs(rows, cols, torch.rand(len(rows), dtype=torch.float64) + 0.1, num_rows, num_latents)


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
    assert torch.equal(slots.l0(), dense_of(pairs).gt(0).sum(1))
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


def test_keep_drops_pairs_and_their_gates_together():
    pairs = random_pairs(4, 6)
    pairs.gate = pairs.values * 2
    kept = pairs.keep(pairs.cols < 3)
    assert (kept.cols < 3).all() and torch.equal(kept.gate, kept.values * 2) and kept.num_latents == 6


# Gradients


def encoder(num_rows: int = 5, num_latents: int = 7, d_in: int = 3):
    shapes = ((num_rows, d_in), (num_latents, d_in), (num_latents,), (d_in,))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("subtract", [True, False], ids=["b_dec subtracted", "b_dec unused"])
@pytest.mark.parametrize("density", [0.4, 0.0, 1.0])
def test_encoder_gradients_match_finite_differences(density, subtract):
    x, W_enc, b_enc, b_dec = encoder()
    pairs = random_pairs(5, 7, density)

    def function(x, W_enc, b_enc, b_dec):
        b_dec = b_dec if subtract else None
        pre = preactivations(x, W_enc, b_enc, b_dec)
        return encode_pairs(x, W_enc, b_enc, b_dec, pre, pairs.rows, pairs.cols)

    assert gradcheck(function, (x, W_enc, b_enc, b_dec))


@pytest.mark.parametrize("wanted", range(4), ids=["x", "W_enc", "b_enc", "b_dec"])
def test_encoder_gradients_do_not_depend_on_which_are_asked_for(wanted):
    inputs, pairs = encoder(), random_pairs(5, 7)
    pre = preactivations(*inputs)
    weights = torch.randn(len(pairs.rows), dtype=torch.float64)
    (pre[pairs.rows, pairs.cols] * weights).sum().backward()
    alone = [tensor.detach().requires_grad_(i == wanted) for i, tensor in enumerate(inputs)]
    (encode_pairs(*alone, pre, pairs.rows, pairs.cols) * weights).sum().backward()
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
        return decode_prefixes(LatentPairs(pairs.rows, pairs.cols, values, num_rows, 7), W_dec, widths)

    direct = torch.stack([dense_of(pairs)[:, :width] @ W_dec[:width] for width in widths])
    out = function(values, W_dec)
    assert out.shape == (len(widths), num_rows, 3)
    torch.testing.assert_close(out, direct)
    if num_rows:
        assert gradcheck(function, (values, W_dec))


def test_decoder_rows_that_did_not_fire_get_no_gradient():
    pairs = random_pairs(5, 7)
    pairs = pairs.keep(pairs.cols != 4)
    W_dec = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    decode_prefixes(pairs, W_dec, [3, 7]).square().sum().backward()
    assert torch.equal(W_dec.grad[4], torch.zeros(3, dtype=torch.float64))
    assert (W_dec.grad[pairs.cols.unique()].norm(dim=1) > 0).all()


# JumpReLU


def test_jumprelu_is_strict_and_its_values_pass_gradients_only_above_the_threshold():
    z = torch.tensor([0.5, 1.0, 1.5, -1.0], requires_grad=True)
    values, gate = jumprelu(z, torch.ones(4), 0.1)
    assert values.tolist() == [0.0, 0.0, 1.5, 0.0] and gate.tolist() == [0.0, 0.0, 1.0, 0.0]
    values.sum().backward()
    assert z.grad.tolist() == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("penalty", [0.0, 0.7], ids=["reconstruction", "with L0"])
@pytest.mark.parametrize("theta", [0.3, 0.8])
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


def test_a_sparsity_penalty_raises_jumprelu_thresholds():
    z = torch.rand(1000)
    theta = torch.full((1000,), 0.5, requires_grad=True)
    jumprelu(z, theta, 0.2)[1].sum().backward()
    near = (z - 0.5).abs() < 0.1
    torch.testing.assert_close(theta.grad[near], torch.full_like(theta.grad[near], -5.0))
    assert (theta.grad[~near] == 0).all()


def test_jumprelu_compares_bf16_values_with_unrounded_thresholds():
    theta = torch.tensor([0.1000], requires_grad=True)
    z = theta.detach().bfloat16()  # rounds up, so z lies above theta
    assert z.float() > theta
    values, gate = jumprelu(z, theta, 0.5)
    assert gate.item() == 1 and torch.equal(values, z)
    values.float().sum().backward()
    assert theta.grad.dtype == torch.float32 and theta.grad.item() == pytest.approx(-0.1 / 0.5)


# Two processes


BATCHES = {
    "plain": (lambda: torch.randn(8, 13), 2.5),
    "ties": (lambda: integers(8, 13), 3),
    "all equal": (lambda: torch.ones(8, 5), 2),
    "all negative": (lambda: -torch.rand(8, 5) - 0.1, 2),
    "only the second process fires": (lambda: torch.cat([-torch.ones(4, 9), torch.rand(4, 9)]), 4),
    "one process holds all of the largest": (lambda: torch.cat([torch.rand(4, 9) + 1, torch.rand(4, 9)]), 3.5),
    "fewer positive than k": (lambda: torch.where(torch.rand(8, 9) < 0.2, torch.rand(8, 9), -torch.ones(8, 9)), 6),
    "less than one place for each process": (lambda: torch.rand(8, 9), 0.2),
    "more places than entries": (lambda: torch.rand(8, 3), 7),
}


def _select_on_rank(rank: int, folder: str, joined: dict, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        for name, (pre, k) in joined.items():
            mine = pre.chunk(2)[rank]
            rows, cols = select_batch_topk(mine, k, dist.group.WORLD)
            results.put((rank, name, rows.tolist(), cols.tolist()))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_batch_topk_over_two_processes_equals_one_process_on_the_joined_batch(tmp_path):
    joined = {name: (make(), k) for name, (make, k) in BATCHES.items()}
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_select_on_rank, (str(tmp_path), joined, results), nprocs=2)
    masks = {name: torch.zeros(pre.shape, dtype=torch.bool) for name, (pre, _) in joined.items()}
    for _ in range(2 * len(joined)):
        rank, name, rows, cols = results.get()
        masks[name][torch.tensor(rows, dtype=torch.int64) + rank * len(masks[name]) // 2, cols] = True
    for name, (pre, k) in joined.items():
        assert torch.equal(masks[name], batch_topk_mask(pre, k)), name
