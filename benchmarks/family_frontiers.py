"""Hold ReLU, JumpReLU and Gated SAEs against those that other libraries train on the same hidden states: frontiers.

    python benchmarks/family_frontiers.py --lm ../shared/lm --text ../shared/text --output runs/frontiers

In the environment of `make_environment.sh`, with the setting `lm` of recipes.py (or `--setting`), whose states it
shares. Two SAEs are compared at one L0 only by accident, since the L0 of the others follows from a coefficient or
misses its target. So each library trains several, and FVU is drawn against the L0 that was reached: below and to the
left is better. A trained SAE is a line of `<output>/frontiers.json`, which is not trained again.

Ours are the defaults at several `target_l0`. The others get what their trainers ask for: dictionary-learning rows with
E||x||^2 = 1, sae-lens rows of mean norm sqrt(d_in); a warm-up of 100 steps and a decay over the last fifth; and
the learning rates named below, the default of each among them. FVU, L0 and dead latents are of held-out rows.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from recipes import SETTINGS, Setting, entry, hidden_states, run_cell

from hf_matryoshka_sae.common.figures import save_figure
from hf_matryoshka_sae.common.files import write_json


_BATCH = 2048
_OURS = {"jumprelu": "jumprelu", "gated": "gated", "relu": "relu"}
_TARGETS = (10, 16, 24, 40)
# Trainers of dictionary-learning: class, what sets the L0 and its values, learning rates.
_DICTIONARY_LEARNING = {
    "jumprelu": ("jumprelu.JumpReluTrainer", "target_l0", _TARGETS, (7e-5, 1e-3, 4e-3)),
    "gated": ("gdm.GatedSAETrainer", "l1_penalty", (0.04, 0.08, 0.16, 0.32, 0.64), (5e-5, 1e-3, 4e-3)),
    "relu": ("standard.StandardTrainerAprilUpdate", "l1_penalty", (0.04, 0.08, 0.16, 0.32, 0.64), (1e-3, 4e-3)),
}
# Configs of sae-lens, likewise.
_SAE_LENS = {
    "jumprelu": ("JumpReLU", "target_l0", _TARGETS, (3e-4, 1e-3)),
    "gated": ("Gated", "l1_coefficient", (2.0, 4.0, 8.0, 16.0), (3e-4, 1e-3)),
    "relu": ("Standard", "l1_coefficient", (2.0, 4.0, 8.0, 16.0), (3e-4, 1e-3)),
}


def batches(states: torch.Tensor, count: int, scale: float) -> Iterator[torch.Tensor]:
    """Yield `count` batches of rows in a random order, each row times `scale`."""
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(0))
    for step in range(count):
        rows = order[(step * _BATCH) % len(order) :][:_BATCH]
        yield states[rows] * scale


def measured(encode: Callable, decode: Callable, heldout: torch.Tensor, scale: float) -> dict[str, float]:
    """Return FVU, L0 and the share of dead latents of an SAE that takes rows times `scale`."""
    error = total = fired = 0.0
    with torch.no_grad():
        for rows in heldout.split(4096):
            latents = encode(rows * scale)
            error += (rows - decode(latents) / scale).square().sum().item()
            fired = fired + (latents > 0).sum(0)
        total = (heldout - heldout.mean(0)).square().sum().item()
    dead = (fired == 0).float().mean().item()
    return {"fvu": error / total, "l0": fired.sum().item() / len(heldout), "dead": dead}


def dictionary_learning(
    family: str, value: float, lr: float, setting: Setting, train: torch.Tensor, heldout: torch.Tensor
) -> dict[str, float]:
    """Train one of dictionary-learning's and measure it."""
    import importlib

    path, field = _DICTIONARY_LEARNING[family][:2]
    module, name = path.split(".")
    steps = setting.tokens // _BATCH
    trainer = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), name)(
        steps=steps,
        activation_dim=train.shape[1],
        dict_size=setting.num_latents,
        layer=0,
        lm_name="",
        lr=lr,
        warmup_steps=min(100, steps // 4),
        sparsity_warmup_steps=steps // 5,
        decay_start=int(0.8 * steps),
        seed=0,
        device="cpu",
        **{field: value},
    )
    scale = 1 / train[:65536].square().sum(1).mean().sqrt().item()
    for step, rows in enumerate(batches(train, steps, scale)):
        trainer.update(step, rows)
    return measured(trainer.ae.encode, trainer.ae.decode, heldout, scale)


def sae_lens(
    family: str, value: float, lr: float, setting: Setting, train: torch.Tensor, heldout: torch.Tensor
) -> dict[str, float]:
    """Train one of sae-lens' and measure it."""
    import sae_lens as library
    from sae_lens.config import SAETrainerConfig

    kind, field = _SAE_LENS[family][:2]
    steps = setting.tokens // _BATCH
    own: dict[str, Any] = {field: value}
    own |= {"l0_warm_up_steps" if family == "jumprelu" else "l1_warm_up_steps": steps // 5}
    if family == "jumprelu":
        own |= {"jumprelu_sparsity_loss_mode": "quadratic"}
    config = getattr(library, f"{kind}TrainingSAEConfig")(
        d_in=train.shape[1], d_sae=setting.num_latents, device="cpu", **own
    )
    sae = getattr(library, f"{kind}TrainingSAE")(config)
    run = SAETrainerConfig(
        total_training_samples=steps * _BATCH,
        train_batch_size_samples=_BATCH,
        lr=lr,
        lr_end=lr / 10,
        lr_warm_up_steps=min(100, steps // 4),
        lr_decay_steps=steps // 5,
        device="cpu",
    )
    trainer = library.SAETrainer(run, sae, data_provider=iter(()))
    scale = math.sqrt(train.shape[1]) / train[:65536].norm(dim=1).mean().item()
    for rows in batches(train, steps, scale):
        trainer.step(rows)
        trainer.n_training_steps += 1
    return measured(sae.encode, sae.decode, heldout, scale)


def ours(family: str, target: float, setting: Setting, train: Any, heldout: Any) -> dict[str, float]:
    """Train one of ours with the default recipe."""
    spec = entry(_OURS[family], setting, {"target_l0": float(target)})
    (row,) = run_cell(spec, setting, 0, train, heldout)["rows"]
    return {key: row[key] for key in ("fvu", "l0", "dead")}


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Draw FVU against L0, an axis for each family, a line for each library and learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for axis, family in zip(figure.subplots(1, len(_OURS)), _OURS, strict=True):
        own = [point for point in points if point["family"] == family]
        for name in dict.fromkeys(point["name"] for point in own):
            line = sorted((point["l0"], point["fvu"]) for point in own if point["name"] == name)
            axis.plot(*zip(*line, strict=True), marker="o", markersize=4, label=name)
        axis.set(title=family, xlabel="L0", ylabel="FVU", xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    save_figure(figure, path)


def main() -> int:
    """Train what is missing, print the points, draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", help="folder or id of the causal language model")
    parser.add_argument("--minilm", help="folder or id of the encoder, for --setting minilm")
    parser.add_argument("--text", help="folder with train.parquet and heldout.parquet, column text")
    parser.add_argument("--setting", choices=list(SETTINGS), default="lm")
    parser.add_argument("--families", nargs="+", choices=list(_OURS), default=list(_OURS))
    parser.add_argument("--libraries", nargs="+", default=["ours", "dictionary-learning", "sae-lens"])
    parser.add_argument("--output", type=Path, default=Path("runs/frontiers"))
    parser.add_argument("--states", type=Path, help="folder of hidden states, as of recipes.py")
    known = parser.parse_args()
    setting, paths = SETTINGS[known.setting], {"lm": known.lm, "minilm": known.minilm, "text": known.text}
    folder = known.states or known.output / "states"
    train, heldout = (hidden_states(setting, split, paths, folder) for split in ("train", "heldout"))
    jobs: list[tuple[str, str, float, Callable[[], dict[str, float]]]] = []
    for family in known.families:
        if "ours" in known.libraries:
            for target in _TARGETS:
                jobs.append((family, "ours", target, lambda f=family, t=target: ours(f, t, setting, train, heldout)))
        for library, run, table in (
            ("dictionary-learning", dictionary_learning, _DICTIONARY_LEARNING),
            ("sae-lens", sae_lens, _SAE_LENS),
        ):
            if library in known.libraries:
                jobs += [
                    (
                        family,
                        f"{library} lr {lr:g}",
                        value,
                        lambda r=run, f=family, v=value, lr=lr: r(f, v, lr, setting, train, heldout),
                    )
                    for lr in table[family][3]
                    for value in table[family][2]
                ]
    path = known.output / f"frontiers-{known.setting}.json"
    points = json.loads(path.read_text()) if path.exists() else []
    done = {(point["family"], point["name"], point["value"]) for point in points}
    for family, name, value, job in jobs:
        if (family, name, value) not in done:
            began = time.monotonic()
            points.append({"family": family, "name": name, "value": value, **job()})
            points[-1]["seconds"] = time.monotonic() - began
            write_json(path, points)
        point = next(p for p in points if (p["family"], p["name"], p["value"]) == (family, name, value))
        sys.stdout.write(
            f"{family:<9} {name:<28} {value:>7g}  L0 {point['l0']:7.2f}  FVU {point['fvu']:.4f}  "
            f"dead {point['dead']:.1%}\n"
        )
        sys.stdout.flush()
    plot(points, known.output / f"frontiers-{known.setting}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
