"""Run `matryoshka-sae toy`: train a vanilla and a Matryoshka SAE on a tree of features and compare them."""

import argparse
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from ...common.files import write_json
from ...common.report import text_table
from ...common.seeds import derived_seed
from .matching import match
from .model import ToyModel
from .plots import plot_activations, plot_cosines
from .settings import PUBLISHED_L0, TOY_BATCH_SIZE
from .training import FAMILIES, toy_spec, train_toy
from .tree import TREE_FILE, FeatureTree, load_tree, random_tree


ABOUT = (
    "A feature is recovered where the decoder row of its latent points along it (cosine at least 0.9) and the latent "
    "fires where it should (recall and precision at least 0.95). parents_fire: P(a parent's latent fires | one of its "
    "children is on), the mean over parents; near 0 the children have absorbed their parent. mcc: mean correlation of "
    "features and matched latents. mean_max_cosine: mean over features of the largest cosine of any decoder row."
)


def compare(parsed: argparse.Namespace) -> None:
    """Train both SAEs as the arguments say; print the table, write `toy.json` and pictures of each seed."""
    tree = load_tree(parsed.tree or TREE_FILE) if parsed.random_tree is None else random_tree(parsed.random_tree)
    target_l0 = parsed.target_l0
    if target_l0 is None:
        published = parsed.tree is None and parsed.random_tree is None
        target_l0 = PUBLISHED_L0 if published else tree.expected_l0
    folder = Path(parsed.output_dir)
    tree.save(folder / "tree.json")
    accelerator = Accelerator(cpu=True)  # a GPU would mostly wait for the next launch with so small a dictionary
    results: list[dict[str, Any]] = []
    with tqdm(total=len(parsed.seeds) * len(FAMILIES) * parsed.steps, unit="step") as bar:
        for seed in parsed.seeds:
            model, matches = ToyModel(tree, seed), {}
            for family in FAMILIES:
                bar.set_description(f"{family}, seed {seed}")
                spec = toy_spec(family, tree.num_features, target_l0)
                sae = train_toy(model, spec, accelerator, parsed.steps, seed, lambda *_: bar.update())
                matches[family] = match(model, sae, seed=derived_seed(seed, "measure"))
                results.append({"seed": seed, "family": family, **matches[family].summary(tree.names)})
            run = dict(steps=parsed.steps, batch_size=TOY_BATCH_SIZE, target_l0=target_l0, true_l0=tree.expected_l0)
            comparison = {"about": ABOUT, **run, "features": tree.num_features, "results": results}
            write_json(folder / "toy.json", comparison)
            title = f"Which latents fire with a feature (seed {seed})"
            plot_activations(matches, tree, folder / f"activations-seed{seed}.png", title)
            plot_cosines(matches, tree, folder / f"decoder-seed{seed}.png", f"Where decoder rows point (seed {seed})")
    sys.stdout.write(f"{table(results, tree)}\nSaved {folder / 'toy.json'} and pictures of each seed beside it.\n")


def table(results: list[dict[str, Any]], tree: FeatureTree) -> str:
    """Return the results as text, one line for each seed and family."""
    titles = ["seed", "family", "L0", "FVU", "max cosine", "MCC", "recovered", "parent fires"]
    rows = [
        [
            str(row["seed"]),
            row["family"],
            f"{row['l0']:.3f}",
            *(f"{row[key]:.4f}" for key in ("fvu", "mean_max_cosine", "mcc")),
            f"{row['recovered']}/{tree.num_features}",
            "-" if row["parents_fire"] is None else f"{row['parents_fire']:.2%}",
        ]
        for row in results
    ]
    title = f"{tree.num_features} features, true L0 {tree.expected_l0:.4g}"
    meaning = "parent fires: P(a parent's latent fires | one of its children is on), mean over parents"
    return "\n".join([title, *text_table(titles, rows), meaning])
