"""What the tests of studies share."""

from collections.abc import Iterator

import pytest
from matplotlib.layout_engine import ConstrainedLayoutEngine


@pytest.fixture(scope="package", autouse=True)
def quick_pictures() -> Iterator[None]:
    """Most of the time of a small study would go into the layout of its pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConstrainedLayoutEngine, "execute", lambda self, figure: None)
        yield
