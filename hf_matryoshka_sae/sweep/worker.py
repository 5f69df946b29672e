"""One run of a sweep in a process of its own, which ends when the sweep's process does.

python -m hf_matryoshka_sae.sweep.worker RUN_YAML OUTPUT_DIR
"""

import os
import signal
import sys
import threading

from ..train import main


def _end_with_parent() -> None:
    sys.stdin.buffer.read()  # returns when the sweep's process is gone
    os.kill(os.getpid(), signal.SIGTERM)  # the trainer saves a checkpoint and ends


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(main(["--config", sys.argv[1], "--output_dir", sys.argv[2]]))
