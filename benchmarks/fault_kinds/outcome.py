"""What one kind of fault did."""

from dataclasses import dataclass


@dataclass
class Outcome:
    """How many tries of a kind of fault ended well.

    Args:
        kind (`str`): Name of the kind.
        tried (`int`): How often it was tried.
        survived (`int`): How often it ended as it should.
        failures (`list[str]`): What went wrong, a line for each of the others.
    """

    kind: str
    tried: int
    survived: int
    failures: list[str]
