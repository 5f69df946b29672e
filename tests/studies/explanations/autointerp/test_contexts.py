"""Passages of a latent, against what is seen by looking at every token."""

import numpy as np
import pytest
import torch

from hf_matryoshka_sae.assets import load_embedded_lm
from hf_matryoshka_sae.studies.explanations.autointerp.contexts import LatentContexts, TokenTexts, wrong_marks
from hf_matryoshka_sae.studies.explanations.n2g import Examples


def made(values: torch.Tensor, keep: torch.Tensor | None = None) -> Examples:
    keep = torch.ones(values.shape, dtype=torch.bool) if keep is None else keep
    places = (values.flatten() > 0).nonzero().flatten()
    windows = torch.arange(values.numel()).view(values.shape)
    return Examples(windows, keep, {0: (places, values.flatten()[places])})


def sparse(seed: int, share: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(6, 64, generator=generator) + 0.1
    return values * (torch.rand(6, 64, generator=generator) < share)


@pytest.mark.parametrize("seed", range(5))
def test_passages_are_what_they_are_called(seed):
    values = sparse(seed)
    contexts = LatentContexts(made(values), 0, least=0.01, buffer=3)
    generator = np.random.default_rng(seed)
    firing = contexts.firing(2, 2, generator)
    silent, enough = contexts.silent(10, generator)
    assert len(firing) == min(4, int((values > 0).sum())) and len(silent) == 10 and enough
    assert max(one.values.max() for one in firing) == pytest.approx(float(values.max()))
    for one in firing + silent:
        assert 4 <= len(one.ids) <= 7
        assert list(one.ids) == list(range(one.row * 64 + one.start, one.row * 64 + one.stop))
        assert one.values == pytest.approx(values[one.row, one.start : one.stop].numpy())
    assert all(one.active.any() for one in firing) and not any(one.active.any() for one in silent)
    for group in (firing, silent):
        seen = [token for one in group for token in one.ids]
        assert len(seen) == len(set(seen)), "they overlap"


def test_passages_end_where_tokens_are_left_out():
    keep = torch.ones(1, 20, dtype=torch.bool)
    keep[0, [3, 12]] = False
    values = torch.zeros(1, 20)
    values[0, 8] = 1.0
    (one,) = LatentContexts(made(values, keep), 0, least=0.1, buffer=10).firing(1, 1, np.random.default_rng(0))
    assert (one.start, one.stop) == (4, 12) and one.active.tolist() == [False] * 4 + [True] + [False] * 3


def test_stronger_activations_are_drawn_more_often():
    values = torch.zeros(1, 200)
    values[0, [20, 60, 100, 140]] = torch.tensor([10.0, 1.0, 3.0, 6.0])
    contexts = LatentContexts(made(values), 0, least=0.1, buffer=2)
    drawn = [contexts.firing(1, 1, np.random.default_rng(seed))[1] for seed in range(3000)]
    shares = [np.mean([one.start <= place < one.stop for one in drawn]) for place in (20, 60, 100, 140)]
    assert shares == pytest.approx([0, 0.1, 0.3, 0.6], abs=0.03)


def test_where_it_is_nearly_always_active_the_weakest_fill_up():
    values = torch.full((1, 100), 5.0)
    values[0, 60:80] = 1.0
    silent, enough = LatentContexts(made(values), 0, 0.1, buffer=3).silent(2, np.random.default_rng(0))
    assert not enough and [one.values.max() for one in silent] == [1.0, 1.0]
    # What overlaps comes before what is active.
    values[0, 60:80] = 0.0
    silent, enough = LatentContexts(made(values), 0, 0.1, buffer=3).silent(6, np.random.default_rng(0))
    assert enough and len(silent) == 6 and not any(one.active.any() for one in silent)


def test_wrong_marks_are_as_many_and_elsewhere():
    contexts = LatentContexts(made(sparse(1, share=0.2)), 0, 0.01, buffer=5)
    for seed in range(20):
        generator = np.random.default_rng(seed)
        for one in contexts.firing(3, 3, generator):
            marks = wrong_marks(one, generator)
            assert not (marks & one.active).any()
            assert marks.sum() == min(one.active.sum(), (~one.active).sum())
    everywhere = LatentContexts(made(torch.ones(1, 30)), 0, 0.01).firing(1, 1, np.random.default_rng(0))
    assert wrong_marks(everywhere[0], np.random.default_rng(0)) is None


@pytest.fixture(scope="module")
def tokenizer():
    return load_embedded_lm()[1]


def test_texts_of_tokens_join_to_the_text(tokenizer):
    for text in ("The return value\n  of naïve «calls» 東京 🎉 x", " leading"):
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        parts = TokenTexts(tokenizer).of(ids)
        assert len(parts) == len(ids)
        assert "".join(parts) == text.replace("\n", "⏎").replace("«", "‹").replace("»", "›")


def test_marks_stand_around_runs(tokenizer):
    texts = TokenTexts(tokenizer)
    ids = tuple(tokenizer(" return the value", add_special_tokens=False)["input_ids"])
    assert len(ids) == 3
    assert texts.marked(ids, np.array([True, False, True])) == "« return» the« value»"
    assert texts.marked(ids, np.array([True, True, False])) == "« return the» value"
    assert texts.marked(ids, np.array([False, False, False])) == " return the value"
