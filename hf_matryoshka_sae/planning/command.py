"""`matryoshka-sae plan`: what a run needs on some devices, before anything is loaded."""

import argparse
import logging
import sys
from pathlib import Path

from ..common.command import exit_status
from ..common.files import write_json, write_text
from ..training.config.run import RunConfig, load_run_config
from .devices import DEVICES, find_device


def main(arguments: list[str] | None = None) -> int:
    """Print the plan of a run from command-line arguments; returns the exit status: 1 where nothing fits."""
    parsed, flags = _parser().parse_known_args(arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    return exit_status(lambda: _run(parsed, flags))


def _run(parsed: argparse.Namespace, flags: list[str]) -> int:
    if parsed.device.lower() != "cpu":  # which is measured, with torch
        find_device(parsed.device)
    config = load_run_config(parsed.config, flags, look=RunConfig.check_text)
    from .plan import make_plan
    from .plots import plot
    from .report import report, to_dict
    from .workload import read_workload

    work = read_workload(config, parsed.d_in, parsed.lm_parameters, parsed.dead_share)
    plan = make_plan(work, parsed.devices, find_device(parsed.device, parsed.devices_per_machine))
    sys.stdout.write(report(plan, config))
    if parsed.markdown:
        write_text(Path(parsed.markdown), report(plan, config, markdown=True))
    if parsed.json:
        write_json(Path(parsed.json), to_dict(plan))
    if parsed.plot:
        plot(plan, parsed.plot)
    written = [path for path in (parsed.json, parsed.markdown, parsed.plot) if path]
    if written:
        sys.stdout.write(f"\nSaved {', '.join(written)}.\n")
    return 0 if plan.best is not None else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae plan",
        description="Work out memory, traffic and time of a training run for every layout of its devices. Needs no "
        "GPU and loads no weights: of the language model only the config is read.",
        epilog="Every field of the YAML file is a flag too, for example --saes.0.num_latents 1048576 --batch_size "
        "131072; `matryoshka-sae train --help` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="YAML", help="fields of a training run")
    parser.add_argument("--devices", type=int, default=1, help="processes, each with a device (default: %(default)s)")
    parser.add_argument(
        "--device",
        default="h200",
        help=f'{", ".join(DEVICES)}, an amount such as "80GB", or cpu: this machine, measured (default: %(default)s)',
    )
    parser.add_argument(
        "--devices_per_machine", type=int, help="devices (cpu: processes) in a machine (default: 8; cpu: 1)"
    )
    parser.add_argument("--d_in", type=int, help="width of the hidden states, where the model cannot be looked up")
    parser.add_argument(
        "--lm_parameters",
        type=lambda text: int(float(text)),
        metavar="NUMBER",
        help="its size, such as 8e9, given with --d_in; 0 where it runs elsewhere",
    )
    parser.add_argument(
        "--dead_share", type=float, default=0.1, help="share of the latents that AuxK revives (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables")
    parser.add_argument("--plot", metavar="FILE", help="draw memory and time of each layout")
    return parser
