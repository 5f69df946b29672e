"""Cases of several axes without their product."""

import random
from collections.abc import Iterable
from typing import Any

import pytest


def each(**axes: Iterable | dict[str, Any]) -> pytest.MarkDecorator:
    """As many cases as the longest axis has values, each value of each axis in one at least, and two more in which the
    first and the last values of all axes meet.

    Args:
        axes: values by argument of the test; a dict names them.
    """
    named = {axis: values if isinstance(values, dict) else _named(axis, values) for axis, values in axes.items()}
    count, rng, columns = max(map(len, named.values())), random.Random(0), []
    for names in map(list, named.values()):
        mixed = (names * count)[:count]
        rng.shuffle(mixed)
        columns.append([names[0], names[-1], *mixed])
    rows = dict.fromkeys(zip(*columns, strict=True))
    cases = [[values[name] for values, name in zip(named.values(), row, strict=True)] for row in rows]
    return pytest.mark.parametrize(list(axes), cases, ids=map("-".join, rows))


def _named(axis: str, values: Iterable) -> dict[str, Any]:
    return {f"{axis}{i}" if callable(value) else str(value): value for i, value in enumerate(values)}
