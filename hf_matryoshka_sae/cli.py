"""`matryoshka-sae`: one sub-command per job."""

import argparse
import sys


COMMANDS = {
    "train": "train SAEs as a YAML file says (matryoshka-sae train --help lists its fields)",
    "cache": "harvest hidden states once, for several runs and machines",
    "plan": "work out memory, traffic and time of a training run on some devices",
    "sweep": "train a grid of SAEs and fit scaling laws to their losses",
    "evaluate": "measure saved SAEs at every width on held-out text, beside their baselines",
    "index": "index what the latents of an SAE mean: contexts, logit effects, neighbours, parents",
    "space": "start a page to prune dictionaries, look at features, search, steer and compare",
    "push": "push a run's SAEs to the Hub, with a card that the run fills",
    "pull": "download SAEs from the Hub, or only their first latents",
    "convert": "turn an SAE of another library into one of this, or the other way round",
    "toy": "train SAEs on a tree of known features and compare what they found",
    "synthetic": "train recipes on many known features and compare what each found, at every width",
}
"""What each sub-command that reads its own arguments does."""


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae", description="Progressive sparse autoencoders: the first n latents are a working SAE."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():  # these read their own arguments
        commands.add_parser(name, add_help=False, help=about)
    demo = commands.add_parser(
        "demo", help="train a Matryoshka SAE on the embedded language model, load it back and show what it found"
    )
    demo.add_argument("--output_dir", default="runs/demo", help="folder of the run (default: %(default)s)")
    parsed, rest = parser.parse_known_args(arguments)
    if rest and parsed.command not in COMMANDS:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _run(parsed, rest)


def _run(parsed: argparse.Namespace, rest: list[str]) -> int:
    """Import the command only now, so that `--help` is fast."""
    match parsed.command:
        case "train":
            from .train import main as train

            return train(rest or ["--help"])
        case "cache":
            from .training.cache_command import main as cache

            return cache(rest or ["--help"])
        case "plan":
            from .planning.command import main as plan

            return plan(rest or ["--help"])
        case "sweep":
            from .studies.scaling.command import main as sweep

            return sweep(rest or ["--help"])
        case "evaluate":
            from .studies.command import main as evaluate

            return evaluate(rest or ["--help"])
        case "index":
            from .features.command import main as index

            return index(rest or ["--help"])
        case "space":
            from .space.command import main as space

            return space(rest)
        case "push":
            from .hub.command import push_main

            return push_main(rest or ["--help"])
        case "pull":
            from .hub.command import pull_main

            return pull_main(rest or ["--help"])
        case "convert":
            from .convert.command import main as convert

            return convert(rest or ["--help"])
        case "toy":
            from .studies.known_features.command import toy_main

            return toy_main(rest)
        case "synthetic":
            from .studies.known_features.command import synthetic_main

            return synthetic_main(rest)
    from .demo import demo

    return demo(parsed.output_dir)


if __name__ == "__main__":
    sys.exit(main())
