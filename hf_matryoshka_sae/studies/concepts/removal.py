"""SCR and TPP: what linear probes lose and gain where a few latents are ablated from the hidden states.

Both are SAEBench's (Karvonen et al. 2025, arXiv 2503.09532). An audit (arXiv 2605.18229) found that they fail several
checks at their canonical settings: compare them with published figures, do not rank SAEs by them.

A latent i adds c_i u_i to the hidden state, where u_i is its decoder row at length 1; so nothing depends on how length
is shared between a latent's value and its row. For a probe of weight w its attribution is

    e_i = (mean of c_i over positive examples - mean of c_i over negative ones) * <w, u_i>

To ablate latents is to subtract what they add and to keep all else, also the SAE's error: a probe's log-odds then fall
by exactly the sum of c_i <w, u_i>, for means over a text's tokens too.

SCR (spurious correlation removal). Two attributes a and b of examples; a biased probe is fitted where they coincide.
To keep a, the N latents of largest |e_i| for b's own probe are ablated; A are accuracies as a probe of a:

    SCR = (A_ablated - A_base) / (A_clean - A_base),     0 where A_clean - A_base < 0.001

with A_base the biased probe's and A_clean that of a's own probe. Of the two directions (keep a, keep b) the one of
lower A_base counts; where they are equal, the mean of both.

TPP (targeted probe perturbation). C classes, a probe for each against the rest. With drop_i(j) what class j's probe
loses in balanced accuracy where the N latents of largest e_i for class i are ablated, among those that add more in the
class than outside and have e_i > 0,

    TPP = mean over i of (drop_i(i) - mean over j != i of drop_i(j))

Own probes are fitted to, and accuracies taken of, as many examples of each combination of a and b (SCR) or of each
class (TPP).

Shapes: N examples, D width of hidden states, F latents, C classes, K numbers of latents, T pairs or classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from ...common.checks import check_at_least
from ...common.distributed import processes
from ...common.intervals import CrossedBootstrap
from ...common.logs import progress
from ...common.report import Report
from ...evaluation.data import HeldOut
from ...evaluation.subjects import Dictionary
from ...models import SAEModel
from ...models.sparse_ops import LatentPairs, row_norms
from ..drawn_latents import (
    NEURONS,
    checked_dictionaries,
    mean_l0,
    neuron_dictionary,
    random_dictionaries,
)
from ..probing.columns import LatentColumns
from ..probing.examples import Examples, take_windows, text_batches, text_examples, token_examples
from ..probing.tasks import LabelledTask, TokenTasks
from ..probing.token_properties import WORD_CLASSES
from .probes import Concepts, class_of, combination, fit_coinciding, fit_exclusive
from .report import removal_report


LATENTS = (2, 5, 10, 20, 50)
"""Default numbers of latents that are ablated; SAEBench's headline is 20."""

# Default pairs of SCR have one property of each kind: what a token is, and where it stands.
_KINDS = ("begins a word", "continues a word", "punctuation", "determiner")
_PLACES = ("in double quotes", "in brackets", "seen before")

Task = LabelledTask | TokenTasks
Subjects = Mapping[str, Dictionary | SAEModel] | SAEModel


class Contributions(Dictionary):
    """A dictionary whose activations are the lengths of what latents add to the hidden state, `c_i` of `c_i u_i`."""

    def encode(self, x: Tensor) -> list[LatentPairs]:
        """Encode hidden states `(n, D)`, once for all widths or once for each."""
        return [pairs.with_values(self._lengths(pairs)) for pairs in super().encode(x)]

    @torch.no_grad()
    def _lengths(self, pairs: LatentPairs) -> Tensor:
        lengths = pairs.values
        if not self.sae.config.scale_by_decoder_norm:
            lengths = lengths * row_norms(self.sae.W_dec)[pairs.cols]
        return lengths if pairs.input_norm is None else lengths * pairs.input_norm[1][pairs.rows, 0]


