# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_matryoshka_sae"]
#
# [tool.uv.sources]
# hf_matryoshka_sae = {path = "..", editable = true}
# ///
"""Are the latents of a Matryoshka SAE and of a pruned one as easy to understand, where they fire equally often?

    python examples/progressive_interpretability.py --tokens 999424 --per_group 48

Peter & Søgaard (2025, arXiv 2505.00190) report a trade-off: a Matryoshka SAE reconstructs better at every width, a
pruned plain SAE is the more interpretable. The first latents of a Matryoshka SAE fire more often than those of a
pruned one, and what fires often is harder to say. For each seed this trains a Matryoshka, a TopK and a BatchTopK SAE
on the same hidden states, prunes the plain ones by energy, and explains latents by patterns of tokens (N2G) made from
training text and tested on other text, beside tables of the last token and of the last two from the same text: by
width, by frequency, and at each width as if all fired equally often. Writes `interpretability.md`, `.json` and
`.png`.

Without `--model`, and without the folder `../shared`, the embedded language model and smaller sizes are taken. What is
done is not done again.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from progressive_coding import run_config, settings, train_once
from progressive_coding_judge import dataset_fields, load_saes
from progressive_coding_report import markdown
from progressive_coding_results import Interval

from hf_matryoshka_sae.activations import DatasetConfig, TokenBatch, load_language_model, resolve_hookpoints
from hf_matryoshka_sae.activations.text.documents import load_documents
from hf_matryoshka_sae.activations.text.tokens import TokenStream
from hf_matryoshka_sae.activations.text.windows import WindowShuffle
from hf_matryoshka_sae.common.figures import label_widths, save_figure
from hf_matryoshka_sae.common.files import write_json, write_text
from hf_matryoshka_sae.evaluation import HeldOut, random_dictionary
from hf_matryoshka_sae.models import SAEModel
from hf_matryoshka_sae.progressive import latent_statistics, rank_latents, sort_latents
from hf_matryoshka_sae.studies import explainability
from hf_matryoshka_sae.studies.explanations.by_frequency import by_frequency, matched


METHODS = {
    "matryoshka": "Matryoshka",
    "topk": "TopK, pruned by energy",
    "batch_topk": "BatchTopK, pruned by energy",
}
SCORES = ("f1", "token_f1", "pair_f1", "correlation")
TITLES = {
    "f1": "N2G, F1",
    "token_f1": "table of the last token, F1",
    "pair_f1": "table of the last two tokens, F1",
    "correlation": "simulation by N2G, Pearson's r",
}
logger = logging.getLogger("progressive_interpretability")


def main(arguments: list[str] | None = None) -> int:
    """Measure from command-line arguments; returns the exit status."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for name in ("hf_matryoshka_sae", "progressive_coding", "progressive_interpretability"):
        logging.getLogger(name).setLevel(logging.INFO)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="All other flags are those of progressive_coding.py; eval_tokens: text that patterns are tested on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--per_group", type=int, default=48, help="latents drawn between two widths (%(default)s)")
    parser.add_argument("--groups", type=int, nargs="+", help="widths between which latents are drawn (default: all)")
    parser.add_argument("--effort", type=float, default=0.5, help="scales the places of a latent (%(default)s)")
    parser.add_argument("--example_tokens", type=int, default=30_000, help="text for patterns (%(default)s)")
    parsed, others = parser.parse_known_args(arguments)
    try:
        given = settings(["--output_dir", "runs/progressive_interpretability", *others])
        asked = {"per_group": parsed.per_group, "example_tokens": parsed.example_tokens, "effort": parsed.effort}
        run({**given, "separate": False}, asked | {"groups": parsed.groups or given["widths"]})
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. What was done is not done again.\n")
        return 130
    except ValueError as error:
        sys.stderr.write(f"\nerror: {error}\n")
        return 2
    return 0


