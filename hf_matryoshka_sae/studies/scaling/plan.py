"""Plan the runs of a sweep: planned runs stay as they are, SAEs that none of them has are divided into new ones."""

import shutil
from pathlib import Path

import yaml
from transformers import AutoConfig

from ...activations.language_model import EMBEDDED, load_language_model
from ...common.files import write_text
from ...training import RunConfig, load_run_config
from ...training.config.run import calibration_tokens, with_sizes_of
from ...training.run.folder import FREE_TO_CHANGE
from .config import Sweep


_OWN_FIELDS = {"saes", "tokens", "activation_cache", *FREE_TO_CHANGE}
_BYTES = 4  # of a cached number, or fewer
_SHARE_OF_DISK = 0.5


def plan_runs(sweep: Sweep, processes: int = 1, add: bool = True) -> list[RunConfig]:
    """Return the runs of a sweep, each with its `run.yaml` in its folder.

    Runs are on disk before anything is trained, so that an interrupted sweep continues with the same runs, however
    many processes there are then, and a sweep whose grid has grown trains only the new SAEs. A new run takes the SAEs
    of one budget, or a share of about the same F x tokens for each process. Several new runs share hidden states
    through a cache in the sweep's folder if half of the free disk can hold it.

    Args:
        sweep ([`Sweep`]): The sweep.
        processes (`int`, *optional*, defaults to 1): Number of runs at a time.
        add (`bool`, *optional*, defaults to `True`): Whether to plan missing runs; otherwise present ones are listed.

    Raises:
        `ValueError`: if the folder holds runs of other fields.
    """
    runs = _present_runs(sweep)
    if not add:
        return runs
    folders = {path.parent for path in sweep.folder.glob("*/run.yaml")}
    new = []
    for tokens in sweep.grid.tokens:
        have = {spec.name for run in runs if run.tokens == tokens for spec in run.saes}
        missing = [pair for pair in sweep.grid.pairs if sweep.spec(*pair).name not in have]
        for pairs in _parts(missing, processes, sweep.grid.saes_per_run):
            names = (sweep.folder / f"tokens-{tokens}{suffix}" for suffix in ["", *(f"-{i}" for i in range(2, 10**6))])
            folder = next(name for name in names if name not in folders)
            folders.add(folder)
            new.append(sweep.run(tokens, pairs, folder))
    if len(new) > 1 and sweep.fields.get("activation_cache") is None:
        _share_hidden_states(sweep.folder, new)
    for run in new:
        write_text(Path(run.output_dir) / "run.yaml", yaml.safe_dump(run.to_dict(), sort_keys=False))
    return runs + new


def is_finished(run: RunConfig) -> bool:
    """Return whether a run was trained and measured."""
    return (Path(run.output_dir) / "results.json").is_file()


def cost(run: RunConfig) -> int:
    """Return the relative cost of a run: the number of its latents, times tokens."""
    return run.tokens * sum(spec.num_latents for spec in run.saes)


def own_cache(run: RunConfig) -> Path | None:
    """Return the cache of a run if [`plan_runs`] chose it; else `None`."""
    path = run.activation_cache and Path(run.activation_cache)
    return path if path and path.parent == Path(run.output_dir).parent else None


def _present_runs(sweep: Sweep) -> list[RunConfig]:
    """Return the runs in the sweep's folder that train SAEs of the grid."""
    specs = {spec.name: spec for spec in (sweep.spec(*pair) for pair in sweep.grid.pairs)}
    runs = []
    for path in sorted(sweep.folder.glob("*/run.yaml")):
        run = load_run_config(path, [f"--output_dir={path.parent}"])  # the sweep may have been moved
        fields = run.to_dict()
        planned = with_sizes_of(sweep.run(run.tokens, sweep.grid.pairs[:1]), fields).to_dict()
        changed = [name for name, value in fields.items() if name not in _OWN_FIELDS and planned[name] != value]
        changed += [f"sweep.sae ({spec.name})" for spec in run.saes if specs.get(spec.name, spec) != spec]
        if changed:
            raise ValueError(
                f"{sweep.folder} holds a sweep that differs in {', '.join(changed)} (see {path}). Give another "
                "`output_dir`."
            )
        if run.tokens in sweep.grid.tokens and any(spec.name in specs for spec in run.saes):
            runs.append(run)
    return runs


def _parts(pairs: list[tuple[int, int]], processes: int, largest: int | None) -> list[list[tuple[int, int]]]:
    """Divide (F, k) into parts of about the same sum of F: each goes to the lightest part, the largest F first."""
    if not pairs:
        return []
    count = min(len(pairs), max(processes, -(-len(pairs) // (largest or len(pairs)))))
    parts: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for pair in sorted(pairs, reverse=True):
        open_parts = [part for part in parts if largest is None or len(part) < largest]
        min(open_parts, key=lambda part: sum(size for size, _ in part)).append(pair)
    return [sorted(part) for part in parts]


def _share_hidden_states(folder: Path, runs: list[RunConfig]) -> None:
    """Give the runs a common cache, if the disk can hold one as large as the largest budget."""
    rows = max(run.tokens + calibration_tokens(run) for run in runs)
    width = _hidden_size(runs[0])
    folder.mkdir(parents=True, exist_ok=True)
    if width is not None and rows * width * _BYTES <= _SHARE_OF_DISK * shutil.disk_usage(folder).free:
        for run in runs:
            run.activation_cache = str(folder / f"activations-{rows}")  # another budget needs another one


def _hidden_size(run: RunConfig) -> int | None:
    if run.model == EMBEDDED:
        config = load_language_model(EMBEDDED)[0].config
    else:
        try:
            config = AutoConfig.from_pretrained(run.model, revision=run.model_revision)
        except OSError:
            return None  # the run itself reports the error
    return getattr(config.get_text_config(), "hidden_size", None)
