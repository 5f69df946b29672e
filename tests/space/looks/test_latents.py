"""A latent's page, chips, texts coloured by latents, hits, a family's picture: against what they are made of."""

import json
import re
from xml.etree import ElementTree

import pytest

from hf_matryoshka_sae.assets import embedded_sae_path, load_embedded_lm
from hf_matryoshka_sae.features import FeatureIndex
from hf_matryoshka_sae.space.looks.chips import bar, chip, percent, problem
from hf_matryoshka_sae.space.looks.family_card import family_card
from hf_matryoshka_sae.space.looks.feature_page import context, feature_head, feature_page
from hf_matryoshka_sae.space.looks.labels import Labels
from hf_matryoshka_sae.space.looks.reading import reading, shown_token, side_by_side
from hf_matryoshka_sae.space.tabs.search import EXAMPLES, hits_html, kind_of


HOSTILE = "<script>alert('a & \"b\"')</script>"
HERE = ("embedded", "")
WIDTHS = [64, 192, 448, 960, 2048]


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.sub(r"(\w+)=(\w+)(?=[ >/])", r'\1="\2"', f"<div>{text}</div>"))


def test_white_space_is_folded_and_lost_bytes_are_no_boxes():
    assert shown_token("a\n    b") == "a↵ b" and shown_token("\n\n\n") == "↵ " and shown_token("\ufffd") == "⋯"


def test_a_text_carries_what_its_tokens_fire():
    firings = {8: [[], [[3, 1.0]], [[5, 2.0]]], 64: [[], [[40, 4.0], [3, 1.0]], [[5, 2.0]]]}
    tokens, names = ["<s>", HOSTILE, " b"], {3: "three", 40: HOSTILE, 5: ""}
    root = parsed(reading(tokens, firings, {3: 2.0, 40: 4.0, 5: 2.0}, names, 63, {8: "eight\n", 64: "all"}))
    buttons = list(root.iter("button"))
    assert [one.text for one in buttons] == [HOSTILE, " b"]  # <s> is no part of the text
    assert [one.get("tabindex") for one in buttons] == ["0", "-1"]  # one stop for the tabulator
    assert "--share:0.50" in buttons[0].get("style")  # at width 63 that of latent 3
    known = json.loads(root.find(".//*[@data-reading]").get("data-reading"))
    assert known["widths"] == [8, 64] and known["firings"][1] == firings[64][1:]
    assert known["continuations"] == ["eight↵ ", "all"] and known["labels"]["40"] == HOSTILE
    assert root.find(".//*[@class='goes-on']").text == "eight↵ "


def test_what_differs_between_continuations_is_marked():
    root = parsed(side_by_side([("plain", "the cat sat"), ("steered", "the dog sat <b>")]))
    titles = [one.text for one in root.iter("h3")]
    assert titles == ["plain", "steered"]
    assert [one.text.strip() for one in root.iter("mark")] == ["dog", "<b>"]
    same = parsed(side_by_side([("plain", "a"), ("steered", "a")]))
    assert not list(same.iter("mark")) and "The same as the model" in "".join(same.itertext())


@pytest.mark.parametrize(
    "query, kind",
    [
        ("return, returns", "words"),
        ("don't stop", "words"),
        ("e.g., U.S. law", "words"),
        ("C-3", "words"),
        ("a.b", "words"),
        *((query, "words" if title.startswith("words") else "pattern") for title, query in EXAMPLES),
        ("` the`", "pattern"),
        (". .", "pattern"),
        ("(a | b", "pattern"),
        ("a*", "pattern"),
    ],
)
def test_words_are_told_from_patterns(query, kind):
    assert kind_of(query) == kind


def test_a_hit_stands_under_the_nearest_ancestor_that_was_hit():
    hits = [
        {
            "latent": latent,
            "label": HOSTILE,
            "cosine": 0.9 - 0.1 * n,
            "precision": 0.25,
            "recall": 1.0,
            "tokens_matched": 3,
        }
        for n, latent in enumerate([7, 900, 70, 300])
    ]
    above = {7: [], 900: [300, 70, 7], 70: [7], 300: [250, 70, 7]}
    root = parsed(hits_html(hits, above, HERE, "Read as words: a", 100, 2048))
    rows = [(row.find("td/a").get("data-latent"), row.find("td").get("style")) for row in root.findall(".//tbody/tr")]
    assert rows == [("7", "--depth:0"), ("70", "--depth:1"), ("300", "--depth:2"), ("900", "--depth:3")]
    assert "3 of 100 held-out tokens (3.0%)" in "".join(root.itertext()) and not list(root.iter("script"))
    assert "none of 64 latents fires" in hits_html([], {}, HERE, "Read as words: a", 100, 64)


