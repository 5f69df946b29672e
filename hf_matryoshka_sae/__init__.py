"""Progressive sparse autoencoders for transformers: the first n latents are a working SAE for every n."""

from . import models
from .models import *  # noqa: F403  (the public classes, registered with AutoConfig and AutoModel)


__version__ = "0.1.0"

__all__ = ["__version__", *models.__all__]
