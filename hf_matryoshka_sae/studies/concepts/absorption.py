"""Measure feature absorption and splitting on the first-letter task.

A dictionary should have a latent "begins with s". Absorption is what happens when that latent stays silent on some
such words because another, say one for "short", has the letter's direction built into its own decoder row. With p the
unit direction of a logistic probe for the letter, d_i unit decoder rows, a_i activations and cos_i = p . d_i:

    P_tot  = p . x                                   P_main = sum of a_i cos_i over the main latents
    P_abs  = the 3 largest a_i cos_i among other latents with cos_i >= 0.1 and a_i cos_i > 0

    full      all main latents silent, P_tot > 0, and the latent with the largest a_i cos_i has cos_i >= 0.025 and
              a_i cos_i >= 0.4 P_tot
    fraction  0 where P_tot <= 0, P_main >= P_tot or P_abs < 0.4 P_tot; 1 where P_main <= 0; otherwise
              u / (u + P_main) with u = min(P_abs, P_tot - P_main)

The main latents of a letter are those among which it is split (`probes.main_latents`). Scores are means over the
held-out words which the probe gets right, then over letters. Chanin et al. (2024, arXiv 2409.14507); thresholds of
SAEBench 0.6 (arXiv 2503.09532), which has two differences: its probes stop after 50 epochs, before they converge, and
it ranks latents without bringing them to one scale.

Shapes: N words, D width of the hidden states, F latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...activations import hookpoint_widths, resolve_hookpoints
from ...common.distributed import processes
from ...common.logs import progress
from ...evaluation.geometry import checked_widths
from ...features.firings import joined_pairs, values_of
from ...models import SAEModel
from ...models.sparse_ops import LatentPairs, PairIndex, row_norms
from ..probing.logistic import LogisticProbe, f1_scores, fit_logistic, main_latents, rank_latents
from .first_letter import LETTERS, PROMPT, FirstLetterTask, NotDefined, first_letter_task


_WORDS_AT_ONCE = 1024
_PUBLISHED_LATENTS, _PUBLISHED_PARAMETERS = 16_384, 1_000_000_000


@dataclass(frozen=True)
class AbsorptionThresholds:
    """Thresholds that define absorption; the defaults are those of SAEBench 0.6.

    Args:
        probe_f1 (`float`): F1 on held-out words above which a letter's probe is good enough for the letter to count.
        min_letters (`int`): Number of letters below which the measure is not defined.
        max_main (`int`): Largest number of main latents of a letter.
        min_gain (`float`): Gain in F1 above which a further main latent is added.
        silent (`float`): Activation below which a latent does not fire.
        full_cosine (`float`): Least cosine to the probe of a latent that absorbs fully.
        cosine (`float`): Least cosine to the probe of latents that absorb in part.
        share (`float`): Share of the probe's projection that absorbing latents must carry.
        max_absorbing (`int`): Largest number of latents that absorb in part.
    """

    probe_f1: float = 0.6
    min_letters: int = 20
    max_main: int = 10
    min_gain: float = 0.03
    silent: float = 1e-8
    full_cosine: float = 0.025
    cosine: float = 0.1
    share: float = 0.4
    max_absorbing: int = 3


def absorption(
    sae: SAEModel,
    model: nn.Module,
    tokenizer: Any,
    hookpoint: str,
    widths: Sequence[int] | None = None,
    *,
    selection: str = "restrict",
    thresholds: AbsorptionThresholds | None = None,
    **task_options: Any,
) -> dict[str, Any]:
    """Measure absorption and splitting of an SAE at each prefix width.

    Every process of a distributed run computes the same.

    Args:
        sae ([`SAEModel`]): SAE of the hidden states at `hookpoint`.
        model (`nn.Module`): A transformers model in `eval` mode.
        tokenizer: The language model's tokenizer.
        hookpoint (`str`): Module whose hidden states the SAE reads.
        widths (`Sequence[int]`, *optional*): Widths to measure; by default the SAE's prefix widths.
        selection (`str`, *optional*, defaults to `"restrict"`): How a prefix encodes; see [`SAEModel.encode_pairs`].
        thresholds ([`AbsorptionThresholds`], *optional*): Thresholds that define absorption.
        task_options: `prompt`, `shots`, `max_words`, `min_words`, `heldout`, `batch_size` and `seed` of
            [`first_letter_task`].

    Returns:
        `dict[str, Any]`: Values for JSON. `defined` says whether the language model supports the measure; if not,
        `reason` says why and `rows` is empty. [`absorption_on_task`] describes the other keys.

    Raises:
        `ValueError`: if the SAE does not fit the hookpoint, or an option is out of range.
    """
    thresholds = thresholds or AbsorptionThresholds()
    (hookpoint,) = resolve_hookpoints(model, [hookpoint])
    _check_fit(sae, hookpoint_widths(model, [hookpoint])[hookpoint], hookpoint)
    widths = checked_widths(widths, sae)
    try:
        task = first_letter_task(model, tokenizer, hookpoint, **task_options)
    except NotDefined as error:
        options = {"prompt": PROMPT} | task_options
        source = {"model": model.config.name_or_path or type(model).__name__, "hookpoint": hookpoint, **options}
        return _undefined(str(error), source, thresholds)
    result = absorption_on_task(sae, task, widths, selection=selection, thresholds=thresholds)
    if result["defined"] and model.num_parameters() < _PUBLISHED_PARAMETERS:
        result["notes"].append(
            f"The language model has {model.num_parameters():,} parameters; the measure was made for "
            f"{_PUBLISHED_PARAMETERS:,} or more, which know how words are spelled."
        )
    return result


def absorption_on_task(
    sae: SAEModel,
    task: FirstLetterTask,
    widths: Sequence[int] | None = None,
    *,
    selection: str = "restrict",
    thresholds: AbsorptionThresholds | None = None,
) -> dict[str, Any]:
    """Measure absorption and splitting on hidden states that have been read, for several SAEs at one hookpoint.

    Args:
        sae ([`SAEModel`]): SAE of the task's hidden states.
        task ([`FirstLetterTask`]): Hidden states of words.
        widths (`Sequence[int]`, *optional*): Widths to measure; by default the SAE's prefix widths.
        selection (`str`, *optional*, defaults to `"restrict"`): How a prefix encodes; see [`SAEModel.encode_pairs`].
        thresholds ([`AbsorptionThresholds`], *optional*): Thresholds that define absorption.

    Returns:
        `dict[str, Any]`: `defined`, `reason`, `notes`, `source` (language model, hookpoint, position, prompt),
        `selection`, `thresholds`, `train_words` and `heldout_words` (numbers), `probe_f1` by letter, and `rows`, one
        per width: `width`, `l0` on the task's words, `full_absorption`, `absorption_fraction` and `split_latents`
        (main latents of a letter: 1 means no splitting) as means over `num_letters` letters, their standard
        deviations over letters with `_std`, `words`, `letters_without_latent` and `letters`, the same for each
        letter. Where a prefix has latents for fewer than `min_letters` letters, its means are `None` and `reason`
        says so.
    """
    thresholds = thresholds or AbsorptionThresholds()
    _check_fit(sae, task.states.shape[1], task.source.get("hookpoint"))
    widths = checked_widths(widths, sae)
    classes = task.letters.unique()
    targets = task.letters[:, None] == classes
    probe = fit_logistic(task.states[~task.heldout], targets[~task.heldout])
    right = (probe.scores(task.states) > 0) & targets & task.heldout[:, None]
    f1 = f1_scores(probe.scores(task.states[task.heldout]) > 0, targets[task.heldout])
    usable = f1 > thresholds.probe_f1
    facts = {
        "train_words": int((~task.heldout).sum()),
        "heldout_words": int(task.heldout.sum()),
        "probe_f1": {LETTERS[c]: value for c, value in zip(classes.tolist(), f1.tolist(), strict=True)},
    }
    if usable.sum() < thresholds.min_letters:
        return _undefined(_reason(task, f1, usable, thresholds), task.source, thresholds) | facts
    probe = LogisticProbe(probe.weight[usable], probe.bias[usable])
    selected = Classes([LETTERS[c] for c in classes[usable].tolist()], targets[:, usable], right[:, usable], probe)
    rows = [
        row_of_width(sae, task.states, task.heldout, selected, width, selection, thresholds)
        for width in progress(widths, desc="absorption", leave=False, disable=processes()[0] != 0)
    ]
    notes = []
    if sae.config.num_latents < _PUBLISHED_LATENTS:
        notes.append(f"Published figures are of {_PUBLISHED_LATENTS:,} latents or more.")
    return {
        "defined": True,
        "reason": None,
        "notes": notes,
        "source": task.source,
        "selection": selection,
        "thresholds": asdict(thresholds),
        **facts,
        "rows": rows,
    }


def absorbed_words(
    states: Tensor,
    latents: LatentPairs,
    decoder: Tensor,
    direction: Tensor,
    main: Tensor,
    thresholds: AbsorptionThresholds | None = None,
) -> tuple[Tensor, Tensor]:
    """Return which words are absorbed fully, and the fraction of each; the equations are at the head of this module.

    Args:
        states (`Tensor` of shape `(N, D)`): Hidden states of the words.
        latents ([`LatentPairs`]): Latents of the words, in units of decoder rows of length 1.
        decoder (`Tensor` of shape `(F, D)`): Decoder rows of length 1 (or 0).
        direction (`Tensor` of shape `(D,)`): Direction of the probe, of any length.
        main (`Tensor`): The main latents.
        thresholds ([`AbsorptionThresholds`], *optional*): Thresholds that define absorption.

    Returns:
        `tuple[Tensor, Tensor]`: bool and float64 tensors of shape `(N,)`.

    Raises:
        `ValueError`: if decoder rows are not of unit length, or shapes do not fit.
    """
    thresholds = thresholds or AbsorptionThresholds()
    if latents.num_rows != len(states) or decoder.shape != (latents.num_latents, states.shape[1]):
        raise ValueError(
            f"Expected latents of {len(states)} words and a decoder ({latents.num_latents}, {states.shape[1]}), got "
            f"{latents.num_rows} and {tuple(decoder.shape)}."
        )
    lengths = decoder.double().norm(dim=1)
    if not ((lengths - 1).abs() < 1e-3).logical_or(lengths == 0).all():
        raise ValueError(
            f"Decoder rows must be of length 1, got {lengths.min():.3g} to {lengths.max():.3g}. Divide them by their "
            "lengths and multiply the latents by the same."
        )
    direction = direction.double()
    direction = direction / direction.norm()
    cosine, total = decoder.double() @ direction, states.double() @ direction
    slots = latents.to_slots()
    # One empty slot more, so that a word on which no latent fires has a largest value too.
    values, indices = F.pad(slots.values.double(), (0, 1)), F.pad(slots.indices, (0, 1))
    cosines = cosine[indices]
    along = values * cosines
    is_main = torch.isin(indices, main)

    silent = (values.abs() * is_main < thresholds.silent).all(1)
    top, slot = along.max(1)
    aligned = cosines.gather(1, slot[:, None])[:, 0] >= thresholds.full_cosine
    full = silent & (total > 0) & aligned & (top >= thresholds.share * total)

    of_main = (along * is_main).sum(1)
    candidates = along.where(~is_main & (cosines >= thresholds.cosine) & (along > 0), 0.0)
    absorbing = candidates.topk(min(thresholds.max_absorbing, candidates.shape[1]), dim=1).values.sum(1)
    absorbed = torch.minimum(absorbing, total - of_main)
    fraction = torch.where(of_main <= 0, 1.0, absorbed / (absorbed + of_main))
    none = (total <= 0) | (of_main >= total) | (absorbing < thresholds.share * total)
    return full, fraction.where(~none, 0.0)


@dataclass
class Classes:
    """The classes that count: letters of words, or properties of tokens.

    Args:
        names (`list[str]`): Their names.
        targets (`Tensor` of shape `(N, C)`): bool; members of each.
        right (`Tensor` of shape `(N, C)`): bool; held-out members that the probe gets right.
        probe ([`LogisticProbe`]): Of each class.
        origin (`Tensor` of shape `(D,)`, *optional*): Hidden state from which projections are measured; by default 0.
    """

    names: list[str]
    targets: Tensor
    right: Tensor
    probe: LogisticProbe
    origin: Tensor | None = None


Watch = Callable[[int, Tensor], dict[str, Any]]
"""Takes a class's number and on which of its held-out members `(n,)` a main latent fires; returns further figures."""


