"""What the API answers about the embedded SAE, against the index, the library's functions and plain loops."""

import json
import math
import pickle
import time

import pytest
import torch

from hf_matryoshka_sae.assets import embedded_sae_path
from hf_matryoshka_sae.features import FeatureIndex, search_latents, search_words, text_features
from hf_matryoshka_sae.models import TopKSAE, TopKSAEConfig
from hf_matryoshka_sae.space.subject.answers import SORTS
from hf_matryoshka_sae.steering import reconstruct_text, steer

from .conftest import TOKENS


TEXT = "The function returns a new <b>list</b> & 'the' items."
WIDTHS = [64, 192, 448, 960, 2048]


@pytest.fixture(scope="module")
def opened(endpoints):
    return endpoints.library.open("embedded")


@pytest.fixture(scope="module")
def index() -> FeatureIndex:
    return FeatureIndex.open(embedded_sae_path())


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> str:
    """An SAE without an index."""
    folder = tmp_path_factory.mktemp("bare")
    torch.manual_seed(1)
    config = TopKSAEConfig(d_in=128, num_latents=64, k=6, base_model="embedded", hookpoint="model.layers.2")
    TopKSAE(config).save_pretrained(folder)
    return str(folder)


def plain(value):
    """The value as it comes out of JSON as browsers read it: without NaN and infinities."""
    again = json.loads(json.dumps(value, allow_nan=False))
    assert again == value  # nothing became another type on the way
    return value


def test_an_sae_is_described(endpoints):
    found = plain(endpoints.describe())
    config = json.loads((embedded_sae_path() / "config.json").read_text())
    for name in ("d_in", "num_latents", "prefix_widths", "k", "base_model", "hookpoint"):
        assert found[name] == config[name]
    assert (found["type"], found["activation"]) == (config["model_type"], config["activation"])
    assert found["tokens"] == TOKENS and found["places"] == [found["place"]]
    assert found["index_tokens"] == json.loads((embedded_sae_path() / "features/index.json").read_text())["tokens"]


def test_an_sae_without_an_index_says_so(endpoints, bare):
    assert plain(endpoints.describe(bare))["index_tokens"] is None
    for ask in (
        lambda: endpoints.feature(3, bare),
        lambda: endpoints.latents(bare),
        lambda: endpoints.family(3, bare),
    ):
        with pytest.raises(ValueError, match="no feature index yet. Build it under Explore, or with `matryoshka"):
            ask()


@pytest.mark.slow
def test_without_an_index_the_rest_still_answers(endpoints, bare):
    assert [hit["label"] for hit in plain(endpoints.search("the", sae=bare, top=2))] == ["", ""]
    read = plain(endpoints.read_text(TEXT, bare))
    assert all(len(token) <= 5 for token in read["top"]) and read["latents"][0]["label"] == ""
    strongest = read["latents"][0]["latent"]
    assert plain(endpoints.steer(TEXT, strongest, sae=bare, new_tokens=2))["unit"] is None
    assert plain(endpoints.measure(bare))["k"] is None
    assert plain(endpoints.measure(bare, k=3))["l0"] == 3


def test_measuring_gives_the_figures_of_the_width(endpoints, opened):
    found, narrow = plain(endpoints.measure()), plain(endpoints.measure(width=64))
    assert (found["width"], narrow["width"], found["tokens"]) == (2048, 64, TOKENS)
    assert found["fvu"] < narrow["fvu"] < 1 and found["ce"] < narrow["ce"]
    with torch.no_grad():
        states = torch.cat(list(opened.data.activations())).double()
        l0 = (opened.sae.truncate(64).eval().encode(states.float()).to_dense() > 0).sum(1).double().mean()
        error = (opened.sae.truncate(64).eval()(states.float()).reconstruction.double() - states).square().sum()
    assert narrow["l0"] == pytest.approx(float(l0), rel=1e-5)
    assert narrow["fvu"] == pytest.approx(float(error / (states - states.mean(0)).square().sum()), rel=1e-4)
    weights = 64 * (2 * 128 + 1 + 1) * 4 + 128 * 4 + 64 * 8  # rows, biases, thresholds; b_dec; latent_ids
    assert narrow["size_mb"] == pytest.approx(weights / 1e6)


