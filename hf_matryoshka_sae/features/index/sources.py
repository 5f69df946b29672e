"""The sources of an index: SAE, language model and text, opened and identified by digests."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from ...activations import DatasetConfig, Documents, load_language_model
from ...activations.language_model import EMBEDDED
from ...convert.places import only_sae, saes_in
from ...models import SAEModel
from ...models.digests import weights_digest
from ...models.places import sae_config
from .layout import CONTEXTS, INDEX, LATENTS


_TEXT_FILES = (".parquet", ".jsonl", ".json", ".txt")
_READ_WHOLE = 2**30  # bytes of text files that are digested; more would take longer than some builds
_FIRST_DOCUMENTS = 64


# The SAE


def opened_sae(sae: SAEModel | str | os.PathLike, device: torch.device) -> tuple[SAEModel, Path | None]:
    """Load the SAE; return it with the folder it lies in, `None` where it is not, as it is, in one.

    Raises:
        `ValueError`: if there is none, or its weights are not finite.
    """
    if not isinstance(sae, SAEModel):
        try:
            place = only_sae(saes_in(sae), " An index is of one SAE.")
            loaded = place.load().to(device)
        except OSError as error:
            raise ValueError(f"No SAE can be loaded from '{sae}': {error}") from error
        check_finite(loaded)
        return loaded, place.folder
    check_finite(sae)
    folder = Path(sae.name_or_path or "/nowhere").expanduser()
    # The index of an SAE that was pruned, sorted or trained since must not replace that of the SAE in the folder.
    if sae_config(folder) is None or weights_digest(AutoModel.from_pretrained(folder)) != weights_digest(sae):
        return sae, None
    return sae, folder


def check_finite(sae: SAEModel) -> None:
    """Raise `ValueError` for weights that give no activations: NaN, or infinite rows."""
    for name, tensor in sae.state_dict().items():
        if not tensor.is_floating_point():
            continue
        rows = name in ("W_enc", "W_dec")  # a bias or a threshold may be infinite: that latent never fires
        if not bool((torch.isfinite(tensor) if rows else ~torch.isnan(tensor)).all()):
            raise ValueError(
                f"The SAE's `{name}` has values that are not finite, so its activations mean nothing. Load it again, "
                "or take an earlier checkpoint of its run."
            )


# The language model


def opened_model(model: str | nn.Module, tokenizer: Any, device: torch.device) -> tuple[nn.Module, Any]:
    """Load the language model and its tokenizer where they are not given."""
    if not isinstance(model, nn.Module):
        model, own = load_language_model(model, device=device)
        return model, tokenizer or own
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(getattr(model, "name_or_path", ""))
        except (OSError, ValueError) as error:
            raise ValueError(f"Pass the `tokenizer` of this {type(model).__name__}: {error}") from error
    return model.eval(), tokenizer


# The text


def text_digest(dataset: DatasetConfig | Documents | list[str]) -> str | None:
    """Return a SHA-256 that tells a text from another of the same name; `None` for the Hub's and the embedded text.

    Local files are digested whole up to 1 GiB together, beyond that by name, size and time. Of [`Documents`], which
    need not end, the first are digested.
    """
    if isinstance(dataset, list):
        return _digest_of_texts(dataset)
    if isinstance(dataset, DatasetConfig):
        return _digest_of_files(Path(dataset.path).expanduser()) if dataset.path != EMBEDDED else None
    state = dataset.state_dict()
    texts = dataset.take(_FIRST_DOCUMENTS)
    dataset.load_state_dict(state)
    return _digest_of_texts(texts)


def _digest_of_texts(texts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        text = text if isinstance(text, str) else json.dumps(text, default=str)
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _digest_of_files(path: Path) -> str | None:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _TEXT_FILES and file.is_file())
    else:
        files = [path] if path.is_file() else []
    if not files:
        return None
    digest, whole = hashlib.sha256(), sum(file.stat().st_size for file in files) <= _READ_WHOLE
    for file in files:
        about = file.stat()
        name = file.relative_to(path).as_posix() if file != path else ""  # a renamed file is the same text
        digest.update(f"{name}\0{about.st_size}\0{'' if whole else about.st_mtime_ns}\0".encode())
        if whole:
            with open(file, "rb") as stream:
                while block := stream.read(2**22):
                    digest.update(block)
    return digest.hexdigest()


def described(dataset: DatasetConfig) -> dict[str, Any]:
    """Return the fields of a data set for `index.json`."""
    return asdict(dataset) | {"path": public_name(str(dataset.path))}


def public_name(name: str) -> str:
    """Return a name fit for publication, as an index is pushed: of a local folder only the last part of its path."""
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name


# Where the index goes


def check_target(target: Path) -> None:
    """Raise `ValueError` where an index cannot be written, before any work is done for it; create nothing."""
    place = target
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"The index cannot be written to '{target}': '{place}' is a file. Name another `output_dir`.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"The index cannot be written to '{target}': no permission to write in '{place}'. Name another "
            "`output_dir`."
        )
    for name in (INDEX, LATENTS, CONTEXTS):
        if (target / name).is_dir():
            raise ValueError(f"The index cannot be written: '{target / name}' is a folder. Move it away.")
