"""`evaluate` module: how well a sparse autoencoder reconstructs hidden states."""

from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features, List, Value

from hf_matryoshka_sae.metrics import adapter  # a class by name would be taken for the metric itself


_DESCRIPTION = """\
Fidelity of a sparse autoencoder (SAE): the fraction of variance unexplained (FVU), the published variants of
"explained variance" under names of their own, mean squared error, cosine similarity, norms and bias. Numbers and names
are those of `hf_matryoshka_sae.evaluation`.
"""

_CITATION = """\
@inproceedings{bussmann2025matryoshka,
  title={Learning Multi-Level Features with Matryoshka Sparse Autoencoders},
  author={Bussmann, Bart and Nabeshima, Noa and Karvonen, Adam and Nanda, Neel},
  booktitle={ICML},
  year={2025},
  eprint={2503.17547}
}
@inproceedings{karvonen2025saebench,
  title={{SAEBench}: A Comprehensive Benchmark for Sparse Autoencoders in Language Model Interpretability},
  author={Karvonen, Adam and others},
  booktitle={ICML},
  year={2025},
  eprint={2503.09532}
}
@article{rajamanoharan2024gated,
  title={Improving Dictionary Learning with Gated Sparse Autoencoders},
  author={Rajamanoharan, Senthooran and others},
  journal={arXiv preprint arXiv:2404.16014},
  year={2024}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: reconstructions, a row of D numbers for each token; or a list of sums over tokens, each a result of
        `ReconstructionSums.to_dict()`, optionally with `fired` and `total` of `FiringSums` beside them.
    references: the hidden states, rows of the same shape; or the same sums.
    l0 (optional): number of latents that fire on each token, one for each row that was added.
    l1 (optional): sum of the latents on each token.
Returns:
    A dictionary of numbers: `fvu`, `explained_variance`, `explained_variance_saebench`, `explained_variance_legacy`,
    `explained_variance_dl`, `mse`, `cossim`, `l2_norm_in`, `l2_norm_out`, `l2_ratio`, `relative_reconstruction_bias`,
    `mean_residual_fvu`, `tokens`; `l0` and `l1` where they were given; `l0`, `l1` and `dead` with sums of firings.
Examples:
    >>> import evaluate
    >>> from hf_matryoshka_sae import metrics
    >>> fidelity = evaluate.load(metrics.path("sae_fidelity"))
    >>> states = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]
    >>> reconstructions = [[0.5, 0.0], [0.0, 0.5], [-0.5, 0.0], [0.0, -0.5]]
    >>> result = fidelity.compute(predictions=reconstructions, references=states, l0=[1, 1, 1, 1])
    >>> round(result["fvu"], 4), round(result["cossim"], 4), round(result["l2_ratio"], 4), result["l0"]
    (0.25, 1.0, 0.5, 1.0)
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SAEFidelity(adapter.SumsMetric):
    """Fidelity of reconstructions at one width."""

    def _info(self) -> evaluate.MetricInfo:
        row = List(Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[Features({"predictions": row, "references": row}), adapter.STATISTICS],
            reference_urls=["https://arxiv.org/abs/2503.17547", "https://arxiv.org/abs/2503.09532"],
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        l0: Sequence[float] | None = None,
        l1: Sequence[float] | None = None,
    ) -> dict[str, float]:
        sums, firing = adapter.summed(predictions, references)
        if len(sums.square_error) != 1:
            raise ValueError(
                f"The statistics hold {len(sums.square_error)} widths; `sae_fidelity` takes one. Load "
                "`progressive_curve` for several."
            )
        (row,) = adapter.with_firing(sums, firing, None)
        return {**row, "tokens": int(sums.tokens), **adapter.means(int(sums.tokens), l0=l0, l1=l1)}
