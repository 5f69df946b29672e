"""Tasks from labelled data, from tokens, and those that are left out."""

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_matryoshka_sae.activations import TokenBatch
from hf_matryoshka_sae.assets import load_embedded_lm
from hf_matryoshka_sae.evaluation import HeldOut
from hf_matryoshka_sae.studies.probing.tasks import LabelledTask, TokenTasks, usable_tasks
from hf_matryoshka_sae.studies.probing.token_properties import property_names


def columns(**counts: int) -> dict[str, list]:
    found = [(f"{label} {number}", label) for label, count in counts.items() for number in range(count)]
    return {"text": [text for text, _ in found], "label": [label for _, label in found]}


def test_two_classes_are_one_task():
    task = LabelledTask.from_dataset(columns(bad=30, good=25), name="film")
    assert task.names == ["film: good"]
    assert [text.startswith("good") for text in task.texts] == task.labels[:, 0].tolist()
    assert len(task.texts) == 55


def test_more_classes_are_one_versus_rest_and_small_ones_are_left_out():
    task = LabelledTask.from_dataset(columns(b=30, a=40, d=19, c=20), max_classes=2)
    assert task.classes == ["b"] and len(task.texts) == 70
    task = LabelledTask.from_dataset(columns(b=30, a=40, d=19, c=20))
    assert task.classes == ["a", "b", "c"]
    assert torch.equal(task.labels.sum(1), torch.ones(90, dtype=torch.int64))
    for number, label in enumerate("abc"):
        assert [text[0] == label for text in task.texts] == task.labels[:, number].tolist()


def test_classes_are_drawn_as_equal_as_they_come():
    data = columns(a=500, b=25, c=300)
    task = LabelledTask.from_dataset(data, max_texts=225, seed=3)
    assert task.labels.sum(0).tolist() == [100, 25, 100]
    again = LabelledTask.from_dataset(data, max_texts=225, seed=3)
    other = LabelledTask.from_dataset(data, max_texts=225, seed=4)
    assert again.texts == task.texts != other.texts


def test_every_kind_of_data_set_gives_the_same_task():
    data = columns(no=20, yes=20)
    rows = [{"text": text, "label": label} for text, label in zip(*data.values(), strict=True)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    numbered = Dataset.from_dict({**data, "label": [0] * 20 + [1] * 20}, features=features)
    expected = LabelledTask.from_dataset(data)
    more = Dataset.from_dict({"text": [*data["text"], "unlabelled"], "label": [*numbered["label"], -1]})
    for other in (rows, Dataset.from_dict(data), numbered, more.cast(features)):
        task = LabelledTask.from_dataset(other)
        assert task.texts == expected.texts and task.names == expected.names
        assert torch.equal(task.labels, expected.labels)


def test_blank_texts_and_missing_labels_are_left_out():
    data = columns(no=21, yes=21)
    data["text"][0], data["text"][1], data["label"][41] = " \n", None, None
    with pytest.raises(ValueError, match=r"'no' \(19\)"):
        LabelledTask.from_dataset(data)
    data["text"][1] = "no"
    assert len(LabelledTask.from_dataset(data).texts) == 40


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (columns(a=30, b=30), {"label": "lable"}, "no column 'lable'.*Did you mean 'label'"),  # codespell:ignore
        (columns(a=30, b=30), {"text": "body"}, "Known: label, text"),
        (columns(a=30), {}, r"two classes .* 1: 'a' \(30\)"),
        (columns(a=30, b=3), {}, "at least 20 texts each"),
        (columns(a=30, b=30), {"max_texts": 39}, "40 in all"),
        ({"text": ["a"] * 40, "label": [0.5, 1.5] * 20}, {}, "got a float"),
        ({"text": [["a"]] * 40, "label": [0, 1] * 20}, {}, "must hold texts, got a list"),
        ({"text": ["a"] * 40, "label": [0, 1]}, {}, "40 texts .* 2 labels"),
        (DatasetDict({"train": Dataset.from_dict(columns(a=20, b=20))}), {}, "one of its splits: train"),
        ([], {}, "an empty list"),
        (5, {}, "got a int"),
    ],
)
def test_bad_data_is_named(data, options, message):
    with pytest.raises(ValueError, match=message):
        LabelledTask.from_dataset(data, **options)


def test_labels_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        LabelledTask("t", ["a", "b"], torch.zeros(2, 2, dtype=torch.bool), ["x"])
    with pytest.raises(ValueError, match="blank"):
        LabelledTask("t", ["a", " "], torch.zeros(2, 1, dtype=torch.bool), ["x"])


def test_token_tasks_are_checked():
    ids = torch.ones(2, 5, dtype=torch.int64)
    data = HeldOut(torch.nn.Linear(1, 1), [TokenBatch(ids, ids, ids.bool())], "x")
    with pytest.raises(ValueError, match="tokenizer"):
        TokenTasks.of_properties(data)
    with pytest.raises(ValueError, match="digits"):
        data.tokenizer = load_embedded_lm()[1]
        TokenTasks.of_properties(data, ["digits"])
    found = TokenTasks.of_properties(data, ["-ly", "digit"])
    assert found.names == ["-ly", "digit"] and found.labels[0].shape == (2, 5, 2)
    found.check(data)
    with pytest.raises(ValueError, match=r"\(2, 5, 1\)"):
        TokenTasks(["x"], found.labels).check(data)
    assert 15 <= len(property_names()) <= 30


def test_tasks_without_enough_of_a_class_are_left_out():
    labels = torch.zeros(1000, 5, dtype=torch.bool)
    for number, count in enumerate((500, 20, 19, 990, 30)):
        labels[:count, number] = True
    labels[:, 0] = torch.arange(1000) % 2 == 0
    part = torch.arange(1000) >= 50  # has none of the last one's
    part[:25] = True
    part[:30:2] = False
    kept, skipped = usable_tasks(["even", "rare", "rarer", "common", "apart"], labels, [part, ~part], 0.005)
    assert kept == [0, 1, 4]
    assert "19 of 1000" in skipped["rarer"] and "990 of 1000" in skipped["common"]
    part = torch.arange(1000) >= 30
    kept, skipped = usable_tasks(["even", "apart"], labels[:, [0, 4]], [part, ~part], 0.005)
    assert kept == [0] and skipped.keys() == {"apart"} and "one class alone" in skipped["apart"]
