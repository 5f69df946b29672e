"""`evaluate` module: fidelity of the first n latents of a progressive sparse autoencoder, for many widths n."""

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value

from hf_matryoshka_sae.metrics import adapter  # a class by name would be taken for the metric itself


_DESCRIPTION = """\
The progressive curve of a Matryoshka sparse autoencoder (SAE): every metric of `sae_fidelity` at each width n, where
only the first n latents are used, the mean of the fraction of variance unexplained (FVU) over the curve, and the width
at which FVU reaches a target. Numbers and names are those of `hf_matryoshka_sae.evaluation`.
"""

_CITATION = """\
@inproceedings{bussmann2025matryoshka,
  title={Learning Multi-Level Features with Matryoshka Sparse Autoencoders},
  author={Bussmann, Bart and Nabeshima, Noa and Karvonen, Adam and Nanda, Neel},
  booktitle={ICML},
  year={2025},
  eprint={2503.17547}
}
@article{peter2025progressive,
  title={Empirical Evaluation of Progressive Coding for Sparse Autoencoders},
  author={Peter, Hans and S{\\o}gaard, Anders},
  journal={arXiv preprint arXiv:2505.00190},
  year={2025}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each token the reconstructions at all widths, P rows of D numbers (`(N, P, D)` in all); or sums
        over tokens (`ReconstructionSums.to_dict()`).
    references: the hidden states, a row of D numbers for each token; or the same sums.
    widths: the P widths, strictly increasing.
    fvu_targets (optional): FVUs whose widths are returned; by default 0.5, 0.2 and 0.1.
Returns:
    A dictionary: `width` and every metric of `sae_fidelity` as lists with an entry for each width; `area_fvu`, the
    mean of FVU over the logarithm of the width from the first to the last; `fvu_targets` and `width_for_fvu`, the
    width at which each is first reached, on straight lines between the widths on a logarithmic scale (None where it
    is not reached); `tokens`.
Examples:
    >>> import evaluate
    >>> from hf_matryoshka_sae import metrics
    >>> curve = evaluate.load(metrics.path("progressive_curve"))
    >>> states = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]
    >>> reconstructions = [[[0.5 * a, 0.5 * b], [0.9 * a, 0.9 * b]] for a, b in states]  # at widths 8 and 32
    >>> result = curve.compute(predictions=reconstructions, references=states, widths=[8, 32], fvu_targets=[0.13])
    >>> [round(fvu, 4) for fvu in result["fvu"]], round(result["area_fvu"], 4), round(result["width_for_fvu"][0], 4)
    ([0.25, 0.01], 0.13, 16.0)
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ProgressiveCurve(adapter.SumsMetric):
    """Fidelity at each width, mean FVU over the curve, and widths at which FVU reaches targets."""

    row_dims = 2

    def _info(self) -> evaluate.MetricInfo:
        row = List(Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[Features({"predictions": List(row), "references": row}), adapter.STATISTICS],
            reference_urls=["https://arxiv.org/abs/2503.17547", "https://arxiv.org/abs/2505.00190"],
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        widths: Sequence[int] | None = None,
        fvu_targets: Sequence[float] = (0.5, 0.2, 0.1),
    ) -> dict[str, Any]:
        sums, firing = adapter.summed(predictions, references)
        count = len(sums.square_error)
        if widths is None or len(widths) != count or any(a >= b for a, b in zip([0, *widths], widths, strict=False)):
            raise ValueError(
                f"There are reconstructions at {count} widths: `widths` must be {count} strictly increasing numbers "
                f"from 1, got {None if widths is None else list(widths)}."
            )
        rows = adapter.with_firing(sums, firing, list(widths))
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        fvu = columns["fvu"]
        return {
            "width": list(widths),
            **columns,
            "area_fvu": _area(widths, fvu),
            "fvu_targets": list(fvu_targets),
            "width_for_fvu": [_reached(widths, fvu, target) for target in fvu_targets],
            "tokens": int(sums.tokens),
        }


def _area(widths: Sequence[int], fvu: Sequence[float]) -> float:
    """Return the mean of the FVU over log width."""
    if len(widths) == 1:
        return fvu[0]
    logs = np.log(widths)
    return float(np.trapezoid(fvu, logs) / (logs[-1] - logs[0]))


def _reached(widths: Sequence[int], fvu: Sequence[float], target: float) -> float | None:
    """Return the width at which the FVU first is at the target or below; `None` where it never is."""
    first = next((i for i, value in enumerate(fvu) if value <= target), None)
    if first is None:
        return None
    if first == 0:
        return float(widths[0])
    falling = (fvu[first], fvu[first - 1]), np.log([widths[first], widths[first - 1]])
    return float(np.exp(np.interp(target, *falling)))
