"""The closing report of a run: every dictionary on held-out rows, as numbers, text and a plot, and what it missed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...common.files import write_json
from ...evaluation import Dictionary, HeldOut, evaluate_fidelity
from ...evaluation.report import ABOUT, plot, table
from ..data.harvest import HeldOutStates
from ..sae.learner import Learner
from ..sae.schedules import peak_rate


_TOLERANCE = 0.1  # of the wanted L0
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
            f"{_for_l0(learner, row['l0'] > wanted, tokens)}"
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


def _for_l0(learner: Learner, too_many: bool, tokens: int) -> str:
    """What brings the L0 nearer to its target."""
    spec, kind = learner.spec, learner.config.activation_name
    longer = f"train on more `tokens` ({tokens:,} here)"
    if kind == "topk":
        return f"Fewer than `k` latents have a positive value: {longer}, or ask for a smaller `k`."
    if kind == "batch_topk":
        return (
            "The threshold is that of the text trained on, evenly over the run: see that the held-out text is of the "
            "same kind, or raise `calibration_tokens`."
        )
    start = f"{spec.sparsity_coefficient:g} here" if spec.sparsity_coefficient is not None else "0.1 at the start here"
    if kind == "jumprelu":
        nearer = "Raise" if too_many else "Lower"
        return (
            f"{nearer} `initial_threshold` ({learner.config.initial_threshold:g} here), raise `sparsity_coefficient` "
            f"({start}) or `threshold_lr_scale` ({spec.threshold_lr_scale:g} here), or {longer}."
        )
    return (
        f"{'Raise' if too_many else 'Lower'} `sparsity_coefficient` ({start}), raise `controller_rate` "
        f"({spec.controller_rate:g} here), with which it follows the target, or {longer}."
    )


def _for_dead(learner: Learner, tokens: int) -> str:
    """What keeps latents alive, or revives them."""
    spec = learner.spec
    rate = peak_rate(spec, learner.config, learner.steps)
    lower = f"ower `lr` ({rate:.2g} here)"
    if not spec.auxk_coefficient:
        return f"L{lower}, or set `auxk_coefficient` (0 here; 0.03125 is usual), which revives dead latents."
    revive = f"raise `auxk_coefficient` ({spec.auxk_coefficient:g} here)"
    if learner.config.activation_name == "jumprelu":
        threshold = f"`initial_threshold` ({learner.config.initial_threshold:g} here)"
        return f"L{lower} or {threshold}, {revive}, or train on more `tokens` ({tokens:,} here)."
    return f"Train on more `tokens` ({tokens:,} here), {revive}, or l{lower}."
