"""What every test shares: the optional data folder beside the checkout, and no network but a loopback Hub."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .hub_server import HubServer


# Read when huggingface_hub is imported, so they come first. Tests are offline unless they ask for the loopback Hub.
SERVER = HubServer()
os.environ |= {"HF_ENDPOINT": SERVER.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ |= {"HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_TOKEN": "hf_loopback"}
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; before torch is imported, and for subprocesses

import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: E402
from PIL import Image  # noqa: E402

from hf_matryoshka_sae.common import figures  # noqa: E402
from hf_matryoshka_sae.models import dense_ops  # noqa: E402

from . import tiny_run  # noqa: E402
from .processes import Processes  # noqa: E402


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional data folder beside the checkout; tests that need it skip where it is absent."""
    if not (SHARED / "lm").is_dir():
        pytest.skip(f"needs the optional data folder {SHARED.name}/ beside the checkout")
    return SHARED


def made_once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder for all test processes, which `make` fills in the first that asks."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / name / "run", base / name / "done"
    with FileLock(base / f"{name}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A run of two families at two hookpoints that has ended, with nothing measured; not to be changed."""
    with blank_pictures():
        return made_once(tmp_path_factory, "finished", tiny_run.run)


@pytest.fixture(scope="session")
def two_processes() -> Iterator[Processes]:
    """Two processes of one group, for all tests."""
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def four_processes() -> Iterator[Processes]:
    """Four processes of one group, for slow tests."""
    processes = Processes(4)
    yield processes
    processes.close()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> HubServer:
    """An empty Hub that this process talks to, with an empty cache at `tmp_path / "cache"`."""
    SERVER.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return SERVER


@pytest.fixture(scope="session", autouse=True)
def quick_pictures() -> Iterator[None]:
    """Small pictures without a layout: most of the time of a small run would go into them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DPI", 50)
        patch.setattr(ConstrainedLayoutEngine, "execute", lambda self, figure: None)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is kept for releases is slow."""
    for item in items:
        if item.get_closest_marker("release"):
            item.add_marker("slow")


@contextmanager
def blank_pictures() -> Iterator[None]:
    """Pictures of one pixel, for folders of tests whose runs draw what the tests of other folders look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path, **options: Image.new("L", (1, 1)).save(path))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[2.0, -1.0], ids=["pairs", "matmuls"])
def way(request, monkeypatch) -> None:
    """Both ways of summing over what fired: small tests would always take the second."""
    monkeypatch.setattr(dense_ops, "_SHARE", request.param)
    monkeypatch.setattr(dense_ops, "_FEWEST", 0)
