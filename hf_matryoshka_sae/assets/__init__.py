"""The embedded default: a small causal language model, text and an SAE, so that everything runs with no download."""

from .language_model import embedded_lm_path, load_embedded_lm
from .sparse_autoencoder import embedded_sae_path
from .text import embedded_text


__all__ = ["embedded_lm_path", "embedded_sae_path", "embedded_text", "load_embedded_lm"]
