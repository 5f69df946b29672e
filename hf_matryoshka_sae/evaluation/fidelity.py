"""The core evaluation: reconstruction, firing, spliced language-model loss and similarity at each width."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..common.distributed import processes, reduce_sum
from ..common.logs import progress
from .data import HasActivations, HeldOut, activation_batches
from .language_model import spliced_metrics
from .pooled import pooled_metrics
from .reconstruction import ReconstructionSums
from .similarity import TokenSample, representational_similarity
from .subjects import Dictionary, Subject


@torch.no_grad()
def evaluate_fidelity(
    data: HeldOut | HasActivations | Iterable[Tensor],
    subjects: Mapping[str, Subject],
    language_model: bool = True,
    similarity_tokens: int = 500,
    seed: int = 0,
    loss_widths: Mapping[str, Sequence[int]] | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Evaluate dictionaries and baselines at each of their widths.

    All widths of a subject come from one pass over the data; the language model is run once more for each width whose
    loss is measured.

    Args:
        data ([`HeldOut`], or an iterable of tensors `(n, D)`): Losses need a [`HeldOut`] whose model predicts tokens.
            Under `torch.distributed` each process evaluates its share, and all return the same result.
        subjects (`Mapping[str, Subject]`): Dictionaries and baselines by name, such as [`Dictionary`] of an SAE.
        language_model (`bool`, *optional*, defaults to `True`): Measure spliced losses where that can be done.
        similarity_tokens (`int`, *optional*, defaults to 500): Tokens of the similarity analysis (0: leave it out).
        seed (`int`, *optional*, defaults to 0): Seed of the choice of these tokens.
        loss_widths (`Mapping[str, Sequence[int]]`, *optional*): Widths at which a subject's losses are measured; by
            default all.
        show (`bool`, *optional*, defaults to `True`): Show a progress bar in the main process.

    Returns:
        `dict`: `tokens`, `variance`, `mean_norm`; `clean_ce`, `zero_ce`, `mean_ce` (`None` without losses); and under
        `subjects` a list of rows, one for each width, for each name. See [`ReconstructionSums`], [`FiringSums`],
        [`spliced_metrics`] and [`representational_similarity`] for what the keys mean. Of a model that predicts no
        tokens, `pooled` and [`pooled_metrics`] instead of losses.

        Hidden states and logits of the language model that are NaN or infinite are in no figure, and are counted:
        `excluded_windows` of the held-out text have hidden states that are not finite, `excluded_predictions` of the
        others have such logits. Where a reconstruction is not finite, figures are NaN and `rsa` is `None`.

    Raises:
        `ValueError`: if there are no tokens, hidden states are of another width than an SAE's, or those of an iterable
            are not finite.
    """
    sums: dict[str, ReconstructionSums] = {}
    sample = TokenSample(similarity_tokens, seed) if similarity_tokens else None
    show = show and processes()[0] == 0
    excluded, batches = torch.zeros((), dtype=torch.int64), activation_batches(data)
    if isinstance(data, HeldOut):
        batches = _finite_states(data, excluded)
    for states in progress(batches, desc="reconstruction", disable=not show, leave=False):
        for name, subject in subjects.items():
            if name not in sums:
                sums[name] = ReconstructionSums.zeros(len(subject.widths), states.shape[1])
            _add(name, subject, states, sums[name])
        if sample is not None:
            sample.add(states)
    _check_tokens(sums, excluded)
    first = next(iter(sums.values()))
    rows = {name: _rows(subject, sums[name]) for name, subject in subjects.items()}
    result: dict[str, Any] = {
        "tokens": int(first.tokens),
        "excluded_windows": int(excluded),
        "excluded_predictions": 0,
        "variance": first.variance,
        "clean_ce": None,
        "zero_ce": None,
        "mean_ce": None,
    }
    if sample is not None:
        _add_similarity(subjects, rows, sample.tokens(), seed)
    spliced = {name: _at(subject, (loss_widths or {}).get(name)) for name, subject in subjects.items()}
    spliced = {name: subject for name, subject in spliced.items() if subject.widths}
    if language_model and isinstance(data, HeldOut):
        (_add_losses if data.has_loss else _add_pooled)(result, data, spliced, rows, first.mean, show)
    for row in chain.from_iterable(rows.values()):
        for key in ("ce", "recaptured_zero", "recaptured_mean"):
            row.setdefault(key, None)
    return result | {"subjects": rows}


