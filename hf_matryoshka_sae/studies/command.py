"""`matryoshka-sae evaluate`: read and check its arguments before anything heavy is imported."""

import argparse

from ..common.checks import check_at_least
from ..common.command import add_subject_flags, exit_status, measuring, whole_numbers
from ..common.data_source import EMBEDDED, DatasetConfig, local_files


def main(arguments: list[str] | None = None) -> int:
    """Run `matryoshka-sae evaluate` and return the exit status."""
    parsed = _parser().parse_args(arguments)
    return exit_status(lambda: _run(parsed))


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
    add_subject_flags(parser, 60_000, "held-out text", "that of the SAE's run")
    parser.add_argument("--context_length", type=int, help="in tokens (default: that of the SAE's run, else 128)")
    parser.add_argument("--widths", type=whole_numbers, help="such as 64,128,256 (default: the SAE's prefix widths)")
    parser.add_argument(
        "--selection",
        choices=("mask", "restrict"),
        default="mask",
        help="whether latents past the width compete for places (mask, the default) or not (TopK, refined codes)",
    )
    parser.add_argument("--no_baselines", action="store_true", help="measure the SAEs only")
    parser.add_argument("--lm_exponent", type=float, help="of the language model's loss over its training compute")
    parser.add_argument("--lm_irreducible", type=float, default=0.0, help="nats of that law (default: %(default)s)")
    parser.add_argument(
        "--suite",
        choices=("core", "full"),
        default="core",
        help="core: fidelity. full: also probes, explainability, downstream effects and more, as one report",
    )
    suite = parser.add_argument_group("with --suite full")
    suite.add_argument(
        "--minutes",
        type=float,
        help="to spend; smaller samples are taken where needed",
    )
    suite.add_argument("--labelled", metavar="PATH", help="texts with labels, to probe for: file, folder or Hub id")
    suite.add_argument("--label", default="label", help="their column of labels (default: %(default)s)")
    suite.add_argument(
        "--judge",
        help="explains latents: folder or Hub id of a chat model, https://host/v1#model, or endpoint:MODEL (token in "
        "JUDGE_TOKEN; default: N2G's patterns stand in)",
    )
    suite.add_argument("--prompts", metavar="FOLDER", help="with the judge's prompts (default: the package's)")
    suite.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    parser.add_argument(
        "--output_dir", help="of the results (default: the SAE's where it is a folder, else runs/evaluate)"
    )
    return parser


def _run(parsed: argparse.Namespace) -> None:
    check_at_least(1, tokens=parsed.tokens)
    if parsed.context_length is not None:
        check_at_least(1, context_length=parsed.context_length)
    if parsed.suite == "core" and (parsed.minutes or parsed.labelled or parsed.judge or parsed.prompts):
        raise ValueError("--minutes, --labelled, --judge and --prompts belong to --suite full.")
    if parsed.minutes is not None and not parsed.minutes > 0:
        raise ValueError(f"`minutes` must be above 0, got {parsed.minutes:g}.")
    if parsed.suite == "full" and parsed.no_baselines:
        raise ValueError("--suite full has baselines beside every figure; leave --no_baselines away.")
    parsed.split = parsed.split or ("heldout" if parsed.dataset == EMBEDDED else "train")
    for path in (parsed.dataset, parsed.labelled):
        if path is not None and path != EMBEDDED:
            local_files(DatasetConfig(path, split=parsed.split))  # raises where they are missing
    if parsed.widths is not None:
        parsed.widths = sorted(set(parsed.widths))
    from .evaluating import run

    with measuring() as accelerator:
        run(parsed, accelerator)
