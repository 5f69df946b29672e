"""Budgets of a pruned SAE: from the loss or the size that it may have to the number of its latents.

"keep 95% of recaptured loss"        recaptured loss (zero ablation) at least 0.95 times the full SAE's
"recaptured loss at least 0.9"
"FVU at most 0.2"
"at most 50 MB"                      of weights, 1 MB = 10^6 bytes
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..evaluation import Dictionary, HeldOut, evaluate_fidelity
from ..evaluation.data import HasActivations
from ..models import SAEModel


_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
_FORMS = {
    "kept": rf"keep {_NUMBER} ?% of (?:the )?recaptured loss",
    "recaptured": rf"recaptured loss at least {_NUMBER}",
    "fvu": rf"fvu at most {_NUMBER}",
    "megabytes": rf"at most {_NUMBER} ?mb",
}
_AT_ONCE = 7  # widths measured in one pass: three passes narrow a thousand widths down to one


@dataclass
class Budget:
    """A limit that a pruned SAE must keep.

    Args:
        kind (`str`): `kept` (share of the full SAE's recaptured loss), `recaptured`, `fvu` or `megabytes`.
        limit (`float`): The limit, in the units of its kind: a share, a loss, an FVU or megabytes.
    """

    kind: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Return the budget that a sentence describes.

        Raises:
            `ValueError`: for a sentence of another form, naming the forms there are.
        """
        sentence = " ".join(str(text).lower().split())
        for kind, form in _FORMS.items():
            match = re.fullmatch(form, sentence)
            if match:
                limit = float(match[1])
                return cls(kind, limit / 100 if kind == "kept" else limit)
        raise ValueError(
            f"Cannot read the budget {text!r}. Write for example 'keep 95% of recaptured loss', 'recaptured loss at "
            "least 0.9', 'FVU at most 0.2' or 'at most 50 MB'."
        )


def width_for_budget(
    sae: SAEModel,
    budget: str | Budget,
    data: HeldOut | HasActivations | Iterable[Tensor] | None = None,
    show: bool = True,
) -> int:
    """Return the fewest first latents of an SAE that keep a budget.

    The search divides the range of widths: the result keeps the budget, and one latent less does not. Where quality is
    not monotone in width, a smaller width further down may keep it too. Latents compete inside the width ("restrict"),
    as in the pruned SAE.

    Args:
        sae ([`SAEModel`]): An SAE that is sorted, or trained so that its first latents matter most.
        budget (`str` or [`Budget`]): A budget, or a sentence such as `"keep 95% of recaptured loss"`.
        data ([`HeldOut`], or hidden states that can be read again): Data on which quality is measured; recaptured
            loss needs a [`HeldOut`].
        show (`bool`, *optional*, defaults to `True`): Show progress bars.

    Raises:
        `ValueError`: if the budget cannot be read or kept even by all latents (or one), or data are missing.
    """
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    if budget.kind == "megabytes":
        return _width_for_bytes(sae, budget.limit * 1e6)
    if data is None or (budget.kind != "fvu" and not (isinstance(data, HeldOut) and data.has_loss)):
        needed = "hidden states" if budget.kind == "fvu" else "a HeldOut whose model predicts tokens"
        raise ValueError(f"This budget needs {needed} to measure on: pass it as `activations`.")
    key = "fvu" if budget.kind == "fvu" else "recaptured_zero"

    def quality(widths: Sequence[int]) -> list[float]:
        subject = Dictionary(sae, widths, "restrict")
        losses = budget.kind != "fvu"
        result = evaluate_fidelity(data, {"it": subject}, language_model=losses, similarity_tokens=0, show=show)
        return [row[key] for row in result["subjects"]["it"]]

    full = quality([sae.config.num_latents])[0]
    limit = budget.limit * full if budget.kind == "kept" else budget.limit

    def kept(value: float) -> bool:
        return value <= limit if key == "fvu" else value >= limit

    if not kept(full):
        raise ValueError(
            f"All {sae.config.num_latents} latents reach {full:.4f}: the budget {limit:g} cannot be kept."
        )
    below, width = 0, sae.config.num_latents
    while width - below > 1:
        candidates = _between(below, width)
        good = [w for w, value in zip(candidates, quality(candidates), strict=True) if kept(value)]
        width = min([*good, width])
        below = max([below, *(w for w in candidates if w < width)])
    return width


def _between(low: int, high: int) -> list[int]:
    """Return widths strictly between two, spread evenly on a logarithmic scale."""
    ratio = high / max(low, 1)
    widths = {round(max(low, 1) * ratio ** (i / (_AT_ONCE + 1))) for i in range(_AT_ONCE + 1)}
    return sorted(w for w in widths if low < w < high) or [low + 1]


def _width_for_bytes(sae: SAEModel, limit: float) -> int:
    """Return the most latents whose tensors, with the bias, fit into so many bytes."""
    tensors = sae.state_dict()
    fixed = tensors["b_dec"].nbytes
    each = sum(tensor.nbytes for name, tensor in tensors.items() if name != "b_dec") / sae.config.num_latents
    width = min(int((limit - fixed) // each), sae.config.num_latents)
    if width < 1:
        raise ValueError(f"One latent alone takes {(fixed + each) / 1e6:.3g} MB, the budget is {limit / 1e6:g} MB.")
    return width
