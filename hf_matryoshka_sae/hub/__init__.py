"""SAEs on the Hub: push a run, list what a repository holds, load it, fetch the first latents only."""

from typing import TYPE_CHECKING

from ..common.lazy import imports_on_use


if TYPE_CHECKING:
    from .card import run_card, sae_card
    from .layout import SAEFolder, find_saes
    from .measure import measure_run
    from .pushing import push, push_sae
    from .repository import SAEInfo, list_saes, load, load_many


__all__ = [
    "SAEFolder",
    "SAEInfo",
    "find_saes",
    "list_saes",
    "load",
    "load_many",
    "measure_run",
    "push",
    "push_sae",
    "run_card",
    "sae_card",
]

__getattr__, __dir__ = imports_on_use(__name__)
