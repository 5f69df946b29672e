"""`matryoshka-sae`: one sub-command per job."""

import argparse
import importlib
import sys


COMMANDS = {
    "train": "train SAEs as a YAML file says (matryoshka-sae train --help lists its fields)",
    "cache": "harvest hidden states once, for several runs and machines",
    "plan": "work out memory, traffic and time of a training run on some devices",
    "sweep": "train a grid of SAEs and fit scaling laws to their losses",
    "evaluate": "measure saved SAEs at every width on held-out text, beside their baselines",
    "index": "index what the latents of an SAE mean: contexts, logit effects, neighbours, parents",
    "steer": "steer a language model by latents: measure the dose, write adapters and vectors for other tools",
    "space": "start a page to prune dictionaries, look at features, search, steer and compare",
    "push": "push a run's SAEs to the Hub, with a card that the run fills",
    "pull": "download SAEs from the Hub, or only their first latents",
    "convert": "turn an SAE of another library into one of this, or the other way round",
    "toy": "train SAEs on a tree of known features and compare what they found",
    "synthetic": "train recipes on many known features and compare what each found, at every width",
}
"""What each sub-command that reads its own arguments does."""
_MAINS = {
    "train": ".train:main",
    "cache": ".training.cache_command:main",
    "plan": ".planning.command:main",
    "sweep": ".studies.scaling.command:main",
    "evaluate": ".studies.command:main",
    "index": ".features.command:main",
    "steer": ".steering.command:main",
    "space": ".space.command:main",
    "push": ".hub.command:push_main",
    "pull": ".hub.command:pull_main",
    "convert": ".convert.command:main",
    "toy": ".studies.known_features.command:toy_main",
    "synthetic": ".studies.known_features.command:synthetic_main",
}
_NEED_NOTHING = ("space", "toy", "synthetic")  # of the others' arguments some must be given: without them, their help


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="matryoshka-sae", description="Progressive sparse autoencoders: the first n latents are a working SAE."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():  # these read their own arguments
        commands.add_parser(name, add_help=False, help=about)
    demo_parser = commands.add_parser(
        "demo", help="train a Matryoshka SAE on the embedded language model, load it back and show what it found"
    )
    demo_parser.add_argument("--output_dir", default="runs/demo", help="folder of the run (default: %(default)s)")
    parsed, rest = parser.parse_known_args(arguments)
    if rest and parsed.command not in COMMANDS:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if parsed.command == "demo":
        from .demo import demo

        return demo(parsed.output_dir)
    module, function = _MAINS[parsed.command].split(":")
    run = getattr(importlib.import_module(module, __package__), function)  # only now, so that `--help` is fast
    return run(rest if parsed.command in _NEED_NOTHING else rest or ["--help"])


if __name__ == "__main__":
    sys.exit(main())
