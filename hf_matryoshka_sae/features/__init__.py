"""What a latent means: the index of an SAE's features."""

from .index import build_index
from .latent_pass import IndexSizes
from .layout import Context, Feature
from .logits import LogitEffects, logit_effects
from .store import FeatureIndex


__all__ = ["Context", "Feature", "FeatureIndex", "IndexSizes", "LogitEffects", "build_index", "logit_effects"]
