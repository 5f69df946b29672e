"""Where the index of an open SAE is: beside it, or where the page built one."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from ...features import FeatureIndex, build_index
from ...models.digests import weights_digest
from ..limits import UNREACHABLE
from ..looks.labels import Labels


if TYPE_CHECKING:
    from .opened import Opened


def built_folder(opened: "Opened") -> Path:
    """Where the page builds the index of an SAE: in a cache, as the SAE may be on the Hub or not ours to write to."""
    root = os.environ.get("HF_MATRYOSHKA_SAE_CACHE") or str(Path(constants.HF_HOME) / "hf_matryoshka_sae")
    return Path(root).expanduser() / "indexes" / weights_digest(opened.sae)[:32]


@dataclass(frozen=True)
class FoundIndex:
    """What there is to read of an SAE's latents.

    Args:
        index ([`FeatureIndex`], *optional*): Of these weights; `None` where there is none that can be read.
        labels ([`Labels`]): Read from it.
        problem (`str`): What is wrong with one that cannot be read.
    """

    index: FeatureIndex | None
    labels: Labels
    problem: str = ""


def find_index(opened: "Opened") -> FoundIndex:
    """The finished index of these weights: beside the SAE, or one that the page built."""
    problem = ""
    for where, subfolder in ((opened.where, opened.subfolder), (str(built_folder(opened)), "")):
        if where != opened.where and not Path(where).is_dir():
            continue
        try:
            revision = opened.revision if where == opened.where else None
            index = FeatureIndex.open(where, subfolder, revision=revision, tokenizer=opened.tokenizer)
            index.check(opened.sae)
            index.contexts(0)
            return FoundIndex(index, Labels(index, opened.tokenizer))  # which reads contexts, as far as it is not long
        except (ValueError, *UNREACHABLE) as error:
            if "damaged" in str(error):  # else there is none, or that of other weights
                problem = problem or str(error)
    return FoundIndex(None, Labels(None, opened.tokenizer), problem)


def build(opened: "Opened", tokens: int) -> int:
    """Build the index of an SAE over the page's text; returns of how many tokens it is.

    Raises:
        `ValueError`: as [`build_index`].
    """
    with opened.running("index") as data:
        build_index(
            opened.sae,
            data.model,
            opened.library.dataset,
            tokens,
            built_folder(opened),
            hookpoint=data.hookpoint,
            tokenizer=opened.tokenizer,
            context_length=opened.library.context_length,
        )
    opened.forget_index()
    assert opened.index is not None
    return opened.index.about["tokens"]
