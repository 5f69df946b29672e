"""Sums over processes: what a metric needs to be the same for two processes as for one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


# Processes that share an evaluation, where these are not all: rank, size and group.
_some: tuple[int, int, dist.ProcessGroup | None] | None = None


@contextmanager
def among(rank: int, world: int, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Within the block, an evaluation's tokens are shared by the processes of a group alone.

    Args:
        rank (`int`): Of this process among them.
        world (`int`): How many they are.
        group (`ProcessGroup`, *optional*): Theirs; `None` for one.
    """
    global _some
    before, _some = _some, (rank, world, group)
    try:
        yield
    finally:
        _some = before


def shared_group() -> dist.ProcessGroup | None:
    """The group that shares the evaluation at hand; `None` for all processes."""
    return None if _some is None else _some[2]


def processes() -> tuple[int, int]:
    """Rank of this process and how many there are, `(0, 1)` without `torch.distributed`."""
    if _some is not None:
        return _some[:2]
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def reduce_sum(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, summed over processes in place where there are several; on any device."""
    if processes()[1] > 1:
        # NCCL has no sums on the host, where most of these are.
        device = torch.device("cuda") if dist.get_backend() == "nccl" else None
        for tensor in tensors:
            moved = tensor.to(device) if device is not None else tensor
            dist.all_reduce(moved, group=shared_group())
            if moved is not tensor:
                tensor.copy_(moved)
    return tensors


def gathered(found: list) -> list:
    """What all processes found, in their order."""
    _, world = processes()
    if world == 1:
        return found
    parts: list[list] = [[] for _ in range(world)]
    dist.all_gather_object(parts, found, group=shared_group())
    return [one for part in parts for one in part]
