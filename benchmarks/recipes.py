"""Train every family with its default recipe on several language models and budgets; print and plot what comes out.

    python benchmarks/recipes.py --lm ../shared/lm --minilm MODEL --text ../shared/text --output runs/recipes

A cell is one setting, one recipe and one seed. A finished cell is a JSON file under `<output>/cells`, which is not
computed again: stop the command when you like and run it once more. The hidden states of a setting are harvested once,
into a file under `<output>/states`, and shared by all its cells.

    embedded  the model that ships with the package, model.layers.2, F = 1024, target 16, 1,000,000 tokens
    short     the same, 200,000 tokens
    lm        the model of `--lm`, model.layers.1, F = 4096, target 16, 2,998,272 tokens of `--text`
    lm-short  the same, 400,000 tokens
    minilm    the model of `--minilm`, encoder.layer.3, F = 6144, target 32, 400,000 tokens of `--text`

`--text` is a folder with `train.parquet` and `heldout.parquet`. `--fields lr=0.003 --label slow` tries other fields,
with results under the recipe's name and the label. FVU, L0 (at the threshold that the run calibrates, where the family
has one) and the share of latents that never fire are of up to 60,000 held-out tokens, mask selection; of TopK inside
Matryoshka also where each prefix chooses its own k latents (`restrict`, what `width=` gives). `<output>` gets
`recipes.json`, `recipes.md` and, for each setting, `first-steps-<setting>.png`: what dies, fires and is left
unexplained over the first 500 steps.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import yaml

from hf_matryoshka_sae.common.figures import save_figure
from hf_matryoshka_sae.common.files import write_json, write_text
from hf_matryoshka_sae.convert import load
from hf_matryoshka_sae.evaluation import Dictionary, evaluate_fidelity, open_heldout
from hf_matryoshka_sae.training import RunConfig, train


_CALIBRATION = 200_000
_HELD_OUT = 60_000
_CURVE_STEPS = 500


@dataclass(frozen=True)
class Setting:
    """Whose hidden states, how many, and which dictionary."""

    model: str
    hookpoint: str
    num_latents: int
    target: int
    tokens: int
    widths: tuple[int, ...]
    context_length: int = 128
    exclude: str = "special"
    states: str = ""


_EMBEDDED = Setting("embedded", "model.layers.2", 1024, 16, 1_000_000, (32, 96, 224, 480, 1024), states="embedded")
_LM = Setting("lm", "model.layers.1", 4096, 16, 2_998_272, (128, 384, 896, 1920, 4096), 256, "first", "lm")
SETTINGS = {
    "embedded": _EMBEDDED,
    "short": dataclasses.replace(_EMBEDDED, tokens=200_000),
    "lm": _LM,
    "lm-short": dataclasses.replace(_LM, tokens=400_000),
    "minilm": Setting(
        "minilm", "encoder.layer.3", 6144, 32, 400_000, (192, 576, 1344, 2880, 6144), 128, "special", "minilm"
    ),
}
_DEFAULT_SETTINGS = ["embedded", "lm", "minilm", "short"]

# What stands in an entry of `saes`; sizes and the target are the setting's.
RECIPES: dict[str, dict[str, Any]] = {
    "topk": {"type": "topk"},
    "batch_topk": {"type": "batch_topk"},
    "jumprelu": {"type": "jumprelu"},
    "gated": {"type": "gated"},
    "relu": {"type": "relu"},
    "matryoshka": {"type": "matryoshka"},
    "matryoshka-topk": {"type": "matryoshka", "activation": "topk"},
    "matryoshka-jumprelu": {"type": "matryoshka", "activation": "jumprelu"},
    "matryoshka-relu": {"type": "matryoshka", "activation": "relu"},
    "nabeshima": {"preset": "nabeshima"},
}


def entry(recipe: str, setting: Setting, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of `saes` of a recipe in a setting."""
    spec = dict(RECIPES[recipe])
    competes = spec.get("activation") in ("topk", "batch_topk") or recipe in ("topk", "batch_topk", "matryoshka")
    spec |= {"name": recipe, "num_latents": setting.num_latents, "k" if competes else "target_l0": setting.target}
    if spec.get("type") == "matryoshka":
        spec["prefix_widths"] = list(setting.widths)
    return spec | fields


