"""What a latent means: its index, patterns that find it, trees, texts, and what it does when it is turned up."""

from typing import TYPE_CHECKING

from ..common.lazy import imports_on_use


if TYPE_CHECKING:
    from .index.build import build_index
    from .index.layout import Context, Feature
    from .index.store import FeatureIndex
    from .labels import read_labels
    from .logits import LogitEffects, logit_effects
    from .neuronpedia import export_neuronpedia
    from .patterns.matching import TokenPattern
    from .patterns.search import PatternHit, search_latents, search_words
    from .sizes import IndexSizes
    from .text import TextFeatures, text_features
    from .tree.sums import EdgeSums
    from .tree.tree import LatentTree, build_tree


__all__ = [
    "Context",
    "EdgeSums",
    "Feature",
    "FeatureIndex",
    "IndexSizes",
    "LatentTree",
    "LogitEffects",
    "PatternHit",
    "TextFeatures",
    "TokenPattern",
    "build_index",
    "build_tree",
    "export_neuronpedia",
    "logit_effects",
    "read_labels",
    "search_latents",
    "search_words",
    "text_features",
]

__getattr__, __dir__ = imports_on_use(__name__)
