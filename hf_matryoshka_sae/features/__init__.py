"""What a latent means: its index, patterns that find it, trees, texts, and what it does when it is turned up."""

from .index import build_index
from .latent_pass import IndexSizes
from .layout import Context, Feature
from .logits import LogitEffects, logit_effects
from .neuronpedia import export_neuronpedia
from .patterns import TokenPattern
from .reconstructed import ReconstructedText, reconstruct_text
from .search import PatternHit, search_latents, search_words
from .steering import Steered, steer
from .store import FeatureIndex
from .text import TextFeatures, text_features
from .tree import LatentTree, build_tree
from .tree_sums import EdgeSums


__all__ = [
    "Context",
    "EdgeSums",
    "Feature",
    "FeatureIndex",
    "IndexSizes",
    "LatentTree",
    "LogitEffects",
    "PatternHit",
    "ReconstructedText",
    "Steered",
    "TextFeatures",
    "TokenPattern",
    "build_index",
    "build_tree",
    "export_neuronpedia",
    "logit_effects",
    "reconstruct_text",
    "search_latents",
    "search_words",
    "steer",
    "text_features",
]
