"""Progressive sparse autoencoders for transformers: the first n latents are a working SAE for every n."""

import importlib
from typing import TYPE_CHECKING

from . import models
from .models import *  # noqa: F403  (the public classes, registered with AutoConfig and AutoModel)


if TYPE_CHECKING:
    from . import (  # noqa: F401  (what `__getattr__` gives)
        activations,
        assets,
        convert,
        evaluation,
        features,
        hub,
        metrics,
        planning,
        progressive,
        sweep,
        toy,
        training,
    )


__version__ = "0.1.0"

_ROOMS = (
    "activations",
    "assets",
    "convert",
    "evaluation",
    "features",
    "hub",
    "metrics",
    "planning",
    "progressive",
    "sweep",
    "toy",
    "training",
)

__all__ = ["__version__", *models.__all__]


def __getattr__(name: str):
    """The rooms, imported when they are asked for: `hf_matryoshka_sae.convert.load(...)`."""
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What users are meant to find: the classes and the rooms, imported or not."""
    dunders = [name for name in globals() if name.startswith("__")]
    return sorted({*dunders, *__all__, "models", *_ROOMS})


def _push(sae, repo_id: str, **kwargs):
    return importlib.import_module(".hub", __name__).push_sae(sae, repo_id, **kwargs)


models.SAEModel.publisher = staticmethod(_push)
