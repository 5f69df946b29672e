"""Estimate the scores of every prefix from some of its latents, beside untrained dictionaries.

Latents are drawn from each group that a width adds, and a width's score is the mean over its latents, estimated by
groups: sum over groups of (eligible latents in the group) * (mean of those drawn) / (eligible latents). Intervals span
the 2.5th to the 97.5th percentile of bootstrap resamples of the drawn latents, within groups.

Shapes: F `num_latents`, N latents drawn from a group, S scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..common.intervals import middle_95, resampled_means
from ..evaluation.baselines import random_dictionary
from ..evaluation.data import HeldOut
from ..evaluation.firing import firings_of
from ..evaluation.geometry import checked_widths
from ..evaluation.subjects import Dictionary
from ..models import SAEModel, TopKSAE, TopKSAEConfig


RANDOM, NEURONS = "random", "neurons"
_LEAST = 8  # latents, over which an interval is drawn


def with_baselines(
    saes: Mapping[str, SAEModel] | SAEModel, data: HeldOut, widths: Sequence[int] | None, baselines: bool, seed: int
) -> dict[str, tuple[SAEModel, list[int]]]:
    """Return SAEs with their widths, each followed by a random dictionary of its shape, and the neurons last.

    Args:
        saes (`Mapping[str, SAEModel]`, or one [`SAEModel`]): SAEs of one hookpoint, by name.
        data ([`HeldOut`]): Data on which random dictionaries are calibrated, and whose neurons are taken.
        widths (`Sequence[int]`, *optional*): Widths to measure; by default each SAE's prefix widths.
        baselines (`bool`): Whether to add random dictionaries and neurons.
        seed (`int`): Seed of the random directions.

    Raises:
        `ValueError`: if there is no SAE, one whose weights are not finite, or widths that one does not have.
    """
    saes = {"sae": saes} if isinstance(saes, SAEModel) else saes
    if not saes:
        raise ValueError("Name at least one SAE.")
    for name, sae in saes.items():
        if not isinstance(sae, SAEModel):
            raise ValueError(f"Expected SAEs; `{name}` is a {type(sae).__name__}.")
        if not all(bool(tensor.isfinite().all()) for tensor in sae.state_dict().values()):
            raise ValueError(f"The weights of `{name}` are not all finite: it is damaged, or its training diverged.")
    subjects: dict[str, tuple[SAEModel, list[int]]] = {}
    for name, sae in saes.items():
        chosen = checked_widths(widths, sae)
        subjects[name] = sae.eval(), chosen
        if baselines:
            subjects[f"{RANDOM} ({name})"] = random_dictionary(sae, data, chosen, seed=seed), chosen
    if baselines:
        neurons = neuron_dictionary(data, k=max(1, round(mean_l0(next(iter(saes.values())), data))))
        subjects[NEURONS] = neurons, [neurons.config.num_latents]
    return subjects


def checked_dictionaries(
    data: HeldOut,
    subjects: Mapping[str, Dictionary | SAEModel] | SAEModel,
    widths: Sequence[int] | None,
    selection: str,
    kind: type[Dictionary] = Dictionary,
) -> dict[str, Dictionary]:
    """Return subjects by name as dictionaries of one kind, on the data's device.

    Args:
        data ([`HeldOut`]): Data whose device the dictionaries get.
        subjects (`Mapping[str, Dictionary or SAEModel]`, or one [`SAEModel`]): SAEs or dictionaries, by name.
        widths (`Sequence[int]`, *optional*): Widths of subjects that are SAEs; by default their prefix widths.
        selection (`str`): Selection of subjects that are SAEs.
        kind (`type`, *optional*, defaults to [`Dictionary`]): Class of the dictionaries.

    Raises:
        `ValueError`: if there is none, or one that is neither an SAE nor a [`Dictionary`].
    """
    dictionaries = {}
    for name, subject in (subjects if isinstance(subjects, Mapping) else {"sae": subjects}).items():
        if isinstance(subject, SAEModel):
            subject = kind(subject, widths, selection)
        elif not isinstance(subject, Dictionary):
            raise ValueError(f"Subjects must be SAEs or `Dictionary`s; '{name}' is a {type(subject).__name__}.")
        elif not isinstance(subject, kind):
            subject = kind(subject.sae, subject.widths, subject.selection)
        subject.sae.to(data.device)
        dictionaries[name] = subject
    if not dictionaries:
        raise ValueError("There is no dictionary to measure: `subjects` is empty.")
    return dictionaries


def random_dictionaries(dictionaries: Mapping[str, Dictionary], data: HeldOut, seed: int) -> dict[str, Dictionary]:
    """Return for each dictionary one of its kind with random directions that fires as often on the data."""
    by_name = {}
    for name, one in dictionaries.items():
        random = random_dictionary(one.sae, data, one.widths, seed=seed)
        by_name[f"{RANDOM} ({name})"] = type(one)(random, one.widths, one.selection)
    return by_name


def kind_of(name: str) -> str:
    """Return `dictionary`, `random` or `neurons`, by the names that baselines have in this module."""
    return NEURONS if name == NEURONS else RANDOM if name.startswith(f"{RANDOM} (") else "dictionary"


def as_records(rows: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the records of a [`Report`] from rows by name of the subject."""
    return [{"subject": name, "kind": kind_of(name), **row} for name, of_name in rows.items() for row in of_name]


