"""Hidden states of a run, whatever they come from, and what is known of them before training."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...activations import ActivationStatistics, RowStream, RowTable, StatesStream, estimate_statistics, target_of
from ...activations.states import ONE, is_table
from ...common import distributed
from ...evaluation import HeldOut
from ..config.run import RunConfig, eval_tokens, normalization_tokens, shuffle_tokens
from .placement import Processes
from .text import TextSource


logger = logging.getLogger(__name__)

_SAMPLE = 8192  # hidden states that initialisation looks at
_LARGEST_HELD_OUT = 1 / 10  # of the rows of a table


@dataclass
class HeldOutStates:
    """Held-out rows of one hookpoint, without a language model: FVU, L0 and dead latents can be measured, no losses.

    Args:
        table ([`RowTable`]): The rows, the same in every process; each process evaluates its share of them.
        hookpoint (`str`): Which of them.
        device (`torch.device`): Where they are evaluated.
    """

    table: RowTable
    hookpoint: str
    device: torch.device

    def activations(self) -> Iterator[Tensor]:
        """The rows of this process's share, `(n, D)` in float32."""
        for rows in self.table.batches(self.hookpoint, *distributed.processes()):
            rows = rows.to(self.device, torch.float32)
            yield rows[rows.isfinite().all(1)]


class Source(Protocol):
    """Where a run's hidden states come from: [`TextSource`], or [`GivenStates`]."""

    fills_buffers: bool
    """Whether the streams read for a while before they give their first rows."""

    @property
    def hookpoints(self) -> list[str]:
        """Where SAEs read."""
        ...

    @property
    def model(self) -> nn.Module | None:
        """The language model, where there is one."""
        ...

    def streams(self) -> dict[int, RowStream]:
        """Streams of training rows by hookpoint number."""
        ...

    def heldout(self, hookpoint: str) -> HeldOut | HeldOutStates:
        """Return what SAEs of a hookpoint are evaluated on."""
        ...


