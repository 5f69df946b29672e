"""Render the card of a run into this folder, with its pictures made small.

    matryoshka-sae demo && python model_cards/render.py runs/demo demo
    python model_cards/render.py runs/progressive_coding/seed-0 progressive_coding \
        --names matryoshka topk-4096 batch_topk --comparison benchmarks/progressive_coding \
        --about "The language model is a small Llama, trained on the same text as the SAEs."

What the card shows and the run's folder lacks is measured first. `--comparison` names the folder of a report of
`examples/progressive_coding.py`, of which the card gets a short table and the curves.
"""

import argparse
import csv
import logging
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

from PIL import Image

from hf_matryoshka_sae.hub.card import card_assets, run_card
from hf_matryoshka_sae.hub.layout import find_saes
from hf_matryoshka_sae.hub.measure import measure_run


HERE = Path(__file__).resolve().parent
WIDEST = 1200  # pixels
COLOURS = 255
SHOWN = {
    ("matryoshka", "trained"): "Matryoshka, one SAE",
    ("separate", "trained"): "TopK, one SAE trained for each width",
    ("topk", "energy"): "TopK, pruned by energy",
    ("topk", "trained"): "TopK, not sorted",
}


def main(arguments: list[str] | None = None) -> int:
    """Render a card from command-line arguments; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("name", help="folder of the card, beside this script")
    parser.add_argument("--names", nargs="+", help="only these SAEs of the run")
    parser.add_argument("--repo", help="repository that the card names (default: your-name/NAME)")
    parser.add_argument("--comparison", type=Path, help="folder of a report of examples/progressive_coding.py")
    parser.add_argument("--about", default="", help="what the run itself cannot know, in a sentence or two")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        render(given)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def render(given: argparse.Namespace) -> None:
    """Measure, render, and copy the pictures."""
    folder = HERE / given.name
    measure_run(given.run, given.names)
    saes = find_saes(given.run, given.names)
    pictures, notes = card_assets(given.run, saes), given.about
    if given.comparison:
        pictures["plots/comparison.png"] = given.comparison / "curves-topk.png"
        notes += "\n\n" + comparison(given.comparison / "results.csv")
    repo = given.repo or f"your-name/{given.name.replace('_', '-')}"
    card = run_card(given.run, repo, saes, notes=notes)
    for place, source in pictures.items():
        shrink(source, folder / place)
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def shrink(source: Path, target: Path) -> None:
    """A picture at most `WIDEST` pixels wide, in few colours."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as picture:
        picture = picture.convert("RGB")
        picture.thumbnail((WIDEST, 10 * WIDEST))
        picture.quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(target, optimize=True)


def comparison(path: Path) -> str:
    """The table of a comparison, as the mean over its seeds."""
    values, seeds = defaultdict(list), set()
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            seeds.add(row["seed"])
            if row["metric"] == "fvu" and row["selection"] == "mask":
                values[row["method"], row["ranking"], int(row["width"])].append(float(row["value"]))
    widths = sorted({width for method, _, width in values if method == "matryoshka"})
    lines = [["FVU at width", *(f"{width:,}" for width in widths)], ["---", *["---:"] * len(widths)]]
    for (method, ranking), title in SHOWN.items():
        lines.append([title, *(f"{mean(values[method, ranking, width]):.4f}" for width in widths)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"""## The comparison

One of {len(seeds)} runs (seeds {", ".join(sorted(seeds))}) in which Matryoshka, pruned and separately trained SAEs are
compared at the same widths. Means over the seeds on held-out text, all latents competing (`mask`):

{table}

![FVU, recaptured loss and RSA against width, all rankings](plots/comparison.png)

`examples/progressive_coding.py` in the package's repository makes the whole report, with losses, intervals and the
other rankings; it is in `benchmarks/progressive_coding/report.md` there."""


if __name__ == "__main__":
    sys.exit(main())
