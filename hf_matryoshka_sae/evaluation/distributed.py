"""Sums over processes: what a metric needs to be the same for two processes as for one."""

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> tuple[int, int]:
    """Rank of this process and how many there are, `(0, 1)` without `torch.distributed`."""
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
            dist.all_reduce(moved)
            if moved is not tensor:
                tensor.copy_(moved)
    return tensors


def gathered(found: list) -> list:
    """What all processes found, in their order."""
    _, world = processes()
    if world == 1:
        return found
    parts: list[list] = [[] for _ in range(world)]
    dist.all_gather_object(parts, found)
    return [one for part in parts for one in part]
