"""Pieces of the page: HTML, links, trees, comparisons and labels, against what they are made of."""

import math
import re
from collections import Counter
from urllib.parse import parse_qsl
from xml.etree import ElementTree

import pytest
import torch

from hf_matryoshka_sae.assets import embedded_sae_path, load_embedded_lm
from hf_matryoshka_sae.features import FeatureIndex
from hf_matryoshka_sae.features.patterns.vocabulary import vocabulary_of
from hf_matryoshka_sae.models import TopKSAE, TopKSAEConfig
from hf_matryoshka_sae.progressive import prune
from hf_matryoshka_sae.space import Library
from hf_matryoshka_sae.space.looks import html
from hf_matryoshka_sae.space.looks.labels import Labels
from hf_matryoshka_sae.space.looks.links import View, latent_link
from hf_matryoshka_sae.space.subject.comparing import _matches, compare
from hf_matryoshka_sae.space.subject.library import ROOT
from hf_matryoshka_sae.space.subject.opened import Pruning


HOSTILE = "<script>alert('a & \"b\"')</script>"
WIDTHS = [64, 192, 448, 960, 2048]


def svg(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)  # well-formed, too


# HTML


def test_tokens_are_text_and_shaded_by_value():
    texts = ["<b>", "&amp;", "\"'", "\n", "\t", "\r", "low", "none"]
    values = [4.0, -2.0, 1.0, 8.0, 3.0, 3.0, 0.01, math.nan]
    found = html.tokens(texts, values, 4.0)
    root = svg(found)
    spans = [one for one in root.iter() if "token" in one.get("class", "").split()]
    shares = [float(re.search(r"--share:([\d.]+)", span.get("style"))[1]) for span in spans]
    assert shares == [1.0, 0.5, 0.25, 1.0, 0.75, 0.75]
    assert [span.text for span in spans] == ["<b>", "&amp;", "\"'", "↵\n", "⇥\t", "␍"]
    assert ["below" in span.get("class").split() for span in spans] == [False, True] + [False] * 4
    assert "".join(root.itertext()) == "<b>&amp;\"'↵\n⇥\t␍lownone"
    assert "<b>" not in found


def test_the_peak_is_marked_whatever_its_value():
    for value in (math.nan, 0.0, -1.0, math.inf, 3.0):
        root = svg(html.tokens(["a", "b", "c"], [0.0, value, 0.0], 3.0, peak=1))
        assert [mark.text for mark in root.iter("mark")] == ["b"]
        assert "".join(root.itertext()) == "abc"
    assert "".join(svg(html.tokens(["a"], [0.0], 0.0)).itertext()) == "a"


def test_a_table_escapes_its_head_and_caption():
    found = html.table([HOSTILE, "n"], [["<b>cell</b>", "1"]], HOSTILE, numbers=(1,))
    assert "<script" not in found and "<td><b>cell</b></td>" in found
    assert found.count("&lt;script&gt;") == 2 and found.count("class=number") == 2


def test_a_latents_name_is_a_link_to_it():
    root = svg(f"<p>{html.latent_name('a/b&c', 'x y', 7, HOSTILE)}</p>")
    link = root.find("a")
    assert link.get("data-latent") == "7" and root.find("span").text == HOSTILE
    view, problems = View.of(dict(parse_qsl(link.get("href").lstrip("?"))))
    assert (view.sae, view.place, view.tab, view.latent, problems) == ("a/b&c", "x y", "explore", 7, [])


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_no_number_is_a_dash(value):
    assert html.number(value) == "–" and html.number(1234.5678) == "1235"


# Links


@pytest.mark.parametrize(
    "view",
    [
        View(),
        View("a/b", "model.layers.3", "explore", "energy", 512, 8, 0, "[re `\\s?\\d+`] &=+#%"),
        View(latent=0, tab="explore"),
        View("C:\\x y", "(the root)", q=" the"),
        View("a/b", q="☃ 日本"),
    ],
)
def test_a_link_opens_what_it_was_made_of(view):
    found, problems = View.of(dict(parse_qsl(view.query().lstrip("?"))), default="another/one")
    assert found == view and not problems