def hidden_states(setting: Setting, split: str, paths: dict[str, str | None], folder: Path) -> torch.Tensor:
    """Return the setting's hidden states `(N, D)`, from a file that is written where there is none."""
    path = folder / f"{setting.states}-{split}.npy"
    if not path.exists():
        wanted = _HELD_OUT
        if split == "train":
            largest = max(one.tokens for one in SETTINGS.values() if one.states == setting.states)
            wanted = largest + min(_CALIBRATION, largest // 5)
        text = {"path": "embedded", "split": split}
        if setting.model != "embedded":
            text = {"path": str(Path(paths["text"]) / f"{split}.parquet"), "column": "text"}
        data = open_heldout(
            paths.get(setting.model) or setting.model,
            setting.hookpoint,
            text,
            wanted,
            setting.context_length,
            exclude=setting.exclude,
        )
        rows = torch.cat(list(data.activations()))
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part.npy")
        np.save(temporary, rows.numpy())
        temporary.rename(path)
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # copy on write: torch wants an array it may write to


def run_cell(spec: dict[str, Any], setting: Setting, seed: int, train_states: Any, heldout: Any) -> dict[str, Any]:
    """Train one SAE and return its rows by prefix and the course of its first steps."""
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.from_dict(
            {
                "model": setting.model,
                "hookpoints": [setting.hookpoint],
                "tokens": setting.tokens,
                "batch_size": 2048,
                "log_every": 5,
                "checkpoint_every": 0,
                "seed": seed,
                "saes": [spec],
                "output_dir": folder,
            }
        )
        began = time.monotonic()
        (result,) = train(config, states=train_states, heldout=heldout)
        seconds = time.monotonic() - began
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        restrict = None
        if spec.get("activation") == "topk":
            sae = load(next(Path(folder).rglob("config.json")).parent)
            told = evaluate_fidelity([heldout], {"sae": Dictionary(sae, selection="restrict")}, show=False)
            restrict = _kept(told["subjects"]["sae"])
    course = [
        {"step": line["step"], **{key: told[key] for key in ("l0", "dead", "sparsity")}, "fvu": told["fvu"][-1]}
        for line in lines
        if line["step"] <= _CURVE_STEPS
        for told in line["saes"].values()
    ]
    (rows,) = result["saes"].values()
    cell = {"spec": spec, "seed": seed, "tokens": result["tokens"], "seconds": seconds}
    return {**cell, "rows": _kept(rows), "restrict": restrict, "course": course}


def _kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in ("width", "l0", "fvu", "dead")} for row in rows]


def summary(cells: dict[tuple[str, str], list[dict]], seeds: list[int]) -> list[dict[str, Any]]:
    """Return a row for each setting and recipe: means over the seeds, by prefix."""
    rows = []
    for (setting, name), found in cells.items():
        # What has prefixes is held against the default that has them too.
        nested = name.startswith("matryoshka") and name != "matryoshka"
        base = cells.get((setting, "matryoshka" if nested else "batch_topk"))
        columns = {
            key: [[one["rows"][p][key] for one in found] for p in range(len(found[0]["rows"]))]
            for key in ("l0", "fvu", "dead")
        }
        row: dict[str, Any] = {"setting": setting, "recipe": name, "seeds": len(found)}
        row |= {key: [mean(values) for values in prefixes] for key, prefixes in columns.items()}
        row["widths"] = [one["width"] for one in found[0]["rows"]]
        row["spread"] = [stdev(values) if len(values) > 1 else None for values in columns["fvu"]]
        row["target"] = SETTINGS[setting].target
        if base and len(base[0]["rows"]) in (1, len(row["fvu"])):
            bars = [mean(one["rows"][p]["fvu"] for one in base) for p in range(len(base[0]["rows"]))]
            ends = row["fvu"] if len(bars) == len(row["fvu"]) else row["fvu"][-1:]
            row["ratio"] = [value / bar for value, bar in zip(ends, bars, strict=True)]
        row["seconds"] = mean(one["seconds"] for one in found)
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table: a line for each setting and recipe, FVU and ratio by prefix."""
    lines = [
        "| setting | recipe | seeds | FVU by prefix | L0 | off target | dead | / BatchTopK | s |",
        "|---|---|--:|---|--:|--:|--:|---|--:|",
    ]
    for row in rows:
        fvu = " ".join(f"{value:.3f}" for value in row["fvu"])
        spread = f" ± {row['spread'][-1]:.3f}" if row["spread"][-1] is not None else ""
        ratio = " ".join(f"{value:.2f}" for value in row.get("ratio", []))
        off = row["l0"][-1] / row["target"] - 1
        lines.append(
            f"| {row['setting']} | {row['recipe']} | {row['seeds']} | {fvu}{spread} | {row['l0'][-1]:.2f} "
            f"| {off:+.1%} | {row['dead'][-1]:.2%} | {ratio} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot_courses(folders: dict[str, Path], setting: str, path: Path) -> None:
    """Draw dead share, L0 and FVU over the first steps: a row for each folder of cells, a line for each recipe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4 * len(folders)), layout="constrained")
    axes = figure.subplots(len(folders), 3, squeeze=False, sharex=True)
    names = sorted(
        {cell.parent.name for folder in folders.values() for cell in folder.glob(f"cells/{setting}/*/*.json")}
    )
    for row, (title, folder) in zip(axes, folders.items(), strict=True):
        for number, name in enumerate(names):
            for cell in sorted((folder / "cells" / setting / name).glob("seed-*.json"))[:1]:
                course = json.loads(cell.read_text())["course"]
                style = {"label": name, "color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
                for axis, key in zip(row, ("dead", "l0", "fvu"), strict=True):
                    axis.plot([point["step"] for point in course], [point[key] for point in course], **style)
        row[0].set(title=f"{title}: dead latents", ylabel="share silent over the run's window", ylim=(-0.02, 1))
        row[1].set(title=f"{title}: L0", yscale="log", ylim=(0.5, 1000))
        row[1].axhline(SETTINGS[setting].target, color="black", linewidth=0.7)
        row[2].set(title=f"{title}: FVU of the batch, whole dictionary", yscale="log", ylim=(0.1, 1.2))
        for axis in row:
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
    axes[-1, 2].legend(fontsize=7)  # the last row has every recipe
    save_figure(figure, path)


def parsed_fields(given: list[str]) -> dict[str, Any]:
    """Return `name=value` words as a mapping; values are read as YAML."""
    return {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in given)}


