# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_matryoshka_sae"]
#
# [tool.uv.sources]
# hf_matryoshka_sae = {path = "..", editable = true}
# ///
"""Are the latents of a Matryoshka SAE, of a pruned and of a separately trained one as easy to understand?

    python examples/progressive_coding.py                                    # trains the SAEs
    python examples/progressive_interpretability.py --run runs/progressive_coding

Peter & Søgaard (2025, arXiv 2505.00190) report a trade-off: a Matryoshka SAE reconstructs better at every width, a
pruned plain SAE is the more interpretable. For the SAEs of each seed this measures, at every width: how well patterns
of tokens (N2G) say where latents fire (F1) and simulate how strongly (Pearson's correlation), on held-out text; the
probe loss and k-sparse probes on properties of tokens and on labels of texts. Writes `interpretability.md`, `.csv`,
`.json` and `.png` into the run's folder. What is done is not done again.
"""

import argparse
import csv
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from progressive_coding import run_config
from progressive_coding_judge import dataset_fields, load_saes, training_batches
from progressive_coding_report import STYLES, markdown
from progressive_coding_results import Interval

from hf_matryoshka_sae.activations import DatasetConfig, heldout_batches, load_language_model, resolve_hookpoints
from hf_matryoshka_sae.common.figures import save_figure
from hf_matryoshka_sae.common.files import write_json
from hf_matryoshka_sae.evaluation import HeldOut
from hf_matryoshka_sae.models import SAEModel
from hf_matryoshka_sae.progressive import latent_statistics, rank_latents, sort_latents
from hf_matryoshka_sae.studies import LabelledTask, explainability, probe_losses


EXAMPLE_TOKENS = 150_000  # of training text, from which patterns are made
RANDOM = "random directions (of the Matryoshka's shape)"
METHODS = {
    "matryoshka": "Matryoshka",
    "topk": "TopK, pruned by energy",
    "batch_topk": "BatchTopK, pruned by energy",
    "separate": "TopK trained at the width",
}
METRICS = {
    "f1": ("N2G, F1", 1, ".3f"),
    "correlation": ("simulation by N2G, Pearson's r", 1, ".3f"),
    "probe_loss": ("probe loss, nats", -1, ".4f"),
    "accuracy_1": ("balanced accuracy of a probe on 1 latent", 1, ".4f"),
    "accuracy_2": ("... on 2 latents", 1, ".4f"),
    "accuracy_5": ("... on 5 latents", 1, ".4f"),
}
logger = logging.getLogger("progressive_interpretability")


