"""The report of `progressive_coding.py`: a verdict that follows from the numbers, tables, plots, CSV, JSON."""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from progressive_coding_results import BETTER, METRICS, PLAIN, SELECTIONS, Claim, Interval, Results, claims, grouped

from hf_matryoshka_sae.common.figures import save_figure
from hf_matryoshka_sae.common.files import write_json


STYLES = {
    "matryoshka": dict(color="#c1121f", linewidth=2.6, marker="o", zorder=5),
    "separate": dict(color="black", linewidth=1.8, linestyle="--", marker="s", zorder=4),
    "greedy": dict(color="#7b2cbf", marker="^"),
    "energy": dict(color="#0353a4", marker="D", markersize=9, markerfacecolor="none"),
    "contribution": dict(color="#48cae4", marker="d", linestyle="-."),
    "frequency": dict(color="#2a9d8f", marker="v"),
    "attribution": dict(color="#f4a261", marker="P"),
    "decoder-spectrum": dict(color="#8d6e63", marker="X"),
    "random": dict(color="0.55", marker="+", linestyle=":"),
    "trained": dict(color="0.35", marker="x", linestyle="-."),
}
ABOUT = """\
Widths are those of separately trained TopK SAEs, of the Matryoshka's prefixes, and of what is kept of the plain SAEs
of the largest width after sorting them by each ranking (`unsorted`: as trained). Rankings were measured on training
text. **Native L0 (mask)**: all latents compete, then those past the width are dropped, so narrow prefixes fire fewer.
**Matched L0 (restrict)**: latents compete inside the prefix; TopK keeps k again, BatchTopK and the Matryoshka get at
each width a threshold for k latents per token, calibrated on training text. A separately trained SAE has its own k in
both. Recaptured loss: (zero-ablated - spliced) / (zero-ablated - clean) cross-entropy. `greedy` and the statistics
behind all rankings are those of the full width."""


