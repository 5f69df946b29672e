"""Run `matryoshka-sae evaluate`: measure saved SAEs on held-out text, at every width, beside their baselines."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..activations import DatasetConfig, open_dataset, resolve_hookpoints
from ..activations.language_model import EMBEDDED
from ..common.files import write_json
from ..evaluation.core import ABOUT_ALL, IDENTITY, details, evaluate
from ..evaluation.data import HeldOut, open_heldout
from ..evaluation.language_model import LossScaling
from ..evaluation.opening import RunText, open_saes, run_of
from ..evaluation.report import plot, table
from ..models.digests import folder_digest, weights_digest
from .explanations.autointerp.interpretability import greet
from .explanations.autointerp.judges import open_judge
from .probing.tasks import LabelledTask
from .suite.bench import Bench
from .suite.budget import run_sections
from .suite.report import FOLDER, write_report
from .suite.sections import SECTIONS


def run(parsed: argparse.Namespace, accelerator: Accelerator) -> None:
    """Measure the SAEs that the arguments name, print the tables and write the reports."""
    began = time.monotonic()
    scaling = None if parsed.lm_exponent is None else LossScaling(parsed.lm_exponent, parsed.lm_irreducible)
    labelled = [_labelled(parsed)] if parsed.labelled else []
    judge = open_judge(parsed.judge)
    groups, folder = open_saes(parsed.sae, parsed.subfolder, parsed.model, parsed.hookpoint)
    output = Path(parsed.output_dir) if parsed.output_dir else folder or Path("runs/evaluate")
    if judge is not None and accelerator.is_main_process:
        greet(judge, output / FOLDER / "answers.jsonl")  # a judge that cannot be reached shall fail now, not in hours
    run = run_of(folder)
    heldout: dict[str, HeldOut] = {}
    results, places = [], []
    for (model, hookpoint), group in groups.items():
        if model not in heldout:
            heldout = {model: _open(parsed, run, model, hookpoint, accelerator.device)}  # one language model at a time
        (place,) = resolve_hookpoints(heldout[model].model, [hookpoint])
        data = replace(heldout[model], hookpoint=place)
        own = EMBEDDED if run is None or run.dataset is None else Path(run.dataset.path).name
        about = {"model": model, "dataset": parsed.dataset or own}
        if parsed.suite == "core":
            result = evaluate(data, group, parsed.widths, parsed.selection, not parsed.no_baselines, scaling)
            results.append({**about, **result})
            continue
        bench = Bench(data, group, parsed.widths, parsed.selection, labelled, scaling, judge, parsed.prompts)
        bench.seed, bench.answers = parsed.seed, output / FOLDER / "answers.jsonl"
        minutes = None if parsed.minutes is None else parsed.minutes / len(groups)
        places.append({**about, **_suite(parsed, bench, about, output, minutes, time.monotonic() - began)})
        began = time.monotonic()
    if not accelerator.is_main_process:
        return
    if parsed.suite == "full":
        path = write_report(output / FOLDER, places, parsed.minutes)
        sys.stdout.write(f"{path.read_text(encoding='utf-8').strip()}\n\nSaved {path}\n")
        return
    _write(results, output)


def _labelled(parsed: argparse.Namespace) -> LabelledTask:
    dataset = open_dataset(DatasetConfig(parsed.labelled, split=parsed.split, streaming=False))
    return LabelledTask.from_dataset(dataset, parsed.column, parsed.label, Path(parsed.labelled).stem)


def _suite(
    parsed: argparse.Namespace,
    bench: Bench,
    about: dict[str, Any],
    output: Path,
    minutes: float | None,
    spent: float,
) -> dict[str, Any]:
    """Measure all sections for the SAEs of one hookpoint in `minutes`, of which so many seconds are `spent`."""
    options = ("widths", "selection", "tokens", "context_length", "split", "column", "labelled", "label", "seed")
    law = ("lm_exponent", "lm_irreducible", "minutes", "judge", "prompts")
    key = {name: getattr(parsed, name) for name in (*options, *law)}
    digests = {name: weights_digest(sae) for name, sae in bench.saes.items()}
    inside = bench.data.hookpoint.replace(":", "-")
    sections = run_sections(
        bench, output / FOLDER / inside, SECTIONS, {**about, **key, "saes": digests}, minutes, spent=spent
    )
    return {
        "hookpoint": bench.data.hookpoint,
        "tokens": bench.data.tokens,
        "selection": parsed.selection,
        "saes": list(bench.saes),
        "weights": {name: folder_digest(Path(sae.name_or_path)) for name, sae in bench.saes.items()},
        "folder": inside,
        "sections": sections,
    }


def _open(
    parsed: argparse.Namespace, run: RunText | None, model: str, hookpoint: str, device: torch.device
) -> HeldOut:
    """Open the text that the arguments name, else the run's own held-out text, else the embedded one."""
    options: dict[str, Any] = {"context_length": parsed.context_length or (run.context_length if run else 128)}
    dataset = None
    if parsed.dataset is not None:
        dataset = DatasetConfig(parsed.dataset, split=parsed.split, column=parsed.column)
    elif run is not None and run.dataset is not None:
        dataset, options["exclude"] = run.dataset, run.exclude
    elif model != EMBEDDED:
        raise ValueError(f"Name held-out text for {model!r} with --dataset: a file, a folder or a Hub id.")
    return open_heldout(model, hookpoint, dataset, parsed.tokens, device=device, **options)


def _write(results: list[dict[str, Any]], folder: Path) -> None:
    write_json(folder / "evaluation.json", {"about": ABOUT_ALL, "results": results})
    curves = [result | {"saes": {k: v for k, v in result["saes"].items() if k != IDENTITY}} for result in results]
    plot(curves, folder / "evaluation.png")
    sys.stdout.write(f"{table(results)}\n\n{details(results)}\n")
    sys.stdout.write(f"Saved {folder / 'evaluation.json'} and {folder / 'evaluation.png'}\n")
