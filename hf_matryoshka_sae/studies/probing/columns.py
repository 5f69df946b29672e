"""Activations on many examples, sorted by latent, for probes on single latents.

While batches come in, each process keeps its (example, latent, value) triples: 12 bytes each. `gather` then gives each
process all examples of every world-size-th latent, so that fitting needs no communication, and sorts them by latent
and by example, so that sums do not depend on the order of the batches or on the number of processes.

Shapes: N examples, F latents, M triples.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...common.distributed import processes, reduce_sum


@dataclass
class LatentColumns:
    """Activations as a sparse matrix of N examples by F latents, stored by latent.

    Args:
        rows (`Tensor` of shape `(M,)`): Example of each activation, ascending within a latent; int64.
        values (`Tensor` of shape `(M,)`): Activations that are not 0.
        offsets (`Tensor` of shape `(F + 1,)`): Index of each latent's first activation; int64.
        num_rows (`int`): Number N of examples.
    """

    rows: Tensor
    values: Tensor
    offsets: Tensor
    num_rows: int

    @classmethod
    def of_pairs(cls, rows: Tensor, cols: Tensor, values: Tensor, num_rows: int, num_latents: int) -> "LatentColumns":
        """Sort (example, latent, value) triples `(M,)` in any order; each pair may occur at most once."""
        order = (cols.long() * num_rows + rows.long()).argsort()
        counts = torch.bincount(cols.long(), minlength=num_latents)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(rows[order].long(), values[order], offsets, num_rows)

    @classmethod
    def of_dense(cls, x: Tensor) -> "LatentColumns":
        """Take the nonzero entries of a matrix `(N, F)`."""
        cols, rows = x.T.nonzero(as_tuple=True)
        counts = torch.bincount(cols, minlength=x.shape[1])
        return cls(rows, x[rows, cols], torch.cat([counts.new_zeros(1), counts.cumsum(0)]), len(x))

    @property
    def num_latents(self) -> int:
        """Number of latents F."""
        return len(self.offsets) - 1

    @property
    def cols(self) -> Tensor:
        """Latent of each activation, `(M,)`."""
        return torch.repeat_interleave(torch.arange(self.num_latents), self.offsets.diff())

    def select(self, latents: Tensor) -> "LatentColumns":
        """Return the columns of some latents, in this order."""
        lengths = self.offsets.diff()[latents]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        # All activations of a latent move by the same distance.
        shift = torch.repeat_interleave(self.offsets[latents] - offsets[:-1], lengths)
        places = torch.arange(len(shift)) + shift
        return LatentColumns(self.rows[places], self.values[places], offsets, self.num_rows)

    def among(self, chosen: Tensor) -> "LatentColumns":
        """Return the activations of the chosen examples, `(N,)` bool; examples keep their numbers."""
        inside = chosen[self.rows]
        before = torch.cat([inside.new_zeros(1, dtype=torch.int64), inside.cumsum(0)])
        return LatentColumns(self.rows[inside], self.values[inside], before[self.offsets], self.num_rows)

    def dense(self, latents: Tensor) -> Tensor:
        """Return the activations of a few latents, `(N, len(latents))`."""
        chosen = self.select(latents)
        x = self.values.new_zeros(self.num_rows, len(latents))
        x[chosen.rows, chosen.cols] = chosen.values
        return x

    def sums(self, per_row: Tensor) -> Tensor:
        """Return `out[i] = sum over n of a_n,i * per_row[n]`, `(F, T)` in float64 from `(N, T)`."""
        return torch.nn.functional.embedding_bag(
            self.rows,
            per_row.double(),
            self.offsets,
            mode="sum",
            per_sample_weights=self.values.double(),
            include_last_offset=True,
        )


class PairCollector:
    """The (example, latent, value) triples of this process's batches, up to a bound.

    Args:
        num_latents (`int`): Number of latents F.
        max_pairs (`int`): Largest number of triples; once there are more, they are only counted.
    """

    def __init__(self, num_latents: int, max_pairs: int) -> None:
        self.num_latents, self.max_pairs, self.count = num_latents, max_pairs, 0
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, rows: Tensor, cols: Tensor, values: Tensor) -> None:
        """Add the triples of a batch; those of value 0 are dropped."""
        if not values.isfinite().all():
            raise ValueError("The SAE's latents are not finite: check its weights, or load it in float32.")
        fires = values != 0
        self.count += int(fires.sum())
        if self.count <= self.max_pairs:
            part = (rows[fires].int(), cols[fires].int(), values[fires].float())
            self._parts.append(tuple(tensor.cpu() for tensor in part))
        else:
            self._parts = []

    def gather(self, num_rows: int) -> LatentColumns:
        """Return all examples of this process's latents, those of number `rank` modulo the number of processes.

        Args:
            num_rows (`int`): Number N of examples.

        Raises:
            `ValueError`: in every process, if one of them had more triples than `max_pairs`.
        """
        rank, world = processes()
        sizes = torch.zeros(world, dtype=torch.int64)
        sizes[rank] = self.count
        reduce_sum(sizes)
        if sizes.max() > self.max_pairs:
            raise ValueError(
                f"Probes would keep {int(sizes.max()):,} activations of a dictionary in one process, and its share of "
                f"`max_pairs` is {self.max_pairs:,}. Give fewer examples or dictionaries, use more processes, or "
                "raise `max_pairs` (12 bytes each, five times that while they are fitted)."
            )
        none = (torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32), torch.empty(0))
        triples = tuple(torch.cat(parts) for parts in zip(none, *self._parts, strict=True))
        self._parts = []
        if world > 1:
            triples = _own(triples, sizes.tolist(), rank, world)
        return LatentColumns.of_pairs(*triples, num_rows, self.num_latents)


def own_latents(num_latents: int) -> Tensor:
    """Return the latents whose columns this process holds."""
    rank, world = processes()
    return torch.arange(rank, num_latents, world)


def _own(triples: tuple[Tensor, ...], sizes: list[int], rank: int, world: int) -> tuple[Tensor, ...]:
    """Return the triples of this process's latents from all processes, which broadcast theirs in turn."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    parts_of_sources = []
    for source, size in enumerate(sizes):
        of_source = [own if source == rank else own.new_empty(size) for own in triples]
        of_source = [tensor.to(device) for tensor in of_source]
        for tensor in of_source:
            dist.broadcast(tensor, source)
        mine = of_source[1] % world == rank
        parts_of_sources.append([tensor[mine].cpu() for tensor in of_source])
    return tuple(torch.cat(parts) for parts in zip(*parts_of_sources, strict=True))
