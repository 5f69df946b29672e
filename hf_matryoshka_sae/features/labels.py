"""Labels of latents that come from elsewhere: Neuronpedia's export of explanations, a CSV, or what an index keeps.

Labels belong to the number that a latent had before any sorting or pruning (`latent_ids` of the SAE), as that is the
number which other tools know.
"""

import csv
import gzip
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .index.store import FeatureIndex


LABELS = "labels.json"
_TOKENS = 3  # of a label
_NUMBERS = ("latent_id", "index", "feature_index", "feature", "latent", "id")
_TEXTS = ("label", "description", "explanation", "title", "name")


def read_labels(path: str | os.PathLike) -> dict[int, str]:
    """Read what latents are called, by the number each had before any sorting or pruning.

    Args:
        path (`str` or `os.PathLike`): A `.csv` (or `.tsv`) with a column `latent_id` or `index` and a column `label`
            or `description`; Neuronpedia's explanations, `.jsonl` or `.json`, with `index` and `description`; a JSON
            object of numbers and labels; any of them as `.gz`; or a folder of such files. Of a latent with several
            labels the last counts.

    Raises:
        `ValueError`: if there is no such file, or it holds no labels.
    """
    path = Path(path).expanduser()
    files = sorted(file for file in path.rglob("*") if _kind(file)) if path.is_dir() else [path]
    labels: dict[int, str] = {}
    for file in files:
        if not file.is_file() or not _kind(file):
            raise ValueError(f"Labels are read from .csv, .tsv, .json and .jsonl (or .gz of these); got {file}.")
        try:
            for record in _records(file):
                number, text = _first(record, _NUMBERS), _first(record, _TEXTS)
                if number is not None and text:
                    labels[int(number)] = str(text).strip()
        except (OSError, EOFError, ValueError, csv.Error) as error:
            raise ValueError(f"The labels in {file} cannot be read: {error}") from error
    if not labels:
        raise ValueError(
            f"{path} holds no labels. Expected records with one of {', '.join(_NUMBERS)} and one of "
            f"{', '.join(_TEXTS)}."
        )
    return labels


def _kind(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    return suffixes[-1] if suffixes and suffixes[-1] in (".csv", ".tsv", ".json", ".jsonl") else None


def _records(file: Path) -> Iterator[dict[str, Any]]:
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    text, kind = content.decode("utf-8-sig"), _kind(file)
    if kind in (".csv", ".tsv"):
        yield from csv.DictReader(io.StringIO(text), delimiter="," if kind == ".csv" else "\t")
    elif kind == ".jsonl":
        yield from (json.loads(line) for line in text.splitlines() if line.strip())
    else:
        data = json.loads(text)
        if isinstance(data, dict) and all(str(key).isdigit() for key in data):
            data = [{"index": key, "label": label} for key, label in data.items()]
        yield from data if isinstance(data, list) else [data]


def _first(record: Any, names: tuple[str, ...]) -> Any:
    """Return the first of some fields that a record has, whatever the case of its name."""
    if not isinstance(record, dict):
        return None
    fields = {str(name).strip().lower(): value for name, value in record.items()}
    return next((fields[name] for name in names if fields.get(name) not in (None, "")), None)


def short_labels(index: "FeatureIndex") -> dict[int, str]:
    """Return a few words for each latent: its label, or the tokens on which it fires most strongly, if it has any.

    An index of an earlier version has no such tokens, and without a tokenizer they have no text.
    """
    ids = index.table(["latent_id"])["latent_id"].to_pylist()
    tokens = (
        index.table(["own_tokens"])["own_tokens"].to_pylist() if "own_tokens" in index.columns else [[]] * len(ids)
    )
    ids_named = [token for own in tokens for token in own[:_TOKENS]]
    texts = {token: text for token, text in zip(ids_named, index.spell(ids_named), strict=True) if text != f"#{token}"}
    labels = {}
    for latent, (latent_id, own) in enumerate(zip(ids, tokens, strict=True)):
        words = [shown_token(texts[token]) for token in own[:_TOKENS] if token in texts]
        if label := index.labels.get(latent_id) or " · ".join(dict.fromkeys(words)):
            labels[latent] = label
    return labels


def shown_token(text: str) -> str:
    """Return the text of a token as a label shows it: without spaces around it, which are marks if it has no more."""
    return text.strip() or repr(text)[1:-1].replace(" ", "␣")
