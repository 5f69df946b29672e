"""Probes of concepts, and their accuracies where the latents that speak most for a concept are taken out.

Shapes: N examples, n test examples, D width of hidden states, F latents, R concepts to take out, J probes that are
scored, T attributes or classes, P widths, K numbers of latents.
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
    """Probes of one split: what to take out is ranked by some, what that does is read off others.

    Args:
        names (`list[str]`): What is scored.
        contrast (`Tensor` of shape `(N, R)`): Over positive examples of a concept minus over negative ones: weights of
            which the positive ones add up to 1, and the negative ones to -1.
        own ([`LogisticProbe`]): The probe of each concept, that latents are ranked by.
        scored ([`LogisticProbe`]): J probes.
        test (`Tensor` of shape `(n,)`): Numbers of examples.
        targets (`Tensor` of shape `(n, T)`): bool.
        log_odds (`Tensor` of shape `(n, J)`): Of the scored probes on the test examples as they are.
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
        """How strongly latents speak for a concept, `(F, R)`; what is not above 0 is never taken out.

        Args:
            difference (`Tensor` of shape `(F, R)`): By how much more a latent adds where the concept is there.
            along (`Tensor` of shape `(F, R)`): The decoder's unit rows times the weight of the concept's own probe.
        """

    @abstractmethod
    def told(self, concept: int) -> Tensor:
        """What the scored probes should tell where a concept is taken out, `(n, J)` bool."""

    @abstractmethod
    def scores(self, accuracies: Tensor) -> Tensor:
        """What is reported, `(T, K)`, from accuracies `(R, K, J)` where each concept is taken out."""

    @abstractmethod
    def facts(self) -> dict[str, dict[str, float]]:
        """What the probes are worth with nothing taken out, by name."""

    def accuracies(
        self, columns: LatentColumns, rows: Tensor, widths: Sequence[int], latents: Sequence[int]
    ) -> list[Tensor]:
        """Accuracies `(R, K, J)` at each width.

        Args:
            columns ([`LatentColumns`]): What each latent adds, as a length; of several processes each brings its own.
            rows (`Tensor` of shape `(F, D)`): The decoder, of any lengths.
            widths (`Sequence[int]`), latents (`Sequence[int]`): P widths; K numbers, ascending.
        """
        units = unit_rows(rows.double().cpu())[0]
        difference = reduce_sum(columns.sums(self.contrast))[0]
        ranks = self.ranks(difference, units @ self.own.weight.T)
        chosen = _strongest(ranks, widths, latents[-1])
        some, places = chosen.unique(return_inverse=True)
        added = shown_latents(columns, some)[self.test].double()
        per_length = units[some] @ self.scored.weight.T  # of latent -1 nothing is added
        found = []
        for place in places:
            of_width = [
                torch.stack(
                    [
                        balanced_accuracy(self.log_odds - added[:, at] @ per_length[at], self.told(concept))
                        for at in (order[:count] for count in latents)
                    ]
                )
                for concept, order in enumerate(place.T)
            ]
            found.append(torch.stack(of_width))
        return found


@dataclass
class Coinciding(Concepts):
    """SCR: attributes a and b, and one scored probe, fitted where they coincide. Concept 0 is b: without it a is told.

    Args:
        clean (`Tensor` of shape `(2,)`): Accuracies of the attributes' own probes.
    """

    clean: Tensor

    def ranks(self, difference: Tensor, along: Tensor) -> Tensor:
        return (difference * along).abs()

    def told(self, concept: int) -> Tensor:
        return self.targets[:, concept, None]

    @property
    def base(self) -> Tensor:
        """Accuracies `(2,)` of the scored probe at telling a, and b."""
        return balanced_accuracy(self.log_odds.expand(-1, 2), self.targets)

    @property
    def counted(self) -> Tensor:
        """The directions, keep a and keep b, of the lower base accuracy: one, or of equal ones both."""
        return self.base == self.base.min()

    def scores(self, accuracies: Tensor) -> Tensor:
        gap = (self.clean - self.base)[:, None]
        gained = accuracies[..., 0] - self.base[:, None]
        restored = torch.where(gap < _LEAST_GAP, 0.0, gained / gap)
        return restored[self.counted].mean(0, keepdim=True)

    def facts(self) -> dict[str, dict[str, float]]:
        first = self.counted[0].double() / self.counted.sum()
        clean = self.clean[self.counted].mean()
        (name,) = self.names
        return {name: {"base": self.base.min().item(), "clean": clean.item(), "keeps_first": first.item()}}


