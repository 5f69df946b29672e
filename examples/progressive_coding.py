# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_matryoshka_sae"]
#
# [tool.uv.sources]
# hf_matryoshka_sae = {path = "..", editable = true}
# ///
"""Matryoshka, pruned and separately trained SAEs at the same widths (Peter & Søgaard 2025, arXiv 2505.00190).

    python examples/progressive_coding.py --model ../shared/lm --train ../shared/text/train.parquet \
        --heldout ../shared/text/heldout.parquet --hookpoint model.layers.1

For each seed one run trains, on the same hidden states, a TopK SAE of every width, and a BatchTopK and a Matryoshka
SAE of the largest. The two plain SAEs of the largest width are then sorted by each ranking, measured on training text,
and cut at the smaller widths. All are judged on held-out text, with the latents that fire by themselves ("mask") and
with k latents per token at every width ("restrict"). Writes `report.md`, plots, `results.csv` and `results.json`.

Without `--model`, and without the folder `../shared`, the embedded language model and smaller sizes are taken. A seed
that is done is not trained again. `--model embedded --tokens 61440 --seeds 0 1` is a trial of a few minutes.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from progressive_coding_judge import TestBed, dataset_fields, judge
from progressive_coding_report import read_seed, write_report

from hf_matryoshka_sae.common.files import write_json
from hf_matryoshka_sae.training import Interrupted, RunConfig, train


SHARED = Path(os.path.relpath(Path(__file__).resolve().parents[2] / "shared"))
EMBEDDED = {
    "model": "embedded",
    "train": "embedded",
    "heldout": "embedded",
    "hookpoint": "model.layers.2",
    "context_length": 128,
    "exclude": "special",
    "tokens": 614_400,
    "eval_tokens": 20_000,
    "statistics_tokens": 20_000,
    "widths": [32, 64, 128, 256, 512],
}
FULL = {
    "model": str(SHARED / "lm"),
    "train": str(SHARED / "text" / "train.parquet"),
    "heldout": str(SHARED / "text" / "heldout.parquet"),
    "hookpoint": "model.layers.1",
    "context_length": 256,
    "exclude": "first",
    "tokens": 2_998_272,
    "eval_tokens": 59_925,
    "statistics_tokens": 60_000,
    "widths": [128, 384, 896, 1920, 4096],
}


logger = logging.getLogger("progressive_coding")


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison from command-line arguments; returns the exit status."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for name in ("hf_matryoshka_sae", "progressive_coding"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        run(settings(arguments))
    except (KeyboardInterrupt, Interrupted) as stopped:
        sys.stderr.write(f"\n{stopped or 'Interrupted.'} Seeds that were done are not done again.\n")
        return 130
    except ValueError as error:
        sys.stderr.write(f"\nerror: {error}\n")
        return 2
    return 0


def settings(arguments: list[str] | None) -> dict[str, Any]:
    """The command line, completed with the defaults of the embedded or of the shared model; checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, folder, or `embedded`")
    parser.add_argument("--train", help="training text: a file, folder, Hub id, or `embedded`")
    parser.add_argument("--heldout", help="held-out text")
    parser.add_argument("--column", default="text")
    parser.add_argument("--hookpoint")
    parser.add_argument("--context_length", type=int)
    parser.add_argument("--exclude", choices=["special", "first", "none"], help="positions left out")
    parser.add_argument("--tokens", type=int, help="training tokens")
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--eval_tokens", type=int, help="held-out tokens")
    parser.add_argument("--loss_every", type=int, default=2, help="losses are measured on every n-th held-out batch")
    parser.add_argument("--statistics_tokens", type=int, help="training tokens on which latents are ranked")
    parser.add_argument("--widths", type=int, nargs="+", help="sizes of the separate SAEs and prefixes of the nested")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", default="runs/progressive_coding")
    asked = vars(parser.parse_args(arguments))
    embedded = asked["model"] == "embedded" or (asked["model"] is None and not SHARED.is_dir())
    if embedded and asked["model"] is None:
        logger.info("There is no folder %s: taking the embedded language model and smaller sizes.", SHARED)
    defaults = EMBEDDED if embedded else FULL
    given = {name: defaults.get(name) if value is None else value for name, value in asked.items()}
    widths = given["widths"]
    if len(widths) < 2 or sorted(set(widths)) != widths or widths[0] < given["k"]:
        raise ValueError(f"`widths` must be two or more, increasing, from k ({given['k']}) up; got {widths}.")
    if len(set(given["seeds"])) != len(given["seeds"]):
        raise ValueError(f"`seeds` must differ, got {given['seeds']}.")
    if given["loss_every"] < 1 or given["statistics_tokens"] < 1:
        raise ValueError("`loss_every` and `statistics_tokens` must be at least 1.")
    return given