def spurious_correlation_removal(
    data: HeldOut,
    subjects: Subjects,
    task: Task | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    widths: Sequence[int] | None = None,
    **options: Any,
) -> Report:
    """Measure SCR of dictionaries at each of their widths, beside random ones and the neurons.

    Args:
        data ([`HeldOut`]): The language model, the hookpoint and, for token tasks, the tokens. Under
            `torch.distributed` each process reads its share; all return the same.
        subjects (`Mapping[str, Dictionary or SAEModel]`, or one [`SAEModel`]): Dictionaries or SAEs, by name.
        task ([`LabelledTask`] or [`TokenTasks`], *optional*): Two or more attributes of each text (see
            [`attribute_task`]) or token; by default properties of tokens that follow from the text alone.
        pairs (`Sequence[tuple[str, str]]`, *optional*): Pairs of the task's attributes; by default all, of token
            properties one of what a token is with one of where it stands.
        widths (`Sequence[int]`, *optional*): Widths of subjects that are SAEs; by default their prefix widths.
        **options: `selection` (`str`, `"mask"`), see [`Dictionary`]; `latents` (`Sequence[int]`, 2, 5, 10, 20, 50):
            numbers of ablated latents; `baselines` (`bool`, `True`); `max_tokens` (`int`, 10,000) of token tasks;
            `splits` (`int`, 3): number of random splits; `test_share` (`float`, 0.3): share of the test part; `least`
            (`int`, 20) and `most` (`int`, 300): examples of each combination in a part of a split, combinations with
            fewer are left out; `context_length` (`int`): tokens of a text that are read; `max_pairs` (`int`, 100
            million): activations that a process may keep; `resamples` (`int`, 1000) of the bootstrap over pairs and
            splits; `seed` (`int`, 0); `show` (`bool`, `True`): whether to show progress bars.

    Returns:
        [`Report`]: A row for each subject and width.

    Raises:
        `ValueError`: for options out of range, unknown attributes, or no pair with enough examples.
    """
    return _measure("scr", data, subjects, task, pairs, widths, _Options(**options))


def targeted_probe_perturbation(
    data: HeldOut,
    subjects: Subjects,
    task: Task | None = None,
    widths: Sequence[int] | None = None,
    **options: Any,
) -> Report:
    """Measure TPP of dictionaries at each of their widths, beside random ones and the neurons.

    Args:
        data ([`HeldOut`]): The language model, the hookpoint and, for token tasks, the tokens. Under
            `torch.distributed` each process reads its share; all return the same.
        subjects (`Mapping[str, Dictionary or SAEModel]`, or one [`SAEModel`]): Dictionaries or SAEs, by name.
        task ([`LabelledTask`] or [`TokenTasks`], *optional*): Three classes or more; examples that do not have exactly
            one are left out. By default word classes of tokens.
        widths (`Sequence[int]`, *optional*): Widths of subjects that are SAEs; by default their prefix widths.
        **options: Options of [`spurious_correlation_removal`]; the bootstrap is over classes and splits, `least` and
            `most` are examples of a class.

    Returns:
        [`Report`]: A row for each subject and width.

    Raises:
        `ValueError`: for options out of range, or fewer than three classes with enough examples.
    """
    return _measure("tpp", data, subjects, task, None, widths, _Options(**options))


@dataclass
class _Options:
    selection: str = "mask"
    latents: Sequence[int] = LATENTS
    baselines: bool = True
    max_tokens: int = 10_000
    splits: int = 3
    test_share: float = 0.3
    least: int = 20
    most: int = 300
    context_length: int | None = None
    max_pairs: int = 100_000_000
    resamples: int = 1000
    seed: int = 0
    show: bool = True

    def __post_init__(self) -> None:
        counts = ("max_tokens", "splits", "least", "max_pairs", "resamples")
        check_at_least(1, **{name: getattr(self, name) for name in counts})
        check_at_least(self.least, most=self.most)
        if not 0 < self.test_share < 1:
            raise ValueError(f"`test_share` must lie between 0 and 1, got {self.test_share}.")
        if not self.latents or any(isinstance(n, bool) or n < 1 for n in self.latents):
            raise ValueError(f"`latents` must hold numbers of latents, each at least 1; got {list(self.latents)}.")
        self.latents = sorted(set(self.latents))


