"""Logging of a command's processes: the first writes everything, the others warnings."""

import logging
import os


def is_first_process() -> bool:
    """Return whether this is the first process of a launch, which writes messages that concern all."""
    return os.environ.get("RANK", "0") == "0"


def log_to_stderr() -> None:
    """Log this package's messages to stderr: everything in the first process of a launch, warnings in the others."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # ours is the one to watch
    if not is_first_process():
        transformers_logging.set_verbosity_error()  # all would warn alike of one checkpoint
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hf_matryoshka_sae").setLevel(logging.INFO if is_first_process() else logging.WARNING)
