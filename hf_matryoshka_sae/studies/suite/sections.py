"""The sections of the full evaluation, in their order.

A section has one size that its cost grows with (tokens, latents of a group), from `least`, which is just enough to
show something, to `full`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ...evaluation.core import ABOUT_ALL
from .bench import Bench, Outcome
from .measures import (
    ablation,
    absorption,
    comparison,
    composition,
    explanations,
    fidelity,
    patterns,
    probes,
    removal,
    spelling,
)


Column = tuple[str, str, str]
"""A key of rows, its title, and the format of its values."""


@dataclass(frozen=True)
class Section:
    """A part of the evaluation.

    Args:
        name (`str`), title (`str`), about (`str`): Of it, for files, headings and readers.
        question (`str`): What a reader wants to know, for the first page.
        columns (`tuple[Column, ...]`): The metrics that the summary and the model card show.
        run (`Callable[[Bench, int], Outcome]`): Takes the size.
        unit (`str`): What the size counts.
        least (`int`), full (`int`): Sizes; the same where there is no choice.
        share (`float`): Of a budget of time, relative to the other sections'.
        cost (`float`): Seconds that the least size takes or so, on one core and an SAE of 4,096; cheap ones run first.
        beats_random (`bool`): Whether it says something to be better than random directions; these absorb nothing.
        growth (`float`): Seconds grow with this power of the size.
        better (`str`): Which values of the first column are better, `"higher"` or `"lower"`.
    """

    name: str
    question: str
    title: str
    about: str
    columns: tuple[Column, ...]
    run: Callable[[Bench, int], Outcome]
    unit: str
    least: int
    full: int
    share: float
    cost: float = 1.0
    better: str = "higher"
    growth: float = 1.0
    beats_random: bool = True


SECTIONS = (
    Section(
        "fidelity",
        "Does it keep what the hidden states say?",
        "Reconstruction and the language model's loss",
        ABOUT_ALL,
        (
            ("l0", "L0", ".2f"),
            ("fvu", "FVU", ".4f"),
            ("recaptured_zero", "recaptured loss", ".4f"),
            ("delta_ce", "growth of the loss, nats", ".4f"),
            ("compute_share", "share of training compute", ".2%"),
            ("pooled_cosine", "cosine of pooled embeddings", ".4f"),
            ("neighbours", "nearest texts kept", ".3f"),
            ("rsa", "RSA (Spearman)", ".4f"),
            ("rare", "latents under once in a million", ".2%"),
        ),
        fidelity,
        "tokens",
        4_096,
        30_000,
        share=5,
        cost=10,
        better="lower",
    ),
    Section(
        "probes",
        "Do single latents tell properties of tokens?",
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
        1_000,
        10_000,
        share=2.5,
        cost=8,
        better="lower",
        growth=2.0,  # more tokens, more tasks, and from some size on of several splits
    ),
    Section(
        "patterns",
        "Can what latents fire on be written as patterns of tokens?",
        "Explainability by patterns of tokens (N2G)",
        "Do patterns of tokens, made from examples of a latent's firing, say where it fires on other text? F1, "
        "precision and recall of firing, and Pearson's correlation with the activations; means over drawn latents, "
        "intervals over them. token, 2 tokens: a table of the last token, and of the last two, made from the same "
        "text. What fires often is harder to say than what fires seldom: see the scores by frequency. "
        "explainable: share of latents that fire often enough to be explained by examples.",
        (
            ("f1", "N2G, F1", ".3f"),
            ("token_f1", "table of the last token, F1", ".3f"),
            ("pair_f1", "table of the last two, F1", ".3f"),
        ),
        patterns,
        "latents of each group",
        8,
        48,
        share=4,
        cost=25,
        growth=2.0,  # more latents, and more of the places of each
    ),
    Section(
        "autointerp",
        "Can it be said in words, and the words be used?",
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
        8,
        16,
        share=4,
        cost=30,
    ),
    Section(
        "ablation",
        "Do latents act on few predictions?",
        "Sparsity of downstream effects",
        "A latent is taken away at one token: of the next 16 tokens' logits, the share that changes, (L1 / L2)^2 over "
        "their number (Gao et al. 2024); less is sparser. size: L2 norm of the change. Intervals over tokens.",
        (("fraction", "share of logits a latent acts on", ".4f"),),
        ablation,
        "tokens",
        8,
        64,
        share=1.5,
        cost=10,
        better="lower",
    ),
    Section(
        "removal",
        "Can a concept be taken out alone?",
        "Concept removal: SCR and TPP",
        "Of the accuracy that a probe loses to a spurious attribute, the share that comes back where the 20 latents "
        "that speak most for that attribute are taken out (SCR); what a class's probe loses where the 20 that speak "
        "most for the class are, less what other classes' lose (TPP). On properties of tokens. Intervals over splits "
        "and over pairs or classes.",
        (("scr", "SCR, 20 latents", ".3f"), ("tpp", "TPP, 20 latents", ".3f")),
        removal,
        "tokens",
        4_000,
        10_000,
        share=2,
        cost=15,
    ),
    Section(
        "absorption",
        "Do latents of single tokens absorb those of properties?",
        "Absorption and splitting of properties of tokens",
        "Properties that follow from the text, such as digits, marks or function words, as far as a probe finds them: "
        "fraction of a property's direction that latents of single tokens have absorbed, and how many latents a "
        "property is split into (after Chanin et al. 2024); holes: share of a property's children, such as single "
        "digits, on which its latents are silent.",
        (
            ("absorption_fraction", "absorbed fraction of a property", ".3f"),
            ("split_latents", "latents a property", ".2f"),
            ("hole_share", "children in holes", ".3f"),
        ),
        absorption,
        "tokens",
        4_000,
        12_000,
        share=1.5,
        cost=20,
        better="lower",
        beats_random=False,
    ),
    Section(
        "spelling",
        "Do latents of words absorb those of letters?",
        "Absorption and splitting of first letters",
        "On the first-letter task (Chanin et al. 2024): fraction of a letter's direction that latents of single words "
        "have absorbed, and how many latents a letter is split into. For language models that spell.",
        (
            ("absorption_fraction", "absorbed fraction of a letter", ".4f"),
            ("split_latents", "latents a letter", ".2f"),
        ),
        spelling,
        "words",
        2_000,
        10_000,
        share=1,
        cost=5,
        better="lower",
        beats_random=False,
    ),
    Section(
        "comparison",
        "Which reconstructs best at equal sparsity?",
        "SAEs on one frontier of sparsity and error",
        "Each token's weakest latents are dropped by one threshold for all tokens until an SAE has the L0 of the "
        "sparsest of them; own L0: without. Decoder rows of each two SAEs are matched one to one: 1 would be the same "
        "latents.",
        (("fvu_equal", "FVU at equal L0", ".4f"), ("own_l0", "own L0", ".2f")),
        comparison,
        "tokens",
        4_096,
        16_384,
        share=1,
        cost=6,
        better="lower",
    ),
    Section(
        "composition",
        "Are latents more than sums of others?",
        "Composition (meta-SAE)",
        "Share of the variance of decoder rows that a BatchTopK SAE of a quarter as many latents, 4 at a time, "
        "explains; lower is less composed, and only the distance to random rows of the same shape, trained on as "
        "long, says something. One seed.",
        (("explained", "variance of rows explained", ".3f"),),
        composition,
        "steps",
        100,
        1500,
        share=1.5,
        cost=25,
        better="lower",
    ),
)
