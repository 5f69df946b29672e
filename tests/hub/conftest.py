"""What the tests of the hub share."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from hf_matryoshka_sae.hub import measure

from ..conftest import blank_pictures, made_once


@contextmanager
def quick() -> Iterator[None]:
    """Most of the time of a small measurement would go into p-values and pictures."""
    with blank_pictures(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "fit_power_law", partial(measure.fit_power_law, resamples=20))
        yield


@pytest.fixture(scope="package", autouse=True)
def quick_measurements() -> Iterator[None]:
    """Every test here measures so."""
    with quick():
        yield


@pytest.fixture(scope="session")
def measured_run(finished_run, tmp_path_factory) -> Path:
    """The finished run with everything measured; not to be changed."""

    def measured(folder: Path) -> None:
        shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("checkpoint-*"), dirs_exist_ok=True)
        with quick():  # a session's fixtures come before those of a folder
            measure.measure_run(folder, show=False)

    return made_once(tmp_path_factory, "measured", measured)


@pytest.fixture
def run_copy(measured_run, tmp_path) -> Path:
    """A copy of the measured run to change."""
    return Path(shutil.copytree(measured_run, tmp_path / "run"))
