"""A dictionary in pieces: files that each hold a run of latents of every tensor.

    latents-00001-of-00004.safetensors    rows [0, F/4) of W_enc, W_dec, b_enc, ... under their usual names, and b_dec
    latents-00002-of-00004.safetensors    rows [F/4, F/2)
    ...
    latents.index.json                    {"format": 1, "num_latents": F, "pieces": [{"file", "start", "stop"}, ...]}

transformers puts each tensor whole into one file, which for millions of latents is too large a file. Who writes which
rows leaves no trace: the files are planned from sizes alone, so a dictionary that is spread over processes is written
by all of them at once, each its own rows, into a folder that all of them see, and no process holds the whole:

    plan = plan_files(my_rows, num_latents, max_bytes)      # on every process: equal everywhere
    allocate_files(folder, plan)                            # on one, before the others begin
    write_latents(folder, plan, my_first_row, my_rows)      # on every process
    write_index(folder, plan)                               # on one, when all are done
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from .safetensors_file import Specs, allocate, num_bytes, write_rows


WHOLE_TENSORS = {"b_dec"}  # has no latent axis
PIECES_INDEX_NAME = "latents.index.json"

_FORMAT = 1
_LARGEST_INDEX = 2**22  # bytes; that of a thousand pieces has 100 KB
_PIECE = re.compile(r"latents-\d{5,}-of-\d{5,}\.safetensors")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_METADATA = {"format": "pt"}  # as transformers has it
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Piece:
    """A file and its latents.

    Args:
        file (`str`): Its name.
        start (`int`), stop (`int`): It holds the latents from the first to before the second.
    """

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class FilePlan:
    """The files of a dictionary, before they are written; see [`plan_files`].

    Args:
        num_latents (`int`): F.
        pieces (`tuple[Piece]`): In order; one, called `model.safetensors`, where all fits a file.
        specs (`Mapping`): Type and shape of each tensor of the whole dictionary.
    """

    num_latents: int
    pieces: tuple[Piece, ...]
    specs: Specs

    def specs_of(self, piece: Piece) -> Specs:
        """Type and shape of each tensor of a file."""
        rows, specs = piece.stop - piece.start, {}
        for name, (dtype, shape) in self.specs.items():
            if name not in WHOLE_TENSORS:
                specs[name] = (dtype, (rows, *shape[1:]))
            elif piece.start == 0:
                specs[name] = (dtype, shape)
        return specs


def plan_files(tensors: Mapping[str, Tensor], num_latents: int, max_bytes: int | str) -> FilePlan:
    """Which files a dictionary gets: one where it fits, else as few pieces of equal size as the bound allows.

    Args:
        tensors (`Mapping[str, Tensor]`): A state dict, or any rows of one: the number of rows makes no difference.
        num_latents (`int`): F, of the whole dictionary.
        max_bytes (`int` or `str`): Of a file's tensors, such as `"5GB"`; a file has at least one latent.

    Returns:
        [`FilePlan`], the same for any rows of the same dictionary.

    Raises:
        `ValueError`: if `max_bytes` is no size.
    """
    limit = _size(max_bytes)
    specs = {name: (tensor.dtype, (num_latents, *tensor.shape[1:])) for name, tensor in tensors.items()}
    specs |= {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in WHOLE_TENSORS & tensors.keys()}
    whole = sum(num_bytes(*specs[name]) for name in WHOLE_TENSORS & specs.keys())
    row = sum(num_bytes(dtype, shape[1:]) for name, (dtype, shape) in specs.items() if name not in WHOLE_TENSORS)
    if whole + num_latents * row <= limit:
        return FilePlan(num_latents, (Piece(SAFE_WEIGHTS_NAME, 0, num_latents),), specs)
    count = -(-num_latents // max(1, (limit - whole) // row))
    ends = [num_latents * number // count for number in range(count + 1)]
    names = [f"latents-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return FilePlan(num_latents, tuple(map(Piece, names, ends, ends[1:])), specs)


def allocate_files(folder: str | os.PathLike, plan: FilePlan) -> None:
    """Make the planned files, with their headers and sizes; their tensors are zero."""
    for piece in plan.pieces:
        allocate(Path(folder) / piece.file, plan.specs_of(piece), _METADATA)


def write_latents(
    folder: str | os.PathLike, plan: FilePlan, first_row: int, tensors: Mapping[str, Tensor], show: bool = False
) -> None:
    """Write rows into whichever files they belong to, and bring them to the disk.

    Args:
        folder (`str` or `os.PathLike`): Where [`allocate_files`] made the files.
        plan ([`FilePlan`]): The same on all processes.
        first_row (`int`): Which latent of the dictionary the first row is.
        tensors (`Mapping[str, Tensor]`): State dict of these rows; what has no latent axis is written by those who
            have the first latent.
        show (`bool`, *optional*, defaults to `False`): Show a progress bar.

    Raises:
        `ValueError`: for other tensors than planned, or rows past the end.
        `OSError`: if a file cannot be written.
    """
    rows = {name: tensor for name, tensor in tensors.items() if name not in WHOLE_TENSORS}
    counts = {len(tensor) for tensor in rows.values()}
    if plan.specs.keys() != tensors.keys() or len(counts) != 1:
        found = {name: len(tensor) for name, tensor in rows.items()}
        raise ValueError(f"As many rows of each of {sorted(plan.specs)} should be written, got {found}.")
    (count,) = counts
    if not 0 <= first_row <= plan.num_latents - count:
        raise ValueError(f"{count} rows from {first_row} on do not lie in a dictionary of {plan.num_latents} latents.")
    for piece in logging.tqdm(plan.pieces, desc="Writing latents", disable=not show):
        start, stop = max(piece.start, first_row), min(piece.stop, first_row + count)
        if start >= stop:
            continue
        path, specs = Path(folder) / piece.file, plan.specs_of(piece)
        inside = {name: tensor[start - first_row : stop - first_row] for name, tensor in rows.items()}
        write_rows(path, specs, inside, start - piece.start, _METADATA)
        if start == 0:
            write_rows(path, specs, {name: tensors[name] for name in specs if name in WHOLE_TENSORS}, 0, _METADATA)


def write_index(folder: str | os.PathLike, plan: FilePlan) -> None:
    """Write the index of pieces that are complete; one file needs none."""
    if plan.pieces[0].file == SAFE_WEIGHTS_NAME:
        return
    pieces = [vars(piece) for piece in plan.pieces]
    index = {"format": _FORMAT, "num_latents": plan.num_latents, "pieces": pieces}
    (Path(folder) / PIECES_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_index_json(path: str | os.PathLike) -> dict:
    """The JSON of an index of files; raises `ValueError` for one that is absurdly large, or no JSON."""
    size = os.path.getsize(path)
    if size > _LARGEST_INDEX:
        raise ValueError(f"it has {size:,} bytes, and at most {_LARGEST_INDEX:,} are read")
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_index(path: str | os.PathLike) -> list[Piece]:
    """The pieces of a dictionary, in order.

    Raises:
        `SafetensorError`: if the index is damaged, or its pieces leave latents out.
        `ValueError`: if it is of a newer format.
    """
    try:
        index = read_index_json(path)
        version, num_latents = int(index["format"]), int(index["num_latents"])
        pieces = [Piece(str(piece["file"]), int(piece["start"]), int(piece["stop"])) for piece in index["pieces"]]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise SafetensorError(f"{path} is no index of pieces: {error!r}") from error
    if version > _FORMAT:
        raise ValueError(
            f"{path} is of format {version}; this version of hf_matryoshka_sae reads up to {_FORMAT}. Update the "
            "package: pip install -U hf_matryoshka_sae."
        )
    begins = [0, *(piece.stop for piece in pieces)]
    in_order = all(piece.start == begin < piece.stop for piece, begin in zip(pieces, begins, strict=False))
    if not in_order or begins[-1] != num_latents or not all(_PIECE.fullmatch(piece.file) for piece in pieces):
        raise SafetensorError(f"{path} is no index of pieces: they do not follow each other up to {num_latents}")
    return pieces


def is_weights(name: str) -> bool:
    """Whether a file of this name belongs to the weights of an SAE: of one file, of shards, or of pieces."""
    return bool(_WEIGHTS.fullmatch(name) or _PIECE.fullmatch(name) or name == PIECES_INDEX_NAME)


def tensor_files(folder: Path) -> list[Path]:
    """The files of a folder that hold tensors of an SAE, variants among them, by name."""
    pieces = [path for path in folder.glob("latents-*.safetensors") if _PIECE.fullmatch(path.name)]
    return sorted([*folder.glob("model*.safetensors"), *pieces])


def _size(size: int | str) -> int:
    """Bytes, from a number or such a text as `"5GB"` (decimal units, as in transformers)."""
    if isinstance(size, str):
        text = size.strip()
        try:
            size = int(float(text[:-2]) * _UNITS[text[-2:].upper()])
        except (KeyError, ValueError, OverflowError) as error:
            raise ValueError(f"Expected a size such as '5GB' or '200MB' (KB, MB, GB, TB), got {text!r}.") from error
    if size < 1:
        raise ValueError(f"A file must be allowed at least 1 byte, got {size}.")
    return size
