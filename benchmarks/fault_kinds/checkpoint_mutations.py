"""Ways to break a checkpoint's folder. Each says what it did, and whether what is left must be refused.

What must be refused: code in a pickle, names that lead out of the folder, weights that are not finite or no floating
numbers, tensors that say they are far larger than their file. After other changes a checkpoint may also load, as long
as it then works.
"""

import copy
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file


_UNUSED = ("stats_", "latents_", "last_nonzero", "latent_ids", "neighbours")  # read by nobody, or whole numbers
_DEEP, _LONG = "@deep@", "@long@"  # in JSON, for what its writer would not write
_PICKLES = (".pt", ".pth")


@dataclass(frozen=True)
class Fault:
    """What was done to a folder.

    Args:
        what (`str`): For people.
        refused (`bool`): Whether it must not load.
        rows (`bool`): Whether it lies in some latents, so that others may load.
    """

    what: str
    refused: bool = False
    rows: bool = False


def break_folder(folder: Path, marker: Path, outside: Path, rng: random.Random) -> Fault:
    """Break the checkpoint in a folder in one way.

    Args:
        folder (`Path`): Changed in place.
        marker (`Path`): A file that planted code would write.
        outside (`Path`): A folder beside it, into which a name may lead.
        rng (`random.Random`): Chooses.
    """
    if not list(folder.rglob("*.json")) and any(path.stat().st_size < 2**20 for path in folder.rglob("*.npz")):
        choices = [flip, truncate, splice, edit_archive, change_weights]
    else:
        choices = [flip, truncate, splice, *[edit_json] * 5, *[change_weights] * 3]
        choices += [edit_header] * 4 * bool(list(folder.rglob("*.safetensors")))
        choices += [million_pieces] * bool(list(folder.rglob("latents.index.json")))
        choices += [lead_outside] * 4 * bool(_indexes(folder))
    if any(path.suffix in _PICKLES for path in folder.rglob("*")):
        choices += [plant_code, plant_code, edit_archive, edit_archive, stretch]
    return rng.choice(choices)(folder, marker, outside, rng)


def _pick(folder: Path, rng: random.Random, test: Callable[[Path], bool] = lambda path: True) -> Path:
    return rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and test(path)))


def _indexes(folder: Path) -> list[Path]:
    found = [*folder.rglob("*.index.json")]
    return sorted(found + [path for path in folder.glob("config.json") if "sae_collection" in path.read_text()])


def flip(folder: Path, marker: Path, outside: Path, rng: random.Random) -> Fault:
    """Other bytes at up to 64 places of one file."""
    file = _pick(folder, rng)
    content = bytearray(file.read_bytes())
    end = min(len(content), 2048) if rng.random() < 0.5 else len(content)  # where headers are, or anywhere
    places = [rng.randrange(end) for _ in range(rng.choice([1, 4, 64]))] if end else []
    for place in places:
        content[place] = rng.randrange(256)
    file.write_bytes(content)
    return Fault(f"{len(places)} bytes of {file.name} changed")


def truncate(folder: Path, marker: Path, outside: Path, rng: random.Random) -> Fault:
    """The beginning of one file."""
    file = _pick(folder, rng)
    content = file.read_bytes()
    kept = rng.choice([0, 1, 8, rng.randrange(len(content) + 1), max(0, len(content) - 1)])
    file.write_bytes(content[:kept])
    return Fault(f"{file.name} cut to {kept} bytes")


def splice(folder: Path, marker: Path, outside: Path, rng: random.Random) -> Fault:
    """Bytes put in, taken out, or zeroed."""
    file = _pick(folder, rng)
    content = file.read_bytes()
    start = rng.randrange(len(content) + 1)
    length = rng.choice([1, 4, 256, 4096])
    put = rng.choice([b"", bytes(length), rng.randbytes(length)])
    taken = length if rng.random() < 0.5 else 0
    file.write_bytes(content[:start] + put + content[start + taken :])
    return Fault(f"{taken} bytes of {file.name} at {start} became {len(put)}")


# JSON

_STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 10**12, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"),
    "", "a", "1", "true", "../../etc", "/etc/passwd", "\u0000", "x" * 10_000, [], {}, [None], [[]], {"a": 1}, {"": {}},
    [1, 2, 3], [-1, 0], ["a", 1], [1e400], "__import__('os').abort()", "[" * 5000, "9" * 6000, _DEEP, _LONG,
]  # fmt: skip


def edit_json(folder: Path, marker: Path, outside: Path, rng: random.Random) -> Fault:
    """One value of a JSON file replaced, left out, doubled into a list, or another file's JSON in its place."""
    files = sorted(folder.rglob("*.json"))
    if not files:
        return flip(folder, marker, outside, rng)
    file = rng.choice(files)
    content = json.loads(file.read_text())
    if rng.random() < 0.1:
        content = copy.deepcopy(rng.choice(_STRANGE))
        what = f"{file.name} is {repr(content)[:30]}"
    else:
        holder, key = _place(content, rng)
        what = f"{key!r} in {file.name}"
        if rng.random() < 0.15:
            holder.pop(key)
            what += " left out"
        else:
            holder[key] = copy.deepcopy(rng.choice(_STRANGE))
            what += f" is {repr(holder[key])[:30]}"
    file.write_text(_json_text(content))
    return Fault(what)


def _place(content: Any, rng: random.Random) -> tuple[Any, Any]:
    """A dictionary or list somewhere in it, and a key of that."""
    holder, key = content, None
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.15:
            return holder, key
        holder = inner


def _json_text(content: Any) -> str:
    text = json.dumps(content)
    text = text.replace(f'"{_DEEP}"', "[" * 100_000 + "]" * 100_000)
    return text.replace(f'"{_LONG}"', json.dumps(list(range(1, 10**6)))) if _LONG in text else text


def million_pieces(folder: Path, marker: Path, outside: Path, rng: random.Random) -> Fault:
    """An index of a million pieces of one latent each."""
    file = next(folder.rglob("latents.index.json"))
    piece = '{"file": "latents-0000001-of-1000000.safetensors", "start": %d, "stop": %d}'
    pieces = ",".join(piece % (n, n + 1) for n in range(10**6))
    file.write_text(f'{{"format": 1, "num_latents": {10**6}, "pieces": [{pieces}]}}')
    return Fault("an index of a million pieces", refused=True)


def lead_outside(folder: Path, marker: Path, outside: Path, rng: random.Random) -> Fault:
    """A file of the index, moved out of the folder and named there."""
    file = rng.choice(_indexes(folder))
    content = json.loads(file.read_text())
    if "saes" in content:
        ((name, entry),) = content["saes"].items()
        shutil.move(folder / name, outside / "sae")
        named = rng.choice([f"../{outside.name}/sae", str(outside / "sae"), f"layers.2/../../{outside.name}/sae"])
        content["saes"] = {named: entry}
    else:
        pieces = content.get("pieces")
        name = rng.choice(pieces)["file"] if pieces else rng.choice(sorted(set(content["weight_map"].values())))
        shutil.move(file.parent / name, outside / name)
        named = rng.choice(
            [f"../{outside.name}/{name}", str(outside / name), f"./../{outside.name}/{name}", "a\u0000b"]
        )
        file.write_text(file.read_text())
        content = json.loads(file.read_text().replace(json.dumps(name), json.dumps(named)))
    file.write_text(json.dumps(content))
    return Fault(f"{file.name} names {named!r}", refused=True)


# Headers


