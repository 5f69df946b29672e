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


_LEAST_TEXTS = 20  # texts of a class, so that both parts of a split have some
_LEAST_TOKENS = 20
_UNLABELLED = -1  # value of a `datasets.ClassLabel`


@dataclass
class LabelledTask:
    """Texts and their classes; a probe reads the mean of a text's activations.

    Args:
        name (`str`): Name of the data set, for the report.
        texts (`list[str]`): The N texts.
        labels (`Tensor` of shape `(N, C)`): Labels, bool; one column for each task.
        classes (`list[str]`): Positive class of each column. Two classes are one task, more are one-versus-rest.
    """

    name: str
    texts: list[str]
    labels: Tensor
    classes: list[str]

    def __post_init__(self) -> None:
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
        """Names of the tasks, `"data set: class"`."""
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
        """Make tasks from a data set with a column of texts and one of labels.

        Blank texts, missing labels and classes of fewer than 20 texts are left out.

        Args:
            dataset (`datasets.Dataset`, a mapping of columns, or a sequence of rows as mappings): Labelled texts.
            text (`str`, *optional*, defaults to `"text"`): Column of the texts.
            label (`str`, *optional*, defaults to `"label"`): Column of the labels: strings, integers or bools.
            name (`str`, *optional*, defaults to `"labels"`): Name of the data set in the report.
            max_texts (`int`, *optional*, defaults to 1000): Largest number of texts; where there are more they are
                sampled, as evenly from the classes as possible.
            max_classes (`int`, *optional*, defaults to 10): Largest number of classes; the most frequent are kept.
            seed (`int`, *optional*, defaults to 0): Seed of the sample.

        Raises:
            `ValueError`: for columns that are missing or of another kind, fewer than two classes, or too few texts.
        """
        texts, labels = _column(dataset, text), _column(dataset, label)
        if len(texts) != len(labels):
            raise ValueError(f"There are {len(texts)} texts in '{text}' and {len(labels)} labels in '{label}'.")
        names = _class_names(dataset, label)
        by_class: dict[str, list[str]] = {}
        for content, value in zip(texts, labels, strict=True):
            if content is None or value is None or value == "" or (names and value == _UNLABELLED):
                continue
            if not isinstance(content, str):
                raise ValueError(
                    f"Column '{text}' must hold texts, got a {type(content).__name__}. Name the column of the texts."
                )
            if isinstance(value, float) or not isinstance(value, str | int):
                raise ValueError(
                    f"Column '{label}' must hold classes (strings, integers or bools), got a {type(value).__name__}. "
                    "Name another column, or make classes of its numbers."
                )
            if content.strip():
                by_class.setdefault(names[value] if names else str(value), []).append(content)
        counts = {label: len(texts) for label, texts in by_class.items()}
        by_class = {label: texts for label, texts in by_class.items() if len(texts) >= _LEAST_TEXTS}
        if len(by_class) < 2:
            raise ValueError(
                f"A probe needs two classes of at least {_LEAST_TEXTS} texts each; column '{label}' has "
                f"{_shortened(counts)}. Give more texts, or name the column that tells them apart."
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
        room, texts, numbers = max_texts, [], []
        # The smallest class comes first, so that the room it leaves goes to the others.
        for number, label in enumerate(sorted(by_class, key=lambda label: (len(by_class[label]), label))):
            some = by_class[label]
            share = min(len(some), room // (len(by_class) - number))
            texts += random.Random(f"{seed} {label}").sample(some, share)
            numbers += [list(by_class).index(label)] * share
            room -= share
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
    """Make a task of two attributes of each text, with combinations as evenly represented as possible.

    Args:
        dataset (`datasets.Dataset`, a mapping of columns, or a sequence of rows as mappings): Labelled texts.
        columns (`tuple[str, str]`): Two columns of labels, of two classes each.
        text (`str`, *optional*, defaults to `"text"`): Column of the texts.
        name (`str`, *optional*, defaults to `"labels"`): Name of the data set in the report.
        max_texts (`int`, *optional*, defaults to 2000): Largest number of texts.
        seed (`int`, *optional*, defaults to 0): Seed of the sample, where there are more.

    Raises:
        `ValueError`: for columns that are missing, a label that does not have two classes, or a combination of fewer
            than 20 texts.
    """
    texts, *labels = (_column(dataset, column) for column in (text, *columns))
    classes = []
    for column, of_texts in zip(columns, labels, strict=True):
        values = sorted({str(value) for value in of_texts if value not in (None, "")})
        if len(values) != 2:
            raise ValueError(
                f"Column '{column}' must have two classes, got {len(values)}: {values[:5]}. Take rows of two of them."
            )
        classes.append(values)
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
    raise ValueError("A streamed data set cannot be sampled. Take the rows that are needed first, as a list.")


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
    """Return the class names of a `datasets.ClassLabel`; `None` for other columns."""
    feature = (getattr(dataset, "features", None) or {}).get(column)
    return getattr(feature, "names", None)


def _shortened(counts: Mapping[str, int]) -> str:
    first = ", ".join(f"{label!r} ({count})" for label, count in list(counts.items())[:5])
    return f"{len(counts)}: {first}{', ...' if len(counts) > 5 else ''}" if counts else "none"


@dataclass
class TokenTasks:
    """Labels of tokens; a probe reads the activations of one token.

    Args:
        names (`list[str]`): Names of the T tasks.
        labels (`list[Tensor]`): Labels `(B, S, T)` of each batch of the data, bool; only kept positions count.
    """

    names: list[str]
    labels: list[Tensor]

    @classmethod
    def of_properties(cls, data: HeldOut, only: Iterable[str] | None = None) -> "TokenTasks":
        """Make tasks that follow from the text alone: word classes, letters, quotes, sentences and so on.

        Args:
            data ([`HeldOut`]): Data with its tokenizer.
            only (`Iterable[str]`, *optional*): Names of properties; by default all of [`property_names`].

        Raises:
            `ValueError`: if there is no tokenizer, or no such property.
        """
        if data.tokenizer is None:
            raise ValueError("Token properties are read from the text: pass the `tokenizer` to `HeldOut`.")
        names = property_names()
        chosen = names if only is None else list(only)
        unknown = [name for name in chosen if name not in names]
        if unknown or not chosen:
            raise ValueError(f"Expected some of the token properties {', '.join(names)}; got {unknown or 'none'}.")
        reader, places = TokenReader(data.tokenizer), [names.index(name) for name in chosen]
        return cls(chosen, [property_labels(batch, reader)[..., places] for batch in data.batches])

    def check(self, data: HeldOut) -> None:
        """Raise `ValueError` where these labels do not fit the data's batches."""
        expected = [(*batch.input_ids.shape, len(self.names)) for batch in data.batches]
        shapes = [tuple(labels.shape) for labels in self.labels]
        if expected != shapes or any(labels.dtype != torch.bool for labels in self.labels):
            raise ValueError(
                f"Token labels must be bool and of shape (B, S, {len(self.names)}), one tensor for each batch of the "
                f"data: {expected[:3]}...; got {shapes[:3]}..."
            )


def usable_tasks(
    names: Sequence[str], labels: Tensor, parts: Sequence[Tensor], share: float
) -> tuple[list[int], dict[str, str]]:
    """Return which tasks have enough examples of both classes, and why the others are left out.

    Args:
        names (`Sequence[str]`): Names of the T tasks.
        labels (`Tensor` of shape `(N, T)`): Labels, bool.
        parts (`Sequence[Tensor]` of shape `(N,)`): Examples of each part of each split, bool.
        share (`float`): Least share of the examples that either class must have.

    Returns:
        `tuple[list[int], dict[str, str]]`: Columns of the usable tasks, and a reason for each other name.
    """
    usable, skipped = [], {}
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
            usable.append(number)
    return usable, skipped
