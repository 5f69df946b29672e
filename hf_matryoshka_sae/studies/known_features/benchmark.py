"""Run `matryoshka-sae synthetic`: train recipes on a world of known features and compare what each recovers."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ...common.figures import save_figure
from ...common.files import write_json, write_text
from ...common.intervals import seed_interval
from ...common.report import Column, Report
from ...common.seeds import derived_seed
from ...evaluation.baselines import random_dictionary
from ...models import SAEModel
from ...models.configuration_sae import default_prefix_widths
from ...progressive import sort_latents
from ...training.config.spec import SAESpec
from .feature_recovery import recovery, supervised_sae
from .settings import BATCH_SIZE, SAMPLES, STEPS, World
from .synthetic import SyntheticModel
from .training import train_toy


RANDOM, SUPERVISED = "random", "supervised"

_SHARE = {"better": "higher", "limits": (0.0, 1.02)}
_COLUMNS = (
    Column("mcc", "MCC", "mean correlation of matched pairs.", ".3f", **_SHARE),
    Column(
        "f1",
        "F1",
        "F1 of a latent's firing as a predictor of its feature, mean over matched pairs.",
        ".3f",
        **_SHARE,
    ),
    Column("precision", "precision", "precision of that predictor.", ".3f", "higher", table="nothing"),
    Column("recall", "recall", "recall of that predictor.", ".3f", "higher", table="nothing"),
    Column("cosine", "cosine", "mean cosine of the directions of matched pairs.", ".3f", "higher", table="nothing"),
    Column("found", "found", "number of features with a latent of F1 at least 0.8.", ".1f", "higher"),
    Column(
        "uniqueness",
        "unique",
        "share of different features among those with which the latents that fire correlate most.",
        ".3f",
        "higher",
    ),
    Column(
        "parents_fire",
        "parents fire",
        "P(the latent of a feature with children fires | one of them is on), mean; near 0 they have absorbed it.",
        ".3f",
        **_SHARE,
    ),
    Column("l0", "L0", "mean number of latents that fire on a sample.", ".2f"),
)
_MATCHED = (
    "Latents are matched one to one with features so that the sum of the absolute correlations of their activations "
    "is largest, at each width among its first latents; plain SAEs are sorted by energy. random: a random dictionary "
    "with the L0 of the first recipe. supervised: an SAE built from the features themselves, the ceiling. Intervals: "
    "95%, Student's t over seeds."
)


def default_recipes(num_latents: int, k: int) -> list[dict[str, Any]]:
    """Return recipes of Matryoshka, TopK, BatchTopK and ReLU SAEs at one L0, as entries of a run's `saes`."""
    size = {"num_latents": num_latents}
    return [
        {"type": "matryoshka", **size, "k": k},
        {"type": "topk", **size, "k": k},
        {"type": "batch_topk", **size, "k": k},
        {"type": "relu", **size, "target_l0": float(k)},
    ]