def _measure(
    metric: str,
    data: HeldOut,
    subjects: Subjects,
    task: Task | None,
    pairs: Sequence[tuple[str, str]] | None,
    widths: Sequence[int] | None,
    options: _Options,
) -> Report:
    options.show = options.show and processes()[0] == 0
    dictionaries = checked_dictionaries(data, subjects, widths, options.selection, Contributions)
    if task is None:
        task = TokenTasks.of_properties(data, [*_KINDS, *_PLACES] if metric == "scr" else WORD_CLASSES)
        pairs = list(product(_KINDS, _PLACES)) if metric == "scr" and pairs is None else pairs
    context_length = options.context_length
    if context_length is None:
        context_length = data.batches[0].input_ids.shape[1] if data.batches else 128
    if isinstance(task, TokenTasks):
        if not data.batches:
            raise ValueError("Token tasks need tokens, and the data has no batches. See `open_heldout`.")
        task.check(data)
        data, (task,) = take_windows(data, [task], options.max_tokens)
    elif options.baselines:
        data = replace(data, batches=text_batches(task, data, context_length)[0])
    if options.baselines:  # the neurons get the L0 of the first dictionary
        first = next(iter(dictionaries.values())).sae
        dictionaries |= random_dictionaries(dictionaries, data, options.seed)
        dictionaries[NEURONS] = Contributions(neuron_dictionary(data, max(1, round(mean_l0(first, data)))))
    if isinstance(task, TokenTasks):
        examples = token_examples(data, [task], dictionaries, options.max_pairs, options.show)
    else:
        examples = text_examples(data, task, dictionaries, context_length, options.max_pairs, options.show)
    seeds = range(options.seed * options.splits, (options.seed + 1) * options.splits)
    splits = {seed: examples.held_out(options.test_share, seed) for seed in seeds}
    tests = list(splits.values())
    if metric == "scr":
        chosen, skipped = _chosen_pairs(examples, pairs, tests, options.least)
    else:
        chosen, skipped = _chosen_classes(examples, tests, options.least)
    scores_by_split, facts = _scored_splits(examples, chosen, splits, dictionaries, options, metric.upper())
    about = {
        "metric": metric,
        "hookpoint": data.hookpoint,
        "examples": {examples.kind: len(examples.labels)},
        "selection": " and ".join(dict.fromkeys(dictionary.selection for dictionary in dictionaries.values())),
        "latents": list(options.latents),
        "splits": options.splits,
        "test_share": options.test_share,
        "tasks": {
            name: {key: sum(fact[key] for fact in of_splits) / len(of_splits) for key in of_splits[0]}
            for name, of_splits in facts.items()
        },
        "skipped": skipped,
        "seed": options.seed,
    }
    bootstrap = CrossedBootstrap(options.splits, len(facts), resamples=options.resamples, seed=options.seed)
    scores = {key: torch.stack(of_splits).numpy() for key, of_splits in scores_by_split.items()}
    return removal_report(scores, about, bootstrap)


def _scored_splits(
    examples: Examples,
    chosen: Mapping[str, list[int]] | list[int],
    splits: Mapping[int, Tensor],
    dictionaries: Mapping[str, Dictionary],
    options: _Options,
    title: str,
) -> tuple[dict[tuple[str, int], list[Tensor]], dict[str, list[dict[str, float]]]]:
    """Return a score for each split by subject and width, and the accuracies without ablation by pair or class."""
    scores: dict[tuple[str, int], list[Tensor]] = {}
    facts: dict[str, list[dict[str, float]]] = {}
    for seed, test in progress(splits.items(), desc=title, disable=not options.show, leave=False):
        generator = torch.Generator().manual_seed(seed)
        fitted = list(_fitted(examples, chosen, test, options.most, generator))
        for name, fact in (item for concepts in fitted for item in concepts.facts().items()):
            facts.setdefault(name, []).append(fact)
        for name, dictionary in dictionaries.items():
            each = [_scores(concepts, examples.latents[name], dictionary, options.latents) for concepts in fitted]
            for width, of_width in zip(dictionary.widths, zip(*each, strict=True), strict=True):
                scores.setdefault((name, width), []).append(torch.cat(of_width))
    return scores, facts


