"""Probes of concepts, and their accuracies where the latents that indicate a concept most are ablated.

Shapes: N examples, n test examples, D width of hidden states, F latents, R concepts to ablate, J scored probes,
T attributes or classes, P widths, K numbers of latents.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.distributed import reduce_sum
from ...evaluation.geometry import unit_rows
from ..probing.columns import LatentColumns
from ..probing.logistic import LogisticProbe, fit_logistic
from ..probing.sparse import shown_latents


_LEAST_GAP = 0.001


@dataclass
class Concepts(ABC):
    """Probes of one split: some rank the latents to ablate, others are scored after the ablation.

    Args:
        names (`list[str]`): Names of the pairs or classes that are scored.
        contrast (`Tensor` of shape `(N, R)`): Weights of the examples for each concept; those of positive examples add
            up to 1, those of negative ones to -1.
        own ([`LogisticProbe`]): Probe of each concept, by which latents are ranked.
        scored ([`LogisticProbe`]): The J probes that are scored.
        test (`Tensor` of shape `(n,)`): Numbers of the test examples.
        targets (`Tensor` of shape `(n, T)`): Labels of the test examples, bool.
        log_odds (`Tensor` of shape `(n, J)`): Log-odds of the scored probes on test examples without ablation.
    """

    names: list[str]
    contrast: Tensor
    own: LogisticProbe
    scored: LogisticProbe
    test: Tensor
    targets: Tensor
    log_odds: Tensor

    @abstractmethod
    def ranks(self, difference: Tensor, along: Tensor) -> Tensor:
        """Return how strongly latents indicate a concept, `(F, R)`; latents of 0 or less are never ablated.

        Args:
            difference (`Tensor` of shape `(F, R)`): Mean of what a latent adds where the concept is present, minus
                the mean elsewhere.
            along (`Tensor` of shape `(F, R)`): Products of the decoder's unit rows with the weight of the concept's
                own probe.
        """

    @abstractmethod
    def expected(self, concept: int) -> Tensor:
        """Return the labels `(n, J)`, bool, that the scored probes should predict where a concept is ablated."""

    @abstractmethod
    def scores(self, accuracies: Tensor) -> Tensor:
        """Return the reported scores `(T, K)` from accuracies `(R, K, J)` where each concept is ablated."""

    @abstractmethod
    def facts(self) -> dict[str, dict[str, float]]:
        """Return the accuracies of the probes without ablation, by name."""

    def accuracies(
        self, columns: LatentColumns, rows: Tensor, widths: Sequence[int], latents: Sequence[int]
    ) -> list[Tensor]:
        """Return the accuracies `(R, K, J)` at each width.

        Args:
            columns ([`LatentColumns`]): Length of what each latent adds; each process brings its own latents.
            rows (`Tensor` of shape `(F, D)`): Decoder rows, of any length.
            widths (`Sequence[int]`): The P widths.
            latents (`Sequence[int]`): The K numbers of ablated latents, ascending.
        """
        units = unit_rows(rows.double().cpu())[0]
        difference = reduce_sum(columns.sums(self.contrast))[0]
        ranks = self.ranks(difference, units @ self.own.weight.T)
        chosen = _strongest(ranks, widths, latents[-1])
        some, places = chosen.unique(return_inverse=True)
        added = shown_latents(columns, some)[self.test].double()
        per_length = units[some] @ self.scored.weight.T  # of latent -1 nothing is added
        accuracies = []
        for place in places:
            of_width = [
                torch.stack(
                    [
                        balanced_accuracy(self.log_odds - added[:, at] @ per_length[at], self.expected(concept))
                        for at in (order[:count] for count in latents)
                    ]
                )
                for concept, order in enumerate(place.T)
            ]
            accuracies.append(torch.stack(of_width))
        return accuracies


@dataclass
class Coinciding(Concepts):
    """SCR: attributes a and b, and one scored probe, fitted where they coincide. Concept 0 is b, concept 1 is a.

    Where concept 0 is ablated, the probe should predict a.

    Args:
        clean (`Tensor` of shape `(2,)`): Accuracies of the attributes' own probes.
    """

    clean: Tensor

    def ranks(self, difference: Tensor, along: Tensor) -> Tensor:
        """Return the sizes of the latents' attributions."""
        return (difference * along).abs()

    def expected(self, concept: int) -> Tensor:
        """Return the labels of the attribute that is kept."""
        return self.targets[:, concept, None]

    @property
    def base(self) -> Tensor:
        """Accuracies `(2,)` of the scored probe as a probe of a, and of b."""
        return balanced_accuracy(self.log_odds.expand(-1, 2), self.targets)

    @property
    def counted(self) -> Tensor:
        """Whether each direction, keep a and keep b, counts: that of the lower base accuracy, both where equal."""
        return self.base == self.base.min()

    def scores(self, accuracies: Tensor) -> Tensor:
        """Return the share of the lost accuracy that is restored, `(1, K)`."""
        gap = (self.clean - self.base)[:, None]
        gained = accuracies[..., 0] - self.base[:, None]
        restored = torch.where(gap < _LEAST_GAP, 0.0, gained / gap)
        return restored[self.counted].mean(0, keepdim=True)

    def facts(self) -> dict[str, dict[str, float]]:
        """Return accuracies of the biased and of the clean probe, and whether the first attribute was kept."""
        first = self.counted[0].double() / self.counted.sum()
        clean = self.clean[self.counted].mean()
        (name,) = self.names
        return {name: {"base": self.base.min().item(), "clean": clean.item(), "keeps_first": first.item()}}


