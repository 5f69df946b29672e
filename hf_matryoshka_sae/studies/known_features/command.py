"""`matryoshka-sae toy` and `synthetic`: read and check their arguments before anything heavy is imported."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import yaml

from ...common.checks import check_at_least
from ...common.command import exit_status, whole_numbers
from ...training.config.describe import described
from ...training.config.spec import SAESpec
from .settings import BATCH_SIZE, PUBLISHED_L0, SAMPLES, STEPS, TOY_BATCH_SIZE, TOY_STEPS, World


def toy_main(arguments: list[str] | None = None) -> int:
    """Run `matryoshka-sae toy` and return the exit status."""
    parsed = _toy_parser().parse_args(arguments)
    return exit_status(lambda: _toy(parsed), "Interrupted. Seeds that were done are in toy.json.")


def _toy_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae toy",
        description="Train a vanilla and a Matryoshka SAE on a tree of features (Nabeshima 2024): children absorb "
        "their parents in the one, not in the other.",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one comparison each (default: 0 1 2)")
    parser.add_argument(
        "--steps",
        type=int,
        default=TOY_STEPS,
        help=f"of {TOY_BATCH_SIZE} samples (default: %(default)s, published)",
    )
    parser.add_argument(
        "--target_l0", type=float, help=f"default: {PUBLISHED_L0} as published; other trees: their own"
    )
    tree = parser.add_mutually_exclusive_group()
    tree.add_argument("--tree", metavar="FILE", help="JSON of a tree; by default the published one")
    tree.add_argument("--random_tree", metavar="SEED", type=int, help="make a tree")
    parser.add_argument("--output_dir", default="runs/toy", help="folder of the results (default: %(default)s)")
    return parser


def _toy(parsed: argparse.Namespace) -> None:
    for name in ("steps", "target_l0"):
        value = getattr(parsed, name)
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be above 0, got {value:g}.")
    from .comparison import compare

    compare(parsed)


def synthetic_main(arguments: list[str] | None = None) -> int:
    """Run `matryoshka-sae synthetic` and return the exit status."""
    parsed = _synthetic_parser().parse_args(arguments)
    return exit_status(
        lambda: _synthetic(parsed), "Interrupted. Finished runs are kept: run the same command again to continue."
    )


def _synthetic(parsed: argparse.Namespace) -> None:
    check_at_least(1, steps=parsed.steps, batch_size=parsed.batch_size, samples=parsed.samples)
    if len(set(parsed.seeds)) < len(parsed.seeds) or min(parsed.seeds) < 0:
        raise ValueError(f"`seeds` must be different numbers of at least 0, got {parsed.seeds}.")
    world = World(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(World)})
    recipes = None if parsed.recipes is None else _read_recipes(Path(parsed.recipes))
    from .benchmark import Benchmark, default_recipes, report_of
    from .synthetic import SyntheticModel

    if recipes is None:
        k = parsed.k or max(1, round(SyntheticModel(world).expected_l0))
        recipes = default_recipes(parsed.num_latents or world.features, k)
    folder = Path(parsed.output_dir)
    benchmark = Benchmark(world, recipes, folder, parsed.steps, parsed.batch_size, parsed.widths, parsed.samples)
    results = benchmark.run(parsed.seeds)
    sys.stdout.write(f"{report_of(results).markdown()}\nSaved {folder / 'synthetic.json'}, .md and .png.\n")


def _read_recipes(path: Path) -> list[dict[str, Any]]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The recipes {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    recipes = data.get("saes") if isinstance(data, dict) else data
    if not isinstance(recipes, list):
        raise ValueError(f"{path} must hold a list under `saes`, as a run's YAML does.")
    for number, recipe in enumerate(recipes):
        SAESpec.from_dict(recipe, f"saes.{number}.")  # raises for unknown fields before anything is trained
    return recipes


def _synthetic_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae synthetic",
        description="Train recipes on synthetic hidden states of known features, and compare at each width how many "
        "features each found. The published scale: --features 16384 --d_in 768 --trees 128.",
    )
    parser.add_argument("--recipes", metavar="YAML", help="with `saes:` as in a run's file; by default four families")
    parser.add_argument("--num_latents", type=int, help="of the default recipes (default: as many as features)")
    parser.add_argument("--k", type=int, help="of the default recipes (default: the features' own L0)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one comparison each (default: 0 1 2)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="samples a step (default: %(default)s)")
    parser.add_argument("--widths", type=whole_numbers, help="such as 64,128,256 (default: those of a Matryoshka SAE)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="to match and measure on (default: %(default)s)")
    parser.add_argument("--output_dir", default="runs/synthetic", help="folder of the results (default: %(default)s)")
    world = parser.add_argument_group("the world of features")
    meanings = {field.name: field.meaning for field in described(World)}
    for field in dataclasses.fields(World):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        text = f"{meanings[field.name].rstrip('.')} (default: %(default)s)"
        world.add_argument(f"--{field.name}", default=field.default, help=text, **kind)
    return parser