def row_of_width(
    sae: SAEModel,
    states: Tensor,
    heldout: Tensor,
    classes: Classes,
    width: int,
    selection: str,
    thresholds: AbsorptionThresholds,
    watch: Watch = lambda _number, _fires: {},
) -> dict[str, Any]:
    """Return the row of one prefix width: means over classes, and under `letters` each class's own figures."""
    latents, decoder = _unit_latents(sae, states, width, selection)
    train, tested = (_of_words(latents, part) for part in (~heldout, heldout))
    ranked = rank_latents(train, classes.targets[~heldout], thresholds.max_main)
    scores, without = {}, []
    for c, name in enumerate(classes.names):
        if not len(ranked[c]):
            without.append(name)
            continue
        target = classes.targets[:, c]
        main, curve = main_latents(ranked[c], train, target[~heldout], tested, target[heldout], thresholds.min_gain)
        right, direction = classes.right[:, c], classes.probe.weight[c]
        own = states[right] if classes.origin is None else states[right] - classes.origin
        full, fraction = absorbed_words(own, _of_words(latents, right), decoder, direction, main, thresholds)
        fires = (values_of(_of_words(latents, heldout & target), main) > thresholds.silent).any(1)
        scores[name] = {
            "full_absorption": full.double().mean().item(),
            "absorption_fraction": fraction.mean().item(),
            "split_latents": len(main),
            "words": int(right.sum()),
            "main_latents": main.tolist(),
            "main_f1": curve[len(main) - 1],
            **watch(c, fires),
        }
    row = {"width": width, "l0": (latents.values > 0).sum().item() / len(states)}
    return row | _means(scores, without, thresholds.min_letters) | {"letters": scores}


