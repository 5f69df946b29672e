"""Change latents while a language model generates text."""

from .continuation import Steered, steer
from .reconstructed import ReconstructedText, reconstruct_text


__all__ = [
    "ReconstructedText",
    "Steered",
    "reconstruct_text",
    "steer",
]
