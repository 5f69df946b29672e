"""From a run's fields to its parts: language model, streams of hidden states, dictionaries."""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn
from transformers import AutoModel, PreTrainedModel

from ..activations import (
    ActivationStatistics,
    DatasetConfig,
    TokenBatch,
    estimate_statistics,
    heldout_batches,
    load_language_model,
    open_activations,
    resolve_hookpoints,
)
from ..models import SAEModel, build_sae
from .config import RunConfig, SAESpec
from .initialization import initialize, input_scaling
from .learner import Learner


logger = get_logger(__name__)


@dataclass
class Harvest:
    """The language model and what flows out of it.

    Args:
        model (`nn.Module`): The language model.
        hookpoints (`list[str]`): Resolved.
        stream (`ActivationStream`): Endless shuffled batches of hidden states, with a state.
        statistics (`dict[str, ActivationStatistics]`): Of each hookpoint.
        sample (`dict[str, Tensor]`): Some hidden states of each hookpoint.
        heldout (`Callable`): Gives the held-out token batches.
    """

    model: nn.Module
    hookpoints: list[str]
    stream: Any
    statistics: dict[str, ActivationStatistics]
    sample: dict[str, torch.Tensor]
    heldout: Callable[[], list[TokenBatch]]
