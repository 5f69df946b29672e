"""Binary tasks for probes: labels of whole texts from any data set, labels of tokens from the text itself.

Shapes: N texts, C classes, B windows, S tokens in a window, T tasks.
"""

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...evaluation.data import HeldOut
from ...models.configuration_sae import nearest
from .token_properties import TokenReader, property_labels, property_names


_LEAST_TEXTS = 20  # of a class, so that some are left for both parts
_LEAST_TOKENS = 20
_UNLABELLED = -1  # of a `datasets.ClassLabel`


@dataclass
class LabelledTask:
    """Texts and their classes; a probe reads the mean of a text's activations.

    Args:
        name (`str`): Of the data set, for the report.
        texts (`list[str]`): N texts.
        labels (`Tensor` of shape `(N, C)`): bool; a column for each task.
        classes (`list[str]`): What is positive in each column. Two classes are one task, more are one-versus-rest.
    """

    name: str
    texts: list[str]
    labels: Tensor
    classes: list[str]

    def __post_init__(self):
        shape = (len(self.texts), len(self.classes))
        if self.labels.dtype != torch.bool or tuple(self.labels.shape) != shape:
            raise ValueError(
                f"`labels` of the task '{self.name}' must be bool and of shape {shape}, a column for each of "
                f"{self.classes}; got {self.labels.dtype} {tuple(self.labels.shape)}."
            )
        if any(not text.strip() for text in self.texts):
            raise ValueError(f"The task '{self.name}' has blank texts. Leave them and their labels out.")

    @property
    def names(self) -> list[str]:
        """The tasks' names, `"data set: class"`."""
        return [f"{self.name}: {label}" for label in self.classes]

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        text: str = "text",
        label: str = "label",
        name: str = "labels",
        max_texts: int = 1000,
        max_classes: int = 10,
        seed: int = 0,
    ) -> "LabelledTask":
        """Tasks from a data set with a column of texts and one of labels.

        Blank texts and missing labels are left out, and so are classes of fewer than 20 texts.

        Args:
            dataset (`datasets.Dataset`, a mapping of columns, or a sequence of rows as mappings): What is labelled.
            text (`str`, *optional*, defaults to `"text"`): Column of the texts.
            label (`str`, *optional*, defaults to `"label"`): Column of the labels: strings, integers or bools.
            name (`str`, *optional*, defaults to `"labels"`): For the report.
            max_texts (`int`, *optional*, defaults to 1000): A choice by `seed` where there are more, of as equal a
                number from each class as there is.
            max_classes (`int`, *optional*, defaults to 10): The most frequent, where there are more.
            seed (`int`, *optional*, defaults to 0): Of the choice.

        Raises:
            `ValueError`: for columns that are not there or of another kind, fewer than two classes, or too few texts.
        """
        texts, labels = _column(dataset, text), _column(dataset, label)
        if len(texts) != len(labels):
            raise ValueError(f"There are {len(texts)} texts in '{text}' and {len(labels)} labels in '{label}'.")
        names = _class_names(dataset, label)
        by_class: dict[str, list[str]] = {}
        for written, given in zip(texts, labels, strict=True):
            if written is None or given is None or given == "" or (names and given == _UNLABELLED):
                continue
            if not isinstance(written, str):
                raise ValueError(
                    f"Column '{text}' must hold texts, got a {type(written).__name__}. Name the column of the texts."
                )
            if isinstance(given, float) or not isinstance(given, str | int):
                raise ValueError(
                    f"Column '{label}' must hold classes (strings, integers or bools), got a {type(given).__name__}. "
                    "Name another column, or make classes of its numbers."
                )
            if written.strip():
                by_class.setdefault(names[given] if names else str(given), []).append(written)
        found = {label: len(texts) for label, texts in by_class.items()}
        by_class = {label: texts for label, texts in by_class.items() if len(texts) >= _LEAST_TEXTS}
        if len(by_class) < 2:
            raise ValueError(
                f"A probe needs two classes of at least {_LEAST_TEXTS} texts each; column '{label}' has "
                f"{_shortened(found)}. Give more texts, or name the column that tells them apart."
            )
        classes = sorted(by_class, key=lambda label: (-len(by_class[label]), label))[:max_classes]
        return cls._of_classes(name, {label: by_class[label] for label in sorted(classes)}, max_texts, seed)

    @classmethod
    def _of_classes(cls, name: str, by_class: dict[str, list[str]], max_texts: int, seed: int) -> "LabelledTask":
        if max_texts < _LEAST_TEXTS * len(by_class):
            raise ValueError(
                f"`max_texts` must leave {_LEAST_TEXTS} texts for each of the {len(by_class)} classes of '{name}', "
                f"{_LEAST_TEXTS * len(by_class)} in all; got {max_texts}."
            )
        left, texts, numbers = max_texts, [], []
        # The smallest class first: what it leaves is for the others.
        for done, label in enumerate(sorted(by_class, key=lambda label: (len(by_class[label]), label))):
            some = by_class[label]
            share = min(len(some), left // (len(by_class) - done))
            texts += random.Random(f"{seed} {label}").sample(some, share)
            numbers += [list(by_class).index(label)] * share
            left -= share
        labels = torch.tensor(numbers)[:, None] == torch.arange(len(by_class))
        classes = list(by_class)
        if len(classes) == 2:  # the second is the first's complement
            labels, classes = labels[:, 1:], classes[1:]
        return cls(name, texts, labels, classes)


def attribute_task(
    dataset: Any,
    columns: tuple[str, str],
    text: str = "text",
    name: str = "labels",
    max_texts: int = 2000,
    seed: int = 0,
) -> LabelledTask:
    """Two attributes of each text: texts with both, as equal a number of each combination as there is.

    Args:
        dataset (`datasets.Dataset`, a mapping of columns, or a sequence of rows as mappings): What is labelled.
        columns (`tuple[str, str]`): Two columns of labels, of two classes each.
        text (`str`, *optional*), name (`str`, *optional*), max_texts (`int`, *optional*, defaults to 2000), seed
            (`int`, *optional*): As in [`LabelledTask.from_dataset`].

    Raises:
        `ValueError`: for columns that are not there, a label that has not two classes, or a combination of fewer than
            20 texts.
    """
    texts, *labels = (_column(dataset, column) for column in (text, *columns))
    classes = []
    for column, of_texts in zip(columns, labels, strict=True):
        found = sorted({str(given) for given in of_texts if given not in (None, "")})
        if len(found) != 2:
            raise ValueError(
                f"Column '{column}' must have two classes, it has {len(found)}: {found[:5]}. Take rows of two of them."
            )
        classes.append(found)
    combined = {", ".join(pair): pair for pair in itertools.product(*classes)}
    both = [None if None in pair or "" in pair else ", ".join(map(str, pair)) for pair in zip(*labels, strict=True)]
    task = LabelledTask.from_dataset({"text": texts, "label": both}, name=name, max_texts=max_texts, seed=seed)
    if len(task.names) < len(combined):
        raise ValueError(
            f"Each combination of {' and '.join(columns)} needs {_LEAST_TEXTS} texts; those that have them are "
            f"{'; '.join(task.classes)}. Give more texts."
        )
    places = [[combined[label][at] == classes[at][1] for label in task.classes] for at in (0, 1)]
    attributes = torch.stack([task.labels[:, place].any(1) for place in places], 1)
    return LabelledTask(name, task.texts, attributes, [f"{c} {of[1]}" for c, of in zip(columns, classes, strict=True)])


def _column(dataset: Any, column: str) -> list:
    names = _columns(dataset)
    if column not in names:
        raise ValueError(f"The data set has no column '{column}'.{nearest(column, names)}")
    if isinstance(dataset, Sequence):
        return [row.get(column) for row in dataset]
    if isinstance(dataset, Mapping) or hasattr(dataset, "__len__"):
        return list(dataset[column])
    raise ValueError("A streamed data set cannot be chosen from. Take what is needed first, as a list of rows.")


def _columns(dataset: Any) -> list[str]:
    if getattr(dataset, "column_names", None) is not None and not isinstance(dataset.column_names, Mapping):
        return list(dataset.column_names)
    if isinstance(dataset, Mapping) and isinstance(next(iter(dataset.values()), None), list | tuple):
        return list(dataset)
    if isinstance(dataset, Sequence) and len(dataset) and isinstance(dataset[0], Mapping):
        return list(dict.fromkeys(name for row in dataset for name in row))
    splits = f" Choose one of its splits: {', '.join(dataset)}." if isinstance(dataset, Mapping) and dataset else ""
    raise ValueError(
        "Expected a `datasets.Dataset`, a dict of columns or a list of rows (dicts), got "
        f"{'an empty' if hasattr(dataset, '__len__') and not len(dataset) else 'a'} {type(dataset).__name__}.{splits}"
    )


def _class_names(dataset: Any, column: str) -> list[str] | None:
    """What the numbers of a `datasets.ClassLabel` stand for."""
    feature = (getattr(dataset, "features", None) or {}).get(column)
    return getattr(feature, "names", None)


def _shortened(found: Mapping[str, int]) -> str:
    first = ", ".join(f"{label!r} ({count})" for label, count in list(found.items())[:5])
    return f"{len(found)}: {first}{', ...' if len(found) > 5 else ''}" if found else "none"


@dataclass
class TokenTasks:
    """Labels of tokens; a probe reads the activations of one token.

    Args:
        names (`list[str]`): T tasks.
        labels (`list[Tensor]`): For each batch of the data `(B, S, T)`, bool; only kept positions count.
    """

    names: list[str]
    labels: list[Tensor]

    @classmethod
    def of_properties(cls, data: HeldOut, only: Iterable[str] | None = None) -> "TokenTasks":
        """Tasks that follow from the text alone: word classes, letters, quotes, sentences and so on.

        Args:
            data ([`HeldOut`]): With its tokenizer.
            only (`Iterable[str]`, *optional*): Names of properties; by default all of [`property_names`].

        Raises:
            `ValueError`: if there is no tokenizer, or no such property.
        """
        if data.tokenizer is None:
            raise ValueError("Token properties are read from the text: give the `HeldOut` its `tokenizer`.")
        names = property_names()
        chosen = names if only is None else list(only)
        unknown = [name for name in chosen if name not in names]
        if unknown or not chosen:
            raise ValueError(f"Expected some of the token properties {', '.join(names)}; got {unknown or 'none'}.")
        reader, places = TokenReader(data.tokenizer), [names.index(name) for name in chosen]
        return cls(chosen, [property_labels(batch, reader)[..., places] for batch in data.batches])

    def check(self, data: HeldOut) -> None:
        """Raises `ValueError` where these labels are not of the data's batches."""
        expected = [(*batch.input_ids.shape, len(self.names)) for batch in data.batches]
        found = [tuple(labels.shape) for labels in self.labels]
        if expected != found or any(labels.dtype != torch.bool for labels in self.labels):
            raise ValueError(
                f"Token labels must be bool and of shape (B, S, {len(self.names)}), one tensor for each batch of the "
                f"data: {expected[:3]}...; got {found[:3]}..."
            )


def usable_tasks(
    names: Sequence[str], labels: Tensor, parts: Sequence[Tensor], share: float
) -> tuple[list[int], dict[str, str]]:
    """Which tasks have enough of both classes, and why the others are left out.

    Args:
        names (`Sequence[str]`), labels (`Tensor` of shape `(N, T)`): The tasks.
        parts (`Sequence[Tensor]` of shape `(N,)`): Examples of each part of each split, bool.
        share (`float`): The least of the examples that either class must be.

    Returns:
        `(list[int], dict[str, str])`: Columns that are left, and a reason for each name that is not.
    """
    kept, skipped = [], {}
    total, positive = len(labels), labels.sum(0).tolist()
    rarest = torch.stack([torch.minimum(labels[part].sum(0), (~labels[part]).sum(0)) for part in parts]).amin(0)
    for number, name in enumerate(names):
        rare = min(positive[number], total - positive[number])
        if rare < share * total or rare < _LEAST_TOKENS:
            skipped[name] = (
                f"{positive[number]} of {total} examples are positive; either class must be at least {share:.1%} and "
                f"{_LEAST_TOKENS}"
            )
        elif not rarest[number]:
            skipped[name] = "a part of a split has examples of one class alone"
        else:
            kept.append(number)
    return kept, skipped
