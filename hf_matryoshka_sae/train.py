"""Train SAEs on the hidden states of a language model.

    matryoshka-sae train --config run.yaml
    accelerate launch -m hf_matryoshka_sae.train --config run.yaml --batch_size 4096 --saes.0.k 64

Every field of the YAML file is a flag too; a dot reaches into nested fields, a number, from 0, into a list.
"""

import sys
from typing import TYPE_CHECKING

from .common.logs import is_first_process, log_to_stderr


if TYPE_CHECKING:
    from .training import RunConfig


def main(arguments: list[str] | None = None) -> int:
    """Run a training from command-line arguments; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(_help())
        return 0
    from .training import load_run_config
    from .training.config.run import check_ready

    try:
        config = load_run_config(*_config_and_flags(arguments), look=check_ready)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"\nerror: {error}\n")
        return 2
    return _train(config)


def _train(config: "RunConfig") -> int:
    """Run a training whose fields are right; everything heavy is imported here."""
    from .training import Interrupted, LostProcess, train

    log_to_stderr()
    try:
        train(config)
    except Interrupted as stopped:
        if is_first_process():  # all of them have stopped
            sys.stderr.write(f"\n{stopped}\n")
        return 130
    except LostProcess as error:
        sys.stderr.write(f"\nerror: {error}\n")
        return 1
    except (ValueError, OSError) as error:
        sys.stderr.write(f"\nerror: {error}\n")
        return 2
    return 0


def _config_and_flags(arguments: list[str]) -> tuple[str | None, list[str]]:
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), arguments[:i] + arguments[i + 1 :]
    return None, arguments


def _help() -> str:
    from .training.config.describe import help_text, run_fields

    return (
        f"{__doc__}\n{help_text(run_fields())}\n\n"
        "`matryoshka-sae plan` says what a run will need; examples/ has files to start from.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
