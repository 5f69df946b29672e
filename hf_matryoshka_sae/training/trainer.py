"""The training run: one language model feeds several dictionaries, in one process or many."""

import os
import signal
import threading
import time
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

from ..evaluation import HeldOut
from ..models import SAEModel
from .calibration import calibrate_threshold
from .checkpoints import Checkpoints
from .config import RunConfig
from .learner import Learner
from .metrics_log import MetricsLog
from .provenance import Provenance
from .report import evaluate, write_report
from .setup import Harvest, build_learners, open_harvest


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
    "output_dir",
    "overlap",
}


class Interrupted(Exception):
    """The run was asked to stop; a checkpoint has been saved."""


def train(config: RunConfig) -> list[dict[str, Any]]:
    """Run a training to its end: SAEs, metrics, table and plot in `config.output_dir`.

    Args:
        config ([`RunConfig`]): The run; see [`load_run_config`].

    Returns:
        `list[dict]`: For each hookpoint what [`report.evaluate`] gives.

    Raises:
        `ValueError`: for whatever does not fit, before anything is trained where that can be seen.
        [`Interrupted`]: after Ctrl-C, when the checkpoint is saved.
    """
    return Trainer(config).run()


def make_accelerator(config: RunConfig) -> Accelerator:
    """The Accelerator of a run. Several processes without a GPU need `cpu=True`, or each trains on its own."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.trackers or None,
        project_dir=config.output_dir,
        cpu=several and not torch.cuda.is_available(),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # The others wait while the main process evaluates, which may take longer than the usual ten minutes.
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),
        ],
    )


class Trainer:
    """Holds a run's parts; [`train`] is the way in."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.accelerator = accelerator = make_accelerator(config)
        self.folder = Path(config.output_dir)
        self.provenance = Provenance(self.folder, config, accelerator)
        self._claim_folder()
        parts = accelerator.num_processes * config.gradient_accumulation_steps
        if config.batch_size % parts:
            raise ValueError(
                f"`batch_size` ({config.batch_size}) must be a multiple of processes x gradient_accumulation_steps "
                f"({accelerator.num_processes} x {config.gradient_accumulation_steps})."
            )
        self.micro_batch = config.batch_size // parts
        self.harvest: Harvest = open_harvest(config, accelerator, self.micro_batch)
        self.learners: list[Learner] = build_learners(config, accelerator, self.harvest)
        self.checkpoints = Checkpoints(
            self.folder, config.keep_checkpoints, accelerator.process_index, accelerator.wait_for_everyone
        )
        self.skipped = self._skipped_for_states = 0  # steps of the whole run that were left out

    def _claim_folder(self) -> None:
        """Write the run's YAML; go on only with a run of the same fields."""
        path, fields = self.folder / "run.yaml", self.config.to_dict()
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.config.resume and any(self.folder.glob("checkpoint-*")):
                before = (yaml.safe_load(path.read_text()) if path.exists() else None) or {}
                changed = [key for key in fields if key not in FREE_TO_CHANGE and before.get(key) != fields[key]]
                if changed:
                    raise ValueError(
                        f"{self.folder} holds an unfinished run that differs in {', '.join(changed)} (see {path}). "
                        "Give another `output_dir`, or start over with --resume false."
                    )
            temporary = path.with_suffix(".yaml.tmp")
            temporary.write_text(yaml.safe_dump(fields, sort_keys=False))
            temporary.replace(path)
        self.accelerator.wait_for_everyone()

    def run(self) -> list[dict[str, Any]]:
        """Train from the newest checkpoint, or the start, to the end."""
        try:
            return self._run()
        finally:
            self.harvest.stream.close()

    def _run(self) -> list[dict[str, Any]]:
        accelerator, config = self.accelerator, self.config
        start = self._resume() if config.resume else 0
        self.provenance.begin(start, self.harvest.model)
        log = MetricsLog(accelerator, self.folder, config, start)
        stream = iter(self.harvest.stream)
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
                self._step(stream, step)
                seen += config.batch_size
                bar.update(config.batch_size)
                done = step + 1
                logs = done % config.log_every == 0 or done == config.steps
                skipped = self._look_for_skips() if logs or accelerator.device.type == "cpu" else False
                if logs and not skipped:
                    statistics = {learner.name: learner.statistics(step) for learner in self.learners}
                    first = next(iter(statistics.values()))
                    bar.set_postfix(FVU=f"{first.fvu[-1]:.3f}", L0=f"{first.l0:.1f}", dead=f"{first.dead:.1%}")
                    speed = seen / (time.monotonic() - began)
                    log.write(done, {name: asdict(value) for name, value in statistics.items()}, speed, self.skipped)
                if self._any(stop.is_set()):
                    self._stop(done)
                if config.checkpoint_every and done % config.checkpoint_every == 0 and done < config.steps:
                    self._save(done)
        bar.close()
        # Written before the end's work, so that whatever happens there costs no training.
        self._save(config.steps)
        results = self._finish(stream)
        log.close()
        return results

    # One step

    def _step(self, stream, step: int) -> None:
        """One optimizer step of every dictionary; what is not finite changes nothing."""
        batches = [next(stream) for _ in range(self.config.gradient_accumulation_steps)]
        for batch in batches:
            with self.accelerator.accumulate(*(learner.objective for learner in self.learners)):
                for learner in self.learners:
                    learner.accumulate(batch[learner.hookpoint], step)
        for learner in self.learners:
            learner.step(step)

    def _look_for_skips(self) -> bool:
        """Warn of steps that were left out, and end a run that has only such; whether the last one was.

        The host waits for the device here, so on a GPU this is done when metrics are logged.
        """
        found = [learner.skipped() for learner in self.learners]
        states, gradients, in_a_row = (max(counts) for counts in zip(*found, strict=True))
        if states + gradients > self.skipped:
            what = "hidden states" if states > self._skipped_for_states else "gradients"
            what += " with NaN or infinite values"
            self.skipped, self._skipped_for_states = states + gradients, states
            logger.warning(f"A step was skipped: {what} ({self.skipped} so far).")
            if in_a_row >= _PATIENCE:
                hookpoints = ", ".join(dict.fromkeys(learner.hookpoint for learner in self.learners))
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

    def _resume(self) -> int:
        found = self.checkpoints.load()
        if found is None:
            return 0
        step, shared, own = found
        if shared["processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"The checkpoint was written by {shared['processes']} processes, now there are "
                f"{self.accelerator.num_processes}. Start as many, or start over with --resume false."
            )
        for learner, state in zip(self.learners, shared["learners"], strict=True):
            learner.load_state_dict(state)
        counts = [learner.skipped() for learner in self.learners]
        self.skipped, self._skipped_for_states = max(sum(count[:2]) for count in counts), max(c[0] for c in counts)
        self.harvest.stream.load_state_dict(own["stream"])
        logger.info(f"Going on from step {step} of {self.config.steps} in {self.folder}.")
        return step

    def _save(self, step: int) -> Path:
        shared = {
            "processes": self.accelerator.num_processes,
            "learners": [learner.state_dict() for learner in self.learners],
        }
        path = self.checkpoints.save(step, shared, {"stream": self.harvest.stream.state_dict()})
        self.provenance.save(step, self.skipped)
        return path

    def _stop(self, step: int) -> None:
        path = self._save(step)
        raise Interrupted(
            f"Stopped after step {step} of {self.config.steps}; saved {path}. Run the same command again to go on."
        )

    # The end

    def _finish(self, stream) -> list[dict[str, Any]]:
        """Calibrate, fold, save, load back, evaluate."""
        calibration = self._calibration_batches(stream)
        self.harvest.stream.close()  # from here on the language model is the evaluation's
        for learner in self.learners:
            self._save_sae(learner, calibration)
        self.accelerator.wait_for_everyone()
        results, harvest = [], self.harvest
        for hookpoint in harvest.hookpoints:
            saes = {
                learner.name: self._load_sae(learner) for learner in self.learners if learner.hookpoint == hookpoint
            }
            if saes:
                data = HeldOut(harvest.model, harvest.heldout, hookpoint, harvest.mask_token_id)
                results.append(evaluate(data, saes))
        if self.accelerator.is_main_process:
            write_report(results, self.folder, self.accelerator)
        self.provenance.save(self.config.steps, self.skipped)
        self.accelerator.wait_for_everyone()
        return results

    def _calibration_batches(self, stream) -> list[dict[str, torch.Tensor]]:
        if not any(learner.sae.config.activation_name == "batch_topk" for learner in self.learners):
            return []
        tokens_each = -(-self.config.calibration_tokens // self.accelerator.num_processes)
        return [next(stream) for _ in range(max(1, -(-tokens_each // self.micro_batch)))]

    def _save_sae(self, learner: Learner, calibration: list[dict[str, torch.Tensor]]) -> None:
        sae: SAEModel = learner.finished()
        threshold, path = None, self._place(learner)
        if sae.config.activation_name == "batch_topk":
            batches = (
                (batch[learner.hookpoint].to(learner.mean).float() - learner.mean) / learner.scale
                for batch in calibration
            )
            threshold = calibrate_threshold(sae, batches, learner.k, learner.group)
        sae.fold_normalization_(learner.mean, learner.scale)
        if learner.base is not None:
            learner.base.restore(sae)
        if self.accelerator.is_main_process:
            sae.save_pretrained(path)
            tokens = len(calibration) * self.micro_batch * self.accelerator.num_processes
            self.provenance.add_sae(learner, path, threshold, tokens)

    def _place(self, learner: Learner) -> Path:
        return self.folder / learner.name / learner.hookpoint.replace(":", "-")

    def _load_sae(self, learner: Learner) -> SAEModel:
        return type(learner.sae).from_pretrained(self._place(learner)).to(next(self.harvest.model.parameters()).device)


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