def test_a_latents_link_has_the_latent_even_if_it_is_0():
    assert dict(parse_qsl(latent_link("a/b", "p", 0).lstrip("?")))["latent"] == "0"
    assert "place" not in latent_link("a/b", ROOT, 0)
    assert View.of({"latent": "0"})[0] == View(latent=0, tab="explore")
    assert View.of({"latent": "3", "tab": "tree"})[0].tab == "explore"


@pytest.mark.parametrize("text", ["x", "1.5", "-1", "+1", "1e3", "٣", "²", "0x1", "1 2", HOSTILE, "nan"])
@pytest.mark.parametrize("name", ["width", "k", "latent"])
def test_what_is_no_number_is_told_and_left_out(name, text):
    view, problems = View.of({name: text, "sae": "a/b"})
    assert view == View("a/b") and len(problems) == 1 and name in problems[0] and text[:40] in problems[0]


def test_links_that_somebody_else_made_are_borne():
    view, problems = View.of({"tab": "nothing", "utm_source": "x", "__theme": "dark", "__class__": "x", "sae": "  "})
    assert view == View() and len(problems) == 1 and "no tab 'nothing'" in problems[0]
    huge, problems = View.of({"width": "9" * 5000, "latent": "9" * 5000})
    assert huge.width >= 10**17 and huge.latent >= 10**17 and not problems


@pytest.fixture(scope="module")
def index() -> FeatureIndex:
    return FeatureIndex.open(embedded_sae_path())


# Labels


def test_peak_tokens_are_those_of_the_contexts(index):
    found = index.peak_tokens()
    assert len(found) == 2048
    for latent in range(0, 2048, 69):
        contexts = [one for one in index.contexts(latent) if one.kind == "top"]
        assert found[latent] == [int(one.token_ids[one.peak]) for one in contexts]
        assert [one.value for one in contexts] == sorted((one.value for one in contexts), reverse=True)


def test_peak_tokens_follow_the_latents_of_a_pruned_sae(index):
    sae = Library(tokens=300).open("embedded").sae
    pruned = prune(sae, 100, by="random")
    assert pruned.latent_ids.tolist() != list(range(100))
    whole = index.peak_tokens()
    assert index.for_sae(pruned).peak_tokens() == [whole[latent] for latent in pruned.latent_ids.tolist()]


def test_labels_are_the_most_frequent_peaks(index):
    _, tokenizer = load_embedded_lm()
    texts = vocabulary_of(tokenizer).texts
    labels = Labels(index, tokenizer)
    checked = 0
    for latent in range(0, 2048, 41):
        peaks = [texts[one.token_ids[one.peak]] for one in index.contexts(latent) if one.kind == "top"]
        count = Counter(text.strip() for text in peaks)
        if "" in count:
            continue  # written with signs for what is not seen
        checked += 1
        shown = labels[latent].split(" · ")
        assert [count[text] for text in shown] == sorted(count.values(), reverse=True)[:3]
    assert checked > 20
    for latent in labels.search("RETURN"):
        assert "return" in labels[latent].lower()
    assert {n for n in range(2048) if "return" in labels[n].lower()} == set(labels.search("RETURN")) != set()


def test_labels_read_one_by_one_are_the_same(index, monkeypatch):
    _, tokenizer = load_embedded_lm()
    at_once = Labels(index, tokenizer)
    monkeypatch.setattr("hf_matryoshka_sae.space.looks.labels._ALL_AT_ONCE", 10)
    texts, feature = vocabulary_of(tokenizer).texts, index.feature(42)
    assert Labels(index, tokenizer)[42] == " · ".join(texts[token].strip() for token in feature.own_tokens[:3])
    monkeypatch.setitem(index.__dict__, "columns", index.columns - {"own_tokens"})  # of an earlier version
    one_by_one = Labels(index, tokenizer)
    assert [one_by_one[latent] for latent in range(0, 2048, 201)] == [at_once[n] for n in range(0, 2048, 201)]
    with pytest.raises(ValueError, match="at most"):
        one_by_one.search("a")
    assert Labels(None, tokenizer)[3] == ""


