"""What the processes of a command say while they work."""

import logging
import os


def is_first_process() -> bool:
    """Whether this is the process of a launch that says what all of them know."""
    return os.environ.get("RANK", "0") == "0"


def log_to_stderr() -> None:
    """Log what this package tells to stderr: everything in the first process of a launch, warnings in the others."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # ours is the one to watch
    if not is_first_process():
        transformers_logging.set_verbosity_error()  # of one checkpoint, all would warn alike
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hf_matryoshka_sae").setLevel(logging.INFO if is_first_process() else logging.WARNING)