class Benchmark:
    """Recipes on one world; finished runs are kept and not repeated.

    Args:
        world ([`World`]): Numbers of the world; each seed draws its own directions.
        recipes (`Sequence[dict]`): Entries of a run's `saes`; `num_latents` is the number of features by default.
        folder (`Path`): Folder of the results: `runs/<recipe>-seed<seed>.json`, `synthetic.json`, `.md` and `.png`.
        steps (`int`, *optional*, defaults to 2000): Training steps.
        batch_size (`int`, *optional*, defaults to 1024): Samples in a step.
        widths (`Sequence[int]`, *optional*): Widths to measure; by default those of a Matryoshka SAE with as many
            latents as the smallest recipe.
        samples (`int`, *optional*, defaults to 20,000): Samples to match latents on, and to measure them on.

    Raises:
        `ValueError`: for entries that are no recipes, or two recipes of one name.
    """

    def __init__(
        self,
        world: World,
        recipes: Sequence[dict[str, Any]],
        folder: Path,
        steps: int = STEPS,
        batch_size: int = BATCH_SIZE,
        widths: Sequence[int] | None = None,
        samples: int = SAMPLES,
    ) -> None:
        self.world, self.folder = world, folder
        self.steps, self.batch_size, self.samples = steps, batch_size, samples
        self.specs: dict[str, SAESpec] = {}
        for number, recipe in enumerate(recipes):
            spec = SAESpec.from_dict({"num_latents": world.features, **recipe}, f"saes.{number}.")
            name = spec.folder(spec.sae_config(world.d_in, "synthetic", "synthetic"))
            if name in self.specs or name in (RANDOM, SUPERVISED):
                raise ValueError(f"Recipes need different names; {name!r} is taken. Set `name`.")
            self.specs[name] = spec
        if not self.specs:
            raise ValueError("There is no recipe to train.")
        smallest = min(spec.num_latents for spec in self.specs.values())
        self.widths = list(widths) if widths is not None else default_prefix_widths(smallest)

    def run(self, seeds: Sequence[int], show: bool = True) -> dict[str, Any]:
        """Train and measure the recipes that are not finished; write all results and return them.

        Args:
            seeds (`Sequence[int]`): Seeds; each is a world of its own and one run of every recipe.
            show (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        """
        accelerator = Accelerator(cpu=True) if not torch.cuda.is_available() else Accelerator()
        total = len(seeds) * len(self.specs) * self.steps
        with tqdm(total=total, unit="step", disable=not show) as bar:
            for seed in seeds:
                model = SyntheticModel(self.world, seed)
                for name, spec in self.specs.items():
                    bar.set_description(f"{name}, seed {seed}")
                    recipe = {"type": spec.type, **dataclasses.asdict(spec)}
                    self._once(
                        name,
                        seed,
                        recipe,
                        lambda s=spec, m=model, n=seed: self._trained(m, s, n, accelerator, bar),
                        bar,
                    )
        results = self._collected(seeds)
        write_json(self.folder / "synthetic.json", results)
        write_text(self.folder / "synthetic.md", report_of(results).markdown())
        plot(results, self.folder / "synthetic.png")
        return results

    def _once(
        self, name: str, seed: int, recipe: dict[str, Any], measure: Callable[[], dict[str, Any]], bar: tqdm
    ) -> None:
        """Measure a recipe, unless its file holds the result of the same settings."""
        path = self.folder / "runs" / f"{name}-seed{seed}.json"
        made_by = {
            "world": dataclasses.asdict(self.world),
            "recipe": recipe,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "widths": self.widths,
            "samples": self.samples,
        }
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("made_by") == json.loads(
            json.dumps(made_by)
        ):
            bar.update(self.steps)
            return
        write_json(path, {"name": name, "seed": seed, "made_by": made_by, "subjects": measure()})

    def _trained(
        self, model: SyntheticModel, spec: SAESpec, seed: int, accelerator: Accelerator, bar: tqdm
    ) -> dict[str, list[dict[str, Any]]]:
        """Train an SAE; return its rows, and with the first recipe those of the baselines too."""
        sae = train_toy(model, spec, accelerator, self.steps, seed, lambda *_: bar.update(), self.batch_size)
        sample = next(model.batches(8192, derived_seed(seed, "sample")))
        if len(sae.prefix_widths) == 1:
            sae = sort_latents(sae, activations=[sample])
        rows_by_kind = {"trained": self._rows(model, sae, seed)}
        if spec is next(iter(self.specs.values())):
            rows_by_kind[RANDOM] = self._rows(model, random_dictionary(sae, [sample], self.widths, seed=seed), seed)
            supervised = supervised_sae(model, self.samples, derived_seed(seed, "supervised"))
            widths = [width for width in self.widths if width < model.num_features]
            rows_by_kind[SUPERVISED] = recovery(
                model, supervised, [*widths, model.num_features], self.samples, derived_seed(seed, "recovery")
            )
        return rows_by_kind

    def _rows(self, model: SyntheticModel, sae: SAEModel, seed: int) -> list[dict[str, Any]]:
        widths = [width for width in self.widths if width < sae.config.num_latents]
        return recovery(model, sae, [*widths, sae.config.num_latents], self.samples, derived_seed(seed, "recovery"))

    def _collected(self, seeds: Sequence[int]) -> dict[str, Any]:
        by_subject: dict[str, list[list[dict[str, Any]]]] = {}
        for name in self.specs:
            for seed in seeds:
                run = json.loads((self.folder / "runs" / f"{name}-seed{seed}.json").read_text(encoding="utf-8"))
                for kind, rows in run["subjects"].items():
                    by_subject.setdefault(name if kind == "trained" else kind, []).append(rows)
        order = [*self.specs, RANDOM, SUPERVISED]
        model = SyntheticModel(self.world, seeds[0])
        results = {
            "world": dataclasses.asdict(self.world),
            "expected_l0": model.expected_l0,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "seeds": list(seeds),
            "subjects": {name: _over_seeds(by_subject[name]) for name in order},
        }
        return {"about": report_of(results).explanation, **results}


def _over_seeds(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return means over seeds for each width, with intervals."""
    rows = []
    for of_width in zip(*runs, strict=True):
        row: dict[str, Any] = {"width": of_width[0]["width"]}
        for key in (column.name for column in _COLUMNS):
            values = [each[key] for each in of_width if each[key] is not None]
            row[key] = mean(values) if values else None
            row[f"{key}_interval"] = seed_interval(values)
        row["f1_by_decile"] = [mean(part) for part in zip(*(each["f1_by_decile"] for each in of_width), strict=True)]
        rows.append(row)
    return rows


def report_of(results: dict[str, Any]) -> Report:
    """Return the results as a report."""
    world, subjects = results["world"], results["subjects"].items()
    title = (
        f"{world['features']} known features in {world['d_in']} dimensions, {results['expected_l0']:.3g} on at once; "
        f"{results['steps']} steps of {results['batch_size']}, seeds {', '.join(map(str, results['seeds']))}"
    )
    kinds = dict.fromkeys((RANDOM, SUPERVISED), "random")  # plots draw both in the style of untrained dictionaries
    records = [{"subject": name, "kind": kinds.get(name), **row} for name, rows in subjects for row in rows]
    return Report("synthetic", title, records, _COLUMNS, {}, ["mcc", "f1", "parents_fire"], intervals=_MATCHED)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw MCC, F1 and whether parents fire against width, and F1 against frequency, to a PNG."""
    from matplotlib.figure import Figure

    figure, report = Figure(figsize=(12, 8), layout="constrained"), report_of(results)
    axes = figure.subplots(2, 2).flatten()
    report.draw(axes[:3])
    for name, rows in results["subjects"].items():
        style = "--" if name in (RANDOM, SUPERVISED) else "-"
        deciles = rows[-1]["f1_by_decile"]
        axes[3].plot(range(1, len(deciles) + 1), deciles, marker="o", markersize=4, linestyle=style, label=name)
    axes[3].set(xlabel="tenth of features, the most frequent first", ylabel="F1, all latents")
    axes[3].grid(alpha=0.3)
    axes[3].set_ylim(0, 1.02)
    figure.suptitle(report.title, fontsize=9)
    save_figure(figure, path)
