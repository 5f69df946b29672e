"""The metrics as sections of one evaluation: each called with its size, each giving rows of plain numbers."""

from collections.abc import Mapping
from typing import Any

from ...common.report import Column, Report
from ...evaluation import report
from ...evaluation.core import IDENTITY, details, evaluate
from ..concepts.absorption import absorption_on_task
from ..concepts.first_letter import NotDefined, first_letter_task
from ..concepts.removal import spurious_correlation_removal, targeted_probe_perturbation
from ..concepts.report import HEADLINE, WARNING
from ..drawn_latents import as_records
from ..effects.ablation import ablation_sparsity
from ..explanations.autointerp.interpretability import automated_interpretability
from ..explanations.explainability import explainability
from ..probing.probe_losses import probe_losses
from ..weights.meta_sae import meta_sae
from .bench import Bench, Found, Rows


_ABSORPTION = (
    Column("l0", "L0", "latents that fire on a word.", ".2f", table="nothing"),
    Column(
        "absorption_fraction",
        "fraction",
        "of a letter's direction that single words absorb.",
        better="lower",
    ),
    Column("full_absorption", "full", "words whose letter is told by no latent of the letter.", better="lower"),
    Column("split_latents", "latents a letter", "how many a letter is split into.", better="lower"),
    Column("num_letters", "letters", "that the language model knows.", "d"),
)
_REMOVAL = (
    Column("scr", "SCR", f"spurious correlation removal, {HEADLINE} latents taken out.", ".3f", "higher"),
    Column("tpp", "TPP", f"targeted probe perturbation, {HEADLINE} latents taken out.", ".3f", "higher"),
)


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
            {
                key: value["spearman"] if key == "rsa" and value is not None else value
                for key, value in row.items()
                if key == "rsa" or not isinstance(value, dict)
            }
            for row in found
        ]
        for name, found in rows.items()
    }


def probes(bench: Bench, tokens: int) -> Found:
    """Probe loss and k-sparse probes."""
    options = {"selection": bench.selection, "max_tokens": tokens, "seed": bench.seed}
    return Found.of(probe_losses(bench.data, bench.saes, [None, *bench.labelled], bench.widths, **options))


def patterns(bench: Bench, per_group: int) -> Found:
    """N2G."""
    return Found.of(explainability(bench.saes, *bench.halves, bench.widths, per_group, seed=bench.seed))


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
    return Found({}, "", {}) if found is None else Found.of(found)


def ablation(bench: Bench, tokens: int) -> Found:
    """Ablation sparsity."""
    return Found.of(ablation_sparsity(bench.saes, bench.data, bench.widths, tokens, seed=bench.seed))


def absorption(bench: Bench, size: int) -> Found:  # noqa: ARG001 (all sections have one signature)
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
    keys = ("width", "reason", *(column.name for column in _ABSORPTION))
    rows = {name: [{key: row.get(key) for key in keys} for row in found["rows"]] for name, found in results.items()}
    notes = list(dict.fromkeys(note for found in results.values() for note in found["notes"]))
    told = Report(
        "absorption", "First letters", as_records(rows), _ABSORPTION, {}, ["absorption_fraction"], notes=notes
    )
    return Found(rows, str(told), results, told.plot, notes)


def removal(bench: Bench, tokens: int) -> Found:
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
    return Found(merged.flat(), f"{scr}\n\n{tpp}", everything, merged.plot, [WARNING])


def composition(bench: Bench, seeds: int) -> Found:
    """Meta-SAEs."""
    return Found.of(meta_sae(bench.saes, bench.widths, seeds=range(bench.seed, bench.seed + seeds)))
