"""What every test shares: the optional data folder beside the checkout, and no network."""

import os
from pathlib import Path

import pytest
import torch

from hf_matryoshka_sae.models import dense_ops


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional data folder beside the checkout; tests that need it skip where it is absent."""
    if not (SHARED / "lm").is_dir():
        pytest.skip(f"needs the optional data folder {SHARED.name}/ beside the checkout")
    return SHARED


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[2.0, -1.0], ids=["pairs", "matmuls"])
def way(request, monkeypatch) -> None:
    """Both ways of summing over what fired: small tests would always take the second."""
    monkeypatch.setattr(dense_ops, "_SHARE", request.param)
