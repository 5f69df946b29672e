"""What is said of tokens, against the same said of characters and words by hand."""

import re

import pytest
import torch

from hf_matryoshka_sae.activations import TokenBatch
from hf_matryoshka_sae.assets import load_embedded_lm
from hf_matryoshka_sae.studies.probing.token_properties import (
    WORD_CLASSES,
    TokenReader,
    property_labels,
    property_names,
)


TEXT = """The old Reader ("a quick one") often walked to LONDON in 1984. He said: "It's fine." Then
they [all of them, mostly] agreed while reading quickly!

An open "quotation and (bracket end here

with the Paragraph. Interestingly, the words are repeated: the words."""


@pytest.fixture(scope="module")
def tokenizer():
    return load_embedded_lm()[1]


@pytest.fixture(scope="module")
def told(tokenizer) -> dict[str, list[str]]:
    """The tokens' texts of which each property is true, in order."""
    return read(tokenizer, TEXT)


def batch_of(tokenizer, *texts: str) -> TokenBatch:
    bos = tokenizer.bos_token_id
    rows = [[bos, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [bos] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return TokenBatch(ids, mask, mask.bool() & (ids != bos))


def read(tokenizer, text: str) -> dict[str, list[str]]:
    batch = batch_of(tokenizer, text)
    labels = property_labels(batch, TokenReader(tokenizer))[0]
    texts = TokenReader(tokenizer).texts(batch.input_ids[0].tolist())
    found = zip(property_names(), labels.T, strict=True)
    return {name: [texts[at].strip() for at in column.nonzero()[:, 0].tolist()] for name, column in found}


def test_the_parts_of_a_window_are_its_text(tokenizer):
    batch = batch_of(tokenizer, TEXT)
    ids = [*batch.input_ids[0].tolist(), *batch.input_ids[0].tolist()]
    reader = TokenReader(tokenizer)
    parts = list(reader.parts(ids, [1] * len(ids)))
    assert [part.text for part in parts] == [TEXT, TEXT]
    for part in parts:
        assert "".join(part.text[start:end] for start, end in part.raw) == TEXT
        assert all(part.text[start:end].strip() == part.text[start:end] for start, end in part.spans)
    assert [at for part in parts for at in part.positions] == [at for at, token in enumerate(ids) if token]


def test_properties_of_characters(told):
    assert "".join(told["digit"]) == "1984"
    assert all(not any(c.isalnum() for c in token) for token in told["punctuation"])
    assert "".join(told["punctuation"]).count("(") == TEXT.count("(")
    assert len(told["line break"]) >= 3


def test_properties_of_words(told):
    words = re.findall(r"[A-Za-z]+(?:'[A-Za-z]+)?", TEXT)
    assert len(told["begins a word"]) == len(words)
    assert len(told["capitalised"]) == len([w for w in words if w[0].isupper() and not (len(w) > 1 and w.isupper())])
    assert len(told["all capitals"]) == 1 and "LONDON".endswith(told["all capitals"][0])
    lower = [word.lower() for word in words]
    assert len(told["follows 'the'"]) == lower.count("the") == 4
    for name, lexicon in WORD_CLASSES.items():
        assert len(told[name]) == len([word for word in lower if word in lexicon.split()]), name
    assert len(told["-ly"]) == len([word for word in lower if word.endswith("ly") and len(word) > 3]) == 3
    assert len(told["-ed"]) == len([word for word in lower if word.endswith("ed") and len(word) > 3])
    assert len(told["ends a long word"]) == len([word for word in words if len(word) >= 9])
    for letter in "acst":
        assert len(told[f"first letter {letter}"]) == len([word for word in lower if word[0] == letter])


def test_a_word_goes_on_where_it_has_begun(told, tokenizer):
    words = re.findall(r"[A-Za-z]+(?:'[A-Za-z]+)?", TEXT)
    assert len(told["begins a word"]) + len(told["continues a word"]) >= len(words)
    pieces = read(tokenizer, "antidisestablishmentarianism 7th")
    assert len(pieces["begins a word"]) == 2
    assert "".join(pieces["begins a word"][:1] + pieces["continues a word"]).startswith("antidisestablishment")


def test_quotes_and_brackets_end_with_their_paragraph(told):
    quoted, bracketed = "".join(told["in double quotes"]), "".join(told["in brackets"])
    assert "aquickone" in quoted and "fine" in quoted and quoted.endswith("quotationand(bracketendhere")
    assert '"aquickone"' in bracketed and "allofthem,mostly" in bracketed and bracketed.endswith("bracketendhere")
    assert "walked" not in quoted + bracketed and "Paragraph" not in quoted + bracketed


def test_sentences(told):
    assert "".join(token[0] for token in told["begins a sentence"]) == "HTAwI"
    ends = [token[0] for token in told["ends a sentence"]]
    assert ends == [".", ".", "!", ".", "."]


def test_places_in_the_window_and_repetition(tokenizer):
    batch = batch_of(tokenizer, TEXT, "Short one")
    labels = property_labels(batch, TokenReader(tokenizer))
    names = property_names()
    for row in range(2):
        length = int(batch.attention_mask[row].sum())
        positions = torch.arange(labels.shape[1])
        real = batch.keep[row]
        early, late, seen = (
            labels[row, :, names.index(name)]
            for name in ("first quarter of the context", "last quarter of the context", "seen before")
        )
        assert torch.equal(early, real & (positions < length / 4))
        assert torch.equal(late, real & (positions >= 0.75 * length))
        ids = batch.input_ids[row].tolist()
        assert seen.tolist() == [bool(real[at]) and ids[at] in ids[1:at] for at in range(len(ids))]
        assert not labels[row][~real].any()
