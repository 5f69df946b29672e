"""`matryoshka-sae`: one sub-command per job."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae", description="Progressive sparse autoencoders: the first n latents are a working SAE."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", add_help=False, help="train SAEs as a YAML file says (matryoshka-sae train --help lists its fields)"
    )
    train.set_defaults(run=_train)
    demo = commands.add_parser(
        "demo", help="train a Matryoshka SAE on the embedded language model, load it back and show what it found"
    )
    demo.add_argument("--output_dir", default="runs/demo", help="folder of the run (default: %(default)s)")
    demo.set_defaults(run=_demo)
    parsed, rest = parser.parse_known_args(arguments)
    if rest and parsed.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return parsed.run(parsed, rest)


def _train(parsed: argparse.Namespace, rest: list[str]) -> int:
    from .train import main as train

    return train(rest or ["--help"])


def _demo(parsed: argparse.Namespace, rest: list[str]) -> int:
    from .demo import demo

    return demo(parsed.output_dir)


if __name__ == "__main__":
    sys.exit(main())