def edit_header(folder: Path, marker: Path, outside: Path, rng: random.Random) -> Fault:
    """The header of a safetensors file: a type, shape, offset or name, or what it is as a whole."""
    file = _pick(folder, rng, lambda path: path.suffix == ".safetensors")
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = sorted(header.keys() - {"__metadata__"})
    name = rng.choice(names)
    refused = False
    match rng.choice(["dtype", "shape", "offsets", "value", "name", "length", "relabel"]):
        case "relabel":
            known = {"F32": "I32", "F64": "I64", "I64": "F64"}
            name = rng.choice([n for n in names if header[n]["dtype"] in known])
            was = header[name]["dtype"]
            header[name]["dtype"] = known[was]
            refused = was != "I64" and not name.startswith(_UNUSED)
            what = f"{name} is {header[name]['dtype']}, was {was}"
        case "dtype":
            header[name]["dtype"] = rng.choice(
                ["I32", "U8", "BOOL", "F64", "BF16", "F4", "F8_E4M3", "C64", "", None, 3]
            )
            what = f"{name} is {header[name]['dtype']}"
        case "shape":
            shape = header[name]["shape"]
            flat = shape[::-1] if rng.random() < 0.2 else [[], [0], [0, 2**40], [1, *shape], [2**62, 4], [-1], "a"]
            header[name]["shape"] = flat if flat == shape[::-1] else rng.choice(flat)
            what = f"{name} has shape {header[name]['shape']}"
        case "offsets":
            header[name]["data_offsets"] = rng.choice([[0, 0], [0, 2**62], [-8, 8], [8, 0], [], None, [0, len(data)]])
            what = f"{name} lies at {header[name]['data_offsets']}"
        case "value":
            holder, key = _place(header, rng)
            holder[key] = copy.deepcopy(rng.choice(_STRANGE))
            what = f"{key!r} of the header is {repr(holder[key])[:30]}"
        case "name":
            header[rng.choice(["", "W_enc", "b_dec", "x" * 5000, "\u0000"])] = header.pop(name)
            what = f"{name} has another name"
        case "length":
            length = rng.choice([0, 1, 2**31, 2**63, 100 * 2**20, length + 1, max(0, length - 1)])
            file.write_bytes(length.to_bytes(8, "little") + raw[8:])
            return Fault(f"the header of {file.name} has {length} bytes")
    text = _json_text(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return Fault(f"{file.name}: {what}", refused, rows=file.name.startswith("latents-"))


# Tensors


def change_weights(folder: Path, marker: Path, outside: Path, rng: random.Random) -> Fault:
    """Entries that are not finite, another type, fewer axes, or thresholds below 0."""
    kinds = (".safetensors", ".npz", *_PICKLES)
    file = _pick(folder, rng, lambda path: path.suffix in kinds and path.stat().st_size < 2**20)
    state = _read(file)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    used = sorted(
        name for name, value in tensors.items() if value.is_floating_point() and not _is_unused(folder, name)
    )
    if not used:
        return flip(folder, marker, outside, rng)
    name = rng.choice(used)
    changed, refused = tensors[name].clone(memory_format=torch.contiguous_format), True
    match rng.choice(["nan", "inf", "bool", "whole", "half", "below 0", "scalar", "missing"]):
        case "nan":
            changed.view(-1)[rng.randrange(changed.numel())] = float("nan")
            what = f"a NaN in {name}"
        case "inf" if name not in ("threshold", "topk_threshold"):  # a latent that never fires
            changed.view(-1)[rng.randrange(changed.numel())] = rng.choice([float("inf"), float("-inf")])
            refused = not name.endswith("log_threshold") and not name.endswith("log_jumprelu_threshold")
            what = f"an infinity in {name}"
        case "bool":
            changed, what = changed > 0, f"{name} is bool"
            refused = changed.dim() > 0
        case "whole":
            changed, what = (changed * 10).to(rng.choice([torch.int8, torch.int32, torch.int64])), f"{name} is whole"
            refused = changed.dim() > 0
        case "half":
            changed, refused, what = changed.half(), False, f"{name} is half"
        case "below 0":
            changed = -changed.abs() - 0.1
            refused, what = name == "threshold" and folder.name == "jumprelu", f"{name} is below 0"
        case "scalar":
            changed, refused = changed.view(-1)[:1] if rng.random() < 0.5 else changed.view(-1)[0], False
            what = f"{name} has shape {tuple(changed.shape)}"
        case _:
            del state[name]
            _write(file, state)
            return Fault(f"{name} of {file.name} is missing")
    state[name] = changed.contiguous().clone()
    _write(file, state)
    in_rows = what.startswith(("a NaN", "an infinity")) or file.name.startswith("latents-")
    return Fault(f"{file.name}: {what}", refused, rows=in_rows)


def _is_unused(folder: Path, name: str) -> bool:
    unapplied = name == "b_enc" and "bussmann" in {folder.name, folder.parent.name} | {p.name for p in folder.parents}
    return name.startswith(_UNUSED) or unapplied


def _read(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".npz":
        with np.load(file) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    return torch.load(file, weights_only=True)


def _write(file: Path, state: dict[str, Any]) -> None:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file(state, file, metadata)
    elif file.suffix == ".npz":
        np.savez(file, **{name: value.numpy() for name, value in state.items()})
    else:
        torch.save(state, file)


# Pickles and archives


class _Code:
    """What a hostile pickle holds: a call that writes the marker."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def plant_code(folder: Path, marker: Path, outside: Path, rng: random.Random) -> Fault:
    """A pickle that calls something when it is read."""
    file = _pick(folder, rng, lambda path: path.suffix in _PICKLES)
    code = rng.choice(
        [
            _Code(open, str(marker), "w"),
            _Code(os.system, f"touch {marker}"),
            _Code(exec, f"open({str(marker)!r}, 'w')"),
            _Code(os.mkdir, str(marker)),
            _Code(bytearray, 3 * 2**30),
        ]
    )
    state, place = _read(file), rng.choice(["beside", "inside", "alone", "bare"])
    name = rng.choice(sorted(state))
    match place:
        case "beside":
            state["more"] = code
        case "inside":
            state[name] = code
        case "alone":
            state = code
        case "bare":
            file.write_bytes(pickle.dumps(code, protocol=rng.choice([0, 2, 4])))
            return Fault(f"{file.name} is a bare pickle of a call", refused=True)
    legacy = rng.random() < 0.3
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    return Fault(f"{file.name}: a call {place}{', in the older layout' * legacy}", refused=True)


def stretch(folder: Path, marker: Path, outside: Path, rng: random.Random) -> Fault:
    """Tensors of stride 0 that say they have thousands of times the entries that are stored."""
    file = _pick(folder, rng, lambda path: path.suffix in _PICKLES)
    state = _read(file)
    size, kind = 2**15, rng.choice([torch.half, torch.float32, torch.bfloat16])
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim():
            state[name] = torch.ones((), dtype=kind).expand([size] * value.dim())
    torch.save(state, file, _use_new_zipfile_serialization=rng.random() < 0.7)
    return Fault(f"{file.name}: every tensor is one number of stride 0", refused=True)


def edit_archive(folder: Path, marker: Path, outside: Path, rng: random.Random) -> Fault:
    """Bytes of a pickle or a numpy header inside the archive, whose checksums then are right again."""
    file = _pick(folder, rng, lambda path: path.suffix in (".npz", *_PICKLES))
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    name = rng.choice([key for key in sorted(entries) if key.endswith((".npy", "data.pkl"))])
    content = bytearray(entries[name])
    if name.endswith(".npy") and rng.random() < 0.7:
        shape, kind = (
            rng.choice([(2**40,), (2**20, 2**20), (0, 5), (-1,), (3,)]),
            rng.choice(["<f4", "<f8", "|O", "<c8", "?", "<i4", "<f2"]),
        )
        text = io.BytesIO()
        np.lib.format.write_array_header_1_0(text, {"descr": kind, "fortran_order": False, "shape": shape})
        end = 10 + int.from_bytes(content[8:10], "little")
        content[:end] = text.getvalue()
        what = f"{name} is {kind} {shape}"
    else:
        end = len(content) if name.endswith(".pkl") else 128
        places = [rng.randrange(end) for _ in range(rng.choice([1, 2, 8]))]
        for place in places:
            content[place] = rng.randrange(256)
        what = f"{len(places)} bytes of {name} changed"
    entries[name] = bytes(content)
    with zipfile.ZipFile(file, "w") as archive:
        for key, value in entries.items():
            archive.writestr(key, value)
    return Fault(f"{file.name}: {what}")
