"""`matryoshka-sae evaluate`: saved SAEs on held-out text, at every width, beside their baselines."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from ..activations import DatasetConfig, open_dataset, resolve_hookpoints
from ..activations.language_model import EMBEDDED
from ..common.checks import check_at_least
from ..common.command import exit_status
from ..common.files import write_json
from ..evaluation.core import ABOUT_ALL, IDENTITY, details, evaluate
from ..evaluation.data import HeldOut, open_heldout
from ..evaluation.language_model import LossScaling
from ..evaluation.opening import open_saes
from ..evaluation.report import plot, table
from ..models.digests import folder_digest, weights_digest
from .explanations.autointerp.interpretability import greet
from .explanations.autointerp.judges import open_judge
from .probing.tasks import LabelledTask
from .suite.bench import Bench
from .suite.budget import run_sections
from .suite.report import FOLDER, write_report
from .suite.sections import SECTIONS


def main(arguments: list[str] | None = None) -> int:
    """Run the evaluation from command-line arguments; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    transformers_logging.disable_progress_bar()  # ours is the one to watch
    # Makes the process group where there are several processes. Not on MPS: it lacks float64, in which sums are.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    try:
        return exit_status(lambda: _run(parsed, accelerator))
    finally:
        accelerator.end_training()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae evaluate",
        description="Evaluate saved SAEs on held-out text at every width, beside a random dictionary, principal "
        "components and the identity.",
    )
    parser.add_argument(
        "sae", metavar="REPO_OR_DIR", help="folder of an SAE, or of several; file of weights; Hub id; or 'embedded'"
    )
    parser.add_argument("--subfolder", help="of the repository or folder")
    parser.add_argument("--model", help="language model: Hub id, folder or 'embedded' (default: what the SAE names)")
    parser.add_argument("--hookpoint", help="where the SAE reads (default: what the SAE names)")
    parser.add_argument("--dataset", metavar="PATH", help="held-out text: file, folder or Hub id")
    parser.add_argument("--split", default="train", help="of the data set (default: %(default)s)")
    parser.add_argument("--column", default="text", help="with the text (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=60_000, help="to evaluate on (default: %(default)s)")
    parser.add_argument("--context_length", type=int, default=128, help="in tokens (default: %(default)s)")
    parser.add_argument("--widths", type=_widths, help="such as 64,128,256 (default: the SAE's prefix widths)")
    parser.add_argument(
        "--selection",
        choices=("mask", "restrict"),
        default="mask",
        help="whether latents past the width compete for places (mask, the default) or not; matters to TopK alone",
    )
    parser.add_argument("--no_baselines", action="store_true", help="the SAEs only")
    parser.add_argument("--lm_exponent", type=float, help="of the language model's loss over its training compute")
    parser.add_argument("--lm_irreducible", type=float, default=0.0, help="nats of that law (default: %(default)s)")
    parser.add_argument(
        "--suite",
        choices=("core", "full"),
        default="core",
        help="core: fidelity. full: also probes, explainability, downstream effects and more, as one report",
    )
    suite = parser.add_argument_group("with --suite full")
    suite.add_argument("--minutes", type=float, help="to spend; smaller samples are taken where they have to be")
    suite.add_argument("--labelled", metavar="PATH", help="texts with labels, to probe for: file, folder or Hub id")
    suite.add_argument("--label", default="label", help="their column of labels (default: %(default)s)")
    suite.add_argument(
        "--judge",
        help="explains latents: folder or Hub id of a chat model, https://host/v1#model, or endpoint:MODEL (token in "
        "JUDGE_TOKEN; default: N2G's patterns stand in)",
    )
    suite.add_argument("--prompts", metavar="FOLDER", help="with the judge's prompts (default: the package's)")
    suite.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    parser.add_argument("--output_dir", help="default: beside the SAE where it is a folder, else runs/evaluate")
    return parser


def _widths(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 64,128,256, got {text!r}") from None


def _run(parsed: argparse.Namespace, accelerator: Accelerator) -> None:
    check_at_least(1, tokens=parsed.tokens, context_length=parsed.context_length)
    if parsed.suite == "core" and (parsed.minutes or parsed.labelled or parsed.judge or parsed.prompts):
        raise ValueError("--minutes, --labelled, --judge and --prompts belong to --suite full.")
    if parsed.minutes is not None and not parsed.minutes > 0:
        raise ValueError(f"`minutes` must be above 0, got {parsed.minutes:g}.")
    if parsed.suite == "full" and parsed.no_baselines:
        raise ValueError("--suite full has baselines beside every figure; leave --no_baselines away.")
    scaling = None if parsed.lm_exponent is None else LossScaling(parsed.lm_exponent, parsed.lm_irreducible)
    labelled = [_labelled(parsed)] if parsed.labelled else []
    judge = open_judge(parsed.judge)
    groups, folder = open_saes(parsed.sae, parsed.subfolder, parsed.model, parsed.hookpoint)
    output = Path(parsed.output_dir) if parsed.output_dir else folder or Path("runs/evaluate")
    if judge is not None and accelerator.is_main_process:
        greet(judge, output / FOLDER / "answers.jsonl")  # it may not be there, and its turn comes late
    opened: dict[str, HeldOut] = {}
    results, places = [], []
    for (model, hookpoint), group in groups.items():
        if model not in opened:
            opened = {model: _open(parsed, model, hookpoint, accelerator.device)}  # one language model at a time
        (place,) = resolve_hookpoints(opened[model].model, [hookpoint])
        data = replace(opened[model], hookpoint=place)
        about = {"model": model, "dataset": parsed.dataset or EMBEDDED}
        if parsed.suite == "core":
            result = evaluate(data, group, parsed.widths, parsed.selection, not parsed.no_baselines, scaling)
            results.append({**about, **result})
            continue
        bench = Bench(data, group, parsed.widths, parsed.selection, labelled, scaling, judge, parsed.prompts)
        bench.seed, bench.answers = parsed.seed, output / FOLDER / "answers.jsonl"
        places.append({**about, **_suite(parsed, bench, about, output)})
    if not accelerator.is_main_process:
        return
    if parsed.suite == "full":
        path = write_report(output / FOLDER, places, parsed.minutes)
        sys.stdout.write(f"{path.read_text(encoding='utf-8').split('### ')[0].strip()}\n\nSaved {path}\n")
        return
    _write(results, output)


def _labelled(parsed: argparse.Namespace) -> LabelledTask:
    dataset = open_dataset(DatasetConfig(parsed.labelled, split=parsed.split, streaming=False))
    return LabelledTask.from_dataset(dataset, parsed.column, parsed.label, Path(parsed.labelled).stem)


def _suite(parsed: argparse.Namespace, bench: Bench, about: dict[str, Any], output: Path) -> dict[str, Any]:
    """Everything about the SAEs of one place."""
    options = ("widths", "selection", "tokens", "context_length", "split", "column", "labelled", "label", "seed")
    law = ("lm_exponent", "lm_irreducible", "minutes", "judge", "prompts")
    key = {name: getattr(parsed, name) for name in (*options, *law)}
    digests = {name: weights_digest(sae) for name, sae in bench.saes.items()}
    inside = bench.data.hookpoint.replace(":", "-")
    sections = run_sections(
        bench, output / FOLDER / inside, SECTIONS, {**about, **key, "saes": digests}, parsed.minutes
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


def _open(parsed: argparse.Namespace, model: str, hookpoint: str, device: torch.device) -> HeldOut:
    dataset = None
    if parsed.dataset is not None:
        dataset = DatasetConfig(parsed.dataset, split=parsed.split, column=parsed.column)
    elif model != EMBEDDED:
        raise ValueError(f"Name held-out text for {model!r} with --dataset: a file, a folder or a Hub id.")
    return open_heldout(model, hookpoint, dataset, parsed.tokens, parsed.context_length, device=device)


def _write(results: list[dict[str, Any]], folder: Path) -> None:
    write_json(folder / "evaluation.json", {"about": ABOUT_ALL, "results": results})
    drawn = [result | {"saes": {k: v for k, v in result["saes"].items() if k != IDENTITY}} for result in results]
    plot(drawn, folder / "evaluation.png")
    sys.stdout.write(f"{table(results)}\n\n{details(results)}\n")
    sys.stdout.write(f"Saved {folder / 'evaluation.json'} and {folder / 'evaluation.png'}\n")