def _means(scores: dict[str, dict[str, Any]], without: list[str], min_letters: int) -> dict[str, Any]:
    """Return means and standard deviations over letters, `None` where there are too few."""
    means, reason = {}, None
    if len(scores) < min_letters:
        reason = f"Only {len(scores)} letters have a latent that indicates them; {min_letters} are needed."
    for name in ("full_absorption", "absorption_fraction", "split_latents"):
        values = torch.tensor([of_letter[name] for of_letter in scores.values()], dtype=torch.float64)
        means[name] = None if reason else values.mean().item()
        means[f"{name}_std"] = None if reason else values.std(correction=0).item()
    return means | {
        "reason": reason,
        "num_letters": len(scores),
        "words": sum(of_letter["words"] for of_letter in scores.values()),
        "letters_without_latent": without,
    }


@torch.no_grad()
def _unit_latents(sae: SAEModel, states: Tensor, width: int, selection: str) -> tuple[LatentPairs, Tensor]:
    """Return the latents of words in units of decoder rows of length 1, and those rows, on the CPU."""
    decoder = sae.W_dec.float()
    norms = row_norms(decoder)
    parts, training = [], sae.training
    sae.eval()
    try:
        for start in range(0, len(states), _WORDS_AT_ONCE):
            part = sae.encode_pairs(states[start : start + _WORDS_AT_ONCE].to(sae.W_enc), width, selection)
            values = part.values.float()
            # `scale_by_decoder_norm` means that latents are in these units already.
            scaled = values if sae.config.scale_by_decoder_norm else values * norms[part.cols]
            index = PairIndex(part.rows.cpu(), part.cols.cpu(), part.num_rows, part.num_latents)
            parts.append(LatentPairs(index, scaled.cpu()))
    finally:
        sae.train(training)
    latents = joined_pairs(parts)
    if not latents.values.isfinite().all():
        raise ValueError("The SAE's latents are not finite: check its weights, or load it in float32.")
    return latents.keep(latents.values != 0), (decoder / norms[:, None]).cpu()