def main() -> int:
    """Run what is missing, print the table, draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", help="folder or id of the causal language model of settings lm and lm-short")
    parser.add_argument("--minilm", help="folder or id of the encoder of setting minilm")
    parser.add_argument("--text", help="folder with train.parquet and heldout.parquet, column text")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=_DEFAULT_SETTINGS)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--states", type=Path, help="folder of hidden states; by default <output>/states")
    parser.add_argument("--before", type=Path, help="<output> of an earlier version, to be drawn above this one's")
    parser.add_argument("--fields", nargs="+", default=[], metavar="NAME=VALUE", help="of every entry of `saes`")
    parser.add_argument("--label", default="", help="added to the recipes' names; goes with --fields")
    known = parser.parse_args()
    if bool(known.fields) != bool(known.label):
        parser.error("--fields and --label go together: results are kept under the recipe's name and the label.")
    paths = {"lm": known.lm, "minilm": known.minilm, "text": known.text}
    cells: dict[tuple[str, str], list[dict]] = {}
    for name in known.settings:
        setting = SETTINGS[name]
        if setting.model in paths and not (paths[setting.model] and paths["text"]):
            sys.stderr.write(f"Left out {name}: it needs --{setting.model} and --text.\n")
            continue
        for seed in known.seeds:
            for recipe in known.recipes:
                full = recipe + (f"-{known.label}" if known.label else "")
                path = known.output / "cells" / name / full / f"seed-{seed}.json"
                if not path.exists():
                    folder = known.states or known.output / "states"
                    states, heldout = (hidden_states(setting, split, paths, folder) for split in ("train", "heldout"))
                    spec = entry(recipe, setting, parsed_fields(known.fields))
                    write_json(path, run_cell(spec, setting, seed, states, heldout))
                cell = json.loads(path.read_text())
                cells.setdefault((name, full), []).append(cell)
                if cell.get("restrict"):  # as a reader of the prefix alone has it
                    cells.setdefault((name, f"{full} (restrict)"), []).append({**cell, "rows": cell["restrict"]})
        if known.label:
            _add_bars(cells, name, known)
        folders = {"before": known.before} if known.before else {}
        plot_courses({**folders, "now": known.output}, name, known.output / f"first-steps-{name}.png")
    rows = summary(cells, known.seeds)
    suffix = f"-{known.label}" if known.label else ""
    write_json(known.output / f"recipes{suffix}.json", rows)
    write_text(known.output / f"recipes{suffix}.md", markdown(rows))
    sys.stdout.write(markdown(rows))
    return 0


def _add_bars(cells: dict[tuple[str, str], list[dict]], setting: str, known: argparse.Namespace) -> None:
    """Add finished cells of the defaults that a trial is held against."""
    for recipe in ("batch_topk", "matryoshka"):
        paths = [known.output / "cells" / setting / recipe / f"seed-{seed}.json" for seed in known.seeds]
        found = [json.loads(path.read_text()) for path in paths if path.exists()]
        if found:
            cells[setting, recipe] = found


if __name__ == "__main__":
    sys.exit(main())
