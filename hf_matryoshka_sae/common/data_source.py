"""The source of text in a config, and a check that its files exist; imported before torch."""

import difflib
from dataclasses import dataclass
from pathlib import Path


EMBEDDED = "embedded"
LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
"""The name of the `datasets` loader, by the suffix of a file."""


@dataclass
class DatasetConfig:
    """The source of text."""

    path: str
    """Hub data set id, a folder of files, one `.parquet`, `.jsonl`, `.json` or `.txt` file (documents of a `.txt` file
    are separated by blank lines), or `embedded` for the text the package ships."""
    name: str | None = None
    """Configuration of a Hub data set."""
    split: str = "train"
    """In a folder: the files named after it, or all files when the split is `train` and none is. A single file is one
    split, whatever is asked."""
    column: str = "text"
    """Column holding the text, or a list of chat messages (`{"role": ..., "content": ...}`), which the tokenizer's
    chat template renders."""
    streaming: bool | None = None
    """Read while training instead of preparing the data set first; by default for Hub ids, not for local files."""
    source_column: str | None = None
    """Column that names where each text is from. Of an `eval_dataset`: FVU and L0 are reported for each source too."""


def local_files(config: DatasetConfig) -> list[Path] | None:
    """Return the files of a local data set, `None` where the path reads as a Hub id.

    Raises:
        `ValueError`: If the path or a file of the split is missing, or kinds of files are mixed.
    """
    path = Path(config.path).expanduser()
    if path.is_dir():
        return _split_files(path, config.split)
    if path.suffix not in LOADERS:
        if path.exists() or path.is_absolute() or config.path.startswith((".", "~")):
            raise _missing_path(path)
        return None
    if not path.is_file():
        raise _missing_path(path)
    return [path]


def _split_files(folder: Path, split: str) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix in LOADERS and file.is_file())
    if not files:
        raise ValueError(f"The folder '{folder}' has no {', '.join(LOADERS)} file.")
    named = [file for file in files if file.stem.startswith(split) or split in file.relative_to(folder).parts[:-1]]
    if not named and split != "train":
        names = ", ".join(file.relative_to(folder).as_posix() for file in files[:10])
        raise ValueError(f"The folder '{folder}' has no file for the split '{split}'; it has {names}.")
    files = named or files
    kinds = {LOADERS[file.suffix] for file in files}
    if len(kinds) > 1:
        raise ValueError(f"The folder '{folder}' mixes {', '.join(sorted(kinds))} files; keep one kind in a folder.")
    return files


def _missing_path(path: Path) -> ValueError:
    if path.exists():
        return ValueError(f"'{path}' is not a supported file; expected one of {', '.join(LOADERS)}, or a folder.")
    if not path.parent.is_dir():
        return ValueError(f"The data set '{path}' does not exist, nor does the folder '{path.parent}'.")
    beside = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir() or entry.suffix in LOADERS)
    near = difflib.get_close_matches(path.name, beside, n=5) or beside[:5]
    return ValueError(f"The data set '{path}' does not exist. Near it: {', '.join(near) or 'nothing readable'}.")
