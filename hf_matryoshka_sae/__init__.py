"""Progressive sparse autoencoders for transformers: the first n latents are a working SAE for every n."""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING


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
        steering,
        studies,
        training,
    )
    from .models import *  # noqa: F403


__version__ = "0.1.0"

_CLASSES = (
    "CONFIGS",
    "MODELS",
    "BatchTopKSAE",
    "BatchTopKSAEConfig",
    "DenseSAE",
    "GatedSAE",
    "GatedSAEConfig",
    "JumpReLUSAE",
    "JumpReLUSAEConfig",
    "MatryoshkaSAE",
    "MatryoshkaSAEConfig",
    "ReluSAE",
    "ReluSAEConfig",
    "SAEConfig",
    "SAEModel",
    "SAEOutput",
    "SparseLatents",
    "TopKSAE",
    "TopKSAEConfig",
    "build_sae",
)
_ROOMS = (
    "models",
    "activations",
    "assets",
    "convert",
    "evaluation",
    "features",
    "hub",
    "metrics",
    "planning",
    "progressive",
    "steering",
    "studies",
    "training",
)

__all__ = ["__version__", *_CLASSES]


def __getattr__(name: str) -> object:
    """Classes and rooms, imported when they are asked for: `hf_matryoshka_sae.convert.load(...)`."""
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    if name in _CLASSES:
        return getattr(importlib.import_module(".models", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What users are meant to find: the classes and the rooms, imported or not."""
    dunders = [name for name in globals() if name.startswith("__")]
    return sorted({*dunders, *__all__, "models", *_ROOMS})


def _push(sae: object, repo_id: str, **kwargs: object) -> object:
    return importlib.import_module(".hub", __name__).push_sae(sae, repo_id, **kwargs)


def _publish_from_here() -> None:
    sys.modules[f"{__name__}.models"].SAEModel.publisher = staticmethod(_push)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Does something once, right after a module is imported.

    Args:
        actions (`dict[str, Callable]`): What, by the module's name.
    """

    def __init__(self, actions: dict) -> None:
        self.actions = actions

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        if name not in self.actions:
            return None
        action = self.actions.pop(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                action()

            spec.loader.exec_module = exec_module
        return spec


def _register() -> None:
    """Import the models, which register with AutoConfig and AutoModel."""
    importlib.import_module(".models", __name__)


# AutoModel knows the classes whichever of the two packages is imported first, and neither imports the other for it.
sys.meta_path.insert(0, _AfterImport({f"{__name__}.models": _publish_from_here, "transformers": _register}))
if "transformers" in sys.modules:
    _register()
