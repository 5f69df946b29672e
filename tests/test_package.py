"""What the package shows of itself, to people and to type checkers."""

import importlib
import typing

import pytest

import hf_matryoshka_sae
from hf_matryoshka_sae import MODELS, SAEModel, SAEOutput


def test_dir_shows_the_classes_and_the_rooms_and_nothing_private():
    names = [name for name in dir(hf_matryoshka_sae) if not name.startswith("__")]
    assert {"MatryoshkaSAE", "SparseLatents", "convert", "evaluation", "features", "hub", "metrics"} <= set(names)
    assert not [name for name in names if name.startswith("_")] and "importlib" not in names
    for name in names:
        assert getattr(hf_matryoshka_sae, name) is not None


def test_rooms_are_the_modules_and_other_names_are_refused():
    assert hf_matryoshka_sae.convert is importlib.import_module("hf_matryoshka_sae.convert")
    with pytest.raises(AttributeError, match="no attribute 'converters'"):
        hf_matryoshka_sae.converters  # noqa: B018


def test_types_say_what_loading_and_calling_give():
    for model in MODELS.values():
        assert typing.get_type_hints(model.from_pretrained)["return"] is typing.Self
    assert typing.get_args(SAEModel.__annotations__["__call__"])[-1] is SAEOutput
    assert typing.get_type_hints(hf_matryoshka_sae.convert.load)["return"] is SAEModel
