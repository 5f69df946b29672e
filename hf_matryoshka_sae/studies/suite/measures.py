"""The metrics as sections of one evaluation: each called with its size, each giving rows of plain numbers."""

from collections.abc import Mapping
from typing import Any

from ...common.report import Column, Report, text_table
from ...evaluation import report
from ...evaluation.core import IDENTITY, details, evaluate
from ...evaluation.data import HeldOut
from ..concepts.absorption import absorption_on_task
from ..concepts.first_letter import NotDefined, first_letter_task
from ..concepts.properties import COLUMNS, property_absorption
from ..concepts.removal import spurious_correlation_removal, targeted_probe_perturbation
from ..concepts.report import HEADLINE, WARNING
from ..drawn_latents import as_records
from ..effects.ablation import ablation_sparsity
from ..explanations.autointerp.interpretability import automated_interpretability
from ..explanations.explainability import explainability
from ..frontier import agreement, sparsity_frontier
from ..probing.logistic import f1_scores, fit_logistic
from ..probing.probe_losses import probe_losses
from ..weights.meta_sae import meta_sae
from .bench import Bench, Outcome, Rows


_EFFORT, _MOST_EFFORT, _SUBSTITUTES_FROM = 0.01, 0.5, 32  # of a latent of each group; latents of a group
_FULL_STEPS = 1500
_SEVERAL_SPLITS = 4_000  # tokens from which on probes are fitted to several splits
_WORDS_TO_CHECK, _SPELLS = 600, 0.5
_REMOVAL = (
    Column("scr", "SCR", f"spurious correlation removal, {HEADLINE} latents taken out.", ".3f", "higher"),
    Column("tpp", "TPP", f"targeted probe perturbation, {HEADLINE} latents taken out.", ".3f", "higher"),
)


def fidelity(bench: Bench, tokens: int) -> Outcome:
    """Reconstruction, loss, similarity, weights and firing."""
    data = bench.data.sample(tokens)
    result = evaluate(data, bench.saes, bench.widths, bench.selection, scaling=bench.scaling)
    drawn = result | {"saes": {name: rows for name, rows in result["saes"].items() if name != IDENTITY}}
    text = f"{report.table([result])}\n\n{details([result])}"
    facts = {key: value for key, value in result.items() if key != "saes"}
    return Outcome(_flat(result["saes"]), text, result, lambda path: report.plot([drawn], path), facts=facts)


def _flat(rows: Mapping[str, list[dict[str, Any]]]) -> Rows:
    """The rows with numbers only: similarity is its rank correlation."""
    return {
        name: [
            {
                key: value["spearman"] if key == "rsa" and value is not None else value
                for key, value in row.items()
                if key == "rsa" or not isinstance(value, dict)
            }
            for row in each
        ]
        for name, each in rows.items()
    }


def probes(bench: Bench, tokens: int) -> Outcome:
    """Probe loss and k-sparse probes; on few tokens of one split."""
    options = {"selection": bench.selection, "max_tokens": tokens, "seed": bench.seed}
    options["splits"] = 1 if tokens < _SEVERAL_SPLITS else 3
    return Outcome.of(probe_losses(bench.data, bench.saes, [None, *bench.labelled], bench.widths, **options))


def patterns(bench: Bench, per_group: int) -> Outcome:
    """N2G; of few latents with little effort."""
    options = {"effort": min(_MOST_EFFORT, _EFFORT * per_group), "seed": bench.seed}
    options["substitutes"] = 2 if per_group >= _SUBSTITUTES_FROM else 0
    return Outcome.of(explainability(bench.saes, *bench.halves, bench.widths, per_group, **options))


def explanations(bench: Bench, per_group: int) -> Outcome:
    """Automated interpretability; only the main process has it."""
    report = automated_interpretability(
        bench.saes,
        *bench.halves,
        bench.judge,
        bench.widths,
        per_group,
        cache=bench.answers,
        prompts=bench.prompts,
        seed=bench.seed,
    )
    return Outcome({}, "", {}) if report is None else Outcome.of(report)


def ablation(bench: Bench, tokens: int) -> Outcome:
    """Ablation sparsity."""
    if not bench.data.has_loss:
        raise NotDefined("the language model predicts no tokens, so there are no logits for latents to act on")
    return Outcome.of(ablation_sparsity(bench.saes, bench.data, bench.widths, tokens, seed=bench.seed))


def absorption(bench: Bench, tokens: int) -> Outcome:
    """Absorption and splitting of properties of tokens."""
    return Outcome.of(property_absorption(bench.data, bench.saes, bench.widths, max_tokens=tokens, seed=bench.seed))


