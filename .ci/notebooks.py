"""Run the notebooks of a folder in place, and keep their outputs: `python .ci/notebooks.py FOLDER [NAME ...]`."""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


# Bars are widgets, of which a file keeps nothing; figures are for screens.
os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def run(path: Path) -> None:
    """Execute a notebook in an empty folder, so that what it writes lies about nowhere."""
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        cell.metadata = {}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        where = {"metadata": {"path": scratch}}
        NotebookClient(book, kernel_name="python3", timeout=900, resources=where, record_timing=False).execute()
    book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(book, path)
    sys.stdout.write(f"{path.name}: {time.monotonic() - begin:.0f} s\n")


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    for path in sorted(Path(folder).glob("*.ipynb")):
        if not names or path.stem in names:
            run(path)
