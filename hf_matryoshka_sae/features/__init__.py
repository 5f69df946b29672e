"""What a latent means: the index of an SAE's features."""

from .index import IndexSizes, build_index
from .logits import LogitEffects, logit_effects
from .store import Context, Feature, FeatureIndex


__all__ = ["Context", "Feature", "FeatureIndex", "IndexSizes", "LogitEffects", "build_index", "logit_effects"]