def run(given: dict[str, Any]) -> None:
    """Train and judge every seed, then report on all of them."""
    root = Path(given["output_dir"])
    lasting = {name: value for name, value in given.items() if name not in ("seeds", "output_dir")}
    tests, seeds = None, []
    for seed in given["seeds"]:
        folder = root / f"seed-{seed}"
        config = run_config(given, seed, folder)
        trained = train_once(config, folder)
        found = None if trained else read_seed(folder / "comparison.json", lasting)
        if found is None:
            tests = tests or TestBed.open(given)
            logger.info("Judging seed %d.", seed)
            began = time.monotonic()
            found = {"settings": lasting, "seed": seed, **judge(config, given, tests, folder)}
            found["judged_in_seconds"] = time.monotonic() - began
            write_json(folder / "comparison.json", found)
        seeds.append(found)
    write_report(root, lasting, seeds)
    logger.info("Wrote %s", root / "report.md")


# Training


def run_config(given: dict[str, Any], seed: int, folder: Path) -> RunConfig:
    """The run of one seed: all SAEs from one pass of the language model, each with its family's default recipe."""
    k, largest = given["k"], given["widths"][-1]
    separate = given["widths"] if given.get("separate", True) else [largest]
    saes = [{"type": "topk", "name": f"topk-{width}", "num_latents": width, "k": k} for width in separate]
    saes.append({"type": "batch_topk", "name": "batch_topk", "num_latents": largest, "k": k})
    nested = {"type": "matryoshka", "activation": "batch_topk", "prefix_widths": given["widths"]}
    saes.append({**nested, "name": "matryoshka", "num_latents": largest, "k": k})
    same = ("model", "context_length", "exclude", "tokens", "batch_size", "eval_tokens")
    most = {"calibration_tokens": 200_000, "normalization_tokens": 65_536, "shuffle_tokens": 131_072}
    return RunConfig.from_dict(
        {name: given[name] for name in same}
        | {name: min(size, given["tokens"]) for name, size in most.items()}  # a trial run is short in every part
        | {
            "dataset": dataset_fields(given, "train"),
            "eval_dataset": dataset_fields(given, "heldout"),
            "hookpoints": [given["hookpoint"]],
            "saes": saes,
            "seed": seed,
            "output_dir": str(folder),
        }
    )


def train_once(config: RunConfig, folder: Path) -> bool:
    """Train where that has not been done; whether it was done now."""
    if not (folder / "results.json").exists():
        train(config)
        return True
    before = RunConfig.from_dict(yaml.safe_load((folder / "run.yaml").read_text())).to_dict()
    fields = config.to_dict()
    changed = [name for name in fields if name != "output_dir" and before.get(name) != fields[name]]
    if changed:
        raise ValueError(f"{folder} holds a run that differs in {', '.join(changed)}. Give another `output_dir`.")
    logger.info("Seed %d is trained already: %s", config.seed, folder)
    return False


if __name__ == "__main__":
    sys.exit(main())
