"""Sums over processes: what a metric needs to be the same for two processes as for one."""

import torch.distributed as dist
from torch import Tensor


def processes() -> tuple[int, int]:
    """Rank of this process and how many there are, `(0, 1)` without `torch.distributed`."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def reduce_sum(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, summed over processes in place where there are several."""
    if processes()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
    return tensors
