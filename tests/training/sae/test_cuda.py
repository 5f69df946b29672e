"""A training step on CUDA: float32 equals the CPU, bf16 keeps float32 masters, and the host never waits."""

import pytest
import torch

from .test_learner import D, F, batches, learner


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FAMILIES = pytest.mark.parametrize(
    "fields",
    [{"type": "topk"}, {"type": "batch_topk"}, {"type": "matryoshka"}, {"type": "matryoshka", "activation": "topk"}],
    ids=str,
)


def trained(fields, steps=5, **options):
    torch.manual_seed(0)
    one = learner(**fields, **options)
    for step, x in enumerate(batches(steps)):
        one.accumulate(x, step)
        one.step(step)
    return one


@FAMILIES
def test_float32_on_a_gpu_trains_as_on_a_cpu(fields):
    torch.backends.cuda.matmul.allow_tf32 = False
    here, there = trained(fields, device="cpu"), trained(fields, device="cuda")
    for (name, a), (_, b) in zip(here.sae.named_parameters(), there.sae.named_parameters(), strict=True):
        assert torch.allclose(a, b.cpu(), atol=1e-4), name


@FAMILIES
def test_bf16_keeps_float32_masters_and_learns(fields):
    one = trained(fields, steps=40, device="cuda", mixed_precision="bf16")
    assert all(parameter.dtype == torch.float32 for parameter in one.sae.parameters())
    assert one.sae.W_enc.shape == (F, D)
    assert one.statistics(39).fvu[-1] < 0.7


@FAMILIES
def test_the_host_does_not_wait_within_a_step(fields):
    one = trained(fields, device="cuda")
    one.dead_every, one.dead = 10**6, torch.tensor([3, 9], device="cuda")
    x = next(batches(1)).pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.accumulate(x, 5)
        one.step(5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
