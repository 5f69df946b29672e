"""Against Python's own `re` on strings, with a tokenizer whose tokens are characters; and on real tokenizers."""

import random
import re
import time

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_matryoshka_sae.assets import load_embedded_lm
from hf_matryoshka_sae.features.patterns.matching import TokenPattern
from hf_matryoshka_sae.features.patterns.vocabulary import vocabulary_of


LETTERS = "abcxyz 12"


@pytest.fixture(scope="module")
def characters() -> PreTrainedTokenizerFast:
    """One token a character."""
    backend = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(LETTERS)}, unk_token="x"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def tokenizer():
    return load_embedded_lm()[1]


def rows(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[LETTERS.index(sign) for sign in text] for text in texts])


def ends(pattern: str, text: str) -> list[bool]:
    """By trying every start with every end: the rest of the text is counted off in a look-ahead."""
    found = [False] * len(text)
    for end in range(1, len(text) + 1):
        anchored = re.compile(f"(?:{pattern})(?=[\\s\\S]{{{len(text) - end}}}\\Z)")
        found[end - 1] = any(anchored.match(text, start) for start in range(end))
    return found


SAME = [  # ours, Python's
    (".", "."),
    ("abc", "abc"),
    ("(ab|b)c", "(ab|b)c"),
    ("(a)+b", "a+b"),
    ("(a|b)*", "[ab]*"),
    ("a(b)?c", "ab?c"),
    ("(a){2}", "a{2}"),
    ("(a){2,}b", "a{2,}b"),
    ("(a){,2}b", "a{0,2}b"),
    ("(a.){1,2}", "(?:a.){1,2}"),
    ("[v=.].*[v]", "(?P<v>.).*(?P=v)"),
    ("[v=(a|b)+]c[v]", "(?P<v>[ab]+)c(?P=v)"),
    ("[v=.][w=.][w][v]", "(?P<v>.)(?P<w>.)(?P=w)(?P=v)"),
    ("a(?=b)", "a(?=b)"),
    ("a(?!b)", "a(?!b)"),
    ("(?<=a)b", "(?<=a)b"),
    ("(?<!a)b", "(?<!a)b"),
    ("[re `[ab]`]c", "[ab]c"),
    ("([re `[ab]`][re `[bc]`])+", "(?:[ab][bc])+"),
    ("[re `\\d`]+ ", "[12]+"),
    ("a [re `[^a]`]", "a[^a]"),
    ("a\\ b", "a b"),
    ("vowel = a\nother = ([vowel]|b)\n[other]+c  # text", "[ab]+c"),
    ("[BEGIN].", "\\A."),
    ("[literal_set `ab`, `c`]x", "(?:ab|c)x"),
    ("[prefix abc]", "(?:a(?=bc)|ab(?=c)|abc)"),
    ("[prefix a(b)*c]", "(?:ab*(?=b*c)|ab*c)"),
    ("[prefix (a|bc)x]", "(?:a(?=x)|b(?=cx)|bc(?=x)|ax|bcx)"),
    ("[prefix (ab){2,}]", "(?:a(?=b(?:ab)+)|ab(?=(?:ab)+)|aba(?=b)|(?:ab)+a(?=b)|(?:ab){2,})"),
    ("[prefix (ab){2}]", "(?:a(?=bab)|ab(?=ab)|aba(?=b)|abab)"),
]


@pytest.mark.parametrize("ours, python", SAME, ids=[ours for ours, _ in SAME])
def test_every_match_end_is_marked(characters, ours, python):
    draw = random.Random(ours)
    texts = ["".join(draw.choices("aabbcx 1", k=14)) for _ in range(25)] + ["abababababcabc", "aabbccaabbccxa"]
    found = TokenPattern.compile(ours, characters).mask(rows(texts))
    assert found.tolist() == [ends(python, text) for text in texts]


def test_empty_matches_do_not_count(characters):
    assert not TokenPattern.compile("(a)*", characters).mask(rows(["bcbc"])).any()
    assert not TokenPattern.compile("(?=a)", characters).mask(rows(["aaaa"])).any()
    assert TokenPattern.compile("a", characters).mask(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)


