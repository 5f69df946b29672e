"""The first steps of BatchTopK and JumpReLU, in which each token keeps its own largest latents, as in TopK.

From random directions the largest values of a batch are those of tokens with a large norm: these would take the places
of all others, and latents that the others need would die before they have turned (benchmarks/README.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ...models import SAEModel
from ...models.families import FAMILIES
from ...models.sharding import Layout
from ..config.spec import SAESpec
from .calibration import calibrate_l0


class Competition:
    """Lets each token keep its own `k` or `target_l0` latents in the first steps.

    Args:
        sae ([`SAEModel`]): In training.
        spec ([`SAESpec`]): Its `topk_fraction` and `target_l0` are read.
        steps (`int`): Of the run.
        layout ([`Layout`]): The processes that train the SAE.
        fixed (`int`): The first so many latents keep their thresholds.
    """

    def __init__(self, sae: SAEModel, spec: SAESpec, steps: int, layout: Layout, fixed: int) -> None:
        self.sae, self.spec, self.steps, self.layout, self.fixed = sae, spec, steps, layout, fixed

    def holds(self, step: int) -> bool:
        """Whether tokens have places of their own at a step."""
        return self._places() is not None and 0 <= step < self.spec.topk_fraction * self.steps

    def _places(self) -> float | None:
        """How many latents of each token are to fire, in the families that can begin so."""
        return {"batch_topk": self.sae.k, "jumprelu": self.spec.target_l0}.get(self.sae.config.activation_name)

    @contextmanager
    def at(self, step: int, x: Tensor, first: bool) -> Iterator[None]:
        """Select as the step is to.

        Args:
            step (`int`): Its number.
            x (`Tensor` of shape `(N, D)`): Normalised hidden states. JumpReLU's thresholds take over on them: as many
                fire as before, of the batch at large.
            first (`bool`): Whether this is the step's first micro-batch.
        """
        sae, family, k = self.sae, self.sae.family, self.sae.k
        if self.holds(step):
            sae.family, sae.k = FAMILIES["topk"], max(1, round(self._places()))
        elif first and self.holds(step - 1) and sae.config.activation_name == "jumprelu":
            calibrate_l0(sae, [x], self.spec.target_l0, self.layout, self.fixed)
        try:
            yield
        finally:
            sae.family, sae.k = family, k
