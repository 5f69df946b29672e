"""Experiment trackers: which there are, what each needs installed, and how a run is named and goes on in each.

Nothing heavy is imported before a tracker is opened: what is wrong is told while the fields are read.
"""

import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ...common.command import nearest


if TYPE_CHECKING:
    from accelerate import Accelerator


ALL = "all"
"""Every tracker that is installed."""

# The modules one of which an Accelerate tracker needs; the first is what pip installs, apart from the names below.
_MODULES = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


@dataclass
class TrackedRun:
    """A run as trackers see it.

    Args:
        project (`str`): What it is compared with others in.
        folder (`Path`): The run's; its name is the run's name.
        fields (`dict`): The run's config, flat.
        start (`int`): Optimizer steps already done.
        id (`str`): The same in all sessions of the run.
    """

    project: str
    folder: Path
    fields: Mapping[str, Any]
    start: int
    id: str

    @property
    def name(self) -> str:
        """Name of the run: that of its folder."""
        return self.folder.resolve().name


# What the class of each tracker is made with besides the project's name; `config` where it takes the fields itself.
_ARGUMENTS: dict[str, Callable[[TrackedRun], dict[str, Any]]] = {
    "aim": lambda run: {"run_name": run.name, "logging_dir": ".", "experiment": run.project},
    "clearml": lambda run: {"task_name": run.name},
    "dvclive": lambda run: {"dir": str(run.folder / "dvclive"), "resume": run.start > 0},
    "mlflow": lambda run: {"run_name": run.name},
    "swanlab": lambda run: {"experiment_name": run.name},
    # Events of steps that are done again, or of a run that was started over, are hidden.
    "tensorboard": lambda run: {
        "run_name": "tensorboard",
        "logging_dir": str(run.folder),
        "purge_step": run.start + 1,
    },
    "trackio": lambda run: {
        "name": run.name,
        "config": dict(run.fields),
        "resume": "allow" if run.start else "never",
        "embed": False,
    },
    "wandb": lambda run: {
        "name": run.name,
        "id": run.id,
        "config": dict(run.fields),
        **({"resume": "allow"} if run.start else {}),
    },
}


def check_names(names: Sequence[str]) -> None:
    """Raises `ValueError` for a tracker that Accelerate does not have."""
    known = {*_MODULES, ALL, *_registered()}
    for name in names:
        if name not in known:
            raise ValueError(f"Unknown tracker in `trackers`: {name!r}.{nearest(name, known)}")


def check_installed(names: Sequence[str]) -> None:
    """Raises `ValueError` for a tracker whose package is missing, with the command that installs it."""
    missing = [name for name in names if name in _MODULES and not _is_installed(name)]
    if missing:
        packages = " ".join(_MODULES[name][0].replace("_", "-") for name in missing)
        raise ValueError(
            f"`trackers` names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"`pip install {packages}`, or leave it out; metrics.jsonl has the same numbers."
        )


def check_access(names: Sequence[str]) -> None:
    """Raises `ValueError` where the tracker `wandb` has no key."""
    if "wandb" in names or (ALL in names and _is_installed("wandb")):
        import wandb

        try:
            wandb.login(verify=False)
        except Exception as error:  # wandb has errors of its own
            raise ValueError(
                f"The tracker wandb cannot be used: {error} Set WANDB_API_KEY or run `wandb login`; with "
                "WANDB_MODE=offline nothing is sent and no key is needed."
            ) from error


def open_trackers(accelerator: "Accelerator", names: Sequence[str], run: TrackedRun) -> None:
    """Start the trackers of a run on the main process, and show them its fields.

    Args:
        accelerator (`Accelerator`): Logs to them from now on.
        names (`Sequence[str]`): Of trackers.
        run ([`TrackedRun`]): What it is called, and where it goes on.

    Raises:
        `ValueError`: if one cannot be started.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if ALL in names:
        names = [*(name for name in names if name != ALL), *(name for name in _MODULES if _is_installed(name))]
    trackers = {}
    for name in dict.fromkeys(names):
        cls, arguments = LOGGER_TYPE_TO_CLASS[name], _ARGUMENTS.get(name, lambda _run: {})(run)
        if cls.requires_logging_directory:
            arguments.setdefault("logging_dir", str(run.folder))
        trackers[name] = cls(arguments.pop("run_name", run.project), **arguments)
    accelerator.log_with = list(trackers.values())
    try:
        accelerator.init_trackers(run.project)
        for name, tracker in trackers.items():
            _show_fields(accelerator, name, tracker, run)
    except Exception as error:  # each tracker has errors of its own
        raise ValueError(f"A tracker of {', '.join(trackers)} cannot be started: {error}") from error


def lasting_id(folder: Path, start: int) -> str:
    """The id under which trackers know a run: new where it starts, the same where it goes on.

    Args:
        folder (`Path`): The run's.
        start (`int`): Optimizer steps already done.
    """
    path = folder / "trackers.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["id"] if start else None
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    if known is None:
        known = uuid.uuid4().hex
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps({"id": known}) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    return known


def _show_fields(accelerator: "Accelerator", name: str, tracker: Any, run: TrackedRun) -> None:
    if name == "tensorboard":  # Accelerate would make a folder, and so a run to compare with, of each session's fields
        if accelerator.is_main_process:
            text = yaml.safe_dump(dict(run.fields), sort_keys=False)
            tracker.writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), run.start)
    elif "config" not in getattr(tracker, "init_kwargs", {}):
        tracker.store_init_configuration(dict(run.fields))


def _is_installed(name: str) -> bool:
    return any(importlib.util.find_spec(module) is not None for module in _MODULES[name])


def _registered() -> Sequence[str]:
    """Names that this program has given Accelerate itself."""
    tracking = sys.modules.get("accelerate.tracking")
    return [] if tracking is None else [str(name) for name in tracking.LOGGER_TYPE_TO_CLASS]
