"""How one dictionary lies on several processes, and the cut that all of them agree on.

Processes form a mesh of replicas and shards. Replicas of a dictionary see different tokens; its shards hold different
latents, in order, and see the same tokens. Every shard finds the candidates among its own latents, their values are
gathered, and each keeps what is above the one cut (the scheme of Gao et al. 2024, arXiv 2406.04093, made exact: where
a shard had more candidates than it may send, all of them are sent).

Shapes: N tokens, F latents of the whole dictionary, R replicas, S shards, C candidates that a process sends.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Layout:
    """The place of this process among those that train one dictionary.

    Args:
        num_latents (`int`): F, of the whole dictionary.
        replica (`int`), replicas (`int`): Which replica this process belongs to, and R.
        shard (`int`), shards (`int`): Which part of the latents it holds, and S.
        replica_group (`ProcessGroup`, *optional*): Processes with the same latents and other tokens.
        shard_group (`ProcessGroup`, *optional*): Processes with the same tokens and other latents.
        group (`ProcessGroup`, *optional*): All of them, replica by replica, the shards of each in order.
        capacity_factor (`float`): How many times its even share of the candidates a shard sends at first.

    Attributes:
        selections (`int`), fallbacks (`int`): Selections made over shards, and those in which more had to be sent.
    """

    num_latents: int
    replica: int = 0
    replicas: int = 1
    shard: int = 0
    shards: int = 1
    replica_group: dist.ProcessGroup | None = None
    shard_group: dist.ProcessGroup | None = None
    group: dist.ProcessGroup | None = None
    capacity_factor: float = 4.0
    selections: int = 0
    fallbacks: int = 0

    @property
    def processes(self) -> int:
        """R x S."""
        return self.replicas * self.shards

    @property
    def rows(self) -> tuple[int, int]:
        """The first latent that this process holds, and the one after its last."""
        return shard_rows(self.num_latents, self.shard, self.shards)

    def own_widths(self, widths: list[int]) -> list[int]:
        """How many of this process's latents are in each prefix of the whole dictionary."""
        start, stop = self.rows
        return [min(max(width, start), stop) - start for width in widths]

    def capacity(self, count: int, processes: int, factor: float | None = None) -> int:
        """Of `count` places over `processes`, those that one may fill before it sends everything."""
        factor = self.capacity_factor if factor is None else factor
        return min(count, math.ceil(count * factor / processes))


def shard_rows(num_latents: int, shard: int, shards: int) -> tuple[int, int]:
    """The first latent of a shard, and the one after its last; sizes differ by one at most."""
    return num_latents * shard // shards, num_latents * (shard + 1) // shards


