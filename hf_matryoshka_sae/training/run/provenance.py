"""How a run's weights came to be: `provenance.json` in its folder, for its card and for whoever asks later.

Beside `run.yaml`, which says what was asked for: the command, versions, hardware, the time of every session of a
resumed run, and for each SAE the normalisation folded into it and the threshold that was solved for.
"""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ...activations.language_model import EMBEDDED
from ...common.files import write_json
from ...models.digests import folder_digest
from ..config.run import RunConfig
from ..sae.learner import Learner


PROVENANCE_FILE = "provenance.json"

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "safetensors")
_SECRET = re.compile(r"\bhf_(?!matryoshka)[A-Za-z0-9]{6,}|\b(api_org|ghp|github_pat)_\w{8,}|(?<=://)[^/@\s]+(?=@)")
_SECRET_FLAG = re.compile(r"-{1,2}[\w.-]*(token|password|secret|api_?key)$", re.IGNORECASE)
_ROOT = r"(?:~|[A-Za-z]:)?[/\\]"
_ABSOLUTE = re.compile(rf"^{_ROOT}.+$|(?<![\w.:/~-]){_ROOT}[^\s'\",=]+")


class Provenance:
    """Keeps `provenance.json` of a run up to date; the main process writes it, at checkpoints and at the end.

    The seconds of a session that was killed count up to its last checkpoint: what came after was done again.

    Args:
        folder (`Path`): The run's folder.
        config ([`RunConfig`]): The run.
        accelerator (`Accelerator`): Its devices and processes are written down.
        run_id (`str`): Of the run, however often it was interrupted.
    """

    def __init__(self, folder: Path, config: RunConfig, accelerator: Accelerator, run_id: str) -> None:
        self.path, self.config, self.accelerator = folder / PROVENANCE_FILE, config, accelerator
        self.run_id = run_id
        self.began = time.monotonic()
        self.record: dict[str, Any] = {}

    def begin(self, step: int, model: nn.Module | None) -> None:
        """Open a session at a step: the first of a run, or one that goes on with what is on record.

        The run's id is on the disk from here on, before its first checkpoint is.
        """
        config = self.config
        before = read_provenance(self.path.parent) if step else {}
        session = {
            "command": typed_command(),
            "from_step": step,
            "to_step": step,
            "seconds": 0.0,
            "versions": versions(),
            "hardware": hardware(self.accelerator),
        }
        local = {"model": config.model, "init_from": config.init_from}
        texts = {"dataset": config.dataset, "eval_dataset": config.eval_dataset}
        local |= {name: text.path for name, text in texts.items() if text is not None}
        for i, spec in enumerate(config.saes):
            local |= {f"saes.{i}.init_from": spec.init_from, f"saes.{i}.grow_from": spec.grow_from}
        self.record = {
            "format": 1,
            "run_id": self.run_id,
            "sessions": [*before.get("sessions", []), session],
            "language_model": {} if model is None else describe_model(model),  # the main process has one
            "on_this_machine": sorted(name for name, path in local.items() if _is_here(path)),
            "saes": before.get("saes", {}),
        }
        if before.get("run_id") != self.run_id:
            self.save(step, 0, 0)

    def add_sae(self, folder: Path, description: dict[str, Any]) -> None:
        """Write down what [`describe_sae`] told of a saved SAE."""
        self.record["saes"][folder.relative_to(self.path.parent).as_posix()] = description

    def save(self, step: int, skipped: int, left_out: int, warnings: Sequence[str] = ()) -> None:
        """Write the file whole, with the time so far.

        Args:
            step (`int`): Steps done.
            skipped (`int`): Steps that were left out.
            left_out (`int`): Hidden states that were left out because they are not finite.
            warnings (`Sequence[str]`, *optional*): What the user was told at the end.
        """
        self.record["sessions"][-1] |= {"to_step": step, "seconds": round(time.monotonic() - self.began, 1)}
        self.record |= {"tokens": step * self.config.batch_size, "skipped_steps": skipped, "states_left_out": left_out}
        self.record["warnings"] = list(warnings)
        if self.accelerator.is_main_process:
            write_json(self.path, self.record)


