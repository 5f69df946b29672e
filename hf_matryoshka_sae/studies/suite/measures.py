"""The metrics as sections of one evaluation: each called with its size, each giving rows of plain numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...evaluation import report
from ...evaluation.core import IDENTITY, details, evaluate
from ..concepts.absorption import absorption_on_task
from ..concepts.first_letter import NotDefined, first_letter_task
from ..concepts.removal import spurious_correlation_removal, targeted_probe_perturbation
from ..concepts.report import HEADLINE, WARNING
from ..drawn_latents import NEURONS
from ..effects.ablation import ablation_sparsity
from ..explanations.autointerp.interpretability import automated_interpretability
from ..explanations.explainability import explainability
from ..probing.probe_losses import probe_losses
from ..weights.meta_sae import meta_sae
from .bench import Bench, Found, Rows


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
                if _plain(key, value)
            }
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
    told = found.about["judge"]
    notes = [told[:1].upper() + told[1:] if found.about["stand_in"] else f"Judge: {told}"]
    every = [rows[-1] for rows in found.rows.values()]
    unusable = sum(row["malformed"] + row["refusals"] for row in every)
    if unusable:
        asked = sum(row["questions"] for row in every)
        notes.append(
            f"{unusable} of {asked} answers were refusals or malformed, and count as saying nothing: see `refusals` "
            "and `malformed` by dictionary"
        )
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


def removal(bench: Bench, tokens: int) -> Found:
    """SCR and TPP at their headline number of latents."""
    options = {"selection": bench.selection, "latents": [HEADLINE], "max_tokens": tokens, "seed": bench.seed}
    rows: Rows = {}
    parts = {
        "scr": spurious_correlation_removal(bench.data, bench.saes, widths=bench.widths, **options),
        "tpp": targeted_probe_perturbation(bench.data, bench.saes, widths=bench.widths, **options),
    }
    for name, found in parts.items():
        for row in found.rows:
            of_subject = rows.setdefault(row["subject"], [])
            place = [each for each in of_subject if each["width"] == row["width"]]
            if not place:
                of_subject.append({"width": row["width"]})
                place = of_subject[-1:]
            count = str(HEADLINE)
            place[0].update({name: row["score"][count], f"{name}_interval": row["interval"][count]})
    everything = {name: found.to_dict() for name, found in parts.items()}
    text = "\n\n".join(map(str, parts.values()))
    return Found(rows, text, everything, lambda path: _plot_removal(rows, path), [WARNING])


def _plot_removal(rows: Rows, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("scr", "tpp"), strict=True):
        report.draw_widths(axis, rows, name, flat=(NEURONS,))
        axis.set(ylabel=f"{name.upper()}, {HEADLINE} latents taken out")
    figure.suptitle(WARNING, fontsize=9, color="tab:red")
    report.save_figure(figure, path)


def composition(bench: Bench, seeds: int) -> Found:
    """Meta-SAEs."""
    found = meta_sae(bench.saes, bench.widths, seeds=range(bench.seed, bench.seed + seeds))
    rows: Rows = {}
    for row in found.rows:
        rows.setdefault(row["subject"], []).append(
            {"width": row["width"], "explained": row["explained"], "explained_interval": row["interval"]}
        )
    return Found(rows, str(found), found.to_dict(), found.plot)