def read_seed(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What was found for a seed with the same settings, if it was."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return found if found["settings"] == settings else None


def write_report(folder: Path, settings: dict[str, Any], seeds: list[dict[str, Any]]) -> None:
    """Write `report.md`, `results.csv`, `results.json` and a picture for each plain SAE."""
    results = Results(seeds)
    found = claims(results)
    pictures = [(name, folder / f"curves-{base}.png") for base, name in PLAIN.items()]
    for base, (name, path) in zip(PLAIN, pictures, strict=True):
        plot_curves(results, base, f"Matryoshka and pruned {name} SAEs", path)
    write_csv(folder / "results.csv", seeds)
    verdict = [asdict(claim) for claim in found]
    write_json(folder / "results.json", {"about": ABOUT, "settings": settings, "claims": verdict, "seeds": seeds})
    parts = [
        "# Progressive coding: Matryoshka, pruned and separately trained SAEs",
        setting(settings, results),
        f"{ABOUT}\n\nTables: mean over seeds ± half of the 95% t-interval.",
        "## Verdict\n\n" + "\n".join(verdict_lines(results, found)),
        "### Paired differences\n\nIn favour of the first; in brackets the seeds in which it is better.\n\n"
        + claim_table(results, found),
        "## Which ranking prunes best\n\n" + "\n\n".join(ranking_parts(results)),
        *(f"![FVU, recaptured loss and RSA of {name}]({path.name})" for name, path in pictures),
        *metric_parts(results),
        "## Power laws\n\n" + power_law_part(results),
        "## Cost of training\n\n" + cost_part(results),
    ]
    temporary = folder / "report.md.tmp"
    temporary.write_text("\n\n".join(parts) + "\n")
    temporary.replace(folder / "report.md")


def write_csv(path: Path, seeds: list[dict[str, Any]]) -> None:
    """Every number in a line of its own."""
    temporary = path.with_suffix(".csv.tmp")
    with open(temporary, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["seed", "method", "ranking", "selection", "width", "metric", "value"])
        for seed in seeds:
            for row in seed["rows"]:
                about = [seed["seed"], *(row[key] for key in ("method", "ranking", "selection", "width"))]
                out.writerows([*about, metric, row[metric]] for metric in METRICS if row[metric] is not None)
    temporary.replace(path)


# The verdict


def verdict_lines(results: Results, found: list[Claim]) -> list[str]:
    """For each metric where the published order holds and where it does not; then what nesting costs."""
    lines = []
    for metric, sign in BETTER.items():
        order = (" < " if sign < 0 else " > ").join(["Matryoshka", "pruned by energy", "unsorted"])
        groups = {key: of_widths for key, of_widths in grouped(found) if key[2] == metric}
        doubts = {key: doubt for key, of_widths in groups.items() if (doubt := _doubt(of_widths))}
        failing = sum(claim.held < claim.seeds for of_widths in groups.values() for claim in of_widths)
        text = f"holds at every inner width in {_every_seed(results)}, for both plain SAEs, at native and matched L0"
        if failing:
            count = sum(map(len, groups.values()))
            text = f"does not hold everywhere: {failing} of {count} comparisons fail in one seed or more"
        lines.append(f"- **{METRICS[metric][0]}: {order}** {text}.")
        for (base, selection, _, better, worse), doubt in doubts.items():
            lines.append(f"  - {better} against {worse}, {PLAIN[base]}, {SELECTIONS[selection]}: {doubt}.")
    return [*lines, *_tax_lines(results)]


def _every_seed(results: Results) -> str:
    count = len(results.seeds)
    return "the one seed" if count == 1 else f"every one of {count} seeds"


def _doubt(of_widths: list[Claim]) -> str:
    """Where a claim fails, and where its interval cannot tell; empty where there is nothing to say."""
    failing = [
        f"{claim.held} of {claim.seeds} seeds at {claim.width}" for claim in of_widths if claim.held < claim.seeds
    ]
    parts = ["better in " + ", ".join(failing)] if failing else []
    unsure = [
        str(claim.width)
        for claim in of_widths
        if claim.held == claim.seeds and claim.gain.half is not None and not claim.gain.above_zero
    ]
    if unsure:
        parts.append(f"in every seed, but with a 95% interval that reaches 0, at {', '.join(unsure)}")
    return "; ".join(parts)


def _tax_lines(results: Results) -> list[str]:
    """What nesting costs at full width, and against SAEs of the same width of their own."""
    lines, full = [], results.widths[-1]
    nested = results.values("matryoshka", "trained", "mask", full, "fvu")
    for base, name in PLAIN.items():
        ratio = nested / results.values(base, "trained", "mask", full, "fvu")
        each = ", ".join(f"{value:.3f}" for value in ratio)
        lines.append(
            f"- **Nesting tax**: at full width the Matryoshka's FVU is {Interval.of(ratio).text('.3f')} times that of "
            f"the plain {name} of the same k, width and tokens (by seed: {each})."
        )
    for selection, name in SELECTIONS.items():
        ratios = [
            results.values("matryoshka", "trained", selection, width, "fvu")
            / results.values("separate", "trained", selection, width, "fvu")
            for width in results.widths
        ]
        each = ", ".join(
            f"{Interval.of(ratio).text('.3f')} at {width}" for width, ratio in zip(results.widths, ratios, strict=True)
        )
        lines.append(f"- The Matryoshka's FVU over that of a TopK SAE trained at the width, {name}: {each}.")
    return lines


def claim_table(results: Results, found: list[Claim]) -> str:
    """Paired differences with intervals and counts of seeds."""
    rows = []
    for (base, selection, metric, better, worse), of_widths in grouped(found):
        cells = [f"{claim.gain.text('+.4f')} ({claim.held}/{claim.seeds})" for claim in of_widths]
        rows.append([PLAIN[base], SELECTIONS[selection], METRICS[metric][0], f"{better} over {worse}", *cells])
    return markdown(["SAE", "selection", "metric", "comparison", *map(str, results.widths[:-1])], rows)


def ranking_parts(results: Results) -> list[str]:
    """For each plain SAE and selection: all rankings against energy, paired over seeds."""
    parts, inner = [], results.widths[:-1]
    for base, name in PLAIN.items():
        for selection, how in SELECTIONS.items():
            ratios = {
                ranking: np.stack([_relative_fvu(results, base, ranking, selection, width) for width in inner])
                for ranking in results.distinct(base)
            }
            gains = {ranking: _recaptured_gain(results, base, ranking, selection) for ranking in ratios}
            order = sorted(ratios, key=lambda ranking: ratios[ranking].mean())
            rows = [
                [results.label(base, ranking)]
                + [Interval.of(values).text("+.1f") for values in [*ratios[ranking], ratios[ranking].mean(0)]]
                + [Interval.of(gains[ranking]).text("+.4f")]
                for ranking in order
            ]
            head = ["ranking", *(f"FVU at {width}, %" for width in inner), "mean, %", "recaptured, mean"]
            text = f"### {name}, {how}\n\n" + _best_line(results, base, order[0], ratios, gains)
            parts.append(f"{text}\n\nAgainst pruning by energy:\n\n{markdown(head, rows)}")
    return parts


def _relative_fvu(results: Results, base: str, ranking: str, selection: str, width: int) -> np.ndarray:
    """Per cent by which the FVU is above that of pruning by energy, by seed."""
    energy = results.values(base, "energy", selection, width, "fvu")
    return 100 * (results.values(base, ranking, selection, width, "fvu") / energy - 1)


def _recaptured_gain(results: Results, base: str, ranking: str, selection: str) -> np.ndarray:
    """Recaptured loss above that of pruning by energy, averaged over inner widths, by seed."""
    gains = [
        results.values(base, ranking, selection, width, "recaptured_zero")
        - results.values(base, "energy", selection, width, "recaptured_zero")
        for width in results.widths[:-1]
    ]
    return np.mean(gains, axis=0)


def _best_line(results: Results, base: str, best: str, ratios: dict, gains: dict) -> str:
    most = max(gains, key=lambda ranking: gains[ranking].mean())
    line = f"Least FVU over the inner widths: **{results.label(base, best)}**; "
    line += f"most recaptured loss: **{results.label(base, most)}**."
    for ranking in ("greedy", "attribution"):
        if ranking in ratios:
            change, gain = Interval.of(ratios[ranking].mean(0)), Interval.of(gains[ranking])
            line += (
                f" Against energy, {ranking} changes FVU by {change.text('+.1f')}% and recaptured loss by "
                f"{gain.text('+.4f')} on average over the inner widths."
            )
    return line


# Tables


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def setting(settings: dict[str, Any], results: Results) -> str:
    """What was trained and judged."""
    first, seeds = results.seeds[0], [str(seed["seed"]) for seed in results.seeds]
    judged = Interval.of(np.array([seed["judged_in_seconds"] for seed in results.seeds]))
    return (
        f"Language model `{settings['model']}`, {settings['hookpoint']}; {settings['tokens']:,} training tokens in "
        f"batches of {settings['batch_size']:,}; k = {settings['k']}; seeds {', '.join(seeds)}. Judged on "
        f"{first['tokens']:,} held-out tokens, losses on {first['loss_tokens']:,} of them (cross-entropy clean "
        f"{first['clean_ce']:.4f}, zero-ablated {first['zero_ce']:.4f} nats); ranked on at least "
        f"{settings['statistics_tokens']:,} tokens of training text. Judging a seed took {judged.mean:.0f} seconds."
    )


def metric_parts(results: Results) -> list[str]:
    """A table for each metric and selection."""
    parts = []
    for metric, (title, form) in METRICS.items():
        for selection, how in SELECTIONS.items():
            ways = [("Matryoshka", "matryoshka", "trained"), ("TopK trained at the width", "separate", "trained")]
            for base, name in PLAIN.items():
                ways += [
                    (f"{name}, {results.label(base, ranking)}", base, ranking) for ranking in results.distinct(base)
                ]
            rows = [
                [label]
                + [
                    Interval.of(results.values(method, ranking, selection, width, metric)).text(form)
                    for width in results.widths
                ]
                for label, method, ranking in ways
            ]
            parts.append(f"## {title}, {how}\n\n" + markdown(["", *map(str, results.widths)], rows))
    return parts


def power_law_part(results: Results) -> str:
    """Exponents with intervals, p-values and verdicts, a line for each seed."""
    rows = []
    for seed in results.seeds:
        for row in seed["power_laws"]:
            about = [seed["seed"], row["method"], row["importance"]]
            if "error" in row:
                rows.append([*about, "-", "-", "-", f"not fitted: {row['error']}"])
                continue
            fit = row["fit"]
            low, high = fit["rank_exponent_interval"]
            exponent = f"{fit['rank_exponent']:.3f} [{low:.3f}, {high:.3f}]"
            tail = f"{fit['tail']} of {fit['values'] - fit['zeros']}"
            rows.append([*about, exponent, tail, f"{fit['p_value']:.2f}", fit["verdict"]])
    first = results.seeds[0]["seed"]
    head = ["seed", "SAE", "importance", "rank exponent s [95%]", "latents in the tail", "p", "verdict"]
    return (
        "Importance ~ rank^-s by maximum likelihood (Clauset, Shalizi and Newman 2009). p below 0.1 rejects the law; "
        f"the verdict also weighs a log-normal and an exponential.\n\n{markdown(head, rows)}\n\n"
        f"![Importance by rank, seed {first}](seed-{first}/power_laws.png)"
    )


def cost_part(results: Results) -> str:
    """Parameters and the time of a step of each SAE, and five separate SAEs against one."""
    costs = [seed["cost"] for seed in results.seeds]
    first, full = costs[0], f"topk-{results.widths[-1]}"

    def seconds(of: Callable[[dict], float]) -> np.ndarray:
        return np.array([of(cost) for cost in costs])

    plain = seconds(lambda cost: cost["step_seconds"][full])
    separate = [f"topk-{width}" for width in results.widths]
    together = seconds(lambda cost: sum(cost["step_seconds"][name] for name in separate))
    nested = seconds(lambda cost: cost["step_seconds"]["matryoshka"])
    rows = []
    for name, parameters in first["parameters"].items():
        times = seconds(lambda cost, name=name: cost["step_seconds"][name])
        speed = Interval.of(first["batch_size"] / times / 1000).text(".1f")
        rows.append([name, f"{parameters:,}", speed, Interval.of(times / plain).text(".2f")])
    total = sum(first["parameters"][name] for name in separate)
    model = seconds(lambda cost: cost["language_model_seconds"]) / plain
    return (
        f"Steps of {first['batch_size']:,} hidden states that go on from the trained weights, without the language "
        f"model; all SAEs take turns in one process, median of {first['turns']} steps, mean over seeds ± half of the "
        f"95% interval.\n\n"
        + markdown(["SAE", "parameters", "thousand tokens per second", f"time of a step / {full}"], rows)
        + f"\n\nThe {len(separate)} separate TopK SAEs have {total:,} parameters and take "
        f"{Interval.of(together / nested).text('.2f')} times as long as the Matryoshka, which has "
        f"{first['parameters']['matryoshka']:,}. The language model's forward pass takes "
        f"{Interval.of(model).text('.2f')} times a step of {full}: once in a shared run, once each otherwise."
    )


# Plots


def plot_curves(results: Results, base: str, title: str, path: Path) -> None:
    """FVU, recaptured loss and RSA against width, at native and at matched L0; bands from the least to the most."""
    from matplotlib.figure import Figure

    panels = ["fvu", "recaptured_zero", "rsa"]
    figure = Figure(figsize=(12, 12.5), layout="constrained")
    axes = figure.subplots(3, 2, sharex=True, sharey="row")
    ways = [("Matryoshka", "matryoshka", "trained"), ("TopK trained at the width", "separate", "trained")]
    ways += [(results.label(base, ranking), base, ranking) for ranking in results.distinct(base)]
    for row, metric in zip(axes, panels, strict=True):
        for axis, (selection, how) in zip(row, SELECTIONS.items(), strict=True):
            for label, method, ranking in ways:
                values = np.stack([results.values(method, ranking, selection, w, metric) for w in results.widths])
                style = STYLES[ranking if method in PLAIN else method]
                axis.plot(results.widths, values.mean(1), **{"linewidth": 1.5, "markersize": 5, **style}, label=label)
                axis.fill_between(results.widths, values.min(1), values.max(1), color=style["color"], alpha=0.15, lw=0)
            axis.set_xscale("log")
            axis.set_xticks(results.widths, [str(width) for width in results.widths])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.tick_params(labelbottom=True)
            if metric == "fvu":
                axis.set_title(how[0].upper() + how[1:])
        row[0].set_ylabel(METRICS[metric][0])
    _limits(axes)
    for axis in axes[-1]:
        axis.set_xlabel("width (latents)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    count = len(results.seeds)
    figure.suptitle(title if count == 1 else f"{title}: mean over {count} seeds, bands from the least to the most")
    save_figure(figure, path)


def _limits(axes) -> None:
    """FVU on a logarithmic scale; what recaptures less than nothing may leave the picture."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes[0, 0].set_yscale("log")
    for axis in axes[0]:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for row in axes[1:]:
        low = row[0].get_ylim()[0]
        row[0].set_ylim(max(low, -0.25), 1.02)