def describe_sae(
    learner: Learner, folder: Path, solved: dict[str, float], l0: float | None, tokens: int
) -> dict[str, Any]:
    """What was folded into a saved SAE.

    Args:
        learner ([`Learner`]): Trained it.
        folder (`Path`): Where it was saved.
        solved (`dict[str, float]`): The `threshold` or `threshold_shift` that was solved for, in normalised units.
        l0 (`float`, *optional*): Latents per token that it was solved for.
        tokens (`int`): That it was solved for on.
    """
    description: dict[str, Any] = {
        "hookpoint": learner.hookpoint,
        "input_scaling": learner.spec.input_scaling,
        "mean_norm": float(learner.mean.norm()),
        "scale": float(learner.scale),
        "weights": folder_digest(folder),
    }
    if solved:
        description["calibration"] = {
            **{name: value * float(learner.scale) for name, value in solved.items()},  # in the units of the saved SAE
            "l0": float(l0),
            "tokens": tokens,
            "from_latent": learner.fixed,  # a frozen base keeps its own
        }
    return description


def _is_here(path: str | None) -> bool:
    return path is not None and path != EMBEDDED and Path(path).expanduser().exists()


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """What a run's `provenance.json` says; empty where it has none, or a damaged one."""
    try:
        record = json.loads((Path(folder) / PROVENANCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Class and size of a language model."""
    config = getattr(model, "config", None)
    sizes = {"layers": "num_hidden_layers", "hidden_size": "hidden_size", "vocab_size": "vocab_size"}
    known = {name: getattr(config, field, None) for name, field in sizes.items()}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"class": type(model).__name__, "parameters": parameters, **{k: v for k, v in known.items() if v}}


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries under it."""
    from ... import __version__

    own = {"python": platform.python_version(), "hf_matryoshka_sae": __version__}
    return own | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def hardware(accelerator: Accelerator) -> dict[str, Any]:
    """What the run was computed on, as seen by the main process."""
    device = accelerator.device
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": device.type,
        "name": name,
        "processes": accelerator.num_processes,
        "cpu_cores": cores,
        "torch_threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def typed_command(arguments: Sequence[str] | None = None) -> str | None:
    """The command line of this process, without secrets and without places of this machine.

    Args:
        arguments (`Sequence[str]`, *optional*): `sys.orig_argv` by default.

    Returns:
        `str`, or `None` where no script or module was started (code given with `-c`, a notebook).
    """
    words = list(sys.orig_argv if arguments is None else arguments)
    if len(words) < 2 or "-c" in words[:4] or "-" in words[1:2] or "ipykernel" in " ".join(words):
        return None
    program = Path(words[0]).name.removesuffix(".exe")
    words = ["python" if re.fullmatch(r"python[\d.]*", program) else program, *words[1:]]
    script = Path(words[1])
    if words[0] == "python" and script.parent.name in ("bin", "Scripts"):
        words = [script.name.removesuffix(".exe"), *words[2:]]  # a command that pip installed
    return shlex.join(_shown(before, word) for before, word in zip(["", *words], words, strict=False))


def _shown(before: str, word: str) -> str:
    """An argument as it may be read by anyone."""
    if _SECRET_FLAG.fullmatch(before):
        return "***"
    flag, equals, value = word.partition("=")
    if equals and _SECRET_FLAG.fullmatch(flag):
        return f"{flag}=***"
    return without_secrets(f"{without_places(flag)}{equals}{without_places(value)}")


def without_secrets(text: str) -> str:
    """Text with whatever looks like an access token, or a name in an address, as `***`."""
    return _SECRET.sub("***", text)


def without_places(text: str) -> str:
    """Text with its absolute paths cut to their last part: the rest says where on this machine, which nobody needs."""
    return _ABSOLUTE.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], text)