@dataclass
class Exclusive(Concepts):
    """TPP: classes of which an example has one, each told from the rest."""

    def ranks(self, difference: Tensor, along: Tensor) -> Tensor:
        return difference.clamp(min=0) * along  # what is louder elsewhere speaks for another class

    def told(self, concept: int) -> Tensor:
        return self.targets

    def scores(self, accuracies: Tensor) -> Tensor:
        drops = balanced_accuracy(self.log_odds, self.targets) - accuracies  # (R, K, J), R and J being the classes
        intended = drops.diagonal(dim1=0, dim2=2).T
        others = (drops.sum(-1) - intended) / (len(drops) - 1)
        return intended - others

    def facts(self) -> dict[str, dict[str, float]]:
        accuracies = balanced_accuracy(self.log_odds, self.targets).tolist()
        return {name: {"accuracy": accuracy} for name, accuracy in zip(self.names, accuracies, strict=True)}


def fit_coinciding(
    name: str, hidden: Tensor, attributes: Tensor, test: Tensor, most: int, generator: torch.Generator
) -> Coinciding:
    """The probes of SCR on one split.

    Args:
        name (`str`): Of the pair.
        hidden (`Tensor` of shape `(N, D)`), attributes (`Tensor` of shape `(N, 2)`): bool; a and b.
        test (`Tensor` of shape `(N,)`): bool; examples of the test part.
        most (`int`): Examples of each combination in either part.
        generator (`torch.Generator`): Of the choice, where there are more.
    """
    train, held = _both_parts(combination(attributes), 4, test, most, generator)
    clean = fit_logistic(hidden[train], attributes[train])
    coinciding = attributes[train, 0] == attributes[train, 1]
    biased = fit_logistic(hidden[train][coinciding], attributes[train, :1][coinciding])
    return Coinciding(
        [name],
        _contrast(attributes.flip(1), train),
        LogisticProbe(clean.weight.flip(0), clean.bias.flip(0)),
        biased,
        held,
        attributes[held],
        biased.scores(hidden[held]),
        balanced_accuracy(clean.scores(hidden[held]), attributes[held]),
    )


def fit_exclusive(
    names: list[str], hidden: Tensor, labels: Tensor, test: Tensor, most: int, generator: torch.Generator
) -> Exclusive:
    """The probes of TPP on one split; `labels` are `(N, T)` bool, other arguments as in [`fit_coinciding`]."""
    train, held = _both_parts(class_of(labels), labels.shape[1], test, most, generator)
    probe = fit_logistic(hidden[train], labels[train])
    return Exclusive(names, _contrast(labels, train), probe, probe, held, labels[held], probe.scores(hidden[held]))


def combination(attributes: Tensor) -> Tensor:
    """Which of the four combinations of two attributes `(N, 2)` an example has, `(N,)`."""
    return 2 * attributes[:, 0].long() + attributes[:, 1].long()


def class_of(labels: Tensor) -> Tensor:
    """The class of each example, -1 for those with none or with several, from `(N, T)` bool."""
    return torch.where(labels.sum(1) == 1, labels.long().argmax(1), -1)


def balanced_accuracy(log_odds: Tensor, targets: Tensor) -> Tensor:
    """The mean of the shares of positives and of negatives that are told right, `(J,)`, from `(n, J)` each."""
    said = log_odds > 0
    hits = (said & targets).sum(0).double() / targets.sum(0)
    rejections = (~said & ~targets).sum(0).double() / (~targets).sum(0)
    return (hits + rejections) / 2


def _both_parts(
    cells: Tensor, count: int, test: Tensor, most: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Examples of the train and of the test part, as many of each cell."""
    return tuple(_equal(torch.where(part, cells, -1), count, most, generator) for part in (~test, test))


def _equal(cells: Tensor, count: int, most: int, generator: torch.Generator) -> Tensor:
    members = [(cells == cell).nonzero()[:, 0] for cell in range(count)]
    size = min(most, *map(len, members))
    assert size, "pairs and classes without examples are left out before"
    drawn = [some[torch.randperm(len(some), generator=generator)[:size]] for some in members]
    return torch.cat(drawn).sort().values


def _contrast(targets: Tensor, part: Tensor) -> Tensor:
    """Weights `(N, R)` whose sum over examples of a part is the mean of positives minus that of negatives."""
    positive = targets[part].double()
    weights = torch.zeros(targets.shape, dtype=torch.float64)
    weights[part] = positive / positive.sum(0) - (1 - positive) / (1 - positive).sum(0)
    return weights


def _strongest(ranks: Tensor, widths: Sequence[int], most: int) -> Tensor:
    """The latents `(P, most, R)` of largest rank among the first of each width; -1 where no rank is above 0."""
    chosen = torch.full((len(widths), most, ranks.shape[1]), -1)
    for p, width in enumerate(widths):
        # A stable sort: of equal ones the first latents, whatever the width.
        order = ranks[:width].sort(dim=0, descending=True, stable=True)
        found = torch.where(order.values > 0, order.indices, -1)[:most]
        chosen[p, : len(found)] = found
    return chosen
