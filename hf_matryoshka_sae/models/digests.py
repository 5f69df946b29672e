"""Digests of blocks of rows and of all weights.

The first let a reader of the first latents check them without the rest of the file, the second say to what a result
belongs.

The Hub's own checksum is of a whole file. A pushed SAE carries `model.digests.json` beside its weights: the ends of
blocks of rows (all prefix widths, powers of two, and every 64th of the dictionary), and for each tensor a digest of
each block. They find damage on the way, as a checksum does; they are no signature.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from .pieces import tensor_files
from .safetensors_file import as_bytes


DIGESTS_NAME = "model.digests.json"
_HEX_DIGITS = 16


def block_ends(num_rows: int, widths: list[int]) -> list[int]:
    """Where blocks of rows end, ascending up to `num_rows`: few enough for any size, and all widths people ask for."""
    powers = {2**power for power in range(num_rows.bit_length())}
    parts = {round(num_rows * part / 64) for part in range(1, 65)}
    return sorted(end for end in powers | parts | set(widths) if 1 <= end <= num_rows)


def digest(data: bytes | memoryview) -> str:
    """The digest of some bytes."""
    return hashlib.sha256(data).hexdigest()[:_HEX_DIGITS]


def row_digests(
    state: dict[str, Tensor], num_rows: int, widths: list[int], whole: set[str], first_row: int = 0
) -> dict:
    """What `model.digests.json` holds for the tensors of an SAE.

    Args:
        state (`dict[str, Tensor]`): As they are saved.
        num_rows (`int`): F.
        widths (`list[int]`): Prefix widths; blocks end there too.
        whole (`set[str]`): Tensors without a latent axis.
        first_row (`int`, *optional*, defaults to 0): Which latent the first of the rows in `state` is.

    Returns:
        `dict` with `blocks` (where they end), `rows` (a digest of each tensor for each block that lies inside the
        rows) and `whole`.
    """
    ends = block_ends(num_rows, widths)
    blocks = list(zip([0, *ends], ends, strict=False))

    def digests(rows: Tensor) -> list[str]:
        inside = [(a - first_row, b - first_row) for a, b in blocks if first_row <= a and b <= first_row + len(rows)]
        return [digest(as_bytes(rows[a:b])) for a, b in inside]

    return {
        "algorithm": f"sha256, {_HEX_DIGITS} hex digits",
        "blocks": ends,
        "rows": {name: digests(tensor) for name, tensor in state.items() if name not in whole},
        "whole": {name: digest(as_bytes(state[name])) for name in sorted(whole & state.keys())},
    }


def digests_of_piece(published: dict, start: int, stop: int) -> dict:
    """Return what `model.digests.json` says of a file with the latents from `start` to before `stop`.

    Ends of blocks are counted from the file's own first row. A block that begins before the file has `None`: it cannot
    be checked.
    """
    ends = published.get("blocks", ())
    inside = [i for i, end in enumerate(ends) if start < end <= stop]
    cut = [i for i in inside if (ends[i - 1] if i else 0) < start]

    def of_piece(digests: list[str]) -> list[str | None]:
        return [None if i in cut else digests[i] for i in inside if i < len(digests)]

    rows = {name: of_piece(digests) for name, digests in published.get("rows", {}).items()}
    return {**published, "blocks": [ends[i] - start for i in inside], "rows": rows}


def first_wrong_row(
    published: dict, name: str, start: int, have: int, read: Callable[[int, int], bytes]
) -> int | None:
    """Where the first block begins that is not what was published, among those that end past `start` and up to `have`.

    Args:
        published (`dict`): What `model.digests.json` holds.
        name (`str`): Of the tensor.
        start (`int`): Rows that were there, and checked, before.
        have (`int`): Rows that are there.
        read (`Callable[[int, int], bytes]`): Gives the bytes of the rows between two.
    """
    if name in published.get("whole", {}):
        return None if digest(read(0, have)) == published["whole"][name] else 0
    begin = 0
    for end, expected in zip(published.get("blocks", ()), published.get("rows", {}).get(name, ()), strict=False):
        if start < end <= have and expected is not None and digest(read(begin, end)) != expected:
            return begin
        begin = end
    return None


def weights_digest(sae: nn.Module) -> str:
    """SHA-256 over an SAE's tensors, by name: says of which weights a result is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def folder_digest(folder: Path) -> str | None:
    """SHA-256 of the files of an SAE's weights, over all shards or pieces; `None` where there are none."""
    digest, files = hashlib.sha256(), tensor_files(folder)
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest() if files else None