def spelling(bench: Bench, words: int) -> Outcome:
    """Absorption and splitting of first letters, where the language model knows them."""
    data = bench.data
    _check_spelling(data, bench.seed)
    task = first_letter_task(data.model, data.tokenizer, data.hookpoint, max_words=words, seed=bench.seed)
    results = {
        name: absorption_on_task(sae, task, bench.widths, selection="restrict") for name, sae in bench.saes.items()
    }
    first = next(iter(results.values()))
    if not first["defined"]:
        raise NotDefined(first["reason"])
    rows = {
        name: [{k: v for k, v in row.items() if k != "letters"} for row in each["rows"]]
        for name, each in results.items()
    }
    notes = list(dict.fromkeys(note for result in results.values() for note in result["notes"]))
    columns = [column for column in COLUMNS if column.name not in ("hole_share", "main_f1")]
    report = Report("spelling", "First letters", as_records(rows), columns, {}, ["absorption_fraction"], notes=notes)
    return Outcome(rows, str(report), results, report.plot, notes)


def _check_spelling(data: HeldOut, seed: int) -> None:
    """Raise [`NotDefined`] where first letters of bare words cannot be told; the task reads far more text."""
    if data.tokenizer is None:
        raise NotDefined("there is no tokenizer, so there are no words")
    words = {"prompt": "{word}", "shots": 0, "max_words": _WORDS_TO_CHECK, "min_words": 8, "seed": seed}
    task = first_letter_task(data.model, data.tokenizer, data.hookpoint, **words)
    classes = task.letters.unique()
    targets = task.letters[:, None] == classes
    probe = fit_logistic(task.states[~task.heldout], targets[~task.heldout])
    f1 = f1_scores(probe.scores(task.states[task.heldout]) > 0, targets[task.heldout])
    if f1.mean() < _SPELLS:
        raise NotDefined(
            f"the language model does not spell: a probe tells the first letter of words with a mean F1 of "
            f"{f1.mean():.2f} over {len(classes)} letters"
        )


def removal(bench: Bench, tokens: int) -> Outcome:
    """SCR and TPP at their headline number of latents."""
    options = {"selection": bench.selection, "latents": [HEADLINE], "max_tokens": tokens, "seed": bench.seed}
    scr = spurious_correlation_removal(bench.data, bench.saes, widths=bench.widths, **options)
    tpp = targeted_probe_perturbation(bench.data, bench.saes, widths=bench.widths, **options)
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for part in (scr, tpp):
        for record in part.records:
            place = {key: record[key] for key in ("subject", "kind", "width")}
            both, (column,) = records.setdefault((record["subject"], record["width"]), place), part.columns
            both |= {part.name: column.value(record), f"{part.name}_interval": column.bounds(record)}
    merged = Report(
        "removal", "Concept removal", list(records.values()), _REMOVAL, {}, ["scr", "tpp"], warning=WARNING
    )
    everything = {part.name: part.to_dict() for part in (scr, tpp)}
    return Outcome(merged.flat(), f"{scr}\n\n{tpp}", everything, merged.plot, [WARNING])


def composition(bench: Bench, steps: int) -> Outcome:
    """Meta-SAEs of one seed; on few steps those of an SAE and of random rows are both unfinished, and comparable."""
    batch = 1024 if steps >= _FULL_STEPS else 512
    return Outcome.of(meta_sae(bench.saes, bench.widths, steps=steps, batch_size=batch, seeds=[bench.seed]))


def comparison(bench: Bench, tokens: int) -> Outcome:
    """Several SAEs at equal sparsity, and how alike their latents are."""
    if len(bench.saes) < 2:
        raise NotDefined("there is one SAE; name a folder of several to compare them")
    report = sparsity_frontier(bench.data.sample(tokens), bench.saes, seed=bench.seed)
    lines = [["", "width", "matched cosine", "random rows"]]
    for row in agreement(bench.saes):
        names, cosine = f"{row['first']}, {row['second']}", row["matched_cosine"]
        lines.append([names, str(row["width"]), "-" if cosine is None else f"{cosine:.3f}", f"{row['random']:.3f}"])
    report.more = "How alike their decoder rows are, matched one to one:\n" + "\n".join(
        text_table(*lines[:1], lines[1:])
    )
    own = {record["subject"]: [record] for record in report.records if record["fvu_equal"] is not None}
    rows = {name: [{key: row[key] for key in ("width", "own_l0", "fvu_equal")}] for name, (row,) in own.items()}
    return Outcome(rows, str(report), report.to_dict(), report.plot, report.notes)
