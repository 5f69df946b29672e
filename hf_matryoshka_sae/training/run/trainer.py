"""The training run: one language model feeds several dictionaries, in one process or many."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from ...activations.sentences import SENTENCE_EMBEDDING
from ...common.command import Interrupted
from ...common.distributed import gathered
from ..config.run import RunConfig, as_begun, calibration_tokens, check_ready
from ..config.trackers import check_access
from ..data.feed import Feed
from ..data.harvest import open_harvest
from ..data.placement import Processes
from ..data.text import sentence_rows
from ..sae.learner import Learner
from .building import build_learners
from .checkpoints import Checkpoint
from .closing import Closing, place_of
from .folder import RunFolder
from .memory import keep_freed_memory
from .metrics_log import MetricsLog
from .provenance import Provenance
from .watchdog import Watchdog


logger = get_logger(__name__)

# So many steps in a row without a usable batch mean that the data, not one token, is at fault.
_PATIENCE = 20


def train(config: RunConfig, states: Any = None, heldout: Any = None) -> list[dict[str, Any]]:
    """Run a training to its end: SAEs, metrics, table and plot in `config.output_dir`.

    By default the run's `model` reads its `dataset`. Where `states` are given, no language model is needed: what is
    trained on are these, `model` and `hookpoints` only name them, and what concerns text (`dataset`, `context_length`,
    `activation_cache` and so on) is not read. At the end FVU, L0 and dead latents are measured on held-out rows, and
    no language-model losses.

    Args:
        config ([`RunConfig`]): The run; see [`load_run_config`].
        states (*optional*): Hidden states: a tensor or array `(N, D)`, [`States`] where some rows are masked, a
            `datasets.Dataset` with a column of vectors, a mapping of such by hookpoint; an iterator over any of these,
            or a function that makes one; or a [`RowStream`], such as an [`ActivationStream`]. Tensors and data sets
            are read in a new order in each epoch, and an interrupted run goes on exactly; so it does with a function
            whose iterator gives the same again. An iterator itself cannot be rewound: a run over one does not go on.
        heldout (*optional*): The rows that dictionaries are evaluated on, like `states`, but no iterator. By default
            `eval_tokens` of the given rows, at most a tenth, which training then leaves out; of an iterator or a
            stream its first ones.

    Returns:
        `list[dict]`: For each hookpoint what [`report.evaluate`] gives.

    Raises:
        `ValueError`: for whatever does not fit, before anything is trained where that can be seen; where another run
            holds `config.output_dir`, at once.
        `OSError`: if `config.output_dir` cannot be written to, or the disk is full.
        [`Interrupted`]: after Ctrl-C, when the checkpoint is saved.
        [`LostProcess`]: where another process of the run has ended.
    """
    if states is None:
        check_ready(config)
        if heldout is not None:
            raise ValueError("`heldout` rows go with `states`; held-out text is the config's `eval_dataset`.")
        if SENTENCE_EMBEDDING in config.hookpoints:
            states, heldout = sentence_rows(config)
    config = as_begun(config)
    accelerator = make_accelerator(config)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with Watchdog(accelerator, Path(config.output_dir)) as watchdog, RunFolder(config, accelerator) as folder:
        if accelerator.is_main_process:
            check_access(config.trackers)
        return Trainer(config, accelerator, folder, watchdog.progress, states, heldout).run()


def make_accelerator(config: RunConfig) -> Accelerator:
    """The Accelerator of a run. Several processes without a GPU need `cpu=True`, or each trains on its own.

    Apple's GPUs are not used: sums are in float64, which they do not have.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        project_dir=config.output_dir,
        cpu=not torch.cuda.is_available() and (several or torch.backends.mps.is_available()),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # The others wait while the main process evaluates, which may take longer than the usual ten minutes.
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),
        ],
    )


