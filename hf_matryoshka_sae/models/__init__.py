"""The SAEs as transformers models."""

from transformers import AutoConfig, AutoModel

from .collection_sae import SAECollection, SAECollectionConfig
from .configuration_sae import (
    CONFIGS,
    BatchTopKSAEConfig,
    GatedSAEConfig,
    JumpReLUSAEConfig,
    MatryoshkaSAEConfig,
    ReluSAEConfig,
    SAEConfig,
    TopKSAEConfig,
)
from .dense_sae import DenseSAE
from .modeling_sae import (
    MODELS,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReluSAE,
    SAEModel,
    TopKSAE,
)
from .outputs import SAEOutput, SparseLatents


for _config, _model in [*MODELS.items(), (SAECollectionConfig, SAECollection)]:
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)


def build_sae(config: SAEConfig) -> SAEModel:
    """A freshly initialised SAE of the class that `config` belongs to."""
    return MODELS[type(config)](config)


__all__ = [
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
]
