"""`matryoshka-sae index`: the feature index of a saved SAE."""

import argparse
import sys
from typing import TYPE_CHECKING

from ..common.checks import check_at_least
from ..common.command import add_subject_flags, chosen_dataset, exit_status, measuring
from .sizes import FOLDER, IndexSizes


if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..common.data_source import DatasetConfig
    from .index.store import FeatureIndex


_LISTED = 5


def main(arguments: list[str] | None = None) -> int:
    """Run `matryoshka-sae index` and return the exit status."""
    parsed = _parser().parse_args(arguments)
    return exit_status(
        lambda: _run(parsed), "Interrupted. The finished part is saved: run the same command again to continue."
    )


def _run(parsed: argparse.Namespace) -> None:
    check_at_least(1, context_length=parsed.context_length, lm_batch_size=parsed.lm_batch_size)
    dataset = chosen_dataset(parsed)
    sizes = IndexSizes(top_contexts=parsed.top_contexts, context_tokens=parsed.context_tokens)
    sizes.check()
    with measuring() as accelerator:
        index = _build(parsed, dataset, sizes, accelerator)
        if accelerator.is_main_process:
            sys.stdout.write(_summary(index, parsed.output_dir or parsed.sae))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae index",
        description="Build the feature index of an SAE: for each latent how it fires, in which contexts, which tokens "
        "it promotes, and which latents are like it or fire with it. A command that was cut short is continued by the "
        "same command.",
    )
    parser.add_argument(
        "sae",
        metavar="REPO_OR_DIR",
        help="folder of an SAE of any format; or its file, or Hub id (then with --output_dir)",
    )
    add_subject_flags(parser, 1_000_000)
    parser.add_argument("--context_length", type=int, default=128, help="in tokens (default: %(default)s)")
    parser.add_argument("--lm_batch_size", type=int, default=32, help="windows in a batch (default: %(default)s)")
    parser.add_argument(
        "--top_contexts", type=int, default=IndexSizes.top_contexts, help="kept of each latent (default: %(default)s)"
    )
    parser.add_argument(
        "--context_tokens",
        type=int,
        default=IndexSizes.context_tokens,
        help="shown of a context (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random samples (default: %(default)s)")
    parser.add_argument("--output_dir", help=f"folder in which {FOLDER}/ is made (default: the SAE's)")
    parser.add_argument(
        "--save_every", type=int, default=5_000_000, help="tokens between two saved states (default: %(default)s)"
    )
    parser.add_argument("--restart", action="store_true", help="start over instead of going on")
    return parser


def _build(
    parsed: argparse.Namespace, dataset: "DatasetConfig", sizes: IndexSizes, accelerator: "Accelerator"
) -> "FeatureIndex":
    from .index.build import build_index

    return build_index(
        parsed.sae,
        parsed.model,
        dataset,
        parsed.tokens,
        parsed.output_dir,
        hookpoint=parsed.hookpoint,
        context_length=parsed.context_length,
        lm_batch_size=parsed.lm_batch_size,
        sizes=sizes,
        seed=parsed.seed,
        resume=not parsed.restart,
        save_every=parsed.save_every,
        device=accelerator.device,
    )


def _summary(index: "FeatureIndex", place: str) -> str:
    """Return the lines that the command prints: sizes, and the latents that fire most often."""
    about, table = index.about, index.table(["latent", "frequency", "max"]).to_pydict()
    dead = sum(frequency == 0 for frequency in table["frequency"])
    lines = [f"{place}/{FOLDER}: {len(index)} latents over {about['tokens']} tokens, {dead} of them dead"]
    if about["logits"].startswith("left out"):
        lines.append(f"logit effects {about['logits']}")
    order = sorted(table["latent"], key=lambda latent: -table["frequency"][latent])[:_LISTED]
    lines += [f"  latent {n:>6}  fires on {table['frequency'][n]:.2%}, at most {table['max'][n]:.4g}" for n in order]
    return "\n".join(lines) + "\n"
