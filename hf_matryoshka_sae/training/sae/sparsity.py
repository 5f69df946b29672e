"""The coefficient of the sparsity penalty, and how it follows the L0 asked for."""

from typing import Any

import torch
from torch import Tensor

from ..config.spec import SAESpec
from .losses import LOG_UNIT
from .schedules import sparsity_warmup


# The coefficient follows each change of L0 / target in proportion, beside what `controller_rate` adds up. Alone, that
# would go on long after L0 has begun to move, and overshoot.
_PROPORTIONAL = 1.0
_NONE_YET = 2.0  # no distance is as large


class SparsityCoefficient:
    """A coefficient that is raised where more than `target_l0` latents fire, and lowered where fewer do.

    Its logarithm moves by the logarithm of L0 / target and by what that has changed since the last step. This
    proportional-integral control comes to rest at the target, where steps of one size (Nabeshima 2024) swing around it
    or, smaller, come too late. JumpReLU's penalty knows the target itself, and its coefficient stays as it is.

    Args:
        spec ([`SAESpec`]): Its `sparsity_coefficient`, `sparsity_penalty`, `target_l0` and `controller_rate` are read.
        activation (`str`): Which activation the latents have.
        steps (`int`): Of the run.
        device (`torch.device`): Of the coefficient; the host does not wait for it.
        first_threshold (`float`, *optional*): What [`start_at_target`] gave.

    Attributes:
        value (`Tensor` of shape `()`): The coefficient without its warm-up.
        error (`Tensor` of shape `()`): log(L0 / target) of the last step, from -1 to 1.
    """

    def __init__(
        self, spec: SAESpec, activation: str, steps: int, device: torch.device, first_threshold: float | None = None
    ) -> None:
        self.spec, self.steps, self.device = spec, steps, device
        self._follows = spec.target_l0 is not None and activation in ("relu", "gated")
        value = spec.sparsity_coefficient or 0.0
        if spec.sparsity_coefficient is None and spec.target_l0 is not None:
            value = _first(spec, first_threshold)
        self._penalises = value != 0
        self.value, self.error = torch.tensor(value, device=device), torch.tensor(_NONE_YET, device=device)

    def at(self, step: int) -> Tensor | float:
        """The coefficient in force at a step; 0 where the spec has no penalty."""
        return self.value * sparsity_warmup(self.spec, step, self.steps) if self._penalises else 0.0

    def follow(self, l0: Tensor, step: int, finite: Tensor) -> None:
        """Move after a step.

        Args:
            l0 (`Tensor` of shape `()`): Latents that fired per token.
            step (`int`): Its number.
            finite (`Tensor` of shape `()`): False where the step was left out: then nothing moves.
        """
        if not self._follows:
            return
        error = (l0.clamp(min=1e-3) / self.spec.target_l0).log().clamp(-1, 1)
        change = torch.where(self.error == _NONE_YET, 0.0, error - self.error)
        # In the warm-up L0 is still on its way down; what falls below the target then would go on falling.
        acts = finite & (l0 < self.spec.target_l0) if sparsity_warmup(self.spec, step, self.steps) < 1 else finite
        factor = (self.spec.controller_rate * error + _PROPORTIONAL * change).exp()
        self.value = self.value * torch.where(acts, factor, 1.0)
        self.error = torch.where(finite, error, self.error)

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on."""
        return {"sparsity": self.value.item(), "l0_error": self.error}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what [`state_dict`] gave; an earlier version kept no `l0_error`."""
        self.value = torch.tensor(state["sparsity"], device=self.device)
        self.error = state.get("l0_error", torch.tensor(_NONE_YET)).to(self.device)


def _first(spec: SAESpec, threshold: float | None) -> float:
    """Where a coefficient begins that follows a target, in units where E||x||^2 = 1.

    An L1 penalty l on latents with unit rows moves thresholds to l / 2 (soft thresholding). This is half of what would
    hold them where they begin: they come down as latents learn, and it is at first that too strong a penalty kills. A
    `log` penalty gets the slope at 0 that L1 would have.
    """
    return (0.1 if threshold is None else threshold) * (LOG_UNIT if spec.sparsity_penalty == "log" else 1.0)