def _fitted(
    examples: Examples,
    chosen: Mapping[str, list[int]] | list[int],
    test: Tensor,
    most: int,
    generator: torch.Generator,
) -> Iterator[Concepts]:
    """Fit the probes of one split: those of each pair, or of all classes."""
    if isinstance(chosen, Mapping):
        for name, columns in chosen.items():
            yield fit_coinciding(name, examples.hidden, examples.labels[:, columns], test, most, generator)
    else:
        names, labels = [examples.names[column] for column in chosen], examples.labels[:, chosen]
        yield fit_exclusive(names, examples.hidden, labels, test, most, generator)


def _scores(
    concepts: Concepts, columns: list[LatentColumns], dictionary: Dictionary, latents: Sequence[int]
) -> list[Tensor]:
    """Return the scores `(T, K)` at each width."""
    rows, scores = dictionary.sae.W_dec, []
    for some, widths in zip(columns, dictionary.encodings, strict=True):
        scores += [concepts.scores(accuracies) for accuracies in concepts.accuracies(some, rows, widths, latents)]
    return scores


# Pairs and classes with enough examples


def _fewest(cells: Tensor, count: int, tests: Sequence[Tensor]) -> Tensor:
    """Count the examples of each cell in the part of any split that has fewest, `(count,)`."""
    parts = [part for test in tests for part in (test, ~test)]
    return torch.stack([torch.bincount(cells[part & (cells >= 0)], minlength=count) for part in parts]).amin(0)


def _chosen_pairs(
    examples: Examples, pairs: Sequence[tuple[str, str]] | None, tests: Sequence[Tensor], least: int
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return the label columns of each usable pair, and why others are left out."""
    names = examples.names
    pairs = list(combinations(names, 2)) if pairs is None else [tuple(pair) for pair in pairs]
    unknown = sorted({name for pair in pairs for name in pair if name not in names})
    if unknown or any(len(set(pair)) != 2 for pair in pairs):
        raise ValueError(f"`pairs` must hold pairs of two of {', '.join(names)}; got {unknown or pairs}.")
    usable, skipped = {}, {}
    for pair in dict.fromkeys(pairs):
        columns = [names.index(name) for name in pair]
        fewest = int(_fewest(combination(examples.labels[:, columns]), 4, tests).min())
        if fewest >= least:
            usable[" x ".join(pair)] = columns
        else:
            skipped[" x ".join(pair)] = f"{fewest} examples of one combination in a part of a split"
    if not usable:
        raise ValueError(
            f"No pair of attributes has {least} examples of each of its four combinations in both parts of a split "
            f"({skipped}). Give more text, other attributes, or a smaller `least`."
        )
    return usable, skipped


def _chosen_classes(examples: Examples, tests: Sequence[Tensor], least: int) -> tuple[list[int], dict[str, str]]:
    """Return the label columns of usable classes, and why others are left out."""
    fewest = _fewest(class_of(examples.labels), len(examples.names), tests).tolist()
    usable = [column for column, count in enumerate(fewest) if count >= least]
    skipped = {
        examples.names[column]: f"{count} examples in a part of a split"
        for column, count in enumerate(fewest)
        if count < least
    }
    if len(usable) < 3:
        raise ValueError(
            f"TPP needs three classes with {least} examples each in both parts of a split, and has "
            f"{[examples.names[column] for column in usable]} (left out: {skipped}). Give more text, a label of more "
            "classes, or a smaller `least`."
        )
    return usable, skipped
