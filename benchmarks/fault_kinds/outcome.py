"""What a fault benchmark found."""

from dataclasses import dataclass


@dataclass
class Outcome:
    """How many faults of one kind were survived.

    Args:
        kind (`str`): What was broken.
        tried (`int`), survived (`int`): Faults that were tried, and those that ended as they should.
        failures (`list[str]`): One line for each of the others, which says what happened and how to reproduce it.
    """

    kind: str
    tried: int
    survived: int
    failures: list[str]
