"""The training run: one language model feeds several dictionaries, in one process or many."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from .building import build_learners
from .checkpoints import Checkpoint, Checkpoints
from .closing import Closing
from .config import RunConfig
from .feed import Feed
from .learner import Learner
from .metrics_log import MetricsLog
from .placement import place, processes_of, readers
from .provenance import Provenance
from .readiness import check_ready
from .setup import Harvest, open_harvest
from .trackers import check_access
from .watchdog import Watchdog


logger = get_logger(__name__)

# So many steps in a row without a usable batch mean that the data, not one token, is at fault.
_PATIENCE = 20
# Fields that may differ between an interrupted run and the one that goes on with it.
FREE_TO_CHANGE = {
    "resume",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "trackers",
    "project",
    "output_dir",
    "overlap",
    "latent_shards",
    "capacity_factor",
    "lm_processes",
}
# The same of an entry of `saes`: where it is trained changes nothing.
_PLACES = ("latent_shards", "processes", "device")


class Interrupted(Exception):
    """The run was asked to stop; a checkpoint has been saved."""

    on_all_processes = True


def train(config: RunConfig) -> list[dict[str, Any]]:
    """Run a training to its end: SAEs, metrics, table and plot in `config.output_dir`.

    Args:
        config ([`RunConfig`]): The run; see [`load_run_config`].

    Returns:
        `list[dict]`: For each hookpoint what [`report.evaluate`] gives.

    Raises:
        `ValueError`: for whatever does not fit, before anything is trained where that can be seen.
        [`Interrupted`]: after Ctrl-C, when the checkpoint is saved.
        [`LostProcess`]: where another process of the run has ended.
    """
    check_ready(config)
    accelerator = make_accelerator(config)
    with Watchdog(accelerator, Path(config.output_dir)) as watchdog:
        if accelerator.is_main_process:
            check_access(config.trackers)
        return Trainer(config, accelerator, watchdog.progress).run()


def make_accelerator(config: RunConfig) -> Accelerator:
    """The Accelerator of a run. Several processes without a GPU need `cpu=True`, or each trains on its own."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        project_dir=config.output_dir,
        cpu=several and not torch.cuda.is_available(),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # The others wait while the main process evaluates, which may take longer than the usual ten minutes.
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),
        ],
    )


