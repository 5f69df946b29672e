"""The closing report of a run: every dictionary on held-out rows, as numbers, text and a plot, and what it missed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...common.files import write_json
from ...evaluation import Dictionary, HeldOut, evaluate_fidelity
from ...evaluation.report import ABOUT, plot, table
from ...evaluation.sources import sources_report
from ..data.harvest import HeldOutStates
from ..sae.learner import Learner
from ..sae.schedules import peak_rate


_TOLERANCE = 0.1  # of the wanted L0
LARGEST_SHIFT = 0.2  # of it too: training that ends further off is told of
_MOST_DEAD = 0.1  # of the latents
_LOOK_BACK = 100_000  # tokens of training


def evaluate(data: HeldOut | HeldOutStates, saes: dict[str, Dictionary], show: bool = True) -> dict[str, Any]:
    """Reconstruction and recaptured language-model loss of the SAEs of one hookpoint.

    Args:
        data ([`HeldOut`] or [`HeldOutStates`]): The language model and held-out tokens, or held-out rows; every
            process evaluates its share.
        saes (`dict[str, Dictionary]`): By name; taking raw hidden states.
        show (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Returns:
        `dict`: What [`evaluate_fidelity`] gives, with the rows under `saes`, and the `hookpoint`.

    Raises:
        `ValueError`: if there are no held-out tokens.
    """
    result = evaluate_fidelity(data, saes, show=show)
    rows = result.pop("subjects")
    return {"hookpoint": data.hookpoint, "selection": "mask", **result, "saes": rows}


def write_report(
    results: Sequence[dict[str, Any]], warnings: Sequence[str], folder: Path, accelerator: Accelerator
) -> None:
    """Save `results.json` and `results.png` in `folder` and print the table.

    Args:
        results (`Sequence[dict]`): What [`evaluate`] gave for each hookpoint.
        warnings (`Sequence[str]`): What is wrong with them; part of the file.
        folder (`Path`): The run's.
        accelerator (`Accelerator`): Prints in one process.
    """
    found = {"about": ABOUT, "selection": "mask", "warnings": list(warnings), "results": list(results)}
    write_json(folder / "results.json", found)
    plot(results, folder / "results.png")
    accelerator.print(table(results))
    for rows in (result["sources"] for result in results if result.get("sources")):
        accelerator.print(sources_report(rows))
    accelerator.print(f"Saved {folder / 'results.json'} and {folder / 'results.png'}")


def missed_targets(learner: Learner, result: Mapping[str, Any], tokens: int) -> list[str]:
    """Sentences about an L0 that is over 10% from what was asked for, and about over 10% dead latents.

    All processes that share the dictionary ask at once.

    Args:
        learner ([`Learner`]): What was trained.
        result (`Mapping[str, Any]`): Of its hookpoint, as [`report.evaluate`] gives it.
        tokens (`int`): The run's.
    """
    row, where = result["saes"][learner.name][-1], f"{learner.name} at {learner.hookpoint}"
    competing = learner.config.activation_name in ("topk", "batch_topk")
    field, wanted = ("k", learner.k) if competing else ("target_l0", learner.spec.target_l0)
    missed = []
    if wanted and abs(row["l0"] - wanted) > _TOLERANCE * wanted:
        missed.append(
            f"{where}: {row['l0']:.1f} latents fire per held-out token, but `{field}` asks for {wanted:g}. "
            f"{_for_l0(learner, tokens)}"
        )
    last = learner.last["l0"].item() if learner.last else wanted
    if not competing and wanted and abs(last - wanted) > LARGEST_SHIFT * wanted:
        missed.append(
            f"{where}: training ended with {last:.1f} latents per token, but `target_l0` asks for {wanted:g}; moving "
            f"all thresholds to meet it costs FVU. {_for_control(learner, tokens)}"
        )
    # A latent that fires rarely may be silent on little text, so the training has to agree.
    used = learner.updates - sum(learner.skipped()[:2])
    window = min(_LOOK_BACK, used * learner.batch_size)
    silent = learner.share_silent(window)
    if min(row["dead"], silent) > _MOST_DEAD:
        missed.append(
            f"{where}: {row['dead']:.1%} of the latents are dead: they fired on none of {result['tokens']:,} held-out "
            f"tokens, and {silent:.1%} on none of the last {window:,} of training; at most {_MOST_DEAD:.0%} should "
            f"be. {_for_dead(learner, tokens)}"
        )
    return missed


def _for_l0(learner: Learner, tokens: int) -> str:
    """What brings the held-out L0 nearer to its target."""
    if learner.config.activation_name == "topk":
        longer = f"train on more `tokens` ({tokens:,} here)"
        return f"Fewer than `k` latents have a positive value: {longer}, or ask for a smaller `k`."
    return (
        "Thresholds are those of the text trained on, evenly over the run: see that the held-out text is of the same "
        "kind, or raise `calibration_tokens`."
    )


def _for_control(learner: Learner, tokens: int) -> str:
    """What brings the L0 of training nearer to its target."""
    spec, longer = learner.spec, f"train on more `tokens` ({tokens:,} here)"
    if learner.config.activation_name == "jumprelu":
        strength = f"`sparsity_coefficient` ({spec.sparsity_coefficient or 0:g} here)"
        return f"Raise {strength} or `threshold_lr_scale` ({spec.threshold_lr_scale:g} here), or {longer}."
    return f"Raise `controller_rate` ({spec.controller_rate:g} here), with which the penalty follows it, or {longer}."


def _for_dead(learner: Learner, tokens: int) -> str:
    """What keeps latents alive, or revives them."""
    spec = learner.spec
    rate = peak_rate(spec, learner.config, learner.steps)
    lower = f"ower `lr` ({rate:.2g} here)"
    if not spec.auxk_coefficient:
        return f"L{lower}, or set `auxk_coefficient` (0 here; 0.03125 is usual), which revives dead latents."
    revive = f"raise `auxk_coefficient` ({spec.auxk_coefficient:g} here)"
    return f"Train on more `tokens` ({tokens:,} here), {revive}, or l{lower}."
