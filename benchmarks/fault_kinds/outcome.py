"""What a kind of fault reports."""

from dataclasses import dataclass, field


@dataclass
class Outcome:
    """How the package stood a kind of fault.

    Args:
        kind (`str`): Of the faults.
        tried (`int`): Faults that were tried.
        survived (`int`): Those after which everything was as promised.
        failures (`list[str]`): A line for each of the others: how to reproduce it, and what happened.
    """

    kind: str
    tried: int = 0
    survived: int = 0
    failures: list[str] = field(default_factory=list)