def test_a_match_lies_in_one_row_and_not_in_padding(characters):
    pattern = TokenPattern.compile("ab", characters)
    assert not pattern.mask(rows(["xxxa", "bxxx"])).any()
    padded = rows(["abab", "xabx"])
    real = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
    assert pattern.mask(padded, attention_mask=real).int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    begin = TokenPattern.compile("[BEGIN]a", characters)
    assert begin.mask(padded, attention_mask=real).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]


def test_tokens_past_the_vocabulary_are_tokens_too(characters):
    found = TokenPattern.compile("[v=.][v]", characters).mask(torch.tensor([[40, 40, 41, 3, 3]]))
    assert found[0].int().tolist() == [0, 1, 0, 0, 1]


def marked(pattern: str, text: str, tokenizer, **options) -> list[str]:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    mask = TokenPattern.compile(pattern, tokenizer, **options).mask(ids)[0]
    return [tokenizer.decode([int(token)]) for token in ids[0][mask]]


def test_text_is_whole_tokens_and_a_leading_space_counts(tokenizer):
    text = "return the list and the return"
    assert marked(" the", text, tokenizer) == [" the"] * 2
    assert marked("the", text, tokenizer) == []
    assert marked("return", text, tokenizer) == ["return"]
    assert marked(" return", text, tokenizer) == [" return"]
    assert marked(" the[re ` \\w+`]", text, tokenizer) == [" list", " return"]
    assert marked("[re `tur`, search=True]", text, tokenizer) == ["return", " return"]
    assert marked("[literal_set ways]", text, tokenizer, names={"ways": [" list", "return"]}) == ["return", " list"]
    assert marked("[way]", text, tokenizer, names={"way": "( list| and)"}) == [" list", " and"]


def test_begin_is_also_behind_the_token_that_separates_texts(tokenizer):
    text = f"one{tokenizer.bos_token}return list"
    assert marked("[BEGIN]return", text, tokenizer) == ["return"]


def test_text_that_is_not_whole_tokens_shows_the_tokens(tokenizer):
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "cat": 1, "##s": 2, "a": 3}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    pieces = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert vocabulary_of(pieces).texts == [" [UNK]", " cat", "s", " a"]
    assert TokenPattern.compile(" cats", pieces).mask(torch.tensor([[3, 1, 2, 1]]))[0].tolist() == [0, 0, 1, 0]
    with pytest.raises(
        ValueError, match=r"'Cats' is not whole tokens; .* \[' cat', 's'\](.|\n)*    a?\n?Cats\n    \^"
    ):
        TokenPattern.compile("Cats", pieces)


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("a(b", "column 4: '\\)' is missing"),
        ("ab)", "column 3: '\\)' closes nothing"),
        ("ab+", "column 3: .*\\(text\\)\\+"),
        ("(a)+?", "column 5: .*no lazy repeats"),
        ("*a", "column 1: .*nothing before it to repeat"),
        ("(a){3,2}", "column 4: .*small to large"),
        ("(a){x}", "column 4: expected .2.,"),
        ("[nothing]", "column 1: nothing is named 'nothing'"),
        ("[vowl]", "Perhaps vowel"),
        ("[v]b[v=a]", "column 1: nothing is named 'v'"),
        ("[v=.][v=[v]]", "column 9: \\[v\\] stands within"),
        ("[v=a[w=b][v=c]]", "column 10: 'v' is captured within"),
        ("x = [v=a]\n[v=[x]]", "line 2, column 1: 'v' is captured within"),
        ("(?<=[v=.][v])a", "column 1: a look-behind is matched from its end"),
        ("(?:a)", "column 2: expected \\(\\?=A\\)"),
        ("a||b", "column 3: expected a pattern"),
        ("a\nb", "line 2, column 1: the pattern stands alone"),
        ("re = a\nb", "'re' has a meaning of its own"),
        ("v = a", "there is no pattern"),
        ("", "there is no pattern"),
        ("a\\", "column 2: a backslash"),
        ("[re `(`]", "column 7: the regular expression '\\(' cannot be read"),
        ("[re `q`]", "column 1: no token matches `q`"),
        ("[re `(?:word){e<=1}`]", "match exactly, so {e<=1} is not allowed"),
        ("[re `(?#[)a{s:[}]}`]", "match exactly, so \\{s:.* is not allowed"),
        ("[re `(?bi)a`]", "match exactly, so \\(\\?bi\\) is not allowed"),
        ("[re `a`, search=yes]", "search=True"),
        ("[re a]", "expected something in backticks"),
        ("[prefix [v=a]]", "takes no captures"),
        ("(" * 60 + "a" + ")" * 60, "nested more than 40"),
        ("n = .\n" + "\n".join("n = [n][n]" for _ in range(30)) + "\n[n]", "too long"),
    ],
)
def test_errors_show_the_place(characters, pattern, message):
    with pytest.raises(ValueError, match=message):
        TokenPattern.compile(pattern, characters, names={"vowel": ["a"]})


