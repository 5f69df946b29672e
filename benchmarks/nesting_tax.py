r"""What nesting costs the whole dictionary: Matryoshka SAEs over TopK of the same size, k and tokens, several seeds.

    python benchmarks/nesting_tax.py --lm ../shared/lm --minilm MODEL --text ../shared/text --output runs/tax

On the settings `lm` and `minilm` of recipes.py, whose hidden states it shares (`--states`). Two recipes are trained:
the default, and one whose level weights move further to the whole dictionary (`late`). FVU of each prefix is of
held-out tokens and is read three times: under the mask, with the one threshold of the whole, as elsewhere; `alone`,
where each prefix has the threshold at which k of its own latents fire (`calibrate_thresholds`); and `refined`, where
the code of each prefix looks four times at what it leaves out (`progressive.refined`), which TopK is given too.

A finished cell is a JSON file under `<output>/cells` and is not computed again. `<output>/tax.md` has means and 95%
intervals over the seeds; the tax is the FVU of the whole over that of TopK of the same seed.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from recipes import SETTINGS, Setting, entry, hidden_states

from hf_matryoshka_sae.common.files import write_json, write_text
from hf_matryoshka_sae.common.intervals import seed_interval
from hf_matryoshka_sae.convert import load
from hf_matryoshka_sae.evaluation import Dictionary, evaluate_fidelity
from hf_matryoshka_sae.models import SAEModel
from hf_matryoshka_sae.progressive import calibrate_thresholds, refined, with_threshold
from hf_matryoshka_sae.training import RunConfig, train


_BATCH = 2048
_CALIBRATION = 100 * _BATCH
_LATE = {"level_weights": [1 / 6] * 4 + [1 / 3], "level_weights_end": [1 / 24] * 4 + [5 / 6]}
_REFINED = {"steps": 4, "step_size": 0.1}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {}),
    "default": ("matryoshka", {}),
    "late": ("matryoshka", _LATE),
}


def run_cell(variant: str, setting: Setting, seed: int, states: torch.Tensor, heldout: torch.Tensor) -> dict[str, Any]:
    """Train one SAE and return FVU and L0 by prefix: under the mask, refined, and of each prefix alone at k."""
    recipe, fields = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        config = {"model": setting.model, "hookpoints": [setting.hookpoint], "output_dir": folder, "seed": seed}
        config |= {"tokens": setting.tokens, "batch_size": _BATCH, "checkpoint_every": 0}
        config["saes"] = [entry(recipe, setting, fields)]
        (result,) = train(RunConfig.from_dict(config), states=states, heldout=heldout)
        (rows,) = result["saes"].values()
        cell = {"variant": variant, "seed": seed, "tokens": result["tokens"]}
        cell["mask"] = [{key: row[key] for key in ("width", "l0", "fvu", "dead")} for row in rows]
        sae = load(next(Path(folder).rglob("config.json")).parent)
        better = refined(sae, states[:_CALIBRATION].split(_BATCH), **_REFINED)
        cell["refined"] = [_worth(better.truncate(width), heldout) for width in sae.prefix_widths]
        if recipe == "matryoshka":
            thresholds = calibrate_thresholds(sae, states[:_CALIBRATION].split(_BATCH), float(setting.target))
            cell["alone"] = [
                _worth(with_threshold(sae, width, threshold), heldout) for width, threshold in thresholds.items()
            ]
    return cell


def _worth(sae: SAEModel, heldout: torch.Tensor) -> dict[str, float]:
    """Return width, FVU and L0 of a whole SAE on held-out hidden states `(N, D)`."""
    row = evaluate_fidelity([heldout], {"sae": Dictionary(sae)}, show=False)["subjects"]["sae"][-1]
    return {key: row[key] for key in ("width", "fvu", "l0")}


def table(cells: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table of one setting."""
    plain = [cell["mask"][-1]["fvu"] for cell in cells["topk"]]
    better = [cell["refined"][-1]["fvu"] for cell in cells["topk"]]
    lines = [
        "| recipe | reading | FVU by prefix | L0 by prefix | tax | over refined TopK |",
        "|---|---|---|---|---|---|",
        f"| topk | | {_with_interval(plain, 4)} | {_means(cells['topk'], 'mask', 'l0')} | 1 | |",
        f"| topk | refined | {_with_interval(better, 4)} | {_means(cells['topk'], 'refined', 'l0')} | | 1 |",
    ]
    for variant in [name for name in cells if name != "topk"]:
        for reading in ("mask", "alone", "refined"):
            ends = [cell[reading] for cell in cells[variant]]
            fvus = [_with_interval([rows[p]["fvu"] for rows in ends], 4) for p in range(len(ends[0]))]
            taxes, beside = (
                _with_interval([rows[-1]["fvu"] / own for rows, own in zip(ends, owns, strict=True)], 3)
                for owns in (plain, better)
            )
            lines.append(
                f"| {variant} | {reading} | {', '.join(fvus)} | {_means(cells[variant], reading, 'l0')} "
                f"| {taxes} | {beside} |"
            )
    return "\n".join(lines) + "\n"


def _with_interval(values: list[float], digits: int) -> str:
    interval = seed_interval(values)
    margin = f" ± {(interval[1] - interval[0]) / 2:.{digits}f}" if interval else ""
    return f"{mean(values):.{digits}f}{margin}"


def _means(cells: list[dict[str, Any]], reading: str, key: str) -> str:
    columns = zip(*[[row[key] for row in cell[reading]] for cell in cells], strict=True)
    return " ".join(f"{mean(column):.1f}" for column in columns)


def main() -> int:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", help="folder or id of the causal language model of settings lm and lm-short")
    parser.add_argument("--minilm", help="folder or id of the encoder of setting minilm")
    parser.add_argument("--text", required=True, help="folder with train.parquet and heldout.parquet, column text")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=["lm", "minilm"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/tax"))
    parser.add_argument("--states", type=Path, help="folder of hidden states; by default <output>/states")
    known = parser.parse_args()
    paths, text = {"lm": known.lm, "minilm": known.minilm, "text": known.text}, []
    for name in known.settings:
        setting, cells = SETTINGS[name], {}
        for seed in known.seeds:
            for variant in known.variants:
                path = known.output / "cells" / name / variant / f"seed-{seed}.json"
                if not path.exists():
                    folder = known.states or known.output / "states"
                    states, heldout = (hidden_states(setting, split, paths, folder) for split in ("train", "heldout"))
                    write_json(path, run_cell(variant, setting, seed, states, heldout))
                cells.setdefault(variant, []).append(json.loads(path.read_text()))
        if "topk" in cells:
            text.append(f"{name}, {len(known.seeds)} seeds:\n\n{table(cells)}")
    if text:
        write_text(known.output / "tax.md", "\n".join(text))
    sys.stdout.write("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
