"""`matryoshka-sae sweep`: a grid of SAEs from shared forward passes, and the scaling laws in their losses."""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.command import exit_status
from ...common.logs import log_to_stderr
from ...training.config.describe import described, help_text
from .config import Grid, Sweep, load_sweep


if TYPE_CHECKING:
    from .points import Point


def main(arguments: list[str] | None = None) -> int:
    """Run `matryoshka-sae sweep` and return the exit status."""
    parser = _parser()
    parsed, flags = parser.parse_known_args(arguments)
    if (parsed.config is None) == (parsed.points is None):
        parser.error("give either --config, for a sweep, or --points, to fit points that are there")
    return exit_status(lambda: _run(parsed, flags))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae sweep",
        description="Train an SAE for each size, k and number of tokens, and fit the scaling laws L(F), L(C)\nand "
        "L(F, k) to their held-out losses. Run again, it trains only what its folder lacks.",
        epilog=f"the section `sweep` of the YAML file:\n{help_text(described(Grid, 'sweep.'), 80)}\n\n"
        "Every field of the YAML file is a flag too, for example --sweep.k '[8, 16]' --batch_size 4096;\n"
        "`matryoshka-sae train --help` has the others.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="YAML", help="fields of a training run, with a section `sweep`")
    parser.add_argument(
        "--points", metavar="CSV", help="train nothing, fit these: num_latents, k, loss; tokens, flops, held_out"
    )
    parser.add_argument(
        "--output_dir", help="of runs and results (default: what the file says; runs/scaling for --points)"
    )
    parser.add_argument("--processes", type=int, help="runs at a time (default: one for each CUDA device)")
    parser.add_argument("--fit_only", action="store_true", help="train nothing, fit what is finished")
    parser.add_argument("--resamples", type=int, default=200, help="of the bootstrap (default: %(default)s)")
    return parser


def _run(parsed: argparse.Namespace, flags: list[str]) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("A sweep starts its own processes: run it without `accelerate launch`, with --processes.")
    if parsed.processes is not None and parsed.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {parsed.processes}.")
    if parsed.points is not None and flags:
        raise ValueError(f"{flags[0]} means nothing beside --points.")
    sweep = _sweep(parsed, flags) if parsed.points is None else None
    from .points import read_points, write_points
    from .report import fit_points

    log_to_stderr()
    if sweep is None:
        points, folder = read_points(parsed.points), Path(parsed.output_dir or "runs/scaling")
    else:
        points, folder = _train(parsed, sweep), sweep.folder
        write_points(points, folder / "sweep.csv")  # worth having even where no law fits
    report = fit_points(points, parsed.resamples)
    report.save(folder)
    sys.stdout.write(f"{report}\nSaved {', '.join(str(folder / name) for name in ('report.md', 'scaling.png'))}, ")
    sys.stdout.write("sweep.json and sweep.csv.\n")


def _sweep(parsed: argparse.Namespace, flags: list[str]) -> Sweep:
    place = [f"--output_dir={parsed.output_dir}"] if parsed.output_dir else []
    return load_sweep(parsed.config, flags + place, look=None if parsed.fit_only else Sweep.check_laws)


def _train(parsed: argparse.Namespace, sweep: Sweep) -> "list[Point]":
    from .plan import is_finished, own_cache, plan_runs
    from .points import finished_points
    from .running import default_processes, train_runs

    processes = parsed.processes or default_processes()
    runs = plan_runs(sweep, processes, add=not parsed.fit_only)
    if not parsed.fit_only:
        train_runs([run for run in runs if not is_finished(run)], processes)
        for folder in {own_cache(run) for run in runs} - {None}:
            shutil.rmtree(folder, ignore_errors=True)
    points = finished_points(sweep, runs)
    if not points:
        raise ValueError(f"{sweep.folder} holds no finished run of this sweep.")
    return points
