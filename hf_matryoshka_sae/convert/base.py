"""The parts of a format."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..models import SAEModel
from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    Args:
        name (`str`): Its name for users; `names.py` has a line about it.
        claims (`Callable`): Returns whether a checkpoint is of this format, by its files, config and tensors.
        read (`Callable`): Returns the SAE of a checkpoint.
        objection (`Callable`, *optional*): Returns why the format cannot express an SAE; `None` where it can.
        write (`Callable`, *optional*): Writes an SAE to a path; called only without an objection.
    """

    name: str
    claims: Callable[[Checkpoint], bool]
    read: Callable[[Checkpoint], SAEModel]
    objection: Callable[[SAEModel], str | None] | None = None
    write: Callable[[SAEModel, Path], None] | None = None


def first_objection(*checks: tuple[bool, str]) -> str | None:
    """Return the reason of the first check that holds."""
    return next((reason for holds, reason in checks if holds), None)