class GivenStates:
    """States that are handed to [`train`]: a table is read by all processes, anything else by one process each.

    Of a table some rows are held out, at most a tenth; of a stream its first batches.

    Args:
        states (`Any`): See [`train`].
        config ([`RunConfig`]), accelerator (`Accelerator`): The run and its processes.
        processes ([`Processes`]): What each does.
        heldout (`Any`, *optional*): Other rows to evaluate on, of which any can be read.

    Raises:
        `ValueError`: if the states do not fit the run.
    """

    fills_buffers = True
    model = None

    def __init__(
        self, states: Any, config: RunConfig, accelerator: Accelerator, processes: Processes, heldout: Any = None
    ) -> None:
        self.config, self.processes, self.device = config, processes, accelerator.device
        self._states, self._heldout = states, None
        if isinstance(states, RowStream):
            self.hookpoints = list(states.hookpoints)
        elif is_table(states):
            self._states = RowTable(states, config.hookpoints)
            self.hookpoints = self._states.hookpoints
            if heldout is None:
                count = min(eval_tokens(config), max(1, int(len(self._states) * _LARGEST_HELD_OUT)))
                self._states, self._heldout = self._states.split(count, config.seed)
        else:
            self.hookpoints = config.hookpoints or [ONE]
        if heldout is not None:
            self._heldout = RowTable(heldout, self.hookpoints)
        if config.hookpoints and set(config.hookpoints) != set(self.hookpoints):
            raise ValueError(f"`hookpoints` are {config.hookpoints}, but the states are of {self.hookpoints}.")
        if not isinstance(self._states, RowTable) and processes.streams != processes.world:
            raise ValueError(
                "Each process reads the one stream of states that it is given: leave `data_streams` and "
                "`lm_processes` out, or give a tensor or a data set."
            )
        if processes.world > 1 and self._heldout is None:
            raise ValueError("Streams of states in several processes need `heldout`, rows that all of them evaluate.")

    def streams(self) -> dict[int, RowStream]:
        """This process's readers by number."""
        return {number: self._stream(number) for number in self.processes.own_streams}

    def _stream(self, number: int) -> RowStream:
        config, processes, rows = self.config, self.processes, self.processes.rows
        if not isinstance(self._states, RowStream):
            stream: RowStream = StatesStream(
                self._states,
                self.hookpoints,
                rows,
                max(shuffle_tokens(config, processes.streams), 4 * rows),
                device=self.device,
                dtype=torch.float32 if self.device.type == "cpu" else None,
                seed=config.seed,
                rank=number,
                world_size=processes.streams,
            )
        else:
            stream = self._states
            if stream.batch_size != rows:
                raise ValueError(f"The stream's batches have {stream.batch_size} rows; this run needs {rows}.")
        if self._heldout is None:
            wanted = eval_tokens(config)
            batches = list(itertools.islice(stream, -(-wanted // rows)))
            given = sum(len(one[self.hookpoints[0]]) for one in batches)
            if given < wanted:
                raise ValueError(
                    f"The states end after {given:,} rows, and `eval_tokens` holds out the first {wanted:,}: give "
                    "more, lower it, or name `heldout`."
                )
            self._heldout = RowTable({name: torch.cat([one[name] for one in batches]) for name in self.hookpoints})
        return stream

    def heldout(self, hookpoint: str) -> HeldOutStates:
        """What dictionaries of a hookpoint are evaluated on at the end."""
        return HeldOutStates(self._heldout, hookpoint, self.device)


class Harvest:
    """A run's hidden states and what is measured of them. Streams are opened, and looked at, when first asked for.

    All processes ask for `shapes`, `statistics`, `sample` or `hookpoints` at the same time, the first time.

    Args:
        source ([`Source`]): Where they come from.
        config ([`RunConfig`]), accelerator (`Accelerator`): The run and its processes.
        processes ([`Processes`]): What each does.
    """

    def __init__(self, source: Source, config: RunConfig, accelerator: Accelerator, processes: Processes) -> None:
        self.source, self.config, self.accelerator, self.processes = source, config, accelerator, processes

    @cached_property
    def streams(self) -> dict[int, RowStream]:
        """This process's readers by number: endless shuffled batches of hidden states on the SAEs' device."""
        return self.source.streams()

    @property
    def shapes(self) -> dict[str, tuple[int, torch.dtype]]:
        """Width of each hookpoint, and the type of its rows."""
        return self._measured[0]

    @property
    def hookpoints(self) -> list[str]:
        """Resolved."""
        return list(self.shapes)

    @property
    def statistics(self) -> dict[str, ActivationStatistics]:
        """Of each hookpoint."""
        return self._measured[1]

    @property
    def sample(self) -> dict[str, Tensor]:
        """Some hidden states of each hookpoint, equal in all processes."""
        return self._measured[2]

    @property
    def model(self) -> nn.Module | None:
        """The language model, where this process runs one."""
        return self.source.model if self.processes.reads else None

    @cached_property
    def _measured(self) -> tuple[dict, dict, dict]:
        streams, accelerator, processes = self.streams, self.accelerator, self.processes
        sample: dict[str, list[Tensor]] = {}
        with self._reading_bar() as bar:
            for part in streams[0].peek(_SAMPLE, advance=bar.update) if 0 in streams else ():
                for name, states in part.items():
                    sample.setdefault(name, []).append(states)
            shapes, sample = _agree(sample, accelerator)
            if any(name == target_of(hookpoint) for name in shapes for hookpoint in shapes):
                raise ValueError(
                    "These states have targets other than what an SAE reads. They are read and mixed with their rows, "
                    "but no SAE of this version learns to give anything but its input: leave the targets out."
                )
            empty = [{name: torch.empty(0, width, device=accelerator.device) for name, (width, _) in shapes.items()}]
            each = -(-normalization_tokens(self.config) // processes.streams)
            peeked = itertools.chain(empty, *(one.peek(each, advance=bar.update) for one in streams.values()))
            statistics = estimate_statistics(peeked, each * processes.streams)
        for name, found in statistics.items():
            logger.info(
                f"{name}: d_in {len(found.mean)}, scale {found.scale:.4g}, largest |mean|/std of a dimension "
                f"{found.outlier_ratio:.3g}"
            )
        return shapes, statistics, sample

    def _reading_bar(self) -> tqdm:
        """A progress bar of the main process while shuffle buffers are filled for the first time."""
        return tqdm(
            total=sum(stream.buffer_tokens for stream in self.streams.values()),
            unit="tok",
            unit_scale=True,
            desc="first hidden states",
            disable=not self.accelerator.is_main_process or not self.source.fills_buffers,
            leave=False,
        )

    def heldout(self, hookpoint: str) -> HeldOut | HeldOutStates:
        """What the dictionaries of a hookpoint are evaluated on; the language model is loaded where it is not."""
        return self.source.heldout(hookpoint)

    def close(self) -> None:
        """End what the readers run in the background."""
        for stream in self.streams.values():
            stream.close()


def open_harvest(
    config: RunConfig, accelerator: Accelerator, processes: Processes, states: Any = None, heldout: Any = None
) -> Harvest:
    """A run's hidden states: of its text, or those that are given."""
    if states is None:
        source: Source = TextSource(config, accelerator, processes)
    else:
        source = GivenStates(states, config, accelerator, processes, heldout)
    return Harvest(source, config, accelerator, processes)


def _agree(sample: dict[str, list[Tensor]], accelerator: Accelerator) -> tuple[dict, dict[str, Tensor]]:
    """The widths and types of the first process's sample, and the sample itself, in all processes."""
    joined = {name: torch.cat(parts) for name, parts in sample.items()}
    shared = [{name: (len(rows), rows.shape[1], rows.dtype) for name, rows in joined.items()}]
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(shared, 0)
    for name, (count, width, _) in shared[0].items():
        rows = joined.get(name, torch.empty(count, width, device=accelerator.device)).float()
        joined[name] = broadcast(rows) if accelerator.num_processes > 1 else rows
    return {name: shape[1:] for name, shape in shared[0].items()}, {name: joined[name] for name in shared[0]}