class Trainer:
    """Holds a run's parts; [`train`] is the way in.

    Args:
        config ([`RunConfig`]): The run.
        accelerator (`Accelerator`, *optional*): Its processes.
        progress (`Callable[[int, str], None]`, *optional*): Told the steps done, and what comes next.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator | None = None,
        progress: Callable[[int, str], None] = lambda step, doing: None,
    ):
        self.config, self.progress = config, progress
        self.accelerator = accelerator = accelerator or make_accelerator(config)
        self.folder = Path(config.output_dir)
        self.provenance = Provenance(self.folder, config, accelerator)
        self._claim_folder()
        self.checkpoints = Checkpoints(self.folder, config.keep_checkpoints)
        found = self.checkpoints.load() if config.resume else None
        processes = accelerator.num_processes
        self.readers = readers(config, processes)
        self.streams = self._number_of_streams(found)
        parts = self.streams * config.gradient_accumulation_steps
        if config.batch_size % parts:
            raise ValueError(
                f"`batch_size` ({config.batch_size}) must be a multiple of streams of data x "
                f"gradient_accumulation_steps ({self.streams} x {config.gradient_accumulation_steps}); there is a "
                "stream for each process that runs the language model, or as many as `data_streams` says."
            )
        processes_of(config, processes, self.streams)  # what does not divide is said before anything is loaded
        self.rows = config.batch_size // parts  # of each stream in a micro-batch
        self.harvest: Harvest = open_harvest(config, accelerator, self.rows, self.streams)
        self.placements = place(config, self.harvest.hookpoints, processes, self.streams)
        self.learners: list[Learner] = build_learners(config, accelerator, self.harvest, self.placements)
        rank = accelerator.process_index
        self.streams_of_learners = [place.streams_of(rank) for place in self.placements if rank in place.ranks]
        self.feed = Feed(
            self.harvest.streams,
            self.placements,
            self.harvest.shapes,
            self.rows,
            accelerator.process_index,
            self.readers,
            accelerator.device,
            ahead=config.lm_processes is not None,
        )
        self.skipped = self._skipped_for_states = 0  # steps of the whole run that were left out
        self.start = 0 if found is None else self._resume(*found)

    def _claim_folder(self) -> None:
        """Write the run's YAML; go on only with a run of the same fields."""
        path, fields = self.folder / "run.yaml", self.config.to_dict()
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.config.resume and any(self.folder.glob("checkpoint-*")):
                before = (yaml.safe_load(path.read_text()) if path.exists() else None) or {}
                changed = [key for key in _differing(before, fields) if key not in FREE_TO_CHANGE]
                if changed:
                    raise ValueError(
                        f"{self.folder} holds an unfinished run that differs in {', '.join(changed)} (see {path}). "
                        "Give another `output_dir`, or start over with --resume false."
                    )
            temporary = path.with_suffix(".yaml.tmp")
            temporary.write_text(yaml.safe_dump(fields, sort_keys=False))
            temporary.replace(path)
        self.accelerator.wait_for_everyone()

    def _number_of_streams(self, found: tuple[int, Checkpoint] | None) -> int:
        """Readers of the data: those that the run began with, or as the fields say."""
        if found is not None:
            return found[1].tree("run")["streams"]
        return self.config.data_streams or self.readers

    def run(self) -> list[dict[str, Any]]:
        """Train from the newest checkpoint, or the start, to the end."""
        try:
            return self._run()
        finally:
            self.feed.close()

    def _run(self) -> list[dict[str, Any]]:
        accelerator, config, start = self.accelerator, self.config, self.start
        self.provenance.begin(start, self.harvest.model)
        log = MetricsLog(accelerator, self.folder, config, start)
        began, seen = time.monotonic(), 0
        bar = tqdm(
            total=config.steps * config.batch_size,
            initial=start * config.batch_size,
            unit="tok",
            unit_scale=True,
            desc="training",
            disable=not accelerator.is_main_process,
        )
        with _interrupt_flag() as stop:
            for step in range(start, config.steps):
                self._step(step)
                self.progress(step + 1, "training")
                seen += config.batch_size
                bar.update(config.batch_size)
                done = step + 1
                logs = done % config.log_every == 0 or done == config.steps
                skipped = self._look_for_skips() if logs or accelerator.device.type == "cpu" else False
                if logs and not skipped:
                    statistics = self._statistics(step)
                    first = next(iter(statistics.values()))
                    bar.set_postfix(
                        FVU=f"{first['fvu'][-1]:.3f}", L0=f"{first['l0']:.1f}", dead=f"{first['dead']:.1%}"
                    )
                    log.write(done, statistics, seen / (time.monotonic() - began), self.skipped)
                if self._any(stop.is_set()):
                    self._stop(done)
                if config.checkpoint_every and done % config.checkpoint_every == 0 and done < config.steps:
                    self._save(done)
        bar.close()
        self._tell_fallbacks()
        # Written before the end's work, so that whatever happens there costs no training.
        self._save(config.steps)
        self.progress(config.steps, "finishing")
        results = self._finish()
        log.write_results(config.steps, results)
        log.close()
        return results

    def _tell_fallbacks(self) -> None:
        """Say where shards often had more winners than they send at first: that costs a second exchange."""
        for learner in self.learners:
            layout = learner.layout
            if layout.fallbacks > 0.05 * layout.selections:
                logger.info(
                    f"{learner.name}: in {layout.fallbacks} of {layout.selections} selections a shard had more "
                    f"winners than `capacity_factor: {layout.capacity_factor:g}` foresees, and everything was sent. "
                    "Results are the same; a higher factor would be faster."
                )

    def _finish(self) -> list[dict[str, Any]]:
        closing = Closing(self.config, self.accelerator, self.harvest, self.placements, self.learners, self.provenance)
        return closing.run(self.feed, self.rows, self.folder, self.skipped)

    # One step

    def _step(self, step: int) -> None:
        """One optimizer step of every dictionary; what is not finite changes nothing."""
        for _ in range(self.config.gradient_accumulation_steps):
            self.feed.advance()
            with self.accelerator.accumulate(*(learner.objective for learner in self.learners)):
                for learner, streams in zip(self.learners, self.streams_of_learners, strict=True):
                    learner.accumulate(self.feed.rows(learner.hookpoint, streams), step)
        for learner in self.learners:
            learner.step(step)

    def _statistics(self, step: int) -> dict[str, dict[str, Any]]:
        """What each dictionary's last step told, in the main process; of dictionaries elsewhere too."""
        several = len(self.harvest.hookpoints) > 1
        found = {
            f"{learner.name}/{learner.hookpoint}" if several else learner.name: asdict(learner.statistics(step))
            for learner in self.learners
        }
        if all(0 in placement.ranks for placement in self.placements):
            return found
        told: list[Any] = [None] * self.accelerator.num_processes
        dist.all_gather_object(told, found)
        return {name: statistics for part in told for name, statistics in part.items()}

    def _look_for_skips(self) -> bool:
        """Warn of steps that were left out, and end a run that has only such; whether the last one was.

        The host waits for the device here, so on a GPU this is done when metrics are logged.
        """
        found = [learner.skipped() for learner in self.learners] or [(0, 0, 0)]
        states, gradients, in_a_row = (max(counts) for counts in zip(*found, strict=True))
        if any(len(placement.ranks) < self.accelerator.num_processes for placement in self.placements):
            counts = torch.tensor([states, gradients, in_a_row], device=self.accelerator.device)
            dist.all_reduce(counts, dist.ReduceOp.MAX)
            states, gradients, in_a_row = counts.tolist()
        if states + gradients > self.skipped:
            what = "hidden states" if states > self._skipped_for_states else "gradients"
            what += " with NaN or infinite values"
            self.skipped, self._skipped_for_states = states + gradients, states
            logger.warning(f"A step was skipped: {what} ({self.skipped} so far).")
            if in_a_row >= _PATIENCE:
                hookpoints = ", ".join(self.harvest.hookpoints)
                raise ValueError(
                    f"{in_a_row} steps in a row had {what} at {hookpoints}. The weights are unharmed and the last "
                    "checkpoint stands. Try `model_dtype: float32`, another hookpoint, or a lower `lr`."
                )
        return in_a_row > 0

    def _any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.accelerator.num_processes == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.accelerator.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return bool(tensor)

    # Checkpoints

    def _resume(self, step: int, checkpoint: Checkpoint) -> int:
        names = {self._name(learner): learner for learner in self.learners}
        for name, learner in names.items():
            rows = checkpoint.rows(name, *learner.layout.rows)
            learner.load_state_dict({"rows": rows, "shared": checkpoint.tree(name)})
        counts = [learner.skipped() for learner in self.learners] or [(0, 0, 0)]
        self.skipped, self._skipped_for_states = max(sum(count[:2]) for count in counts), max(c[0] for c in counts)
        self.feed.load_state_dict({number: checkpoint.tree(f"stream-{number}") for number in self.feed.streams})
        logger.info(f"Going on from step {step} of {self.config.steps} in {self.folder}.")
        return step

    def _save(self, step: int) -> Path:
        self.progress(step, "saving")
        trees: dict[str, Any] = {f"stream-{number}": state for number, state in self.feed.state_dict().items()}
        if self.accelerator.is_main_process:
            trees["run"] = {"streams": self.streams, "processes": self.accelerator.num_processes}
        rows = {}
        for learner in self.learners:
            if learner.layout.replica == 0:
                name, state = self._name(learner), learner.state_dict()
                rows[name] = learner.layout.rows[0], state["rows"]
                if learner.layout.shard == 0:
                    trees[name] = state["shared"]
        path = self.checkpoints.save(step, trees, rows)
        self.provenance.save(step, self.skipped)
        self.progress(step, "training")
        return path

    def _name(self, learner: Learner) -> str:
        """Of a dictionary's files in a checkpoint."""
        return f"{learner.name}@{learner.hookpoint}".replace("/", "_").replace(":", "-")

    def _stop(self, step: int) -> None:
        path = self._save(step)
        raise Interrupted(
            f"Stopped after step {step} of {self.config.steps}; saved {path}. Run the same command again to go on."
        )


def _differing(before: dict[str, Any], fields: dict[str, Any]) -> list[str]:
    """Fields of a run that are not what they were, whatever processes it runs on."""

    def essence(data: dict[str, Any], key: str) -> Any:
        value = data.get(key)
        if key != "saes" or not isinstance(value, list):
            return value
        return [{name: entry[name] for name in entry if name not in _PLACES} for entry in value]

    return [key for key in fields if essence(before, key) != essence(fields, key)]


@contextmanager
def _interrupt_flag():
    """An event that Ctrl-C or a termination request sets, so that the step at hand is finished first.

    A second Ctrl-C stops at once.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