def test_a_feature_is_what_the_index_has(endpoints, index):
    for latent in (0, 107, 1735):
        found, expected = plain(endpoints.feature(latent)), index.feature(latent)
        assert (found["latent"], found["latent_id"], found["count"]) == (latent, expected.latent_id, expected.count)
        assert found["energy"] == expected.mean_square and found["max"] == expected.max
        assert found["histogram"]["counts"] == expected.histogram[1].tolist()
        assert len(found["histogram"]["edges"]) == len(found["histogram"]["counts"]) + 1
        assert sum(found["histogram"]["counts"]) == found["count"]
        assert [[other, value] for other, value, _ in found["neighbours"]] == [list(p) for p in expected.neighbours]
        assert [child for child, *_ in found["children"]] == expected.children
        assert (found["parent"] or [None])[0] == expected.parent
        assert found["widths"] == [width for width in WIDTHS if latent < width]
        assert len(found["contexts"]) == len(expected.top_contexts)
        assert sum(map(len, found["quantile_contexts"])) == sum(map(len, expected.quantile_contexts.values()))
        for context, there in zip(found["contexts"], expected.top_contexts, strict=True):
            assert context["activations"][context["peak"]] == context["value"] == pytest.approx(there.value)
            assert len(context["tokens"]) == len(context["activations"]) == len(there.token_ids)


@pytest.mark.parametrize("latent", [-1, 2048, 10**12, 1.5, True, "7", None])
def test_a_latent_there_is_not_is_said(endpoints, latent):
    for ask in (
        lambda: endpoints.feature(latent),
        lambda: endpoints.family(latent),
        lambda: endpoints.activations(TEXT, latent),
        lambda: endpoints.steer(TEXT, latent),
    ):
        with pytest.raises(ValueError, match="numbered 0 to 2047"):
            ask()


# The table of latents


@pytest.mark.parametrize("sort", list(SORTS))
@pytest.mark.parametrize("descending", [True, False])
def test_latents_come_in_order(endpoints, index, sort, descending):
    column = index.table([SORTS[sort]])[SORTS[sort]].to_pylist()
    pages = [
        plain(endpoints.latents(sort=sort, descending=descending, start=at, count=700)) for at in range(0, 2800, 700)
    ]
    rows = [row for page in pages for row in page]
    assert [len(page) for page in pages] == [700, 700, 648, 0]
    assert sorted(row["latent"] for row in rows) == list(range(2048))
    assert [column[row["latent"]] for row in rows] == sorted(column, reverse=descending)


def test_latents_are_told_by_their_tokens(endpoints):
    rows = plain(endpoints.latents(count=1000)) + plain(endpoints.latents(start=1000, count=1000))
    rows += plain(endpoints.latents(start=2000, count=1000))
    found = plain(endpoints.latents(contains=" DEF ", count=1000))
    assert found == [row for row in rows if "def" in row["label"].lower()] != []
    assert all(row["smallest_width"] == min(w for w in WIDTHS if w > row["latent"]) for row in rows)
    assert endpoints.latents(contains="no label holds this") == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sort": "beauty"}, "sorted by energy, frequency"),
        ({"start": -1}, "`start`"),
        ({"count": 0}, "`count`"),
        ({"count": 1001}, "`count`"),
    ],
)
def test_what_the_table_cannot_do_is_said(endpoints, options, message):
    with pytest.raises(ValueError, match=message):
        endpoints.latents(**options)


def test_a_family_is_the_tree_around_a_latent(endpoints, index):
    parents = index.table(["parent"])["parent"].to_pylist()
    child = next(latent for latent in range(2048) if parents[latent] >= 0 and parents[parents[latent]] >= 0)
    found = plain(endpoints.family(child))
    assert found["ancestors"][:2] == [parents[child], parents[parents[child]]]
    root = found["ancestors"][-1]
    below = plain(endpoints.family(root))["below"]
    assert child in [row["latent"] for row in below[len(found["ancestors"]) - 1]]
    assert {row["latent"] for row in below[0]} == {n for n in range(2048) if parents[n] == root}


