"""The sections of the full evaluation, in their order.

A section has one size that its cost grows with (tokens, latents of a group), from `least`, which is just enough to
show something, to `full`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ...evaluation.core import ABOUT_ALL
from .bench import Bench, Found
from .measures import ablation, absorption, composition, explanations, fidelity, patterns, probes, removal


Column = tuple[str, str, str]
"""A key of rows, its title, and the format of its values."""


@dataclass(frozen=True)
class Section:
    """A part of the evaluation.

    Args:
        name (`str`), title (`str`), about (`str`): Of it, for files, headings and readers.
        columns (`tuple[Column, ...]`): The metrics that the summary and the model card show.
        run (`Callable[[Bench, int], Found]`): Takes the size.
        unit (`str`): What the size counts.
        least (`int`), full (`int`): Sizes; the same where there is no choice.
        share (`float`): Of a budget of time, relative to the other sections'.
    """

    name: str
    title: str
    about: str
    columns: tuple[Column, ...]
    run: Callable[[Bench, int], Found]
    unit: str
    least: int
    full: int
    share: float


SECTIONS = (
    Section(
        "fidelity",
        "Reconstruction and the language model's loss",
        ABOUT_ALL,
        (
            ("l0", "L0", ".2f"),
            ("fvu", "FVU", ".4f"),
            ("recaptured_zero", "recaptured loss", ".4f"),
            ("delta_ce", "growth of the loss, nats", ".4f"),
            ("compute_share", "share of training compute", ".2%"),
            ("rsa", "RSA (Spearman)", ".4f"),
        ),
        fidelity,
        "tokens",
        4_096,
        30_000,
        share=5,
    ),
    Section(
        "probes",
        "Recovery of hypothesised features",
        "Probe loss (Gao et al. 2024): of every task the best latent's logistic probe, cross-entropy on held-out "
        "examples, mean over tasks; log 2 = 0.693 is knowing nothing. Beside it the balanced accuracy of probes on k "
        "latents. channels: the best single dimension of the hidden states; all channels: the ceiling. Intervals over "
        "tasks and splits.",
        (
            ("probe_loss", "probe loss, nats", ".4f"),
            ("accuracy_1", "accuracy, 1 latent", ".4f"),
            ("accuracy_5", "accuracy, 5 latents", ".4f"),
        ),
        probes,
        "tokens",
        2_000,
        10_000,
        share=2.5,
    ),
    Section(
        "patterns",
        "Explainability by patterns of tokens (N2G)",
        "Do patterns of tokens, made from examples of a latent's firing, say where it fires on other text? F1, "
        "precision and recall of firing, and Pearson's correlation with the activations; means over drawn latents, "
        "intervals over them. explainable: share of latents that fire often enough to be explained by examples.",
        (("f1", "N2G, F1", ".3f"), ("correlation", "simulation by N2G on all tokens, r", ".3f")),
        patterns,
        "latents of each group",
        2,
        8,
        share=4,
    ),
    Section(
        "autointerp",
        "Automated interpretability",
        "A judge explains latents from passages and is examined on other text: which passages a latent fires in "
        "(detection), whether the tokens marked are the right ones (fuzzing), both as balanced accuracy, 0.5 by "
        "chance; how strongly it fires on each token (simulation, Pearson's r). Without a judge N2G's patterns "
        "answer. Intervals over latents.",
        (
            ("detection", "detection, balanced accuracy", ".3f"),
            ("fuzzing", "fuzzing, balanced accuracy", ".3f"),
            ("simulation", "simulation on passages, r", ".3f"),
        ),
        explanations,
        "latents of each group",
        2,
        8,
        share=4,
    ),
    Section(
        "ablation",
        "Sparsity of downstream effects",
        "A latent is taken away at one token: of the next 16 tokens' logits, the share that changes, (L1 / L2)^2 over "
        "their number (Gao et al. 2024); less is sparser. size: L2 norm of the change. Intervals over tokens.",
        (("fraction", "share of logits a latent acts on", ".4f"),),
        ablation,
        "tokens",
        8,
        64,
        share=1.5,
    ),
    Section(
        "removal",
        "Concept removal: SCR and TPP",
        "Of the accuracy that a probe loses to a spurious attribute, the share that comes back where the 20 latents "
        "that speak most for that attribute are taken out (SCR); what a class's probe loses where the 20 that speak "
        "most for the class are, less what other classes' lose (TPP). On properties of tokens. Intervals over splits "
        "and over pairs or classes.",
        (("scr", "SCR, 20 latents", ".3f"), ("tpp", "TPP, 20 latents", ".3f")),
        removal,
        "tokens",
        8_000,
        10_000,
        share=2,
    ),
    Section(
        "absorption",
        "Absorption and splitting",
        "On the first-letter task (Chanin et al. 2024): fraction of a letter's direction that latents of single words "
        "have absorbed, and how many latents a letter is split into.",
        (("absorption_fraction", "absorbed fraction", ".4f"), ("split_latents", "latents a letter", ".2f")),
        absorption,
        "task",
        1,
        1,
        share=1,
    ),
    Section(
        "composition",
        "Composition (meta-SAE)",
        "Share of the variance of decoder rows that a BatchTopK SAE of a quarter as many latents, 4 at a time, "
        "explains; lower is less composed, and only the distance to random rows of the same shape says something. "
        "Intervals over seeds, where there are several.",
        (("explained", "variance of rows explained", ".3f"),),
        composition,
        "seeds",
        1,
        1,
        share=1.5,
    ),
)
