"""Taking a pruned SAE along: what the page does with tokens, and what it leaves behind."""

import os
import time

import pytest
import torch
from transformers import AutoModel


gr = pytest.importorskip("gradio")

from gradio import oauth  # noqa: E402

from hf_matryoshka_sae.assets import embedded_sae_path  # noqa: E402
from hf_matryoshka_sae.features import FeatureIndex  # noqa: E402
from hf_matryoshka_sae.space.endpoints import Endpoints  # noqa: E402
from hf_matryoshka_sae.space.page import Page  # noqa: E402
from hf_matryoshka_sae.space.subject.exporting import export  # noqa: E402
from hf_matryoshka_sae.space.subject.library import Library  # noqa: E402
from hf_matryoshka_sae.space.subject.opened import Pruning  # noqa: E402


OPEN = ("embedded", "")


@pytest.fixture(scope="module")
def page(endpoints) -> Page:
    return Page(endpoints.library, "embedded")


@pytest.fixture
def tab(page):
    return page.prune


def visitor(token: str) -> gr.OAuthToken:
    return gr.OAuthToken(token=token, scope="write-repos", expires_at=int(time.time()) + 3600)


def test_a_visitor_who_is_logged_in_pushes_to_their_own_repository(tab, hub):
    said = tab.push_logged_in(OPEN, "energy", 64, 16, "somebody/small", "", False, visitor("hf_loopback"))
    assert "somebody/small" in said and "hf_loopback" not in said
    pushed = AutoModel.from_pretrained("somebody/small")
    whole = AutoModel.from_pretrained(embedded_sae_path())
    assert sorted(pushed.latent_ids.tolist()) == list(range(64))
    assert torch.equal(pushed.W_enc, whole.W_enc[pushed.latent_ids])


def test_nobody_pushes_with_the_servers_own_token_on_a_space(tab):
    with pytest.raises(ValueError, match="Log in with Hugging Face first"):
        tab.push_logged_in(OPEN, "trained", 64, 16, "somebody/small", "", False, None)


@pytest.mark.parametrize("name", ["", "small", "a/b/c"])
def test_a_repository_has_an_owner_and_a_name(tab, name):
    with pytest.raises(ValueError, match="your-name/its-name"):
        tab.push_with_token(OPEN, "trained", 64, 16, name, "hf_loopback", True)


def test_old_downloads_are_removed(endpoints, tmp_path):
    opened = endpoints.library.open("embedded")
    first = export(opened, Pruning(width=8), tmp_path)
    os.utime(first, (0, 0))
    second = export(opened, Pruning("energy", 9, 3), tmp_path)
    assert (first.name, second.name) == ("embedded-trained-8.zip", "embedded-energy-9-k3.zip")
    assert second.is_file() and not first.exists()
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path != second.parent]


def test_a_page_has_a_login_on_a_space_alone(endpoints, page, monkeypatch):
    def has_login(page: Page) -> bool:
        return any(isinstance(block, gr.LoginButton) for block in page.blocks.blocks.values())

    assert not has_login(page)
    pytest.importorskip("authlib")
    monkeypatch.setenv("SYSTEM", "spaces")
    monkeypatch.setenv("SPACE_ID", "somebody/space")
    for name in ("OAUTH_CLIENT_ID", "OAUTH_CLIENT_SECRET", "OAUTH_SCOPES", "OPENID_PROVIDER_URL"):
        monkeypatch.setattr(oauth, name, "https://somewhere")
    assert has_login(Page(endpoints.library, "embedded"))


def test_strangers_push_with_a_token_of_their_own(tab, monkeypatch):
    monkeypatch.setattr(tab.endpoints.library, "public", True)
    with pytest.raises(ValueError, match="Give a token"):
        tab.push_with_token(OPEN, "trained", 64, 16, "somebody/small", " ", True)


def test_one_curve_has_one_measure(tab, monkeypatch):
    """The fixture's page reads other tokens than the stored curve is of: what it measures stands apart."""
    asked = OPEN, {"time": 0}, "trained", 0
    (state, *_) = tab.start_over(*asked, None)
    assert len(state["rows"]) == 12
    monkeypatch.setattr(tab.endpoints, "curve_point", lambda *_: {"width": 137, "fvu": 0.3})
    known, _ = tab.measure_width(*asked, state, 137)
    assert [row["width"] for row in known["rows"]] == [137]
    monkeypatch.setattr(tab.endpoints.library, "measures_like", lambda *_: True)
    known, _ = tab.measure_width(*asked, state, 137)
    assert [row["width"] for row in known["rows"]] == sorted([137, *(row["width"] for row in state["rows"])])


def test_the_page_measures_on_what_the_shipped_index_is_of():
    stored = FeatureIndex.open(embedded_sae_path()).showcase()
    assert Library().measures_like(stored, "batch_topk")
    assert not Library().measures_like(stored, "topk")  # selects otherwise at each width
    assert not Library(tokens=3000).measures_like(stored, "batch_topk")
    assert not Library("somebody/text").measures_like(stored, "batch_topk")
    assert not Library().measures_like(stored | {"source": None}, "batch_topk")


@pytest.mark.slow
def test_a_measured_width_is_the_stored_one():
    endpoints = Endpoints(Library())
    (stored,) = (row for row in endpoints.showcase(*OPEN)["curve"]["trained"] if row["width"] == 192)
    measured = endpoints.measure(*OPEN, "trained", 192)
    for name in ("fvu", "l0", "ce", "recaptured_zero"):
        assert measured[name] == pytest.approx(stored[name], rel=1e-4)
