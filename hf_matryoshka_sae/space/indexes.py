"""Where the index of an open SAE is: beside it, or where the page built one."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from ..features import FeatureIndex, build_index
from ..features.sources import weights_digest


if TYPE_CHECKING:
    from .opened import Opened


def built_folder(opened: "Opened") -> Path:
    """Where the page builds the index of an SAE: in a cache, as the SAE may be on the Hub or not ours to write to."""
    root = os.environ.get("HF_MATRYOSHKA_SAE_CACHE") or str(Path(constants.HF_HOME) / "hf_matryoshka_sae")
    return Path(root).expanduser() / "indexes" / weights_digest(opened.sae)[:32]


def find_index(opened: "Opened") -> FeatureIndex | None:
    """The finished index of these weights, if there is one."""
    for where, subfolder in ((opened.where, opened.subfolder), (str(built_folder(opened)), "")):
        if subfolder == "" and where != opened.where and not Path(where).is_dir():
            continue
        try:
            index = FeatureIndex.open(where, subfolder)
            index.check(opened.sae)
            return index
        except (ValueError, OSError):
            continue  # none there, or that of other weights
    return None


def build(opened: "Opened", tokens: int) -> FeatureIndex:
    """Build the index of an SAE over the page's text.

    Raises:
        `ValueError`: as [`build_index`].
    """
    library = opened.library
    with library.lock:
        build_index(
            opened.sae,
            opened.data.model,
            library.dataset,
            tokens,
            built_folder(opened),
            hookpoint=opened.data.hookpoint,
            tokenizer=opened.tokenizer,
            context_length=library.context_length,
        )
    opened.forget_index()
    assert opened.index is not None
    return opened.index
