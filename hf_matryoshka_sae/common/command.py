"""The frame of a sub-command: values of flags, exit status, and errors as one line on the terminal."""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .data_source import EMBEDDED, DatasetConfig, local_files
from .logs import is_first_process


if TYPE_CHECKING:
    from accelerate import Accelerator


class Interrupted(Exception):
    """The work was asked to stop; everything that it needs to go on has been saved."""

    on_all_processes = True


def whole_numbers(text: str) -> list[int]:
    """Return the value of a flag such as `--widths 64,128,256`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 64,128,256, got {text!r}") from None


def add_subject_flags(
    parser: argparse.ArgumentParser, tokens: int, text: str = "text", default: str = EMBEDDED, where: str = "reads"
) -> None:
    """Add the flags of commands that run a language model on text: model, hookpoint, text and how much of it.

    Args:
        parser (`argparse.ArgumentParser`): The command's.
        tokens (`int`): Default number of tokens.
        text (`str`, *optional*, defaults to `"text"`): What the text is, in help.
        default (`str`, *optional*, defaults to `"embedded"`): What text is taken by default, in help.
        where (`str`, *optional*, defaults to `"reads"`): What the SAE does at the hookpoint, in help.
    """
    parser.add_argument("--model", help="language model: Hub id, folder or 'embedded' (default: what the SAE names)")
    parser.add_argument("--hookpoint", help=f"where the SAE {where} (default: what the SAE names)")
    parser.add_argument("--dataset", metavar="PATH", help=f"{text}: file, folder or Hub id (default: {default})")
    parser.add_argument("--split", help="of the data set (default: train; of the embedded text: heldout)")
    parser.add_argument("--column", default="text", help="with the text (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=tokens, help="of it to look at (default: %(default)s)")


def chosen_dataset(parsed: argparse.Namespace) -> DatasetConfig:
    """Return the data set that [`add_subject_flags`] names; raise `OSError` where its files are missing."""
    path = parsed.dataset or EMBEDDED
    dataset = DatasetConfig(
        path, split=parsed.split or ("heldout" if path == EMBEDDED else "train"), column=parsed.column
    )
    if path != EMBEDDED:
        local_files(dataset)
    return dataset


def exit_status(work: Callable[[], int | None], interrupted: str = "Stopped.") -> int:
    """Do a command's work and return its exit status; an error that a user can mend is a line on stderr.

    Of several processes only the first writes it. Other errors are bugs, and are raised.

    Args:
        work (`Callable[[], int]`): Returns the status, `None` for 0.
        interrupted (`str`, *optional*): Message after Ctrl-C; the status is then 130. [`Interrupted`] has its own.

    Returns:
        `int`: The status of `work`; 2 after a `ValueError` or `OSError`, 130 after an interruption.
    """
    try:
        return work() or 0
    except (KeyboardInterrupt, Interrupted) as stopped:
        message, status = str(stopped) or interrupted, 130
    except (ValueError, OSError) as error:
        message, status = f"error: {error}", 2
    if is_first_process():
        sys.stderr.write(f"\n{message}\n")
    return status


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"`, or the list of known names where none is near.

    `models/` has the same function, which cannot be imported without transformers.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."


@contextmanager
def measuring() -> Iterator["Accelerator"]:
    """Yield the processes of a command that measures, by Accelerate; torch is imported only now."""
    import torch
    from accelerate import Accelerator
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours is the one to watch
    # Makes the process group where there are several processes. Not on MPS: it lacks float64, in which sums are.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    try:
        yield accelerator
    finally:
        accelerator.end_training()
