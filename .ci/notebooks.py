"""Run the notebooks of a folder in place, and keep their outputs: `python .ci/notebooks.py FOLDER [NAME ...]`."""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


WIDGET = "application/vnd.jupyter.widget-view+json"


def run(path: Path) -> None:
    """Execute a notebook in an empty folder: what it writes is not left anywhere."""
    book = nbformat.read(path, as_version=4)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        client = NotebookClient(
            book,
            kernel_name="python3",
            timeout=900,
            resources={"metadata": {"path": scratch}},
            record_timing=False,
            coalesce_streams=True,
            store_widget_state=False,
        )
        client.execute()
    for cell in book.cells:
        if cell.cell_type == "code":  # of bars nothing is to be seen without the process that drew them
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(book, path)
    sys.stdout.write(f"{path.name}: {time.monotonic() - begin:.0f} s\n")


if __name__ == "__main__":
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    folder, *names = sys.argv[1:]
    for path in sorted(Path(folder).glob("*.ipynb")):
        if not names or path.stem in names:
            run(path)