def firing_counts(sae: SAEModel, data: HeldOut) -> np.ndarray:
    """Count the tokens on which each latent fires, `(F,)`; every process reads all of the text."""
    states = (data.states(batch.to(data.device)) for batch in data.batches)
    return firings_of(sae, states).fired.cpu().numpy()


def mean_l0(sae: SAEModel, data: HeldOut) -> float:
    """Return the mean number of latents that fire on a token; every process reads all of the text."""
    return float(firing_counts(sae, data).sum() / data.tokens)


@torch.no_grad()
def neuron_dictionary(data: HeldOut, k: int) -> TopKSAE:
    """Return the dimensions of the hidden states as an SAE: the k of each token that differ most from their mean.

    Latent d is dimension d above its mean, latent D + d the same dimension below it; decoder rows are unit vectors.

    Args:
        data ([`HeldOut`]): Data whose hidden states give the mean.
        k (`int`): Number of dimensions per token; at most D.
    """
    total, count = None, 0
    for batch in data.batches:
        states = data.states(batch.to(data.device)).double()
        total = states.sum(0) if total is None else total + states.sum(0)
        count += len(states)
    if total is None:
        raise ValueError("The data has no hidden states to take neurons from. Pass data with at least one batch.")
    d_in = len(total)
    config = TopKSAEConfig(d_in=d_in, num_latents=2 * d_in, k=min(k, d_in), hookpoint=data.hookpoint)
    sae = TopKSAE(config).eval()
    unit = torch.eye(d_in)
    sae.W_enc.copy_(torch.cat([unit, -unit]))
    sae.W_dec.copy_(torch.cat([unit, -unit]))
    sae.b_enc.zero_()
    sae.b_dec.copy_((total / count).float())
    return sae.to(data.device)


@dataclass(frozen=True)
class DrawnLatents:
    """Latents drawn from each group between two widths.

    Args:
        widths (`list[int]`): Widths at which the groups end.
        groups (`list[list[int]]`): Latents drawn from each group.
        eligible (`list[int]`): Number of eligible latents in each group.
    """

    widths: list[int]
    groups: list[list[int]]
    eligible: list[int]

    @classmethod
    def of(cls, eligible: np.ndarray, widths: list[int], per_group: int, seed: int) -> "DrawnLatents":
        """Draw up to `per_group` of the latents of each group for which `eligible`, `(F,)` bool, holds."""
        generator = np.random.default_rng(seed)
        groups, counts = [], []
        for start, stop in zip([0, *widths[:-1]], widths, strict=True):
            members = np.flatnonzero(eligible[start:stop]) + start
            groups.append(sorted(generator.permutation(members)[:per_group].tolist()))
            counts.append(len(members))
        return cls(widths, groups, counts)

    @property
    def weights(self) -> dict[int, float]:
        """How many eligible latents each drawn one stands for."""
        return {
            latent: count / len(group)
            for group, count in zip(self.groups, self.eligible, strict=True)
            for latent in group
        }

    @property
    def latents(self) -> list[int]:
        """Latents of all groups, in order."""
        return [latent for group in self.groups for latent in group]

    def rows(
        self, values: Mapping[int, Sequence[float]], names: Sequence[str], resamples: int, seed: int
    ) -> list[dict[str, float | int | list[float] | None]]:
        """Return a row for each width, estimated from the groups below it.

        Args:
            values (`Mapping[int, Sequence[float]]`): The S scores of each latent.
            names (`Sequence[str]`): Names of the S scores.
            resamples (`int`): Number of bootstrap resamples of the intervals.
            seed (`int`): Seed of the bootstrap.

        Returns:
            `list[dict]`: `width`, `latents` (drawn), `explainable` (share that is eligible), each score's mean by its
            name, and its interval as `<name>_interval`: `None` where fewer than eight latents were drawn in all, or
            from a group of more. Zeros where nothing is eligible.
        """
        size = len(names)
        tables = [np.array([values[latent] for latent in group]).reshape(-1, size) for group in self.groups]
        generator = np.random.default_rng(seed)
        means = [table.mean(0) if len(table) else np.zeros(size) for table in tables]
        samples = [resampled_means(table, resamples, generator) for table in tables]
        rows = []
        for number, width in enumerate(self.widths, start=1):
            weights = np.array(self.eligible[:number], dtype=float)
            weights /= max(1.0, weights.sum())
            scores = np.tensordot(weights, means[:number], 1)
            intervals = middle_95(np.tensordot(weights, samples[:number], 1))
            drawn = sum(map(len, self.groups[:number]))
            groups = zip(self.groups[:number], self.eligible, strict=False)
            if drawn < _LEAST or any(len(group) < min(count, _LEAST) for group, count in groups):
                intervals = [None] * size  # so few say little about the spread of their group
            rows.append(
                {
                    "width": width,
                    "latents": drawn,
                    "explainable": sum(self.eligible[:number]) / width,
                    **dict(zip(names, scores.tolist(), strict=True)),
                    **{f"{name}_interval": bounds for name, bounds in zip(names, intervals, strict=True)},
                }
            )
        return rows
