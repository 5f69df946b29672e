"""Selections against explicit sorting: ties, blocks, backends, two processes against one."""

import pytest
import torch
import torch.distributed as dist

from hf_matryoshka_sae.models.encoder_blocks import EncoderBlocks
from hf_matryoshka_sae.models.selection import select_above, select_batch_topk, select_topk
from hf_matryoshka_sae.models.sharding import Layout

from ..axes import each
from .reference import batch_topk_mask, topk_mask


def blocks_of(pre: torch.Tensor, block_latents: int | None = None) -> EncoderBlocks:
    """Blocks that hold exactly `pre`: the hidden states are unit vectors."""
    num_rows, num_latents = pre.shape
    states = torch.eye(num_rows, dtype=pre.dtype)
    return EncoderBlocks(states, pre.T.contiguous(), pre.new_zeros(num_latents), block_latents=block_latents)


def mask_of(selection: tuple[torch.Tensor, ...], pre: torch.Tensor) -> torch.Tensor:
    """The positive pairs as a mask; fails where pairs are not in order, held twice, or have another value."""
    rows, cols, values = selection
    assert ((rows * pre.shape[1] + cols).diff() > 0).all()
    assert torch.equal(values, pre[rows, cols])
    mask = torch.zeros(pre.shape, dtype=torch.bool)
    mask[rows, cols] = values > 0
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
    "several groups": lambda: torch.randn(9, 203),
    "ties over several groups": lambda: integers(6, 130).float(),
    "two zeros": lambda: torch.tensor([[0.0, -0.0, -1.0] * 30, [-0.0, 0.0, -2.0] * 30]),
    "the largest stand together": lambda: torch.arange(300.0).view(2, 150),
}


BLOCKS = pytest.mark.parametrize("block", [None, 32, 96], ids=["one block", "blocks of 32", "blocks of 96"])


@each(
    static={"listed": False, "static": True},
    block={"one block": None, "blocks of 32": 32, "blocks of 96": 96},
    pre=PRE,
    k=[1, 3, 8, 13, 40],
)
def test_topk_keeps_the_largest_and_the_lowest_latent_of_equals(pre, k, block, static):
    pre = pre()
    selection = select_topk(blocks_of(pre, block), k, static)
    assert len(selection[0]) == len(pre) * min(k, pre.shape[1])
    assert torch.equal(mask_of(selection, pre), topk_mask(pre, k))


@each(
    static={"listed": False, "static": True},
    block={"one block": None, "blocks of 32": 32, "blocks of 96": 96},
    pre=PRE,
    k=[0.1, 1, 2.5, 8, 40],
)
def test_batch_topk_keeps_the_largest_of_the_batch_and_the_first_of_equals(pre, k, block, static):
    pre = pre()
    selection = select_batch_topk(blocks_of(pre, block), k, static=static)
    assert len(selection[0]) == min(int(k * len(pre)), pre.numel())
    assert torch.equal(mask_of(selection, pre), batch_topk_mask(pre, k))


@each(
    static={"listed": False, "static": True},
    block={"one block": None, "blocks of 32": 32, "blocks of 96": 96},
    make=[lambda: torch.randn(300, 700), lambda: torch.randn(300, 700).mul(4).round()],
    k=[0.01, 3.3, 350, 600],
)
def test_batch_topk_is_exact_on_many_entries(make, k, block, static):
    pre = make()
    assert torch.equal(
        mask_of(select_batch_topk(blocks_of(pre, block), k, static=static), pre), batch_topk_mask(pre, k)
    )


@BLOCKS
def test_above_is_strict_and_takes_a_threshold_for_each_latent(block):
    pre = torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.0, -1.0]])
    rows, cols, values = select_above(blocks_of(pre), torch.tensor([0.5, 0.4, -2.0]))
    assert list(zip(rows.tolist(), cols.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 0), (1, 2)]
    assert values.tolist() == [0.5, 0.5, 1.0, -1.0]
    wide, threshold = torch.randn(9, 203), torch.randn(203)
    rows, cols, values = select_above(blocks_of(wide, block), threshold)
    assert torch.equal(torch.stack([rows, cols], 1), (wide > threshold).nonzero())
    assert torch.equal(values, wide[rows, cols])


@pytest.mark.parametrize("block", [None, 32, 64, 96])
def test_blocks_are_the_encoder(block):
    x, W_enc, b_enc, b_dec = torch.randn(5, 4), torch.randn(131, 4), torch.randn(131), torch.randn(4)
    scale = torch.rand(131) + 0.5
    parts = [part.clone() for _, part in EncoderBlocks(x, W_enc, b_enc, b_dec, scale, block)]
    joined = torch.cat(parts, 1)
    torch.testing.assert_close(joined[:, :131], ((x - b_dec) @ W_enc.T + b_enc) * scale)
    assert (joined[:, 131:] == -torch.inf).all() and joined.shape[1] == 160


def test_the_kept_buffer_is_not_shared_by_two_iterations():
    first, second = blocks_of(torch.ones(3, 40)), blocks_of(torch.zeros(3, 40))
    for _, outer in first:
        for _ in second:
            pass
        assert (outer[:, :40] == 1).all()


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


def replicas_of(num_latents: int, rank: int) -> Layout:
    return Layout(num_latents, rank, 2, replica_group=dist.group.WORLD, group=dist.group.WORLD)


def _select_on_rank(rank: int, joined: dict) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for name, (pre, k) in joined.items():
        found[name] = select_batch_topk(blocks_of(pre.chunk(2)[rank]), k, replicas_of(pre.shape[1], rank))[:2]
    return found


def test_batch_topk_over_two_processes_equals_one_process_on_the_joined_batch(two_processes):
    joined = {name: (make(), k) for name, (make, k) in BATCHES.items()}
    first, second = two_processes.run(_select_on_rank, joined)
    for name, (pre, k) in joined.items():
        mask = torch.zeros(pre.shape, dtype=torch.bool)
        mask[first[name]] = True
        mask[second[name][0] + len(pre) // 2, second[name][1]] = True
        assert torch.equal(mask, batch_topk_mask(pre, k)), name
