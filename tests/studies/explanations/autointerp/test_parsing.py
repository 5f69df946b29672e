"""Answers as judges write them."""

import pytest

from hf_matryoshka_sae.studies.explanations.autointerp.parsing import choices, refuses, sentence, strengths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 3]", [True, False, True]),
        ("[]", [False, False, False]),
        ("  [2]\n", [False, True, False]),
        ("```json\n[2, 2]\n```", [False, True, False]),
        ("<think>\nPassage 1 has [1].\n</think>\n[3]", [False, False, True]),
        ("It opened before: [1]\n</think>[3]", [False, False, True]),
        ("Passages two and three do.\n[2, 3]", [False, True, True]),
        ("1: yes\n2: no\n3: Yes.", [True, False, True]),
        ("1. false\n\n2. true\n3. FALSE", [False, True, False]),
        ("(1) - no\n(2) - no\n(3) - 1", [False, False, True]),
    ],
)
def test_choices_are_read(text, expected):
    assert choices(text, 3) == expected


@pytest.mark.parametrize(
    "text",
    ["", "Passage 2.", "[0, 1]", "[4]", "[true]", "[1.0]", '["1"]', "[[1]]", "{}", "2", "null", "[1, 2", "<think>[1]"]
    + ["1: yes\n2: no", "1: yes\n3: no\n2: no", "1: yes\n2: maybe\n3: no"]
    + ["[" * 100_000, "[" + "9" * 5000 + "]", "9" * 5000 + ": yes"],
)
def test_other_choices_are_malformed(text):
    assert choices(text, 3) is None


@pytest.mark.parametrize(
    "text", ["[0, 10, 2.5]", "1: 0\n2: 10\n3: 2.5", "<think>hm</think>Here they are:\n[0.0, 10.0, 2.5]"]
)
def test_strengths_are_read(text):
    assert strengths(text, 3) == [0.0, 10.0, 2.5]


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", "[1, 2, 3, 4]", "[1, 2, 11]", "[1, 2, -1]", "[1, 2, NaN]", "[1, 2, Infinity]", "[1, 2, true]", "no"]
    + ["[1, 2, null]", "1: 1\n2: nan\n3: 3", "1: one\n2: two\n3: three", "[1, 2, " + "1" * 400 + "]", "[]", ""],
)
def test_other_strengths_are_malformed(text):
    assert strengths(text, 3) is None


def test_sentences_are_one_line():
    assert sentence('**Explanation:** "Names of\n months."') == "Names of months."
    assert sentence("<think>what?</think> Explanation: verbs") == "verbs"
    assert sentence(" \n ... ") is None and sentence("") is None
    assert len(sentence("word " * 1000)) <= 500


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, but no.", True),
        ("I cannot assist.", True),
        ("As an AI language model, I", True),
        ("<think>easy</think>\nSorry!", True),
        ("Words of regret such as sorry", False),
        ("[1]", False),
        ("I think 2 and 3", False),
    ],
)
def test_refusals_are_told(text, expected):
    assert refuses(text) is expected
