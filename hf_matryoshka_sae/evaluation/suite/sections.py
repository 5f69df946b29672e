"""The sections of the full evaluation: each gives rows by dictionary and width, a text, a plot and its details.

A section has one size that its cost grows with (tokens, latents of a group), from `least`, which is just enough to
show something, to `full`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...activations import TokenBatch
from ...models import SAEModel
from .. import report
from ..ablation import ablation_sparsity
from ..absorption import absorption_on_task
from ..autointerp import automated_interpretability
from ..core import ABOUT_ALL, IDENTITY, details, evaluate
from ..data import HeldOut
from ..explainability import explainability
from ..first_letter import NotDefined, first_letter_task
from ..language_model import LossScaling
from ..probe_tasks import LabelledTask
from ..probing import probe_losses


Rows = dict[str, list[dict[str, Any]]]
Column = tuple[str, str, str]
"""A key of rows, its title, and the format of its values."""


@dataclass
class Bench:
    """What is evaluated, and on what.

    Args:
        data ([`HeldOut`]): Language model and held-out tokens.
        saes (`dict[str, SAEModel]`): By name, all of one hookpoint.
        widths (`Sequence[int]`, *optional*): By default each SAE's prefix widths.
        selection (`str`, *optional*, defaults to `"mask"`): Where a metric can be had with either; see [`Dictionary`].
        labelled (`list[LabelledTask]`, *optional*): Tasks to probe beside those made from the tokens.
        scaling ([`LossScaling`], *optional*): Of the language model's loss.
        judge (`Judge` or `str`, *optional*): Who explains latents; see [`automated_interpretability`].
        prompts (`str`, *optional*): Folder with the judge's.
        answers (`Path`, *optional*): Where its answers are kept.
        seed (`int`, *optional*, defaults to 0): Of everything that is drawn.
    """

    data: HeldOut
    saes: dict[str, SAEModel]
    widths: Sequence[int] | None = None
    selection: str = "mask"
    labelled: list[LabelledTask] = field(default_factory=list)
    scaling: LossScaling | None = None
    judge: Any = None
    prompts: str | None = None
    answers: Path | None = None
    seed: int = 0

    def tokens(self, count: int) -> HeldOut:
        """About so many of the tokens, from all over the text."""
        return replace(self.data, batches=_spread(self.data.batches, count))

    @cached_property
    def halves(self) -> tuple[HeldOut, HeldOut]:
        """Text to explain latents by, and other text to test that on."""
        batches = self.data.batches
        if len(batches) > 1:
            parts = batches[::2], batches[1::2]
        else:  # by windows
            (batch,) = batches
            parts = tuple([_rows_of(batch, slice(start, None, 2))] for start in (0, 1))
        if not all(int(batch.keep.sum()) for part in parts for batch in part[:1]):
            raise ValueError(
                "There is too little held-out text to explain latents by one half and test it on another."
            )
        return tuple(replace(self.data, batches=list(part)) for part in parts)


def _spread(batches: Sequence[TokenBatch], count: int) -> list[TokenBatch]:
    total = sum(int(batch.keep.sum()) for batch in batches)
    wanted = max(1, round(len(batches) * min(1.0, count / max(1, total))))
    return [batches[index * len(batches) // wanted] for index in range(wanted)]


def _rows_of(batch: TokenBatch, rows: slice) -> TokenBatch:
    return TokenBatch(batch.input_ids[rows], batch.attention_mask[rows], batch.keep[rows], batch.padded)


@dataclass
class Found:
    """What a section found.

    Args:
        rows (`dict[str, list[dict]]`): By dictionary or baseline, each with a `width`.
        text (`str`): Its table.
        details (`Any`): Everything, JSON-able.
        plot (`Callable`, *optional*): Draws to the path it is given.
        notes (`list[str]`, *optional*): What a reader has to know.
        facts (`dict`, *optional*): What goes for all rows, such as losses of the language model.
    """

    rows: Rows
    text: str
    details: Any
    plot: Callable[[Path], None] | None = None
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


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


def fidelity(bench: Bench, tokens: int) -> Found:
    """Reconstruction, loss, similarity, weights and firing."""
    data = bench.tokens(tokens)
    result = evaluate(data, bench.saes, bench.widths, bench.selection, scaling=bench.scaling)
    drawn = result | {"saes": {name: rows for name, rows in result["saes"].items() if name != IDENTITY}}
    text = f"{report.table([result])}\n\n{details([result])}"
    facts = {key: value for key, value in result.items() if key != "saes"}
    return Found(_flat(result["saes"]), text, result, lambda path: report.plot([drawn], path), facts=facts)


def _flat(rows: Mapping[str, list[dict[str, Any]]]) -> Rows:
    """The rows with numbers only: similarity is its rank correlation."""
    return {
        name: [
            {key: value["spearman"] if key == "rsa" else value for key, value in row.items() if _plain(key, value)}
            for row in found
        ]
        for name, found in rows.items()
    }


def _plain(key: str, value: Any) -> bool:
    return key == "rsa" or not isinstance(value, dict)


def probes(bench: Bench, tokens: int) -> Found:
    """Probe loss and k-sparse probes."""
    tasks = [None, *bench.labelled]
    found = probe_losses(
        bench.data, bench.saes, tasks, bench.widths, selection=bench.selection, max_tokens=tokens, seed=bench.seed
    )
    rows: Rows = {}
    for row in found.rows:
        flat = {key: value for key, value in row.items() if key not in ("k_sparse", "tasks", "subject")}
        for k, scores in row["k_sparse"].items():
            flat[f"accuracy_{k}"] = scores["accuracy"]
            flat[f"accuracy_{k}_interval"] = scores.get("accuracy_interval")
        rows.setdefault(row["subject"], []).append(flat)
    return Found(rows, str(found), {**found.about, "rows": found.rows}, found.plot, list(found.about["notes"]))


def patterns(bench: Bench, per_group: int) -> Found:
    """N2G."""
    found = explainability(bench.saes, *bench.halves, bench.widths, per_group, seed=bench.seed)
    return Found(found.rows, str(found), found.to_dict(), found.plot)


def explanations(bench: Bench, per_group: int) -> Found:
    """Automated interpretability; only the main process has it."""
    found = automated_interpretability(
        bench.saes,
        *bench.halves,
        bench.judge,
        bench.widths,
        per_group,
        cache=bench.answers,
        prompts=bench.prompts,
        seed=bench.seed,
    )
    if found is None:
        return Found({}, "", {})
    notes = [f"Judge: {found.about['judge']}"]
    return Found(found.rows, str(found), found.to_dict(), found.plot, notes)


def ablation(bench: Bench, tokens: int) -> Found:
    """Ablation sparsity."""
    found = ablation_sparsity(bench.saes, bench.data, bench.widths, tokens, seed=bench.seed)
    return Found(found.rows, str(found), found.to_dict(), found.plot)


def absorption(bench: Bench, size: int) -> Found:
    """Absorption and splitting of first letters, where the language model knows them."""
    data = bench.data
    try:
        task = first_letter_task(data.model, data.tokenizer, data.hookpoint, seed=bench.seed)
    except NotDefined as error:
        return Found({}, str(error), {"defined": False, "reason": str(error)}, notes=[str(error)])
    results = {
        name: absorption_on_task(sae, task, bench.widths, selection="restrict") for name, sae in bench.saes.items()
    }
    first = next(iter(results.values()))
    if not first["defined"]:
        return Found({}, first["reason"], results, notes=[first["reason"]])
    keys = ("width", "l0", "full_absorption", "absorption_fraction", "split_latents", "num_letters", "reason")
    rows = {name: [{key: row.get(key) for key in keys} for row in found["rows"]] for name, found in results.items()}
    lines = [f"{'width':>8} {'fraction':>9} {'full':>9} {'latents a letter':>17} {'letters':>8}"]
    for name, found in rows.items():
        lines.append(f"  {name}")
        for row in found:
            cells = [row[key] for key in ("absorption_fraction", "full_absorption", "split_latents")]
            told = " ".join(
                f"{'-' if cell is None else format(cell, '.4f'):>{size}}"
                for cell, size in zip(cells, (9, 9, 17), strict=True)
            )
            lines.append(f"{row['width']:>8} {told} {row['num_letters']:>8}")
    notes = list(dict.fromkeys(note for found in results.values() for note in found["notes"]))
    return Found(rows, "\n".join(lines), results, lambda path: _plot_absorption(rows, path), notes)


def _plot_absorption(rows: Rows, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    report.draw_widths(axis, rows, "absorption_fraction")
    axis.set(ylabel="absorbed fraction of first letters", ylim=(0, None))
    report.save_figure(figure, path)


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
        (("f1", "N2G, F1", ".3f"), ("correlation", "simulation by N2G, r", ".3f")),
        patterns,
        "latents a group",
        1,
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
            ("simulation", "simulation, r", ".3f"),
        ),
        explanations,
        "latents a group",
        1,
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
)
