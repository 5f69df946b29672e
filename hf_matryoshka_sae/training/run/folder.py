"""A run's folder: whose run is in it, what of it a run goes on from, what is moved aside where one starts over."""

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from ...activations.language_model import EMBEDDED
from ...common.data_source import DatasetConfig, local_files
from ...common.files import write_text
from ...models.places import is_collection
from ..config.fields import read_yaml
from ..config.run import RunConfig
from ..config.spec import SAESpec
from .checkpoints import FORMAT_VERSION, Checkpoint, Checkpoints, read_manifest
from .lock import RunLock, in_main_process
from .provenance import PROVENANCE_FILE, read_provenance


logger = logging.getLogger(__name__)

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
_RUN_FILE = "run.yaml"
# What tells of an earlier run's SAEs, and would be overwritten or be wrong of another run's.
_RECORDS = (
    _RUN_FILE,
    PROVENANCE_FILE,
    "metrics.jsonl",
    "results.json",
    "results.png",
    "evaluation.json",
    "evaluation.png",
    "measured.json",
    "evaluation_suite",
)


class RunFolder:
    """A run's folder, held by its lock for the time of a `with` block. Every process calls the same methods.

    Args:
        config ([`RunConfig`]), accelerator (`Accelerator`): The run and its processes.

    Raises:
        `ValueError`: on entering, if another run holds the folder.
        `OSError`: on entering, if the folder cannot be written to.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.path = config, accelerator, Path(config.output_dir)
        self.lock = RunLock(self.path)
        self.checkpoints = Checkpoints(self.path, config.keep_checkpoints)
        self.run_id = ""
        self._others: list[Path] = []  # checkpoints of other runs

    def __enter__(self) -> "RunFolder":
        in_main_process(self.accelerator, self._hold)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        self.lock.release()

    def _hold(self) -> None:
        self.lock.acquire()
        if self.lock.held:  # whoever left these is dead
            for litter in [*self.path.glob(".checkpoint-*.tmp"), *self.path.glob("*/*/.saving-*")]:
                if litter.is_dir() and not litter.is_symlink():
                    shutil.rmtree(litter, ignore_errors=True)

    def open(self) -> tuple[int, Checkpoint] | None:
        """Step and content of the checkpoint to go on from, `None` for a run that starts; changes nothing.

        Raises:
            `ValueError`: if the folder holds another run's checkpoints.
        """
        known, new, candidates = in_main_process(self.accelerator, self._survey)
        checkpoint = self.checkpoints.load(candidates) if candidates else None
        if checkpoint is not None:
            in_main_process(self.accelerator, lambda: self._check_seed(checkpoint[1]))
        self.run_id = new if checkpoint is None or known is None else known
        self.checkpoints.about = {"run_id": self.run_id, "fields": self.config.to_dict()}
        return checkpoint

    def _survey(self) -> tuple[str | None, str, list[tuple[int, Path]]]:
        """The id of the run that is here, one for a new run, and the checkpoints that may be gone on from."""
        new, manifests = secrets.token_hex(8), {}
        if not self.config.resume:
            return None, new, []
        self.checkpoints.restore()
        steps = {path: step for step, path in self.checkpoints.all()}
        for path in steps:
            try:
                manifests[path] = read_manifest(path)
            except (OSError, ValueError):
                manifests[path] = {}  # broken; loading says how
        ids = [manifest["run_id"] for manifest in manifests.values() if manifest.get("run_id")]
        run_id = read_provenance(self.path).get("run_id") or (ids[-1] if ids else None)
        # Those of earlier versions have no id.
        own = [path for path, manifest in manifests.items() if manifest.get("run_id") in (None, run_id)]
        self._others = [path for path in manifests if path not in own]
        if self._others and not any(manifests[path] for path in own):
            raise ValueError(
                f"{self._others[-1]} is of another run than the one in {self.path / PROVENANCE_FILE}. Move it "
                "away, give another `output_dir`, or start over with --resume false, which moves aside what is there."
            )
        for path in reversed(own):
            self._check(steps[path], path, manifests[path])
        return run_id, new, [(steps[path], path) for path in own]

    def _check(self, step: int, path: Path, manifest: dict[str, Any]) -> None:
        """Raise `ValueError` where a checkpoint is not of a run of these fields, or of a version to come."""
        version = manifest.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format_version {version!r}; this version of hf_matryoshka_sae reads {FORMAT_VERSION}. "
                "Update the package."
            )
        record = self.path / _RUN_FILE
        before = manifest.get("fields") or (read_yaml(record) if record.exists() else {})
        fields = json.loads(json.dumps(self.config.to_dict()))
        changed = [key for key in differing(before, fields) if key not in FREE_TO_CHANGE]
        if not changed:
            return
        _check_places(self.config, changed)
        kind = "a finished" if self._is_finished(step, before) else "an unfinished"
        changes = ", ".join(_change(key, before, fields) for key in changed)
        raise ValueError(
            f"{self.path} holds {kind} run that differs in {changes} (see {record}). Give another `output_dir`, or "
            "start over with --resume false, which moves aside what is there."
        )

    def _check_seed(self, checkpoint: Checkpoint) -> None:
        """Raise `ValueError` for weights of another seed: an earlier version could leave such in a run's folder.

        Its manifests hold no fields, but the generator of the shuffle buffer knows what it was seeded with.
        """
        if "fields" in read_manifest(checkpoint.path):
            return
        generator = torch.Generator()
        try:
            generator.set_state(checkpoint.tree("stream-0")["stream"]["buffer"]["generator"])
        except (OSError, KeyError):  # a reader of a cache has none
            return
        if generator.initial_seed() != self.config.seed:
            raise ValueError(
                f"{checkpoint.path} was made with seed {generator.initial_seed()}, not {self.config.seed} as "
                f"{self.path / _RUN_FILE} says: it is of an earlier run. Give another `output_dir`, or start over "
                "with --resume false, which moves aside what is there."
            )

    def _is_finished(self, step: int, fields: dict[str, Any]) -> bool:
        try:
            steps = fields["tokens"] // fields["batch_size"]
        except (KeyError, TypeError, ZeroDivisionError):
            return False
        return step >= steps and (self.path / "results.json").is_file()

    def claim(self, start: int, places: Sequence[str]) -> None:
        """Make the folder this run's. Called when everything is open and the first step comes.

        A run that starts moves aside whatever an earlier one has saved here.

        Args:
            start (`int`): Steps already done.
            places (`Sequence[str]`): Where in the folder this run will save SAEs.
        """
        in_main_process(self.accelerator, lambda: self._claim(start, places))

    def _claim(self, start: int, places: Sequence[str]) -> None:
        move_aside(self.path, self._others if start else self._earlier(places))
        write_text(self.path / _RUN_FILE, yaml.safe_dump(self.config.to_dict(), sort_keys=False))

    def _earlier(self, places: Sequence[str]) -> list[Path]:
        """What an earlier run left; nothing where it has not come to anything that is worth keeping."""
        self.checkpoints.restore()
        saes = read_provenance(self.path).get("saes")
        others = [place for place in (saes if isinstance(saes, dict) else ()) if not self._begins_with(place)]
        saved = [path for _, path in self.checkpoints.all()]
        for place in sorted(map(Path, {*others, *places})):
            inside = not place.is_absolute() and ".." not in place.parts
            if inside and (self.path / place / "config.json").is_file():
                saved.append(self.path / place)
        records = [path for path in (self.path / name for name in _RECORDS) if path.exists()]
        if is_collection(self.path):
            records.append(self.path / "config.json")  # the index of its SAEs
        # A run that was killed before its first checkpoint only leaves a log; who asks to start over may want it.
        worth = {"results.json"} if self.config.resume else {"results.json", "metrics.jsonl"}
        return saved + records if saved or worth & {path.name for path in records} else []

    def _begins_with(self, place: str) -> bool:
        """Whether this run goes on from, or grows, a saved SAE in its own folder."""
        named = [spec.init_from or spec.grow_from or self.config.init_from for spec in self.config.saes]
        saved = (self.path / place).resolve()
        return any(source and saved.is_relative_to(Path(source).expanduser().resolve()) for source in named)


def move_aside(folder: Path, paths: Iterable[Path]) -> Path | None:
    """Move files and folders of a run to a new `before-<time>` in its folder, and say so; they are a whole run there.

    Args:
        folder (`Path`): The run's.
        paths (`Iterable[Path]`): In it.

    Returns:
        `Path`: Where they are now; `None` of none.
    """
    paths, name, number = list(paths), time.strftime("before-%Y%m%d-%H%M%S"), 1
    if not paths:
        return None
    while (aside := folder / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    for path in paths:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
        if path.parent != folder:
            with contextlib.suppress(OSError):  # an SAE's folder that holds more
                path.parent.rmdir()
    checkpoints = sum(path.name.startswith("checkpoint-") for path in paths)
    logger.warning(
        f"What an earlier run had saved in {folder} is in {aside} now ({checkpoints} checkpoints, "
        f"{len(paths) - checkpoints} other files and folders). Delete it when you do not need it."
    )
    return aside


def differing(before: dict[str, Any], fields: dict[str, Any]) -> list[str]:
    """Fields of a run that are not what they were, whatever processes it runs on.

    Args:
        before (`dict`): Fields of [`RunConfig.to_dict`] before. A field that is missing, because the version that
            wrote them did not know it, has its default.
        fields (`dict`): Fields of [`RunConfig.to_dict`] now.
    """
    entry, text = _defaults(SAESpec), _defaults(DatasetConfig)

    def essence(data: dict[str, Any], key: str) -> Any:
        value = data.get(key)
        if key in ("dataset", "eval_dataset") and isinstance(value, dict):
            return text | value
        if key != "saes" or not isinstance(value, list):
            return value
        return [{k: v for k, v in (entry | one).items() if k not in _PLACES} for one in value]

    before = _defaults(RunConfig) | before
    return [key for key in fields if essence(before, key) != essence(fields, key)]


def _defaults(cls: type) -> dict[str, Any]:
    """The values of a dataclass's fields that have a default."""
    values = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return values


def _change(key: str, before: dict[str, Any], fields: dict[str, Any]) -> str:
    """A field that differs, with both values where they are short."""
    one, other = before.get(key), fields[key]
    short = all(value is None or isinstance(value, bool | int | float | str) for value in (one, other))
    return f"{key} ({one!r} there, {other!r} here)" if short and key in before else key


def _check_places(config: RunConfig, changed: Sequence[str]) -> None:
    """Raise `ValueError` for a path that does not exist: it is the mistake, not that the run is another."""
    for key in {"dataset", "eval_dataset"} & set(changed):
        dataset = getattr(config, key)
        if dataset is not None and dataset.path != EMBEDDED:
            local_files(dataset)
    if "model" in changed and config.model not in (None, EMBEDDED):
        path = Path(config.model).expanduser()
        if not path.exists() and (path.is_absolute() or config.model.startswith((".", "~")) or len(path.parts) > 2):
            raise ValueError(f"There is no folder {config.model} with a language model (`model`).")
