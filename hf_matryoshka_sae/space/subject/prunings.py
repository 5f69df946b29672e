"""What is kept of an SAE, and what the SAE that it leaves is worth on held-out text."""

from dataclasses import dataclass
from typing import Any

from ...evaluation import Dictionary, HeldOut, evaluate_fidelity
from ...models import SAEModel
from ...progressive import calibrate_thresholds, refined, with_threshold


SELECTION = "restrict"
"""A pruned SAE never sees the latents it lacks: what is measured is what is downloaded."""


@dataclass(frozen=True)
class Pruning:
    """What to keep of an SAE.

    Args:
        ranking (`str`): One of `RANKINGS`; a Matryoshka SAE is sorted within its groups.
        width (`int`): So many latents.
        k (`int`, *optional*): Latents per token, where that can be chosen; by default as trained.
    """

    ranking: str = "trained"
    width: int = 0
    k: int | None = None


def cut(ranked: SAEModel, width: int, k: int | None) -> SAEModel:
    """The first latents of an SAE, and the k strongest of them."""
    if k is None:
        return ranked if width == ranked.config.num_latents else ranked.truncate(width).eval()
    return _with_k(ranked.truncate(width).eval(), k)


def at_k(ranked: SAEModel, data: HeldOut, width: int, k: int) -> SAEModel:
    """The first latents of an SAE whose threshold lets k through per token, on average."""
    config = ranked.config
    if config.refine_steps:
        part = ranked.truncate(width)
        return _with_k(refined(part, data, config.refine_steps, config.refine_step_size, l0=float(k)), k)
    threshold = calibrate_thresholds(ranked, data, float(k), [width])[width]
    return _with_k(with_threshold(ranked, width, threshold), k)


def _with_k(smaller: SAEModel, k: int) -> SAEModel:
    smaller.config.k = smaller.k = k  # the config is saved, the other is used
    return smaller


def worth(sae: SAEModel, data: HeldOut) -> dict[str, Any]:
    """The figures that `matryoshka-sae evaluate` gives for an SAE as it is."""
    fidelity = evaluate_fidelity(data, {"sae": Dictionary(sae, [sae.config.num_latents], SELECTION)})
    (row,) = fidelity.pop("subjects")["sae"]
    return {**fidelity, **row, "size_mb": size_mb(sae)}


def size_mb(sae: SAEModel) -> float:
    """Megabytes (10^6 bytes) of an SAE's tensors, which is its file but for the header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in sae.state_dict().values()) / 1e6