# Search


@pytest.mark.parametrize("width", [0, 448])
def test_search_finds_what_search_latents_does(endpoints, opened, width):
    found = plain(endpoints.search("[re `\\s?\\d+`]", width=width, top=6))
    expected = search_latents("[re `\\s?\\d+`]", opened.sae, opened.data, 6, width or 2048, show=False)
    assert [{k: v for k, v in hit.items() if k != "label"} for hit in found] == [vars(hit) for hit in expected]
    assert [hit["label"] for hit in found] == [opened.labels[hit["latent"]] for hit in found]
    found = plain(endpoints.search("return, the", "words", width=width, top=3))
    expected = search_words(["return", "the"], opened.sae, opened.data, 3, width or 2048, show=False)
    assert [hit["cosine"] for hit in found] == [hit.cosine for hit in expected]


@pytest.mark.parametrize(
    "pattern",
    ["[re `(a+)+$`] [re `(a|a)*b`] .* [re `((.*)*)*x`]", "(. | .*)* [v=.] .* [v]", "(.* .*){1,50} zq", "a{1000000000}"]
    + ["[re `[`]", "(" * 500, "[re `((((((a{900}){900}){900}){900}){900})`]", "zqzqzq", "  ", ""],
)
def test_a_hostile_pattern_ends_with_a_message(endpoints, pattern):
    start = time.monotonic()
    with pytest.raises(ValueError, match=".+"):
        endpoints.search(pattern)
    assert time.monotonic() - start < 20


def test_what_cannot_be_searched_for_is_said(endpoints):
    with pytest.raises(ValueError, match="'pattern' or for 'words'"):
        endpoints.search("the", kind="regex")
    with pytest.raises(ValueError, match="2,001 characters"):
        endpoints.search("a" * 2001)
    with pytest.raises(ValueError, match="empty list"):
        endpoints.search(" , ,", kind="words")


# Texts


def test_a_text_is_read_as_text_features_does(endpoints, opened):
    for width in (0, 192):
        found = plain(endpoints.read_text(TEXT, width=width, top=3))
        model, tokenizer = opened.data.model, opened.tokenizer
        expected = text_features(opened.sae, model, tokenizer, TEXT, width=width or 2048, top=3)
        assert found["tokens"] == expected.tokens and found["width"] == (width or 2048)
        assert found["top"] == [[list(pair) for pair in token] for token in expected.top]
        for row in found["latents"]:
            assert row["activations"] == expected.activations(row["latent"]).tolist()
            assert max(row["activations"]) == row["max"]
            assert plain(endpoints.activations(TEXT, row["latent"], width=width))["activations"] == row["activations"]


def test_markup_stays_text(endpoints):
    assert "<b>list</b> & 'the'" in "".join(endpoints.read_text(TEXT)["tokens"])
    assert "<b>list</b> & 'the'" in "".join(endpoints.reconstruct(TEXT, new_tokens=0)["tokens"])


def test_a_text_is_reconstructed_as_reconstruct_text_does(endpoints, opened):
    found = plain(endpoints.reconstruct(TEXT, width=192, new_tokens=5))
    expected = reconstruct_text(opened.sae, opened.data.model, opened.tokenizer, TEXT, width=192, max_new_tokens=5)
    lost = expected.spliced_loss - expected.loss
    assert [value is None for value in found["lost"]] == lost.isnan().tolist() and found["lost"][:2] == [None, None]
    assert [value for value in found["lost"] if value is not None] == pytest.approx(lost[2:].tolist(), abs=1e-5)
    assert found["spliced_ce"] == pytest.approx(float(expected.spliced_loss[2:].mean()), abs=1e-5)
    assert found["ce"] == pytest.approx(float(expected.loss[2:].mean()), abs=1e-5)
    assert (found["plain"], found["spliced"]) == (expected.plain, expected.spliced)
    assert found["fvu"] == pytest.approx(expected.fvu) and found["l0"] == pytest.approx(expected.l0)


def test_one_word_has_no_losses(endpoints):
    found = plain(endpoints.reconstruct("a", new_tokens=1))
    assert found["ce"] is found["spliced_ce"] is found["fvu"] is None and set(found["lost"]) == {None}