def main(arguments: list[str] | None = None) -> int:
    """Measure from command-line arguments; returns the exit status."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/progressive_coding", help="folder of the comparison (%(default)s)")
    parser.add_argument("--per_group", type=int, default=16, help="latents drawn between two widths (%(default)s)")
    parser.add_argument("--labelled", help="data set of texts with labels (default: the comparison's held-out text)")
    parser.add_argument("--label", help="its column of labels (default: tasks from properties of tokens alone)")
    parsed = parser.parse_args(arguments)
    try:
        run(Path(parsed.run), parsed.per_group, parsed.labelled, parsed.label)
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. What was done is not done again.\n")
        return 130
    except ValueError as error:
        sys.stderr.write(f"\nerror: {error}\n")
        return 2
    return 0


def run(root: Path, per_group: int, labelled: str | None, label: str | None) -> None:
    """Measure every seed of a comparison, then report on all of them."""
    folders = sorted(path.parent for path in root.glob("seed-*/comparison.json"))
    if not folders:
        raise ValueError(f"'{root}' holds no comparison. Run examples/progressive_coding.py first.")
    rows = []
    for folder in folders:
        comparison = json.loads((folder / "comparison.json").read_text())
        given, seed = comparison["settings"], comparison["seed"]
        asked = {"per_group": per_group, "label": label, "labelled": labelled, "example_tokens": EXAMPLE_TOKENS}
        path = folder / "interpretability.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if found.get("asked") != asked:
            found = {"asked": asked}
        if "probes" not in found:
            examples, test = open_text(given)
            saes = of_seed(given, seed, folder, examples)
            for part, measure in (("patterns", patterns), ("probes", probes)):
                if part not in found:
                    logger.info("Seed %d: %s.", seed, part)
                    found[part] = measure(saes, examples, test, given, asked, seed)
                    write_json(path, found)
        rows += [{"seed": seed, **row} for row in merged(found["patterns"], found["probes"])]
    write_report(root, rows, given, asked)
    logger.info("Wrote %s", root / "interpretability.md")


def open_text(given: dict[str, Any]) -> tuple[HeldOut, HeldOut]:
    """Training text to make patterns from, and held-out text to test them on."""
    model, tokenizer = load_language_model(given["model"])
    (hookpoint,) = resolve_hookpoints(model, [given["hookpoint"]])
    dataset, size = DatasetConfig(**dataset_fields(given, "heldout")), given["context_length"]
    test = heldout_batches(dataset, tokenizer, size, given["eval_tokens"], 8, exclude=given["exclude"])
    examples = list(training_batches({**given, "statistics_tokens": EXAMPLE_TOKENS}, tokenizer))
    both = (HeldOut(model, part, hookpoint, tokenizer.mask_token_id, tokenizer) for part in (examples, test))
    return tuple(both)


def of_seed(given: dict[str, Any], seed: int, folder: Path, examples: HeldOut) -> dict[str, SAEModel]:
    """The SAEs of a seed; the plain ones of the largest width sorted by energy."""
    saes = load_saes(run_config(given, seed, folder), folder, examples.hookpoint, examples.device)
    for name in (f"topk-{given['widths'][-1]}", "batch_topk"):
        statistics = latent_statistics(saes[name], examples, neighbours=0)
        order = rank_latents(saes[name], "energy", statistics)
        saes[name] = sort_latents(saes[name], order=order, across_groups=True)
    saes["topk"] = saes.pop(f"topk-{given['widths'][-1]}")
    return saes


def patterns(saes: dict, examples: HeldOut, test: HeldOut, given: dict, asked: dict, seed: int) -> list[dict]:
    """N2G at each width; a separately trained SAE is drawn from as often as a prefix of its width."""
    rows, widths, count = [], given["widths"], asked["per_group"]
    for method in ("matryoshka", "topk", "batch_topk"):
        found = explainability(
            {method: saes[method]}, examples, test, widths, count, seed=seed, baselines=method == "matryoshka"
        )
        for name, of_widths in found.subjects().items():
            kind = {f"random ({method})": "random", "neurons": "neurons"}.get(name, method)
            rows += [{"method": kind, **row} for row in of_widths]
    for number, width in enumerate(widths[:-1], start=1):
        sae = {"separate": saes[f"topk-{width}"]}
        found = explainability(sae, examples, test, [width], count * number, seed=seed, baselines=False)
        rows += [{"method": "separate", **row} for row in found.subject("separate")]
    full = next(row for row in rows if row["method"] == "topk" and row["width"] == widths[-1])
    return [*rows, {**full, "method": "separate"}]


def probes(saes: dict, examples: HeldOut, test: HeldOut, given: dict, asked: dict, seed: int) -> list[dict]:
    """Probe loss and k-sparse probes at each width."""
    tasks: list[Any] = [None]
    if asked["label"]:
        fields = dataset_fields(given, "heldout") if asked["labelled"] is None else {"path": asked["labelled"]}
        dataset = Dataset.from_parquet(fields["path"])
        tasks.append(LabelledTask.from_dataset(dataset, text=given["column"], label=asked["label"]))
    rows = []
    for name, sae in saes.items():
        method = "separate" if name.startswith("topk-") else name
        widths = [sae.config.num_latents] if method == "separate" else given["widths"]
        report = probe_losses(test, {name: sae}, tasks, widths, baselines=method == "matryoshka", seed=seed)
        kinds = {"dictionary": method, "all channels": "all channels", "channels": "channels", "random": "random"}
        rows += [{**row, "method": kinds[row["kind"]]} for row in report.records if row["kind"] in kinds]
    full = next(row for row in rows if row["method"] == "topk" and row["width"] == given["widths"][-1])
    kept = ("method", "width", "probe_loss")
    return [
        {key: row[key] for key in kept}
        | {f"accuracy_{k}": row["k_sparse"].get(k, {}).get("accuracy") for k in ("1", "2", "5")}
        for row in [*rows, {**full, "method": "separate"}]
    ]


def merged(patterns: list[dict], probes: list[dict]) -> list[dict[str, Any]]:
    """One row for each method and width."""
    rows: dict[tuple, dict[str, Any]] = {}
    for row in [*patterns, *probes]:
        key = row["method"], row["width"]
        kept = {name: row[name] for name in ("explainable", "latents", *METRICS) if name in row}
        rows.setdefault(key, {"method": row["method"], "width": row["width"]}).update(kept)
    return list(rows.values())


# The report


def values(rows: list[dict], method: str, width: int | None, metric: str) -> np.ndarray:
    """One number for each seed, in their order."""
    found = [row for row in rows if row["method"] == method and width in (row["width"], None)]
    return np.array([row[metric] for row in sorted(found, key=lambda row: row["seed"]) if row.get(metric) is not None])


def write_report(root: Path, rows: list[dict], given: dict[str, Any], asked: dict[str, Any]) -> None:
    """Tables, paired differences, what they say, a plot, and every number."""
    widths = given["widths"]
    seeds = sorted({row["seed"] for row in rows})
    parts = [
        "# Interpretability against width: Matryoshka, pruned and separately trained SAEs",
        f"Language model `{given['model']}`, {given['hookpoint']}; k = {given['k']}; seeds {seeds}. Patterns of "
        f"tokens (N2G) from {asked['example_tokens']:,} tokens of training text, tested on {given['eval_tokens']:,} "
        f"held-out tokens; {asked['per_group']} latents drawn from each group between two widths (selection mask), "
        "from separate SAEs as many as from a prefix of their width. Probes on properties of tokens"
        + (f" and on the texts' `{asked['label']}`" if asked["label"] else "")
        + ". A pruned SAE's latents are those of the whole. Mean over seeds ± half of the 95% t-interval.",
        "## Is the trade-off there?\n\nA pruned plain SAE would be the more interpretable. Differences in favour of "
        "the pruned, paired over seeds; undecided where 0 is in the 95% interval:\n\n"
        + "\n".join(verdict(rows, widths)),
        *(table(rows, widths, metric) for metric in METRICS),
        "![Interpretability against width](interpretability.png)",
    ]
    plot(rows, widths, root / "interpretability.png")
    write_json(root / "interpretability.json", {"settings": given, "asked": asked, "rows": rows})
    temporary = root / "interpretability.csv.tmp"
    with open(temporary, "w", newline="") as file:
        out = csv.DictWriter(file, ["seed", "method", "width", "latents", "explainable", *METRICS])
        out.writeheader()
        out.writerows(rows)
    temporary.replace(root / "interpretability.csv")
    temporary = root / "interpretability.md.tmp"
    temporary.write_text("\n\n".join(parts) + "\n")
    temporary.replace(root / "interpretability.md")


def verdict(rows: list[dict], widths: list[int]) -> list[str]:
    """For each metric at which widths a pruned SAE is better than the Matryoshka, and at which worse."""
    lines = []
    for metric, (title, sign, form) in METRICS.items():
        for base in ("topk", "batch_topk"):
            told, found = [], {"the pruned is better": [], "the Matryoshka is better": [], "undecided": []}
            for width in widths:
                gain = sign * (values(rows, base, width, metric) - values(rows, "matryoshka", width, metric))
                interval = Interval.of(gain)
                told.append(f"{interval.text('+' + form)} at {width}")
                sure = interval.half is not None and abs(interval.mean) > interval.half
                better = "the pruned is better" if interval.mean > 0 else "the Matryoshka is better"
                found[better if sure else "undecided"].append(str(width))
            said = "; ".join(f"{what} at {', '.join(where)}" for what, where in found.items() if where)
            lines.append(f"- **{title}**, {METHODS[base]}: {said}. By width {', '.join(told)}.")
    return lines


def table(rows: list[dict], widths: list[int], metric: str) -> str:
    """One metric of every method at every width."""
    title, _, form = METRICS[metric]
    lines = []
    for method in (*METHODS, "random"):
        found = [values(rows, method, width, metric) for width in widths]
        if all(map(len, found)):
            cells = [Interval.of(each).text(form) for each in found]
            lines.append([METHODS.get(method, RANDOM), *cells])
    for method in ("neurons", "channels", "all channels"):
        found = values(rows, method, None, metric)
        if len(found):
            lines.append([method, *["-"] * (len(widths) - 1), Interval.of(found).text(form)])
    return f"## {title}\n\n" + markdown(["", *map(str, widths)], lines)


def plot(rows: list[dict], widths: list[int], path: Path) -> None:
    """Four metrics against width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    drawn = ["f1", "correlation", "probe_loss", "accuracy_1"]
    axes = figure.subplots(1, len(drawn))
    styles = {"topk": STYLES["energy"], "batch_topk": STYLES["frequency"], "random": STYLES["random"]}
    for axis, metric in zip(axes, drawn, strict=True):
        for method in (*METHODS, "random"):
            points = [Interval.of(values(rows, method, width, metric)) for width in widths]
            style = STYLES.get(method) or styles[method]
            label = METHODS.get(method, "random directions")
            axis.errorbar(widths, [p.mean for p in points], yerr=[p.half or 0 for p in points], label=label, **style)
        axis.set(xlabel="width (latents)", ylabel=METRICS[metric][0], xscale="log")
        axis.set_xticks(widths, [str(width) for width in widths], rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
