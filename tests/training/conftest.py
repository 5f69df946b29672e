"""What the tests of training share."""

import signal
from collections.abc import Callable, Iterator

import pytest

from hf_matryoshka_sae.training.run.trainer import Trainer

from ..conftest import blank_pictures


@pytest.fixture(scope="package", autouse=True)
def runs_draw_nothing() -> Iterator[None]:
    """The closing plot of a run is a quarter of the time of a small one; test_report.py of the evaluation draws it."""
    with blank_pictures():
        yield


@pytest.fixture
def interrupt(monkeypatch) -> Callable[..., list[int]]:
    """Call it with n: a signal, Ctrl-C by default, comes in the n-th step from then on; it gives the list of steps."""

    def in_step(number: int, sign: int = signal.SIGINT) -> list[int]:
        steps: list[int] = []

        def counted(self, step, before=Trainer._step):
            steps.append(step)
            if len(steps) == number:
                signal.raise_signal(sign)
            return before(self, step)

        monkeypatch.setattr(Trainer, "_step", counted)
        return steps

    return in_step
