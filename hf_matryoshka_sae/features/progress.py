"""What an unfinished index knows, in one file for each process: whole or absent, without pickle."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .windows import Position


_TEXT = "text."


def state_file(folder: Path, rank: int, world: int) -> Path:
    """The file of a process."""
    return folder / f"state-{rank:05d}-of-{world:05d}.safetensors"


def save_state(path: Path, settings: dict[str, Any], position: Position, state: dict[str, Tensor]) -> None:
    """Replace the file by a newer state; it is complete before it takes its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    tensors |= {_TEXT + name: tensor.contiguous() for name, tensor in position.tensors().items()}
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, staged, {"settings": json.dumps(settings), "position": position.to_json()})
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def load_state(path: Path, settings: dict[str, Any]) -> tuple[Position, dict[str, Tensor]] | None:
    """The state in a file; `None` where there is none, or one of other settings."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("settings") != json.dumps(settings):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (FileNotFoundError, SafetensorError):
        return None
    text = {name.removeprefix(_TEXT): tensor for name, tensor in tensors.items() if name.startswith(_TEXT)}
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith(_TEXT)}
    return Position.of(metadata["position"], text), state