# Comparing


def sae_of(rows: torch.Tensor) -> TopKSAE:
    sae = TopKSAE(TopKSAEConfig(d_in=rows.shape[1], num_latents=len(rows), k=2))
    sae.W_dec.data = rows.clone()
    return sae


def test_a_planted_copy_is_found():
    torch.manual_seed(3)
    rows = torch.nn.functional.normalize(torch.randn(50, 64), dim=1)
    order = torch.randperm(50)
    copy = (rows * torch.rand(50, 1).add(0.5) + 0.01 * torch.randn(50, 64))[order]
    copy[:5] = torch.randn(5, 64)  # five are other features
    numbers, other_numbers = torch.arange(100, 150), torch.arange(200, 250)
    found = _matches(sae_of(rows), sae_of(copy), numbers, other_numbers, 50)
    planted = {(100 + int(order[place]), 200 + place) for place in range(5, 50)}
    high = {(left, right) for left, right, cosine in found["pairs"] if cosine > 0.7}
    assert high == planted
    assert found["share_left"] == pytest.approx(45 / 50) == found["share_right"]
    assert set(found["alone"]) == {100 + int(place) for place in order[:5]} and found["count_alone"] == 5
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], copy[None], dim=2)
    assert found["mean_cosine"] == pytest.approx(float(cosines.amax(1).mean()), abs=1e-5)
    mutual = sum(int(cosines[:, right].argmax()) == left for left, right in enumerate(cosines.argmax(1).tolist()))
    assert found["mutual"] == mutual == len(found["pairs"])
    values = [cosine for *_, cosine in found["pairs"]]
    assert values == sorted(values, reverse=True)


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(tokens=500)


def test_two_prunings_of_one_sae_are_counted_as_sets(library):
    opened = library.open("embedded")
    left, right = Pruning("energy", 500), Pruning("frequency", 300)
    found = compare((opened, left), (opened, right), shown=7)
    one, two = set(opened.order("energy")[:500].tolist()), set(opened.order("frequency")[:300].tolist())
    kept = found["kept"]
    assert found["same_sae"] and found["same_place"] and "matches" not in found
    assert (kept["both"], kept["count_left"], kept["count_right"]) == (len(one & two), len(one - two), len(two - one))
    assert set(kept["only_left"]) <= one - two and len(kept["only_left"]) == min(7, len(one - two))
    assert set(kept["only_right"]) <= two - one
    assert [row["width"] for row in found["figures"]] == [500, 300]


def test_two_saes_are_matched_by_the_numbers_of_their_latents(library, tmp_path):
    opened = library.open("embedded")
    pruned = prune(opened.sae, 80, by="random")
    pruned.save_pretrained(tmp_path)
    other = library.open(str(tmp_path))
    found = compare((other, Pruning(width=80)), (opened, Pruning(width=2048)), shown=80)
    assert not found["same_sae"] and found["same_place"] and found["matches"]["share_left"] == 1
    expected = {(place, latent) for place, latent in enumerate(pruned.latent_ids.tolist())}
    assert {(left, right) for left, right, _ in found["matches"]["pairs"]} == expected


def test_saes_of_other_widths_are_not_compared(library):
    opened = library.open("embedded")

    class Other:
        sae = sae_of(torch.randn(8, 64))

    with pytest.raises(ValueError, match="width 128, the other of 64"):
        compare((opened, Pruning(width=64)), (Other(), Pruning(width=8)))
