"""What readers are told of fields: all of them, with type, default and meaning, each once."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest

from hf_matryoshka_sae.common.data_source import DatasetConfig
from hf_matryoshka_sae.features.sizes import IndexSizes
from hf_matryoshka_sae.studies.known_features.settings import World
from hf_matryoshka_sae.studies.scaling.config import Grid
from hf_matryoshka_sae.training.config.describe import FieldText, described, help_text, markdown, run_fields
from hf_matryoshka_sae.training.config.run import RunConfig
from hf_matryoshka_sae.training.config.spec import SAESpec


@dataclass
class Inner:
    """Something inside."""

    # Size
    width: int = 20_000
    """How wide."""


@dataclass
class Outer:
    """An example."""

    name: str
    """What it
    is called."""

    # Things
    kind: Literal["a", "b"] | None = None
    """Which."""
    first: Inner | None = None
    """One."""
    second: Inner | None = None
    """Another."""
    many: list[Inner] = field(default_factory=list)
    rates: int | float | list[float] = 0.5
    """Two numbers, or a list | of them."""

    def method(self):
        """Not a field's."""


def test_fields_are_read_from_their_source():
    assert described(Outer) == [
        FieldText("name", "", "text", "required", "What it is called."),
        FieldText("kind", "Things", "a or b", "", "Which."),
        FieldText("first", "Things", "fields", "", "One."),
        FieldText("second", "Things", "fields as of first", "", "Another."),
        FieldText("many", "Things", "fields as of first", "default []", ""),
        FieldText("rates", "Things", "number or list of numbers", "default 0.5", "Two numbers, or a list | of them."),
        FieldText("first.width", "first: Size", "whole number", "default 20_000", "How wide."),
    ]


def test_texts_for_the_terminal_and_for_the_page():
    (*_, rates, width) = described(Outer)
    assert help_text([rates, width], 30).splitlines() == [
        "Things:",
        "  --rates  number or list of numbers, default 0.5",
        "      Two numbers, or a list |",
        "      of them.",
        "",
        "first: Size:",
        "  --first.width  whole number, default 20_000",
        "      How wide.",
    ]
    assert markdown([rates]).splitlines() == [
        "### Things",
        "",
        "| field | type | default | meaning |",
        "|---|---|---|---|",
        r"| `rates` | number or list of numbers | 0.5 | Two numbers, or a list \| of them. |",
    ]


@pytest.mark.parametrize("cls", [RunConfig, SAESpec, DatasetConfig, Grid, World, IndexSizes])
def test_every_field_of_a_config_has_a_meaning(cls):
    texts = [text for text in described(cls) if "." not in text.name]
    assert [text.name for text in texts] == [each.name for each in dataclasses.fields(cls)]
    assert [text.name for text in texts if not text.meaning.endswith(".")] == []


def test_a_run_shows_every_field_once_and_those_that_are_used_most_first():
    texts = run_fields()
    names = [text.name for text in texts]
    expected = [
        *(each.name for each in dataclasses.fields(RunConfig)),
        *(f"dataset.{each.name}" for each in dataclasses.fields(DatasetConfig)),
        *(f"saes.0.{each.name}" for each in dataclasses.fields(SAESpec)),
    ]
    assert sorted(names) == sorted(expected)
    assert {text.group for text in texts[:20]} == {"Used most"} and names[0] == "model"
    assert all(text.group for text in texts)


def test_defaults_are_those_of_the_families():
    defaults = {text.name: text.default for text in described(SAESpec)}
    assert (
        defaults["betas"]
        == "default [0.9, 0.999]; [0.7, 0.99] for relu, topk, batch_topk, jumprelu, gated, matryoshka"
    )
    assert defaults["target_l0"] == "default 32.0 for relu, jumprelu, gated"
    assert (defaults["lr"], defaults["train_b_enc"]) == ("", "default true")
