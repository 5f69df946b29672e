"""What the latents of sentence embeddings mean: the texts on which each is largest, and the words that these share.

A word is told by its log-odds between the texts of a latent and all texts, with a prior of the words' own
frequencies (Monroe, Colaresi & Quinn 2008, section 3.3.1).
"""

import re
from collections import Counter
from typing import Any

import numpy as np

from .search import to_scipy


_WORD = re.compile(r"[^\W\d_]{3,}")
_PRIOR = 50.0  # words that the prior counts for


def name_latents(codes: Any, texts: list[str], latent_ids: list[int], examples: int = 10, words: int = 3) -> dict:
    """Names for the latents that fire on some texts.

    Args:
        codes (`Tensor` of shape `(N, F)`, or a scipy sparse matrix): Codes of the texts.
        texts (`list[str]`): The N texts.
        latent_ids (`list[int]`): Of the F latents, see [`SAEModel`]; names are kept by them.
        examples (`int`, *optional*, defaults to 10): Texts of a latent that are looked at.
        words (`int`, *optional*, defaults to 3): Words of a name.

    Returns:
        For each latent that fires, by its id as text: `words`, `texts` (the three largest), and the `share` of the
        texts on which it fires.

    Raises:
        `ValueError`: if there are not as many texts as codes.
    """
    by_latent = to_scipy(codes).tocsc()
    if by_latent.shape[0] != len(texts):
        raise ValueError(f"There are codes of {by_latent.shape[0]} texts, and {len(texts)} texts.")
    bags = [Counter(set(_WORD.findall(text.lower()))) for text in texts]
    everywhere = Counter()
    for bag in bags:
        everywhere.update(bag)
    total, names = sum(everywhere.values()), {}
    for latent in range(by_latent.shape[1]):
        column = by_latent[:, latent]
        best = column.indices[np.argsort(-column.data, kind="stable")][:examples]
        if not len(best):
            continue
        own = Counter()
        for text in best:
            own.update(bags[text])
        names[str(latent_ids[latent])] = {
            "words": _telling(own, everywhere, total, words),
            "texts": [texts[text] for text in best[:3]],
            "share": round(column.nnz / len(texts), 6),
        }
    return names


def _telling(own: Counter, everywhere: Counter, total: int, count: int) -> list[str]:
    """The words whose log-odds in `own` stand out most, in standard deviations, among those in two texts at least."""
    size = sum(own.values())
    scores = {}
    for word, times in own.items():
        if times < 2:
            continue
        prior = _PRIOR * everywhere[word] / total
        inside = np.log((times + prior) / (size + _PRIOR - times - prior))
        outside = np.log((everywhere[word] + prior) / (total + _PRIOR - everywhere[word] - prior))
        scores[word] = (inside - outside) / np.sqrt(1 / (times + prior) + 1 / (everywhere[word] + prior))
    return sorted(scores, key=lambda word: (-scores[word], word))[:count]