def all_sum(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the processes of `group` (no gradient); of one process, a copy."""
    value = value.detach().clone()
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def gathered(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all processes of `group`, which are of one shape, stacked in the order of their ranks."""
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.stack(parts)


def cut_of_rows(values: Tensor, k: int, layout: Layout, factor: float | None = None) -> Tensor:
    """Which of a shard's candidates are among the `k` largest of their token over all shards.

    Of equal entries the lowest latent wins, as in one process. The host waits for the device once.

    Args:
        values (`Tensor` of shape `(N, K)`): The shard's own largest entries of each token: `k` of them or all that it
            has, in the order of latents.
        k (`int`): Places of a token.
        layout ([`Layout`]): Counts selections and fallbacks.
        factor (`float`, *optional*): Capacity factor; by default the layout's.

    Returns:
        `Tensor` of shape `(N, K)`, `bool`.
    """
    capacity = layout.capacity(k, layout.shards, factor)
    layout.selections += 1
    while True:
        sent = _largest(values, capacity)
        parts = gathered(sent, layout.shard_group)
        joined = parts.transpose(0, 1).flatten(1)
        cut = joined.topk(min(k, joined.shape[1]), sorted=False).values.amin(1, keepdim=True)
        # A shard whose every sent entry reaches the cut may have kept back another that does.
        full = (parts[..., -1] >= cut.T) & (parts[..., -1] > -torch.inf)
        if capacity == k or not bool(full.any()):
            break
        capacity = k
        layout.fallbacks += 1
    room = k - (joined > cut).sum(1, keepdim=True)
    before = (parts[: layout.shard] == cut).sum((0, 2))[:, None]
    equal = values == cut
    return (values > cut) | (equal & (equal.cumsum(1) + before <= room))


def cut_of_batch(values: Tensor, rows: Tensor, count: int, capacity: int, layout: Layout) -> Tensor | None:
    """Which of a process's candidates are positive and among the `count` largest of all processes.

    Of equal entries the first in the order of (replica, token, latent) wins, as in one process with the joined batch.
    The host waits for the device once.

    Args:
        values (`Tensor` of shape `(M,)`): The `capacity` largest entries of the process, or all that it has, sorted by
            token, then by latent.
        rows (`Tensor` of shape `(M,)`): Their tokens.
        count (`int`): Places of the joined batch.
        capacity (`int`): C; equal on all processes.
        layout ([`Layout`]): Whose processes these are.

    Returns:
        `Tensor` of shape `(M,)`, `bool`; `None` on all processes where one of them may have kept back a winner.
    """
    padding = values.new_full((capacity - len(values),), -torch.inf)
    parts = gathered(torch.cat([values, padding]), layout.group)
    joined = parts.flatten()
    cut = joined.topk(min(count, len(joined)), sorted=False).values.min()
    least = parts.amin(1)
    overflow = ((least >= cut) & (least > 0)).any() & (capacity < count)
    room, equal = count - (joined > cut).sum(), parts == cut
    crowded = (equal.sum() > room) & (cut > 0)
    overflow, crowded = torch.stack([overflow, crowded]).tolist()
    if overflow:
        return None
    if not crowded:
        return (values >= cut) & (values > 0)
    tokens = gathered(torch.cat([rows, rows.new_full((len(padding),), -1)]), layout.group)
    process = torch.arange(len(parts), device=values.device)[:, None].expand_as(parts)
    replica, shard = process // layout.shards, process % layout.shards
    key = (replica * (tokens.max() + 1) + tokens) * layout.shards + shard
    first = key[equal].argsort(stable=True)[: int(room)]
    wins = torch.zeros(int(equal.sum()), dtype=torch.bool, device=values.device)
    wins[first] = True
    chosen = (parts > cut).masked_scatter(equal, wins)
    return chosen[layout.replica * layout.shards + layout.shard, : len(values)] & (values > 0)


def _largest(values: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, descending, -inf where there are fewer."""
    best = values.topk(min(count, values.shape[1])).values
    return torch.nn.functional.pad(best, (0, count - best.shape[1]), value=-torch.inf)


@torch.no_grad()
def exchange_rows(tensor: Tensor, order: Tensor, layout: Layout, budget: int = 2**26) -> None:
    """Put the rows of a sharded tensor into a new order over all shards, in place.

    Args:
        tensor (`Tensor` of shape `(f, ...)`): This shard's rows.
        order (`Tensor` of shape `(F,)`): For each place in the whole dictionary, the latent that moves there; equal on
            all shards.
        layout ([`Layout`]): Whose shards these are.
        budget (`int`, *optional*): Entries that are under way at once in a process.
    """
    start, stop = layout.rows
    edges = torch.tensor([shard_rows(layout.num_latents, s, layout.shards)[0] for s in range(layout.shards)])
    home = torch.bucketize(order.cpu(), edges, right=True) - 1  # the shard that holds each latent now
    place = torch.bucketize(torch.arange(layout.num_latents), edges, right=True) - 1  # and the one that will
    leaving = home == layout.shard
    sent = (order.cpu()[leaving] - start).to(tensor.device)  # by their new places, so by destination
    arriving = home[start:stop]
    slots = arriving.argsort(stable=True).to(tensor.device)
    out_sizes = torch.bincount(place[leaving], minlength=layout.shards).tolist()
    in_sizes = torch.bincount(arriving, minlength=layout.shards).tolist()
    # Viewed as bytes of whole columns: gloo knows few types.
    columns = tensor.view(len(tensor), -1)
    step = max(1, budget // max(1, len(tensor)))
    for begin in range(0, columns.shape[1], step):
        part = columns[:, begin : begin + step]
        outgoing, incoming = part[sent].contiguous(), torch.empty_like(part, memory_format=torch.contiguous_format)
        dist.all_to_all_single(
            incoming.view(torch.uint8), outgoing.view(torch.uint8), in_sizes, out_sizes, group=layout.shard_group
        )
        part[slots] = incoming
