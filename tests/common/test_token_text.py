"""What single tokens and runs of tokens say."""

import pytest

from hf_matryoshka_sae.assets import load_embedded_lm
from hf_matryoshka_sae.common.token_text import texts_in_place, token_texts


@pytest.fixture(scope="module")
def tokenizer():
    return load_embedded_lm()[1]


@pytest.mark.parametrize("text", [" the old house", "a\n b", " naïve 日本 🎈!", "x" * 30])
def test_what_tokens_say_where_they_stand_is_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(texts_in_place(tokenizer, ids)) == text
    alone = token_texts(tokenizer, ids)
    whole = [one == other for one, other in zip(alone, texts_in_place(tokenizer, ids), strict=True)]
    assert all(whole[index] or "\ufffd" in one for index, one in enumerate(alone))


def test_a_token_that_does_not_go_on_behind_a_letter_is_read_alone(tokenizer):
    """A decoder may join some tokens with what stands before them; the others keep their leading spaces."""

    class Joining:
        is_fast = False

        def __call__(self, text, **options):
            return {"input_ids": [0]}

        def decode(self, row, **options):
            return "Ä" if row == [0, 2] else "".join({0: "a", 1: " cat", 2: "\u0308"}[token] for token in row)

    assert token_texts(Joining(), [1, 2]) == [" cat", "\u0308"]
