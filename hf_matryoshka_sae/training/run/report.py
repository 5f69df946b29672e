"""The closing report of a run: every dictionary on held-out rows, as numbers, text and a plot, and what it missed."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...common.files import write_json
from ...evaluation import Dictionary, HeldOut, PrincipalComponents, evaluate_fidelity, random_dictionary
from ...evaluation.baselines import component_widths
from ...evaluation.core import COMPONENTS
from ...evaluation.report import ABOUT, plot, table
from ...evaluation.sources import sources_report
from ...evaluation.subjects import ShardedDictionary, Subject
from ..data.harvest import HeldOutStates
from ..sae.learner import Learner
from ..sae.schedules import peak_rate


_TOLERANCE = 0.1  # of the wanted L0
LARGEST_SHIFT = 0.2  # of it too: training that ends further off is told of
_MOST_DEAD = 0.1  # of the latents
_LOOK_BACK = 100_000  # tokens of training
_BASELINE_TOKENS = 8_192
LARGEST_RANDOM = 2**26  # weights of a decoder that a random one is made beside


def evaluate(
    data: HeldOut | HeldOutStates, saes: dict[str, Dictionary], show: bool = True, baselines: bool = True
) -> dict[str, Any]:
    """Return reconstruction and recaptured language-model loss of the SAEs of one hookpoint, beside baselines.

    Args:
        data ([`HeldOut`] or [`HeldOutStates`]): The language model and held-out tokens, or held-out rows; every
            process evaluates its share.
        saes (`dict[str, Dictionary]`): By name; taking raw hidden states.
        show (`bool`, *optional*, defaults to `True`): Show a progress bar.
        baselines (`bool`, *optional*, defaults to `True`): Measure what is cheap of the baselines: see
            `eval_baselines` of [`RunConfig`].

    Returns:
        `dict`: What [`evaluate_fidelity`] gives, with the rows under `saes` and `baselines`, and the `hookpoint`.

    Raises:
        `ValueError`: if there are no held-out tokens.
    """
    result = evaluate_fidelity(data, saes, show=show)
    rows = result.pop("subjects")
    references = _baselines(data, saes, show) if baselines else {"baselines": {}, "baseline_tokens": 0}
    return {"hookpoint": data.hookpoint, "selection": "mask", **result, "saes": rows, **references}


def _baselines(data: HeldOut | HeldOutStates, saes: dict[str, Dictionary], show: bool) -> dict[str, Any]:
    """Return rows of random dictionaries at the first and last width of each SAE, and of principal components."""
    if isinstance(data, HeldOut):
        data = replace(data.sample(_BASELINE_TOKENS), kept_states={})
    subjects: dict[str, Subject] = {}
    for name, dictionary in saes.items():
        sae, ends = dictionary.sae, sorted({dictionary.widths[0], dictionary.widths[-1]})
        if isinstance(dictionary, ShardedDictionary) or sae.W_dec.numel() > LARGEST_RANDOM:
            continue
        with suppress(ValueError):  # nothing fires, or no state is finite: the SAE's own row says so
            subjects[f"random ({name})"] = Dictionary(random_dictionary(sae, data, ends), ends)
    every = sorted({width for dictionary in saes.values() for width in dictionary.widths})
    (d_in,) = {dictionary.sae.config.d_in for dictionary in saes.values()}
    with suppress(ValueError):  # hidden states that do not vary
        subjects[COMPONENTS] = PrincipalComponents.fit(data, component_widths(every, d_in))
    if not subjects:
        return {"baselines": {}, "baseline_tokens": 0}
    widest = {name: subject.widths[-1:] for name, subject in subjects.items()}
    result = evaluate_fidelity(data, subjects, loss_widths=widest, show=show)
    return {"baselines": result["subjects"], "baseline_tokens": result["tokens"]}


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
    content = {"about": ABOUT, "selection": "mask", "warnings": list(warnings), "results": list(results)}
    write_json(folder / "results.json", content)
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
