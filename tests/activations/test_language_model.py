"""The type in which a language model is loaded."""

import pytest
import torch

from hf_matryoshka_sae.activations import language_model
from hf_matryoshka_sae.activations.language_model import load_language_model


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_where_it_is_fast_and_else_what_the_checkpoint_has(monkeypatch, fast, dtype):
    monkeypatch.setattr(language_model, "bf16_is_fast", lambda device: fast)
    model, _ = load_language_model("embedded", dtype="auto")
    assert next(model.parameters()).dtype == dtype


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="float32, bfloat16, float16 or auto, got 'float8'"):
        load_language_model("embedded", dtype="float8")
