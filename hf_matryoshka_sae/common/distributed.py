"""Sums over processes, so that a metric is the same for two processes as for one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


# The processes that share an evaluation, where these are not all: rank of this one, number of them, their group.
_some: tuple[int, int, dist.ProcessGroup | None] | None = None


@contextmanager
def among(rank: int, world: int, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Within the block, share an evaluation's tokens among the processes of one group alone.

    Args:
        rank (`int`): Number of this process in the group.
        world (`int`): Number of processes in the group.
        group (`ProcessGroup`, *optional*): The group; `None` for a single process.
    """
    global _some
    before, _some = _some, (rank, world, group)
    try:
        yield
    finally:
        _some = before


def shared_group() -> dist.ProcessGroup | None:
    """Return the group that shares the current evaluation; `None` for all processes."""
    return None if _some is None else _some[2]


def processes() -> tuple[int, int]:
    """Return rank of this process and number of processes, `(0, 1)` without `torch.distributed`."""
    if _some is not None:
        return _some[:2]
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def reduce_sum(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, summed in place over processes where there are several; on any device."""
    if processes()[1] > 1:
        # NCCL has no sums on the host, where most of these are.
        device = torch.device("cuda") if dist.get_backend() == "nccl" else None
        for tensor in tensors:
            moved = tensor.to(device) if device is not None else tensor
            dist.all_reduce(moved, group=shared_group())
            if moved is not tensor:
                tensor.copy_(moved)
    return tensors


def gathered(items: list) -> list:
    """Return the items of all processes in one list, in the order of ranks."""
    _, world = processes()
    if world == 1:
        return items
    parts: list[list] = [[] for _ in range(world)]
    dist.all_gather_object(parts, items, group=shared_group())
    return [item for part in parts for item in part]