def _add_pooled(
    result: dict[str, Any],
    data: HeldOut,
    subjects: Mapping[str, Subject],
    rows: dict[str, list[dict[str, Any]]],
    mean: Tensor,
    show: bool,  # noqa: ARG001 (as that of losses)
) -> None:
    """Add what becomes of whole texts, for a model without a loss."""
    result["pooled"], metrics = pooled_metrics(data, mean, list(subjects.values()))
    for (name, subject), entries in zip(subjects.items(), metrics, strict=True):
        by_width = {row["width"]: row for row in rows[name]}
        for width, entry in zip(subject.widths, entries, strict=True):
            by_width[width].update(entry)


def _check_tokens(sums: dict[str, ReconstructionSums], excluded: Tensor) -> None:
    """Raise `ValueError` where no token was evaluated; sum `excluded` over processes in place."""
    if not sums:
        raise ValueError("There are no held-out tokens to evaluate on. Name an `eval_dataset` with text.")
    reduce_sum(excluded)
    if excluded and not reduce_sum(next(iter(sums.values())).tokens.clone())[0]:
        raise ValueError(
            f"All {int(excluded)} windows of the held-out text have hidden states with NaN or infinity. Load the "
            "language model in another type (bfloat16 or float32)."
        )


def _finite_states(data: HeldOut, excluded: Tensor) -> Iterator[Tensor]:
    """Yield the states of each batch of this process, maybe none; add the number of windows left out to `excluded`."""
    for batch in data.share():
        usable, states = data.finite(batch)
        excluded += len(batch.keep) - len(usable.keep)
        yield states


def _add(name: str, subject: Subject, states: Tensor, sums: ReconstructionSums) -> None:
    if not isinstance(subject, Dictionary):
        sums.add(states, subject.reconstruct(states))
        return
    subject.check(name, states)
    pairs = subject.encode(states)
    subject.count(pairs)
    sums.add(states, subject.decode(pairs).float())


def _rows(subject: Subject, sums: ReconstructionSums) -> list[dict[str, Any]]:
    sums.reduce()
    rows = [{"width": width, **row} for width, row in zip(subject.widths, sums.rows(), strict=True)]
    if isinstance(subject, Dictionary):
        for row, firing in zip(rows, subject.firing_rows(), strict=True):
            row.update(firing)
    return rows


def _at(subject: Subject, widths: Sequence[int] | None) -> Subject:
    """Return the subject at some of its widths."""
    if widths is None:
        return subject
    unknown = set(widths) - set(subject.widths)
    if unknown:
        raise ValueError(f"`loss_widths` must be among the widths {subject.widths}, got {sorted(unknown)} as well.")
    subject = copy.copy(subject)
    subject.widths = sorted(widths)
    return subject


def _add_similarity(subjects: Mapping[str, Subject], rows: dict[str, list], tokens: Tensor, seed: int) -> None:
    for name, subject in subjects.items():
        reconstructions = subject.reconstruct(tokens).float()
        finite = reconstructions.isfinite().flatten(1).all(1)
        scores = iter(representational_similarity(tokens, reconstructions[finite], seed=seed))
        for row, is_finite in zip(rows[name], finite.tolist(), strict=True):
            row["rsa"] = next(scores) if is_finite else None


def _add_losses(
    result: dict[str, Any],
    data: HeldOut,
    subjects: Mapping[str, Subject],
    rows: dict[str, list],
    mean: Tensor,
    show: bool,
) -> None:
    passes = sum(len(subject.widths) for subject in subjects.values()) * len(list(data.share()))
    with progress(total=passes, desc="language-model loss", disable=not show, leave=False) as bar:
        baselines, metrics = spliced_metrics(data, mean, list(subjects.values()), bar.update)
    for (name, subject), entries in zip(subjects.items(), metrics, strict=True):
        by_width = {row["width"]: row for row in rows[name]}
        for width, entry in zip(subject.widths, entries, strict=True):
            by_width[width].update(entry)
    for key in ("clean_ce", "zero_ce", "mean_ce", "excluded_predictions"):
        result[key] = getattr(baselines, key)