def test_steering_is_that_of_steer_in_units_of_the_index(endpoints, opened, index):
    latent = endpoints.read_text(TEXT)["latents"][0]["latent"]
    found = plain(endpoints.steer(TEXT, latent, "clamp", -1.5, new_tokens=8))
    unit = index.feature(latent, contexts=False).max
    assert found["unit"] == unit and found["amount"] == pytest.approx(-1.5 * unit)
    model, tokenizer = opened.data.model, opened.tokenizer
    expected = steer(opened.sae, model, tokenizer, TEXT, latent, "clamp", -1.5, unit=unit, max_new_tokens=8)
    assert (found["plain"], found["steered"]) == (expected.plain, expected.steered)
    assert found["plain"] == endpoints.reconstruct(TEXT, new_tokens=8)["plain"]
    assert found["plain"] == plain(endpoints.steer(TEXT, latent, strength=0.0, new_tokens=8))["steered"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "push"}, "mode"),
        ({"strength": math.nan}, "finite"),
        ({"strength": math.inf}, "finite"),
        ({"strength": None}, "finite"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"new_tokens": 0}, "1 to 100 tokens"),
        ({"new_tokens": 101}, "1 to 100 tokens"),
        ({"new_tokens": math.nan}, "1 to 100 tokens"),
        ({"width": 3}, "numbered 0 to 2, got 7"),
        ({"width": 2049}, "between 1 and 2048"),
        ({"seed": 1.5}, "seed"),
        ({"text": "a " * 9000}, "too long"),
    ],
)
def test_what_cannot_be_steered_is_said(endpoints, options, message):
    with pytest.raises(ValueError, match=message):
        endpoints.steer(**({"text": TEXT, "latent": 7} | options))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "Write or paste a text"),
        (" \n\t ", "Write or paste a text"),
        (None, "Write or paste a text"),
        ("a" * 10**7, "10,000,000 characters long; at most 20,000"),
        ("a \ud800 b", "half a character, at place 2"),
        (7, "Expected a text"),
        ("<|endoftext|>", "special tokens alone"),
    ],
)
def test_a_text_that_cannot_be_read_is_said(endpoints, text, message):
    start = time.monotonic()
    for ask in (
        lambda: endpoints.read_text(text),
        lambda: endpoints.activations(text, 3),
        lambda: endpoints.reconstruct(text),
        lambda: endpoints.steer(text, 3),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    assert time.monotonic() - start < 5


def test_a_long_text_is_cut_and_says_so(endpoints, opened):
    text = "the list " * 200
    tokens = 1 + len(opened.tokenizer(text)["input_ids"])  # with the BOS token
    for new, found in (
        (0, plain(endpoints.read_text(text))),
        (10, plain(endpoints.reconstruct(text, new_tokens=10))),
    ):
        assert len(found["tokens"]) == 256 - new and found["left_out"] == tokens - 256 + new


def test_prunings_are_compared(endpoints):
    found = plain(endpoints.compare(width=100, other_width=64))
    assert [row["width"] for row in found["figures"]] == [100, 64] and found["same_sae"]
    assert found["kept"]["both"] == 64 and found["kept"]["count_left"] == 36 and found["kept"]["count_right"] == 0
    for row, again in zip(
        found["figures"], (endpoints.measure(width=100), endpoints.measure(ranking="energy", width=64)), strict=True
    ):
        assert {name: row[name] for name in again} == again


def test_two_saes_are_compared(endpoints, bare):
    found = plain(endpoints.compare(width=32, other=bare, other_ranking="frequency", other_width=16))
    assert not found["same_sae"] and found["same_place"] and "kept" not in found
    assert len(found["matches"]["pairs"]) == min(20, found["matches"]["mutual"]) > 0


def test_a_copy_for_another_process_is_the_same_object(endpoints):
    runner = endpoints.runner
    assert pickle.loads(pickle.dumps(runner)) is runner
    assert pickle.loads(pickle.dumps(runner.compute)) == runner.compute
    assert len(pickle.dumps(runner)) < 1000