def run(given: dict[str, Any], asked: dict[str, Any]) -> None:
    """Train and measure every seed, then report on all of them."""
    root, texts, seeds = Path(given["output_dir"]), None, []
    for seed in given["seeds"]:
        folder = root / f"seed-{seed}"
        config = run_config({**given, "eval_tokens": 4096}, seed, folder)
        train_once(config, folder)
        path = folder / "interpretability.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if found.get("asked") != asked:
            texts = texts or open_texts(given, asked)
            logger.info("Explaining the latents of seed %d.", seed)
            first = seed == given["seeds"][0]
            found = {"asked": asked, "seed": seed, "latents": explained(config, folder, texts, asked, seed, first)}
            write_json(path, found)
        seeds.append(found)
    write_report(root, given, asked, seeds)
    logger.info("Wrote %s", root / "interpretability.md")


def open_texts(given: dict[str, Any], asked: dict[str, Any]) -> tuple[HeldOut, HeldOut]:
    """Open training text to make patterns from and held-out text to test them on, windows from all over each."""
    model, tokenizer = load_language_model(given["model"])
    (hookpoint,) = resolve_hookpoints(model, [given["hookpoint"]])

    def windows(which: str, tokens: int) -> Iterator[TokenBatch]:
        documents = load_documents(DatasetConfig(**dataset_fields(given, which)), tokenizer, shuffle=True)
        stream = TokenStream(documents, tokenizer, given["context_length"], 8, exclude=given["exclude"])
        shuffled = WindowShuffle(stream, 2**17, 0)
        while tokens > 0:
            batch = next(shuffled)
            tokens -= int(batch.keep.sum())
            yield batch

    sizes = {"train": asked["example_tokens"], "heldout": given["eval_tokens"]}
    parts = (list(windows(which, size)) for which, size in sizes.items())
    return tuple(HeldOut(model, part, hookpoint, tokenizer.mask_token_id, tokenizer, {}) for part in parts)


def explained(
    config: Any, folder: Path, texts: tuple[HeldOut, HeldOut], asked: dict[str, Any], seed: int, baselines: bool
) -> dict[str, list[dict[str, Any]]]:
    """Return the scores of the drawn latents of each SAE; with baselines of random directions too."""
    saes = load_saes(config, folder, texts[0].hookpoint, texts[0].device)
    largest = next(name for name in saes if name.startswith("topk-"))
    pruned: dict[str, SAEModel] = {"matryoshka": saes["matryoshka"]}
    for method, name in (("topk", largest), ("batch_topk", "batch_topk")):
        order = rank_latents(saes[name], "energy", latent_statistics(saes[name], texts[0], neighbours=0))
        pruned[method] = sort_latents(saes[name], order=order, across_groups=True)
    options = {"per_group": asked["per_group"], "effort": asked["effort"], "substitutes": 0, "seed": seed}
    report = explainability(pruned, *texts, asked["groups"], baselines=False, **options)
    latents = dict(report.latents)
    if baselines:
        few = {**options, "per_group": min(16, asked["per_group"])}
        random = {"random": random_dictionary(saes["matryoshka"], texts[0], asked["groups"], seed=seed)}
        latents |= explainability(random, *texts, asked["groups"], baselines=False, **few).latents
    return {name: [asdict(one) for one in each] for name, each in latents.items()}


# The report


def objects(latents: list[dict[str, Any]]) -> list[SimpleNamespace]:
    """Return records as objects, as the functions of the package take them."""
    return [SimpleNamespace(**one) for one in latents]


def by_width(latents: list[dict[str, Any]], width: int, score: str) -> float:
    """Return the mean of a score over the first latents of an SAE, each weighed by those that it was drawn for."""
    own = [one for one in latents if one["latent"] < width]
    weights = np.array([one["weight"] for one in own])
    return float(weights @ np.array([one[score] for one in own]) / weights.sum())


def at_equal_frequency(seeds: list[dict[str, Any]], widths: list[int]) -> list[dict[str, Any]]:
    """Return each plain SAE's difference to the Matryoshka, frequency held, by seed, width and score."""
    rows = []
    for found in seeds:
        for other in ("topk", "batch_topk"):
            pair = {name: objects(found["latents"][name]) for name in (other, "matryoshka")}
            for width in widths:
                both = {row["subject"]: row for row in matched(pair, SCORES, [width], resamples=400)}
                if both:
                    rows.append(
                        {
                            "seed": found["seed"],
                            "other": other,
                            "width": width,
                            "latents": [both[name]["latents"] for name in (other, "matryoshka")],
                            "covered": [both[name]["covered"] for name in (other, "matryoshka")],
                            **{score: both[other][score] - both["matryoshka"][score] for score in SCORES},
                        }
                    )
    return rows