def _of_words(latents: LatentPairs, chosen: Tensor) -> LatentPairs:
    """Return the latents of the chosen words, `(N,)` bool, numbered anew."""
    pairs = latents.keep(chosen[latents.rows])
    rows = (chosen.cumsum(0) - 1)[pairs.rows]
    return LatentPairs(PairIndex(rows, pairs.cols, int(chosen.sum()), latents.num_latents), pairs.values)


def _check_fit(sae: SAEModel, width: int, hookpoint: str | None) -> None:
    if width != sae.config.d_in:
        raise ValueError(
            f"This SAE takes hidden states of width d_in = {sae.config.d_in}, those at {hookpoint} have {width}. "
            "Choose the language model and hookpoint it was trained on."
        )


def _reason(task: FirstLetterTask, f1: Tensor, usable: Tensor, thresholds: AbsorptionThresholds) -> str:
    """Return why too few letters count."""
    if len(f1) < thresholds.min_letters:
        return (
            f"Absorption is not defined here: only {len(f1)} letters begin enough of the words that are a token of "
            f"the tokenizer, and {thresholds.min_letters} are needed. Take a language model with a larger vocabulary."
        )
    return (
        f"Absorption is not defined here: a probe finds the first letter with F1 > {thresholds.probe_f1} for "
        f"{int(usable.sum())} of {len(f1)} letters, and {thresholds.min_letters} are needed. The hidden states at "
        f"{task.source.get('hookpoint')} do not tell well enough how words are spelled; take a larger language model, "
        "another hookpoint or another prompt."
    )


def _undefined(reason: str, source: dict[str, Any], thresholds: AbsorptionThresholds) -> dict[str, Any]:
    return {
        "defined": False,
        "reason": reason,
        "notes": [],
        "source": source,
        "thresholds": asdict(thresholds),
        "rows": [],
    }