def test_pieces_escape_what_is_text():
    link = parsed(chip(("a/b&c", "x y"), 7, HOSTILE, 0.48)).find("a")
    assert link.get("data-latent") == "7" and link.find("span").text == HOSTILE and link.find("small").text == ".48"
    told = parsed(problem(f"{HOSTILE}\n  (a | b\n       ^"))
    assert told.find(".//p").text == HOSTILE and told.find(".//pre").text == "  (a | b\n       ^"
    assert parsed(problem("short")).find(".//pre") is None
    assert "--share:1.000" in bar(2.0) and bar(0.5, beside=0.25).count("--share:0.250") == 1
    assert [percent(share) for share in (0, 0.0004, 0.012, 0.5)] == ["0%", "<0.1%", "1.2%", "50%"]


def test_a_context_ends_with_its_document():
    row = {
        "tokens": ["before", "<|endoftext|>", "a", " b", "c\n"],
        "activations": [0, 0, 0, 2.5, 1],
        "peak": 3,
        "value": 2.5,
    }
    root = parsed(context(row, 2.5))
    assert "".join(root.itertext()) == "2.5a bc↵ " and root.find(".//mark").text == " b"
    far = {"tokens": ["x" * 30] * 9, "activations": [0.0] * 9, "peak": 4, "value": 1.0}
    assert "".join(parsed(context(far, 1.0)).itertext()) == "1" + "x" * 30 * 4  # two before, one after


def test_a_latents_page_says_what_is_stored(endpoints):
    feature = endpoints.feature(42)
    root = parsed(feature_page(feature, WIDTHS, HERE))
    titles = [one.text for one in root.iter("h3")]
    assert titles == ["Examples, strongest first", "Family", "Is it real?", "What it does to the next token"]
    lists = root.findall(".//ol[@class='contexts']")
    assert len(lists) == 5 and all(1 <= len(one.findall("li")) <= 3 for one in lists)
    rows = root.findall(".//section[@class='real']//tbody/tr")
    firings = [int(row.find("td").text.replace(",", "")) for row in rows]
    assert firings == [band["firings"] for band in reversed(feature["bands"])] and sum(firings) == feature["count"]
    chips = {int(one.get("data-latent")) for one in root.findall(".//section[@class='family']//a")}
    assert chips <= {one["latent"] for part in feature["family"].values() for one in part} and len(chips) > 5
    head = parsed(feature_head(feature | {"label": HOSTILE}, HERE))
    assert head.find(".//input").get("value") == HOSTILE and head.find(".//p").text == feature["verdict"]


def test_a_latent_of_an_older_index_has_a_page_and_one_that_never_fired_too(endpoints):
    feature = endpoints.feature(5)
    family = {part: [] for part in feature["family"]}
    older = feature | {"bands": [], "own_tokens": [], "candidates": [], "family": family}
    root = parsed(feature_page(older, WIDTHS, HERE))
    assert len(root.findall(".//ol[@class='contexts']")) == 1
    assert "No parent and no children" in "".join(root.itertext())
    silent = {"count": 0, "max": 0.0, "contexts": [], "quantile_contexts": [], "promoted": [], "suppressed": []}
    silent |= {"histogram": {"edges": [], "counts": []}, "neighbours": [], "cofiring": []}
    titles = [one.text for one in parsed(feature_page(older | silent, WIDTHS, HERE)).iter("h3")]
    assert titles == ["Family"]  # an encoder's latent has no logits


def test_a_family_is_a_picture_with_its_address(endpoints):
    card = endpoints.family_card(42, "embedded", "", 0.4, "https://example.org/?latent=42&tab=explore")
    root = ElementTree.fromstring(card)
    words = " ".join(root.itertext())
    assert "Latent 42" in words and "https://example.org/?latent=42&tab=explore" in words
    drawn = {int(one.get("data-latent")) for one in root.iter() if one.get("data-latent")}
    could = {one["latent"] for one in endpoints.feature(42)["family"]["could_refine"] if one["score"] >= 0.4}
    assert {42} | could <= drawn
    assert int(root.get("height")) > int(root.findall("*")[-2].get("height"))
    hostile = family_card(card, HOSTILE, HOSTILE, HOSTILE)
    assert not list(ElementTree.fromstring(hostile).iter("script"))


def test_labels_that_somebody_gave_come_first():
    index = FeatureIndex.open(embedded_sae_path())
    index.labels = {42: "digits", 99_999: "nobody"}
    labels = Labels(index, load_embedded_lm()[1])
    assert labels[42] == "digits" and labels.search("DIGITS") == [42] and labels[41] != ""
