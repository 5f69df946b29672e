"""The Triton kernels against PyTorch's: on CUDA, or anywhere under Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch

from hf_matryoshka_sae.models import dense_ops, sparse_ops, triton_ops

from ..axes import each


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not triton_ops.usable(torch.empty(1, device=DEVICE)),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)


def bags_of(sizes: list[int], num_rows: int) -> tuple[torch.Tensor, ...]:
    """Values, rows, bags and offsets of bags with so many pairs."""
    sizes = torch.tensor(sizes, dtype=torch.int64, device=DEVICE)
    bags = torch.arange(len(sizes), device=DEVICE).repeat_interleave(sizes)
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    index = torch.randint(0, num_rows, (len(bags),), device=DEVICE)
    return torch.randn(len(bags), device=DEVICE), index, bags, offsets


@each(
    dtype=[torch.float32, torch.bfloat16],
    d_in=[1, 37, 256, 300],
    sizes=[[3, 0, 1, 20, 8], [0, 0], [9], [], [0, 65, 0]],
)
def test_gather_sum_adds_up_in_float32(sizes, d_in, dtype):
    source = torch.randn(11, d_in, device=DEVICE).to(dtype)
    values, index, bags, offsets = bags_of(sizes, 11)
    out = triton_ops.gather_sum(values, source, index, offsets)
    assert out.dtype == torch.float32
    expected = torch.zeros(len(sizes), d_in, dtype=torch.float64, device=DEVICE)
    expected.index_add_(0, bags, values.double()[:, None] * source[index].double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_sums_are_rounded_once_to_the_type_asked_for():
    source = torch.randn(11, 37, device=DEVICE)
    values, index, _, offsets = bags_of([3, 0, 1, 20, 8], 11)
    out = triton_ops.gather_sum(values, source, index, offsets, torch.bfloat16)
    assert torch.equal(out, triton_ops.gather_sum(values, source, index, offsets).bfloat16())


@each(dtype=[torch.float32, torch.bfloat16], d_in=[1, 37, 256, 300], sizes=[[3, 0, 1, 20, 8], [0, 0], []])
def test_pair_dot_adds_up_in_float32(sizes, d_in, dtype):
    right = torch.randn(11, d_in, device=DEVICE).to(dtype)
    left = torch.randn(max(1, len(sizes)), d_in, device=DEVICE).to(dtype)
    _, cols, bags, _ = bags_of(sizes, 11)
    out = triton_ops.pair_dot(left, bags, right, cols)
    expected = (left[bags].double() * right[cols].double()).sum(-1)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("widths", [[40], [3, 17, 40]], ids=str)
def test_a_loss_and_its_gradients_are_those_of_pytorchs_kernels(widths, monkeypatch):
    monkeypatch.setattr(dense_ops, "_SHARE", 2.0)
    rows, cols = (torch.rand(6, 40, device=DEVICE) < 0.3).nonzero(as_tuple=True)
    index = sparse_ops.PairIndex(rows, cols, 6, 40)
    shapes = {"x": (6, 37), "W_enc": (40, 37), "b_enc": (40,), "b_dec": (37,), "W_dec": (40, 37)}
    weights = {name: torch.randn(shape, device=DEVICE, requires_grad=True) for name, shape in shapes.items()}

    def gradients():
        x, W_enc, b_enc, b_dec, W_dec = weights.values()
        pre = ((x - b_dec) @ W_enc.T + b_enc)[rows, cols]
        values = sparse_ops.encode_pairs(x, W_enc, b_enc, b_dec, pre, index)
        pairs = sparse_ops.LatentPairs(index, values)
        sse, _ = sparse_ops.prefix_errors(pairs, W_dec, b_dec, x, widths)
        return sse.detach(), torch.autograd.grad(sse.sum(), weights.values())

    with_triton = gradients()
    monkeypatch.setattr(sparse_ops, "triton_usable", lambda tensor: False)
    torch.testing.assert_close(with_triton, gradients(), rtol=1e-4, atol=1e-4)
