"""Train one run of a sweep in a process of its own, which ends when the sweep's process does.

python -m hf_matryoshka_sae.studies.scaling.worker RUN_YAML OUTPUT_DIR
"""

import os
import signal
import sys
import threading

from ...train import main


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the sweep's process is gone; a read of sys.stdin would hold a lock at the end
    os.kill(os.getpid(), signal.SIGTERM)  # the trainer saves a checkpoint and ends


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(main(["--config", sys.argv[1], "--output_dir", sys.argv[2]]))
