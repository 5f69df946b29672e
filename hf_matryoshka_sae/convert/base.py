"""What a format is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..models import SAEModel
from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    Args:
        name (`str`): What users call it; `names.py` has a line about it.
        claims (`Callable`): Whether a checkpoint is of this format, by its files, config and tensors.
        read (`Callable`): The SAE of a checkpoint.
        objection (`Callable`, *optional*): Why it cannot express an SAE; `None` where it can.
        write (`Callable`, *optional*): Write an SAE to a path; only without an objection.
    """

    name: str
    claims: Callable[[Checkpoint], bool]
    read: Callable[[Checkpoint], SAEModel]
    objection: Callable[[SAEModel], str | None] | None = None
    write: Callable[[SAEModel, Path], None] | None = None


def first_objection(*checks: tuple[bool, str]) -> str | None:
    """The reason of the first check that holds."""
    return next((reason for holds, reason in checks if holds), None)
