"""Progressive sparse autoencoders for transformers: the first n latents are a working SAE for every n."""

import importlib

from . import models
from .models import *  # noqa: F403  (the public classes, registered with AutoConfig and AutoModel)


__version__ = "0.1.0"

__all__ = ["__version__", *models.__all__]

_ROOMS = ("activations", "evaluation", "training", "progressive", "features", "convert", "hub")


def __getattr__(name: str):
    """The rooms, imported when they are asked for: `hf_matryoshka_sae.convert.load(...)`."""
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _push(sae, repo_id: str, **kwargs):
    return importlib.import_module(".hub", __name__).push_sae(sae, repo_id, **kwargs)


models.SAEModel.publisher = staticmethod(_push)