def pooled_differences(seeds: list[dict[str, Any]], widths: list[int]) -> list[dict[str, Any]]:
    """Return each plain SAE's difference to the Matryoshka, frequency held, over the latents of all seeds.

    Ends of the 95% intervals: the halves of both SAEs' bootstrap intervals, as their latents are independent, added
    in squares.
    """
    rows = []
    for other in ("topk", "batch_topk"):
        names = (other, "matryoshka")
        pair = {name: objects([one for found in seeds for one in found["latents"][name]]) for name in names}
        for width in widths:
            both = {row["subject"]: row for row in matched(pair, SCORES, [width])}
            if not both:
                continue
            row = {"other": other, "width": width}
            row |= {key: [both[name][key] for name in names] for key in ("latents", "covered")}
            for score in SCORES:
                difference = both[other][score] - both["matryoshka"][score]
                ends = [both[name][f"{score}_interval"] for name in names]
                half = float(np.hypot(*((high - low) / 2 for low, high in ends))) if all(ends) else None
                row |= {score: difference, f"{score}_half": half}
            rows.append(row)
    return rows


def pooled(seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the scores by frequency of each method, latents of all seeds together."""
    names = dict.fromkeys(name for found in seeds for name in found["latents"])
    latents = {name: objects([one for found in seeds for one in found["latents"].get(name, [])]) for name in names}
    return by_frequency(latents, SCORES)


def write_report(root: Path, given: dict[str, Any], asked: dict[str, Any], seeds: list[dict[str, Any]]) -> None:
    """Write tables, differences at equal frequency, what they say, a plot, and every number."""
    widths, rows, bins = asked["groups"], at_equal_frequency(seeds, asked["groups"]), pooled(seeds)
    together = pooled_differences(seeds, widths)
    raw = {
        score: {
            method: [
                Interval.of(np.array([by_width(each["latents"][method], w, score) for each in seeds])) for w in widths
            ]
            for method in METHODS
        }
        for score in (*SCORES, "frequency")
    }
    parts = [
        "# Interpretability against width and frequency: Matryoshka and pruned SAEs",
        f"Language model `{Path(given['model']).name}`, {given['hookpoint']}; F = {given['widths'][-1]}, "
        f"k = {given['k']}, {given['tokens']:,} training tokens; seeds {[each['seed'] for each in seeds]}. Patterns "
        f"from {asked['example_tokens']:,} tokens of training text, tested on {given['eval_tokens']:,} of held-out "
        f"text; {asked['per_group']} latents drawn from each group between the widths {widths}. ± is half of the 95% "
        "t-interval over seeds; in brackets 95% bootstrap intervals over latents.",
        "## At equal frequency\n\nEach pruned SAE less the Matryoshka, as if the latents of both fired equally often. "
        "Above 0 the pruned is easier to say. Latents of all seeds together, ± 95% by bootstrap over latents:\n\n"
        + pooled_table(together, widths)
        + "\n\n"
        + covered_text(together, widths),
        "Of each seed, and the mean over seeds; sure where 0 is outside the interval over seeds:\n\n"
        + difference_table(rows, widths),
        "## By frequency, all seeds together\n\n" + frequency_table(bins),
        *(f"## By width: {title}\n\n" + width_table(raw[score], widths) for score, title in TITLES.items()),
        "## By width: mean frequency\n\n" + width_table(raw["frequency"], widths, ".4f"),
        "![By frequency, and differences at equal frequency](interpretability.png)",
    ]
    write_json(
        root / "interpretability.json",
        {"settings": given, "asked": asked, "differences": rows, "pooled": together, "bins": bins},
    )
    write_text(root / "interpretability.md", "\n\n".join(parts) + "\n")
    plot(bins, together, widths, root / "interpretability.png")


def pooled_table(rows: list[dict[str, Any]], widths: list[int]) -> str:
    """Return the differences over the latents of all seeds."""
    lines = []
    for other in ("topk", "batch_topk"):
        of_width = {row["width"]: row for row in rows if row["other"] == other}
        for score in SCORES:
            cells = []
            for width in widths:
                row = of_width.get(width)
                half = row and row[f"{score}_half"]
                cells.append("-" if row is None else f"{row[score]:+.3f}" + (f" ± {half:.3f}" if half else ""))
            lines.append([METHODS[other], TITLES[score], *cells])
    return markdown(["", "", *map(str, widths)], lines)


def difference_table(rows: list[dict[str, Any]], widths: list[int]) -> str:
    """Return the paired differences of every score at every width."""
    lines = []
    for other in ("topk", "batch_topk"):
        for score in SCORES:
            cells = []
            for width in widths:
                found = np.array([row[score] for row in rows if row["other"] == other and row["width"] == width])
                interval = Interval.of(found) if len(found) else None
                sure = interval is not None and interval.half is not None and abs(interval.mean) > interval.half
                cells.append("-" if interval is None else interval.text("+.3f") + (" (sure)" if sure else ""))
            lines.append([METHODS[other], TITLES[score], *cells])
    return markdown(["", "", *map(str, widths)], lines)


def covered_text(rows: list[dict[str, Any]], widths: list[int]) -> str:
    """Say which share of each SAE's latents fires as often as some of the other's: only these are compared."""
    told = []
    for other in ("topk", "batch_topk"):
        for width in widths:
            found = [row["covered"] for row in rows if row["other"] == other and row["width"] == width]
            if found:
                own, nested = np.mean(found, axis=0)
                told.append(f"{METHODS[other]} at {width}: {own:.0%} of its latents, {nested:.0%} of the Matryoshka's")
    return f"Compared, as the others fire more or less often than any of the other SAE: {'; '.join(told)}."


def frequency_table(bins: list[dict[str, Any]]) -> str:
    """Return every score in every bin, with the number of latents."""
    lines = []
    for row in bins:
        cells = []
        for score in SCORES:
            bounds = row[f"{score}_interval"]
            cells.append(f"{row[score]:.3f}" + (f" [{bounds[0]:.3f} {bounds[1]:.3f}]" if bounds else ""))
        lines.append([METHODS.get(row["subject"], row["subject"]), row["frequency"], row["latents"], *cells])
    return markdown(["", "fires on", "latents", *(TITLES[score] for score in SCORES)], lines)


def width_table(rows: dict[str, list[Interval]], widths: list[int], form: str = ".3f") -> str:
    """Return one score of every method at every width."""
    lines = [[METHODS[method], *(each.text(form) for each in intervals)] for method, intervals in rows.items()]
    return markdown(["", *map(str, widths)], lines)


def plot(bins: list[dict[str, Any]], rows: list[dict[str, Any]], widths: list[int], path: Path) -> None:
    """Draw F1 by frequency, with the tables of the last two tokens, and the differences at equal frequency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, method in enumerate([*METHODS, "random"]):
        own = sorted((row["bin"], row) for row in bins if row["subject"] == method and row["f1_interval"])
        if own:
            places = [10 ** ((place - 0.5) / 2) for place, _ in own]
            middle = [row["f1"] for _, row in own]
            ends = np.array([row["f1_interval"] for _, row in own]).T
            label = METHODS.get(method, "random directions")
            left.errorbar(
                places, middle, yerr=np.abs(ends - middle), fmt="o-", capsize=3, color=f"C{number}", label=label
            )
            left.plot(places, [row["pair_f1"] for _, row in own], ":", color=f"C{number}")
    left.set(xlabel="share of tokens it fires on", ylabel="F1 (dotted: table of the last two tokens)", xscale="log")
    for number, other in enumerate(("topk", "batch_topk"), start=1):
        own = [row for row in rows if row["other"] == other]
        middle, half = [row["f1"] for row in own], [row["f1_half"] or 0 for row in own]
        places = [row["width"] * 1.03**number for row in own]
        right.errorbar(places, middle, yerr=half, fmt="o-", capsize=3, color=f"C{number}", label=METHODS[other])
    right.axhline(0, color="black", linewidth=0.8)
    right.set(ylabel="F1 less the Matryoshka's, frequency held")
    label_widths(right, set(widths))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