class Trainer:
    """Holds a run's parts; [`train`] is the way in. Nothing is written before [`run`].

    Args:
        config ([`RunConfig`]): The run.
        accelerator (`Accelerator`, *optional*): Its processes.
        run_folder ([`RunFolder`], *optional*): Its folder, held.
        progress (`Callable[[int, str], None]`, *optional*): Told the steps done, and what comes next.
        states (`Any`, *optional*), heldout (`Any`, *optional*): As in [`train`].
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator | None = None,
        run_folder: RunFolder | None = None,
        progress: Callable[[int, str], None] = lambda _step, _doing: None,
        states: Any = None,
        heldout: Any = None,
    ) -> None:
        self.config, self.progress = config, progress
        self.accelerator = accelerator = accelerator or make_accelerator(config)
        self.run_folder = run_folder or RunFolder(config, accelerator)
        self.folder, self.checkpoints = self.run_folder.path, self.run_folder.checkpoints
        checkpoint = self.run_folder.open()
        self.provenance = Provenance(self.folder, config, accelerator, self.run_folder.run_id)
        rank, world = accelerator.process_index, accelerator.num_processes
        begun_with = None if checkpoint is None else checkpoint[1].tree("run")["streams"]
        self.processes = processes = Processes.of(config, rank, world, begun_with)
        self.harvest = harvest = open_harvest(config, accelerator, processes, states, heldout)
        self.placements = placements = processes.place(config, harvest.hookpoints)
        self.learners: list[Learner] = build_learners(config, accelerator, harvest, placements)
        self.streams_of_learners = [place.streams_of(rank) for place in placements if rank in place.ranks]
        ahead = config.lm_processes is not None
        micro_batches = config.steps * config.gradient_accumulation_steps
        self.feed = Feed(
            harvest.streams,
            placements,
            harvest.shapes,
            processes,
            accelerator.device,
            ahead,
            keep=-(-calibration_tokens(config) // (processes.streams * processes.rows)) * processes.rows,
            batches=micro_batches if any(spec.solves_thresholds for spec in config.saes) else 0,
        )
        self.skipped = self._skipped_for_states = 0  # steps of the whole run that were left out
        self.left_out = 0  # hidden states that are not finite
        self.last_saved: int | None = None  # steps done at the newest checkpoint
        self.start = 0 if checkpoint is None else self._resume(*checkpoint)

    def run(self) -> list[dict[str, Any]]:
        """Train from the newest checkpoint, or the start, to the end."""
        try:
            return self._run()
        finally:
            self.feed.close()

    def _run(self) -> list[dict[str, Any]]:
        accelerator, config, start = self.accelerator, self.config, self.start
        self.run_folder.claim(start, gathered([place_of(learner) for learner in self.learners]))
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
                if logs:
                    self._look_for_states_left_out()
                skipped = self._look_for_skips() if logs or accelerator.device.type == "cpu" else False
                if logs and not skipped:
                    statistics = self._statistics(step)
                    first = next(iter(statistics.values()))
                    bar.set_postfix(
                        FVU=f"{first['fvu'][-1]:.3f}", L0=f"{first['l0']:.1f}", dead=f"{first['dead']:.1%}"
                    )
                    log.write(done, statistics, seen / (time.monotonic() - began), self.skipped, self.left_out)
                if self._any(stop.is_set()):
                    self._stop(done)
                if config.checkpoint_every and done % config.checkpoint_every == 0 and done < config.steps:
                    self._save(done)
        bar.close()
        self._tell_fallbacks()
        # Written before the end's work, so that whatever happens there costs no training.
        self._save(config.steps)
        self.progress(config.steps, "finishing")
        results, warnings = self._finish()
        log.write_results(config.steps, results)
        log.close()
        for warning in warnings:  # the last lines, where they are seen
            logger.warning(warning)
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

    def _finish(self) -> tuple[list[dict[str, Any]], list[str]]:
        closing = Closing(self.config, self.accelerator, self.harvest, self.placements, self.learners, self.provenance)
        return closing.run(self.feed, self.folder, self.skipped)

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
        own = {
            f"{learner.name}/{learner.hookpoint}" if several else learner.name: asdict(learner.statistics(step))
            for learner in self.learners
        }
        if all(0 in placement.ranks for placement in self.placements):
            return own
        parts: list[Any] = [None] * self.accelerator.num_processes
        dist.all_gather_object(parts, own)
        return {name: statistics for part in parts for name, statistics in part.items()}

    def _look_for_skips(self) -> bool:
        """Warn of steps that were left out, and end a run that has only such; whether the last one was.

        The host waits for the device here, so on a GPU this is done when metrics are logged.
        """
        skipped = [learner.skipped() for learner in self.learners] or [(0, 0, 0)]
        states, gradients, in_a_row = (max(counts) for counts in zip(*skipped, strict=True))
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
                hookpoints, saved = ", ".join(self.harvest.hookpoints), "there is no checkpoint yet"
                remedy = "Try `model_dtype: float32`, another hookpoint, or a lower `lr`."
                if self.config.activation_cache is not None:
                    remedy += " An activation cache of an earlier version may hold such states: build it anew."
                if self.last_saved is not None:
                    saved = f"the checkpoint of step {self.last_saved} stands"
                raise ValueError(
                    f"{in_a_row} steps in a row had {what} at {hookpoints}. None of them changed the weights, and "
                    f"{saved}. {remedy}"
                )
        return in_a_row > 0

    def _look_for_states_left_out(self) -> None:
        """Warn, once, that hidden states are left out. All processes count together, so this is done at the logs."""
        before, self.left_out = self.left_out, self.feed.num_not_finite()
        if self.left_out and not before:
            logger.warning(
                f"Hidden states with NaN or infinite values are left out of training, {self.left_out} so far. "
                "metrics.jsonl counts them as `states_left_out`."
            )

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
        self.last_saved = step
        logger.info(f"Going on from step {step} of {self.config.steps} in {self.folder}.")
        return step

    def _save(self, step: int) -> Path:
        self.progress(step, "saving")
        trees: dict[str, Any] = {f"stream-{number}": state for number, state in self.feed.state_dict().items()}
        if self.accelerator.is_main_process:
            trees["run"] = {"streams": self.processes.streams, "processes": self.processes.world}
        rows = {}
        for learner in self.learners:
            if learner.layout.replica == 0:
                name, state = self._name(learner), learner.state_dict()
                rows[name] = learner.layout.rows[0], state["rows"]
                if learner.layout.shard == 0:
                    trees[name] = state["shared"]
        path = self.checkpoints.save(step, trees, rows)
        self.last_saved = step
        self._look_for_states_left_out()
        self.provenance.save(step, self.skipped, self.left_out)
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


@contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a termination request sets, so that the step at hand is finished first.

    A second Ctrl-C stops at once.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(_number: int, _frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
