"""Patterns that stand in for a judge, on models that see what follows a token and on those that do not."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_matryoshka_sae.studies.explanations.autointerp.contexts import Context, TokenTexts
from hf_matryoshka_sae.studies.explanations.autointerp.readers import PatternReader
from hf_matryoshka_sae.studies.explanations.n2g_trie import HERE, START, WILDCARD, PatternTrie


@pytest.fixture(scope="module")
def texts():
    backend = Tokenizer(models.WordLevel({"?": 0} | {letter: i for i, letter in enumerate("abcde", 1)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.parametrize(
    ("pattern", "written", "predicted"),
    [
        ([1, 2], "'a b'", [0, 0, 7]),
        ([1, WILDCARD, 3], "'a* c'", [0, 0, 0]),
        ([START, 4, 1], "'^d a'", [0, 7, 0]),
        ([2, HERE, 3], "'b| c'", [0, 0, 7]),  # what it needs to see stands behind the passage
    ],
)
def test_a_pattern_is_written_and_predicts(texts, pattern, written, predicted):
    trie = PatternTrie()
    trie.add(pattern, 7.0)
    windows = np.array([[4, 1, 2, 3, 5]])
    reader = PatternReader(trie, texts, windows)
    assert reader.explanation.replace(" ", "") == f"patterns{written}".replace(" ", "")
    passage = Context(0, 0, 3, tuple(windows[0, :3].tolist()), np.zeros(3), np.zeros(3, bool))
    assert reader.simulate(passage) == predicted
    assert reader.detect([passage]) == [any(predicted)]