@dataclass
class Exclusive(Concepts):
    """TPP: classes of which an example has one, with a probe for each class against the rest."""

    def ranks(self, difference: Tensor, along: Tensor) -> Tensor:
        """Return the attributions of latents that are larger inside the class."""
        return difference.clamp(min=0) * along  # a latent that is larger elsewhere indicates another class

    def expected(self, concept: int) -> Tensor:  # noqa: ARG002 (the same whatever concept is ablated)
        """Return the labels of all classes."""
        return self.targets

    def scores(self, accuracies: Tensor) -> Tensor:
        """Return the intended loss of accuracy less the mean loss of the other classes, `(T, K)`."""
        drops = balanced_accuracy(self.log_odds, self.targets) - accuracies  # (R, K, J), R and J being the classes
        intended = drops.diagonal(dim1=0, dim2=2).T
        others = (drops.sum(-1) - intended) / (len(drops) - 1)
        return intended - others

    def facts(self) -> dict[str, dict[str, float]]:
        """Return the accuracy of each class's probe."""
        accuracies = balanced_accuracy(self.log_odds, self.targets).tolist()
        return {name: {"accuracy": accuracy} for name, accuracy in zip(self.names, accuracies, strict=True)}


def fit_coinciding(
    name: str, hidden: Tensor, attributes: Tensor, test: Tensor, most: int, generator: torch.Generator
) -> Coinciding:
    """Fit the probes of SCR on one split.

    Args:
        name (`str`): Name of the pair.
        hidden (`Tensor` of shape `(N, D)`): Hidden states.
        attributes (`Tensor` of shape `(N, 2)`): Attributes a and b, bool.
        test (`Tensor` of shape `(N,)`): bool; examples of the test part.
        most (`int`): Largest number of examples of each combination in either part.
        generator (`torch.Generator`): Generator of the choice, where there are more.
    """
    train, test_part = _both_parts(combination(attributes), 4, test, most, generator)
    clean = fit_logistic(hidden[train], attributes[train])
    coinciding = attributes[train, 0] == attributes[train, 1]
    biased = fit_logistic(hidden[train][coinciding], attributes[train, :1][coinciding])
    return Coinciding(
        [name],
        _contrast(attributes.flip(1), train),
        LogisticProbe(clean.weight.flip(0), clean.bias.flip(0)),
        biased,
        test_part,
        attributes[test_part],
        biased.scores(hidden[test_part]),
        balanced_accuracy(clean.scores(hidden[test_part]), attributes[test_part]),
    )


def fit_exclusive(
    names: list[str], hidden: Tensor, labels: Tensor, test: Tensor, most: int, generator: torch.Generator
) -> Exclusive:
    """Fit the probes of TPP on one split.

    Args:
        names (`list[str]`): Names of the classes.
        hidden (`Tensor` of shape `(N, D)`): Hidden states.
        labels (`Tensor` of shape `(N, T)`): bool; the class of each example.
        test (`Tensor` of shape `(N,)`): bool; examples of the test part.
        most (`int`): Largest number of examples of each class in either part.
        generator (`torch.Generator`): Generator of the choice, where there are more.
    """
    train, test_part = _both_parts(class_of(labels), labels.shape[1], test, most, generator)
    probe = fit_logistic(hidden[train], labels[train])
    return Exclusive(
        names, _contrast(labels, train), probe, probe, test_part, labels[test_part], probe.scores(hidden[test_part])
    )


def combination(attributes: Tensor) -> Tensor:
    """Return the number, 0 to 3, of the combination of two attributes `(N, 2)` that each example has, `(N,)`."""
    return 2 * attributes[:, 0].long() + attributes[:, 1].long()


def class_of(labels: Tensor) -> Tensor:
    """Return the class of each example from `(N, T)` bool, -1 for those with none or with several."""
    return torch.where(labels.sum(1) == 1, labels.long().argmax(1), -1)


def balanced_accuracy(log_odds: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of the shares of positives and of negatives that are predicted right, `(J,)`, from `(n, J)`."""
    predicted = log_odds > 0
    hits = (predicted & targets).sum(0).double() / targets.sum(0)
    rejections = (~predicted & ~targets).sum(0).double() / (~targets).sum(0)
    return (hits + rejections) / 2


def _both_parts(
    cells: Tensor, count: int, test: Tensor, most: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose examples of the train and of the test part, as many of each cell."""
    return tuple(_equal(torch.where(part, cells, -1), count, most, generator) for part in (~test, test))


def _equal(cells: Tensor, count: int, most: int, generator: torch.Generator) -> Tensor:
    members = [(cells == cell).nonzero()[:, 0] for cell in range(count)]
    size = min(most, *map(len, members))
    assert size, "pairs and classes without examples are left out before"
    sampled = [some[torch.randperm(len(some), generator=generator)[:size]] for some in members]
    return torch.cat(sampled).sort().values


def _contrast(targets: Tensor, part: Tensor) -> Tensor:
    """Return weights `(N, R)` whose sum over examples of a part is the mean of positives minus that of negatives."""
    positive = targets[part].double()
    weights = torch.zeros(targets.shape, dtype=torch.float64)
    weights[part] = positive / positive.sum(0) - (1 - positive) / (1 - positive).sum(0)
    return weights


def _strongest(ranks: Tensor, widths: Sequence[int], most: int) -> Tensor:
    """Return the latents `(P, most, R)` of largest rank among the first of each width; -1 where no rank is above 0."""
    chosen = torch.full((len(widths), most, ranks.shape[1]), -1)
    for p, width in enumerate(widths):
        # The sort is stable, so that of equal latents the first win, whatever the width.
        order = ranks[:width].sort(dim=0, descending=True, stable=True)
        latents = torch.where(order.values > 0, order.indices, -1)[:most]
        chosen[p, : len(latents)] = latents
    return chosen
