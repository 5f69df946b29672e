"""Fit probes to examples and score them: single latents, a few latents, all channels of the hidden state.

Shapes: N examples, D width of hidden states, F latents, T tasks, P widths, K values of k, S splits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...common.distributed import reduce_sum
from ...common.logs import progress
from ...evaluation.subjects import Dictionary
from .columns import LatentColumns, own_latents
from .examples import Examples
from .newton import Probes, class_weights, cross_entropy, fit_probes
from .sparse import classifier_scores, dense_probes, shown_latents, sparse_probes


CHANNELS, ALL_CHANNELS = "hidden-state channels", "all channels together"
_VALIDATION = 10**9  # first seed of validation parts, beyond the seeds of splits


@dataclass
class Scores:
    """Scores of one subject on some tasks, at one width; `k_sparse` is `(S, K, T, 3)`, the others `(S, T)`."""

    loss: list[Tensor] = field(default_factory=list)
    train_loss: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    k_sparse: list[Tensor] = field(default_factory=list)


Key = tuple[str, int]


@dataclass
class Probing:
    """Settings of the probes that are fitted to examples.

    Args:
        ridge (`float`, *optional*): Penalty of [`fit_probes`]; by default one over the number of train examples.
        ks (`Sequence[int]`): Numbers of latents of k-sparse probes.
        channels (`bool`): Whether to probe the hidden state's channels too.
        show (`bool`): Whether to show progress bars.
    """

    ridge: float | None
    ks: Sequence[int]
    channels: bool
    show: bool

    def run(
        self, examples: Examples, tests: Sequence[Tensor], dictionaries: Mapping[str, Dictionary]
    ) -> dict[Key, Scores]:
        """Return the scores of each subject at each width.

        Args:
            examples ([`Examples`]): Latents, hidden states and labels.
            tests (`Sequence[Tensor]`): Test part `(N,)` of each split, bool.
            dictionaries (`Mapping[str, Dictionary]`): Dictionaries whose latents the examples hold.
        """
        results: dict[Key, Scores] = {}
        work: list[tuple[str, LatentColumns, list[int]]] = []
        for name, dictionary in dictionaries.items():
            each = zip(examples.latents[name], dictionary.encodings, strict=True)
            work += [(name, columns, widths) for columns, widths in each]
        if self.channels:
            d_in = examples.hidden.shape[1]
            own, alone = own_latents(d_in), torch.zeros_like(examples.hidden)
            alone[:, own] = examples.hidden[:, own]
            work.append((CHANNELS, LatentColumns.of_dense(alone), [d_in]))
        total = len(tests) * sum(len(own_latents(columns.num_latents)) for _, columns, _ in work)
        with progress(total=total, desc="probes: latents", disable=not self.show, leave=False) as bar:
            for name, columns, widths in work:
                self._of_columns(name, columns, widths, examples.labels, tests, results, bar)
        if self.channels:
            self._all_channels(examples, tests, results)
        return results

    def _of_columns(
        self,
        name: str,
        columns: LatentColumns,
        widths: Sequence[int],
        labels: Tensor,
        tests: Sequence[Tensor],
        results: dict[Key, Scores],
        bar: progress,
    ) -> None:
        own, probes = own_latents(columns.num_latents), None
        for test in tests:
            ridge = 1 / int((~test).sum()) if self.ridge is None else self.ridge
            train = columns.among(~test).select(own)
            probes = fit_probes(train, labels, class_weights(labels, ~test), ridge, probes, bar.update)
            everywhere = _in_all_processes(probes, own, columns.num_latents)
            chosen = _best(everywhere.loss, widths)
            losses = _test_losses(columns, everywhere, chosen, labels, class_weights(labels, test))
            scores = sparse_probes(columns, labels, test, widths, self.ks) if self.ks else None
            for p, width in enumerate(widths):
                at = results.setdefault((name, width), Scores())
                at.loss.append(losses[p])
                at.train_loss.append(everywhere.loss.gather(0, chosen[p][None])[0])
                at.latents.append(chosen[p])
                if scores is not None:
                    at.k_sparse.append(scores[p])

    def _all_channels(self, examples: Examples, tests: Sequence[Tensor], results: dict[Key, Scores]) -> None:
        labels = examples.labels
        at = results.setdefault((ALL_CHANNELS, examples.hidden.shape[1]), Scores())
        for number, test in enumerate(
            progress(tests, desc="probes: all channels", disable=not self.show, leave=False)
        ):
            validation = ~test & examples.held_out(test.double().mean().item(), _VALIDATION + number)
            scores = dense_probes(examples.hidden, labels, test, validation)
            at.loss.append(cross_entropy(scores, labels, class_weights(labels, test)))
            at.train_loss.append(cross_entropy(scores, labels, class_weights(labels, ~test)))
            tasks = range(labels.shape[1])
            of_tasks = [classifier_scores(scores[test, task], labels[test, task]) for task in tasks]
            at.k_sparse.append(torch.stack(of_tasks)[None])


def _in_all_processes(probes: Probes, own: Tensor, num_latents: int) -> Probes:
    """Return the probes of all latents, of which each process has fitted some."""
    tensors = []
    for part in (probes.weight, probes.bias, probes.loss):
        whole = part.new_zeros(num_latents, part.shape[1])
        whole[own] = part
        tensors.append(reduce_sum(whole)[0])
    return Probes(*tensors)


def _best(loss: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the latent of least loss among the first of each width, `(P, T)`; of equal ones the first."""
    # Not argmin, which may return any of several equal ones.
    return torch.stack([loss[:width].sort(dim=0, stable=True).indices[0] for width in widths])


def _test_losses(columns: LatentColumns, probes: Probes, chosen: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the losses `(P, T)` of the chosen latents on weighted examples."""
    latents, places = chosen.unique(return_inverse=True)
    x = shown_latents(columns, latents).double()
    losses = []
    for some, place in zip(chosen, places, strict=True):
        scores = x[:, place] * probes.weight.gather(0, some[None]) + probes.bias.gather(0, some[None])
        losses.append(cross_entropy(scores, labels, weights))
    return torch.stack(losses)
