"""What came of a kind of fault."""

from dataclasses import dataclass, field


@dataclass
class Outcome:
    """How often a kind of fault was tried, and how often nothing was lost.

    Args:
        kind (`str`): What was done.
        tried (`int`): How often.
        survived (`int`): How often it ended as it should.
        failures (`list[str]`): A line for each time that it did not: what happened, and how to make it happen again.
    """

    kind: str
    tried: int = 0
    survived: int = 0
    failures: list[str] = field(default_factory=list)
