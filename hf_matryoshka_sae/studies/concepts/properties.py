"""Measure absorption and splitting of properties that follow from the text, on any language model.

First letters are a task for models that can spell, and most small ones cannot. Other properties have parents and
children too: digit -> 0 to 9, punctuation -> each mark, capitalised, function word, quoted -> words. A latent of the
parent is absorbed where a latent of a child carries the parent's direction in its own row and the parent's latent
stays silent; the measures are those of `absorption.py`, over the held-out tokens that have the property and that its
probe finds. Projections are measured from the mean hidden state, not from 0: a property of tokens is a difference,
and hidden states have a mean that is longer than that.

A child here is what the token says, of a digit its first digit. A child is a *hole* of the parent where the parent's
main latents fire on less than a fifth of its tokens, though on more than half of the parent's other tokens.

Properties count whose probe has F1 above .8 on held-out windows.

Shapes: N tokens, D width of the hidden states, T properties.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.distributed import processes
from ...common.logs import progress
from ...common.report import Column, Report
from ...evaluation.data import HeldOut
from ...evaluation.subjects import Dictionary
from ...models import SAEModel
from ..drawn_latents import as_records, checked_dictionaries, random_dictionaries
from ..probing.examples import take_windows
from ..probing.logistic import LogisticProbe, f1_scores, fit_logistic
from ..probing.token_properties import PARENTS, TokenReader, property_labels
from .absorption import AbsorptionThresholds, Classes, row_of_width
from .first_letter import NotDefined


THRESHOLDS = AbsorptionThresholds(probe_f1=0.8, min_letters=1)
LEAST = 30  # tokens with a property, and without, in either half
_LEAST_OF_CHILD = 10
_HOLE, _WHOLE = 0.2, 0.5

COLUMNS = (
    Column("l0", "L0", "latents that fire on a token.", ".2f", table="nothing"),
    Column(
        "absorption_fraction",
        "fraction",
        "of a property's direction that latents of single tokens absorb, mean over tokens, then over properties.",
        ".3f",
        "lower",
    ),
    Column(
        "full_absorption",
        "full",
        "share of tokens on which the property's latents are silent and another carries its direction.",
        ".3f",
        "lower",
    ),
    Column("split_latents", "latents", "number of latents that a property is split into.", ".2f", "lower"),
    Column("hole_share", "holes", "share of children on which the property's latents are silent.", ".3f", "lower"),
    Column("main_f1", "F1", "of a probe on the property's latents alone.", ".3f", "higher"),
    Column("num_letters", "properties", "that have latents.", "d"),
)


def property_absorption(
    data: HeldOut,
    subjects: Mapping[str, Dictionary | SAEModel] | SAEModel,
    widths: Sequence[int] | None = None,
    *,
    selection: str = "restrict",
    thresholds: AbsorptionThresholds = THRESHOLDS,
    baselines: bool = True,
    max_tokens: int = 8_000,
    seed: int = 0,
    show: bool = True,
) -> Report:
    """Measure absorption and splitting of properties of tokens at each width.

    Every process of a distributed run computes the same.

    Args:
        data ([`HeldOut`]): Language model, tokenizer, hookpoint and text.
        subjects (`Mapping[str, Dictionary or SAEModel]`, or one [`SAEModel`]): SAEs of one hookpoint, by name.
        widths (`Sequence[int]`, *optional*): Widths to measure; by default each SAE's prefix widths.
        selection (`str`, *optional*, defaults to `"restrict"`): How a prefix encodes; see [`Dictionary`].
        thresholds ([`AbsorptionThresholds`], *optional*): Thresholds that define absorption.
        baselines (`bool`, *optional*, defaults to `True`): Also measure a random dictionary for each SAE.
        max_tokens (`int`, *optional*, defaults to 8,000): Tokens to read; probes are fitted to half of them.
        seed (`int`, *optional*, defaults to 0): Of the halves and of random directions.
        show (`bool`, *optional*, defaults to `True`): Whether to show a progress bar in the main process.

    Returns:
        [`Report`]: for each subject and width means over properties; `about` has each probe's F1 under `probe_f1` and
        the figures of each property under `properties`, by subject and width.

    Raises:
        [`NotDefined`]: if no property can be found by a probe; the message says how near each comes.
        `ValueError`: if there is no tokenizer, no SAE, or an SAE of another width than the hidden states.
    """
    if data.tokenizer is None:
        raise ValueError("Properties of tokens need the language model's tokenizer: `HeldOut(..., tokenizer=...)`.")
    data, _ = take_windows(data, [], max_tokens)
    dictionaries = checked_dictionaries(data, subjects, widths, selection)
    tokens = _Tokens.read(data, seed)
    classes, probe_f1 = _classes(tokens, thresholds)
    if baselines:
        dictionaries |= random_dictionaries(dictionaries, data, seed)
    rows, properties = {}, {}
    todo = [(name, one, width) for name, one in dictionaries.items() for width in one.widths]
    for name, one, width in progress(todo, desc="absorption", leave=False, disable=not show or processes()[0] != 0):
        one.check(name, tokens.states)
        row = row_of_width(
            one.sae, tokens.states, tokens.heldout, classes, width, one.selection, thresholds, tokens.holes(classes)
        )
        own = row.pop("letters")
        for key in ("hole_share", "main_f1"):
            known = [each[key] for each in own.values() if each[key] is not None]
            row[key] = sum(known) / len(known) if known else None
        rows.setdefault(name, []).append(row)
        properties.setdefault(name, {})[width] = own
    about = {
        "hookpoint": data.hookpoint,
        "tokens": len(tokens.states),
        "probe_f1": probe_f1,
        "properties": properties,
        "thresholds": vars(thresholds),
        "seed": seed,
    }
    missed = [f"{name} ({f1:.2f})" for name, f1 in probe_f1.items() if name not in classes.names]
    notes = [f"properties: {', '.join(f'{name} (F1 {probe_f1[name]:.2f})' for name in classes.names)}"]
    notes += [f"not found by a probe, F1 of {thresholds.probe_f1} or less: {', '.join(missed)}"] if missed else []
    title = f"{data.hookpoint}: absorption and splitting of properties of tokens"
    return Report(
        "absorption", title, as_records(rows), COLUMNS, about, ["absorption_fraction", "split_latents"], notes
    )


class _Tokens:
    """Hidden states of tokens with their properties and children, and which half each is in."""

    def __init__(self, states: Tensor, labels: Tensor, children: list[str], heldout: Tensor) -> None:
        self.states, self.labels, self.children, self.heldout = states, labels, children, heldout

    @classmethod
    def read(cls, data: HeldOut, seed: int) -> "_Tokens":
        reader = TokenReader(data.tokenizer)
        states, labels, children, windows, first = [], [], [], [], 0
        for batch in data.batches:
            batch = batch.to(data.device)
            keep = batch.keep.cpu()
            states.append(data.states(batch).cpu())
            labels.append(property_labels(batch, reader, PARENTS)[keep])
            children += [text.strip().lower() for text in reader.texts(batch.input_ids.cpu()[keep].tolist())]
            windows.append(keep.nonzero()[:, 0] + first)
            first += len(keep)
        window = torch.cat(windows)
        halves = torch.randperm(first, generator=torch.Generator().manual_seed(seed)) % 2 == 0
        return cls(torch.cat(states), torch.cat(labels), children, halves[window])

    def holes(self, classes: Classes) -> Any:
        """Return what counts the children of a class on which its main latents are silent."""

        def count(number: int, fires: Tensor) -> dict[str, Any]:
            members = (classes.targets[:, number] & self.heldout).nonzero().flatten().tolist()
            of_child: dict[str, list[bool]] = {}
            for at, fired in zip(members, fires.tolist(), strict=True):
                child = self.children[at]
                child = (
                    next((each for each in child if each.isdigit()), child)
                    if "digit" in classes.names[number]
                    else child
                )
                of_child.setdefault(child, []).append(fired)
            common = {child: each for child, each in of_child.items() if len(each) >= _LEAST_OF_CHILD}
            total, hits = len(fires), int(fires.sum())
            holes = [
                child
                for child, each in common.items()
                if sum(each) < _HOLE * len(each) and hits - sum(each) > _WHOLE * max(1, total - len(each))
            ]
            share = len(holes) / len(common) if common else None
            return {"children": len(common), "holes": holes, "hole_share": share, "fires": hits / max(1, total)}

        return count


def _classes(tokens: _Tokens, thresholds: AbsorptionThresholds) -> tuple[Classes, dict[str, float]]:
    """Return the properties that a probe finds, and the F1 of all that there are enough tokens of."""
    halves = (tokens.labels[part] for part in (tokens.heldout, ~tokens.heldout))
    enough = torch.stack([torch.minimum(part.sum(0), (~part).sum(0)) >= LEAST for part in halves]).all(0)
    names = [name for name, there in zip(PARENTS, enough.tolist(), strict=True) if there]
    if not names:
        raise NotDefined(f"No property of {', '.join(PARENTS)} is on {LEAST} tokens of each half. Give more tokens.")
    targets, states, heldout = tokens.labels[:, enough], tokens.states, tokens.heldout
    probe = fit_logistic(states[~heldout], targets[~heldout])
    predicted = probe.scores(states) > 0
    f1 = f1_scores(predicted[heldout], targets[heldout])
    usable = f1 > thresholds.probe_f1
    by_name = dict(zip(names, f1.tolist(), strict=True))
    if not usable.any():
        told = ", ".join(f"{name} {value:.2f}" for name, value in by_name.items())
        raise NotDefined(
            f"Absorption is not defined here: a probe of the hidden states finds no property with F1 above "
            f"{thresholds.probe_f1} ({told}). Take another hookpoint, or more tokens."
        )
    right = predicted & targets & heldout[:, None]
    names = [name for name, good in zip(names, usable.tolist(), strict=True) if good]
    chosen = LogisticProbe(probe.weight[usable], probe.bias[usable])
    return Classes(names, targets[:, usable], right[:, usable], chosen, states.mean(0)), by_name
