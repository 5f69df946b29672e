"""Which processes train which dictionary: replicas that see different tokens, shards that hold different latents.

Everything here follows from the run's fields and the number of processes, so every process knows the place of all.
"""

import fnmatch
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh

from ...models.sharding import Layout
from ..config.run import RunConfig
from ..config.spec import SAESpec


@dataclass(frozen=True)
class Placement:
    """One dictionary of a run, and the processes that train it.

    Args:
        index (`int`): Place of its entry in `saes`.
        hookpoint (`str`): Where it reads.
        ranks (`tuple[int, ...]`): Its processes, ascending: replica by replica, the shards of each in order.
        shards (`int`): S.
        streams (`int`): Readers of the run, see [`Feed`].
    """

    index: int
    hookpoint: str
    ranks: tuple[int, ...]
    shards: int
    streams: int

    @property
    def replicas(self) -> int:
        """R."""
        return len(self.ranks) // self.shards

    def streams_of(self, rank: int) -> tuple[int, ...]:
        """The readers whose hidden states a process needs: those of its replica, in order."""
        replica, share = self.ranks.index(rank) // self.shards, self.streams // self.replicas
        return tuple(range(replica * share, (replica + 1) * share))


@dataclass(frozen=True)
class Processes:
    """The processes of a run and what each does; [`of`] works it out once, and everything else asks here.

    Args:
        rank (`int`), world (`int`): This process, and how many there are.
        readers (`int`): How many read hidden states (run the language model): the first ones.
        streams (`int`): Q, the independent streams of data, each read by one process.
        rows (`int`): Hidden states of each stream in a micro-batch.
        holders (`tuple[tuple[tuple[int, ...], int], ...]`): Of each entry of `saes` its processes, ascending, and its
            shards.
    """

    rank: int
    world: int
    readers: int
    streams: int
    rows: int
    holders: tuple[tuple[tuple[int, ...], int], ...]

    @classmethod
    def of(cls, config: RunConfig, rank: int = 0, world: int = 1, streams: int | None = None) -> "Processes":
        """Return the processes of a run.

        Args:
            config ([`RunConfig`]): The run.
            rank (`int`, *optional*, defaults to 0): Number of this process.
            world (`int`, *optional*, defaults to 1): Number of processes.
            streams (`int`, *optional*): Streams of text with which the run began; by default as its fields say.

        Raises:
            `ValueError`: if processes, shards, streams and batches do not divide, a process is not there, or none is
                left for the SAEs.
        """
        readers = world if config.lm_processes is None else config.lm_processes
        if config.lm_processes is not None and not 0 < readers < world:
            raise ValueError(
                f"`lm_processes: {readers}` of {world} processes: at least one must run the language model, and at "
                "least one hold SAEs."
            )
        streams = streams or config.data_streams or readers
        parts = streams * config.gradient_accumulation_steps
        if config.batch_size % parts:
            raise ValueError(
                f"`batch_size` ({config.batch_size}) must be a multiple of streams of data x "
                f"gradient_accumulation_steps ({streams} x {config.gradient_accumulation_steps}); there is a stream "
                "for each process that runs the language model, or as many as `data_streams` says."
            )
        all_holders = range(readers % world, world)
        holders = tuple(_holders(config, index, all_holders, world, streams) for index in range(len(config.saes)))
        return cls(rank, world, readers, streams, config.batch_size // parts, holders)

    @property
    def reads(self) -> bool:
        """Whether this process reads hidden states."""
        return self.rank < self.readers

    @property
    def own_streams(self) -> list[int]:
        """The streams that this process reads."""
        return [stream for stream in range(self.streams) if self.owner(stream) == self.rank]

    def owner(self, stream: int) -> int:
        """The process that reads a stream."""
        return stream * self.readers // self.streams

    def place(self, config: RunConfig, hookpoints: list[str]) -> list[Placement]:
        """The place of every dictionary of the run, at each of its resolved hookpoints."""
        return [
            Placement(index, name, ranks, shards, self.streams)
            for index, (ranks, shards) in enumerate(self.holders)
            for name in hookpoints_of(config.saes[index], hookpoints)
        ]


def _holders(config: RunConfig, index: int, holders: range, world: int, streams: int) -> tuple[tuple[int, ...], int]:
    """The processes, ascending, and the shards of an entry of `saes`."""
    spec, entry = config.saes[index], f"saes.{index}"
    ranks = sorted(set(holders if spec.processes is None else spec.processes))
    if not ranks or ranks[0] < 0 or ranks[-1] >= world:
        raise ValueError(f"`{entry}.processes` are {spec.processes}; the run has 0 to {world - 1}.")
    shards = config.latent_shards if spec.latent_shards is None else spec.latent_shards
    if shards < 1 or len(ranks) % shards:
        raise ValueError(
            f"`latent_shards: {shards}` must divide the number of processes that hold `{entry}`, {len(ranks)}. "
            "Start another number of processes, or shard differently."
        )
    if streams % (len(ranks) // shards):
        raise ValueError(
            f"{streams} streams of data cannot be shared evenly by the {len(ranks) // shards} replicas of `{entry}` "
            f"({len(ranks)} processes / {shards} shards). Set `data_streams` to a multiple of these."
        )
    if spec.grow_from is not None and shards > 1:
        raise ValueError(f"`{entry}` has `grow_from` and cannot be sharded: set its `latent_shards: 1`.")
    return tuple(ranks), shards


def hookpoints_of(spec: SAESpec, hookpoints: list[str]) -> list[str]:
    """Those of the run's hookpoints at which a dictionary is trained. Raises `ValueError` where there is none."""
    if spec.hookpoints is None:
        return hookpoints
    chosen = [name for name in hookpoints if any(fnmatch.fnmatchcase(name, pattern) for pattern in spec.hookpoints)]
    if not chosen:
        raise ValueError(f"`hookpoints` {spec.hookpoints} of an SAE are none of the run's: {', '.join(hookpoints)}.")
    return chosen


class Meshes:
    """The process groups of a run; every process makes all of them, in one order.

    Args:
        accelerator (`Accelerator`): Owns processes and devices.
        placements (`list[Placement]`): Of all dictionaries.
    """

    def __init__(self, accelerator: Accelerator, placements: list[Placement]) -> None:
        self.rank, world = accelerator.process_index, accelerator.num_processes
        self._groups: dict[tuple[tuple[int, ...], int], tuple] = {}
        for key in dict.fromkeys((placement.ranks, placement.shards) for placement in placements):
            self._groups[key] = self._make(*key, world, accelerator.device.type) if world > 1 else (None, None, None)

    def _make(self, ranks: tuple[int, ...], shards: int, world: int, device_type: str) -> tuple:
        everybody = len(ranks) == world
        if everybody and shards == 1:
            return dist.group.WORLD, None, dist.group.WORLD
        mesh = DeviceMesh(device_type, torch.tensor(ranks).view(-1, shards), mesh_dim_names=("replica", "latent"))
        group = dist.group.WORLD if everybody else dist.new_group(list(ranks))
        if self.rank not in ranks:
            return None, None, None
        replicas = len(ranks) // shards
        return (
            mesh.get_group("replica") if replicas > 1 else None,
            mesh.get_group("latent") if shards > 1 else None,
            group if len(ranks) > 1 else None,
        )

    def layout(self, placement: Placement, num_latents: int, capacity_factor: float) -> Layout:
        """This process's place among those of a dictionary."""
        replica, shard = divmod(placement.ranks.index(self.rank), placement.shards)
        groups = self._groups[placement.ranks, placement.shards]
        shape = replica, placement.replicas, shard, placement.shards
        return Layout(num_latents, *shape, *groups, capacity_factor)