@pytest.mark.parametrize("pattern", ["(.|..)+(.|..)+ x", "((a|aa)+)+[v=.]y[v]"])
def test_a_hostile_pattern_ends_at_the_time_limit(characters, pattern):
    text = "a" * 40 + "xy" + "a" * 80
    start = time.monotonic()
    with pytest.raises(ValueError, match="takes longer than 0.3 seconds"):
        TokenPattern.compile(pattern.replace(" ", ""), characters).mask(rows([text]), timeout=0.3)
    assert time.monotonic() - start < 5


def test_many_repeats_in_repeats_are_quick(characters):
    found = TokenPattern.compile("((.)+)+x", characters).mask(rows(["a" * 60 + "x" + "a" * 60]))
    assert found[0].nonzero().flatten().tolist() == [60]


@pytest.mark.slow
def test_a_large_vocabulary_makes_a_short_expression():
    words = {f"{'Ġ' if i % 2 else ''}w{i}": i for i in range(250_000)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    large = PreTrainedTokenizerFast(tokenizer_object=backend)
    vocabulary_of(large)  # decoded once
    pattern = TokenPattern.compile("[re ` Ġ.*`]([re `.*7`]|[re ` Ġ?w1.*`]) w4", large, timeout=60)
    found = pattern.mask(torch.tensor([[1, 7, 4], [0, 7, 4], [3, 10, 4], [3, 20, 4]]))
    assert found.int().tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert len(pattern._expression) < 200


def test_an_error_in_a_name_is_shown_where_it_is(characters):
    with pytest.raises(ValueError, match=r"named 'bad', column 2: no token(.|\n)*\n    a\[re `q`\]\n     \^"):
        TokenPattern.compile("[bad]", characters, names={"bad": "a[re `q`]"})
    with pytest.raises(ValueError, match="one line"):
        TokenPattern.compile("[bad]", characters, names={"bad": "a\nb"})


@pytest.mark.parametrize(
    "source, place, caret",
    [
        ("[re `ab(`]", "line 1, column 9", "    [re `ab(`]\n            ^"),
        ("one = a\n[one][re `[a-`]", "line 2, column 14", "    [one][re `[a-`]\n                 ^"),
        ("[one](", "line 1, column 7", "    [one](\n          ^"),  # a name given beside it is no line of the pattern
        ("a\t)", "line 1, column 3", "    a\t)\n     \t^"),
        ("[literal_set `漢`, `a`])", "line 1, column 23", "    [literal_set `漢`, `a`])\n" + " " * 27 + "^"),
        ("a" * 500 + ")", "line 1, column 501", "    " + "a" * 99 + ")\n" + " " * 103 + "^"),
        ("[literal_set `a`, `q`]", "line 1, column 20", "    [literal_set `a`, `q`]\n" + " " * 23 + "^"),
    ],
)
def test_a_caret_is_below_the_place(characters, source, place, caret):
    with pytest.raises(ValueError, match=f"^Pattern, {place}:") as problem:
        TokenPattern.compile(source, characters, names={"one": "a", "two": ["b"]})
    assert str(problem.value).endswith("\n" + caret)


def test_lines_may_end_as_on_windows(characters):
    found = TokenPattern.compile("vowel = a\r\n# a comment\r\n[vowel]b\r\n", characters).mask(rows(["abxb"]))
    assert found[0].int().tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("names", [0, ["a"], "a", {3: "a"}, {"a": 3}, {"a": None}, {"a": [3]}, {"a": []}, {"a": [""]}])
def test_names_of_a_wrong_type_are_said(characters, names):
    with pytest.raises(ValueError, match="`names` must be a dictionary|Names in patterns|A name stands for"):
        TokenPattern.compile("[a]", characters, names=names)


_CHAIN = "a0 = .\n{}\n[a249]"

HOSTILE = {  # each, without a limit, takes minutes or gigabytes, or exhausts the stack
    "repeats of repeats": "(.{10000}){10000}",
    "plus of plus": "(" * 38 + "." + ")+" * 38,
    "choice of repeats": "|".join([".{10000}"] * 1000),
    "bounded repeats": "(" * 38 + "." + "){0,9}" * 38,
    "a number": "(.){" + "9" * 5000 + "}",
    "doubled names": _CHAIN.format("\n".join(f"a{i} = [a{i - 1}][a{i - 1}]" for i in range(1, 250))),
    "repeated names": _CHAIN.format("\n".join(f"a{i} = ([a{i - 1}])+" for i in range(1, 250))),
    "looked-at names": _CHAIN.format("\n".join(f"a{i} = (?=[a{i - 1}])." for i in range(1, 250))),
    "a long name in many looks": "a = " + "." * 19000 + "\n" + "(?=[a])" * 5000,
    "a long pattern": "a" * 5_000_000,
    "a long prefix": "[prefix " + "." * 9000 + "]",
    "a prefix of repeats": "[prefix (((.){64}){64}){64}]",
    "a regex with a number": "[re `a{1000000000}`]",
    "a regex of repeats": "[re `((a{1000}){1000}){1000}`]",
    "a regex of plus": "[re `" + "(" * 40 + "a" + ")+" * 40 + "`]",
    "a regex in brackets": "[re `" + "(" * 1000 + "a" + ")" * 1000 + "`]",
    "a regex behind a comment": "[re `(?#[)((a{1000}){1000}){1000}]`]",
    "a verbose regex": "[re `(?x)#[\\n((a{1000}){1000}){1000}#]`]",
    "many wide classes": "a = " + "|".join(f"[re `[{x}{y}].*`]" for x in LETTERS for y in "ab") + "\n" + "[a]" * 900,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pattern_is_refused_in_time(tokenizer, name):
    ids = tokenizer("the return of the list " * 40, return_tensors="pt")["input_ids"]
    start = time.process_time()
    message = "takes longer|too (long|deep|large)|go to 1000|at most|takes? (no|up to)|nested more"
    with pytest.raises(ValueError, match=message):
        TokenPattern.compile(HOSTILE[name], tokenizer).mask(ids, timeout=0.3)
    assert time.process_time() - start < 3


def test_finding_tokens_ends_at_the_time_limit(characters, monkeypatch):
    vocabulary = vocabulary_of(characters)
    monkeypatch.setattr(vocabulary, "texts", ["a" * 40 + "b"] * len(vocabulary.texts))
    start = time.monotonic()
    with pytest.raises(ValueError, match="column 1: the regular expression .* takes too long"):
        TokenPattern.compile("[re `(a|aa)+(a|aa)+c`]", characters, timeout=0.2)
    with pytest.raises(ValueError, match="takes too long"):
        TokenPattern.compile("(" + "|".join(["ab"] * 1000) + ")", characters, timeout=0.0)
    assert time.monotonic() - start < 2


def test_large_patterns_of_use_are_read(tokenizer):
    ids = torch.arange(1000).view(10, 100)
    words = sorted({text for text in vocabulary_of(tokenizer).texts if text.strip().isalpha()})
    found = TokenPattern.compile("[literal_set words].{0,50}", tokenizer, names={"words": words}).mask(ids)
    assert found.any() and len(words) > 500
    TokenPattern.compile("(.){10000}", tokenizer).mask(ids)
    TokenPattern.compile("((([re `\\w+`])+.)+.)+ the", tokenizer).mask(ids)


def test_masks_are_for_rows_of_ids(characters):
    pattern = TokenPattern.compile("a", characters)
    with pytest.raises(ValueError, match="shape"):
        pattern.mask(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="float"):
        pattern.mask(torch.zeros(1, 3))


@pytest.mark.parametrize("source", ["`#", "it`s # c"])
def test_a_comment_sign_behind_an_open_backtick_is_an_error(tokenizer, source):
    with pytest.raises(ValueError, match="behind an open backtick"):
        TokenPattern.compile(source, tokenizer)
