"""What visitors can open, and what they are told where they cannot."""

import json
import os
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers
from safetensors.torch import load_file, save_file

from hf_matryoshka_sae.assets import embedded_sae_path
from hf_matryoshka_sae.models import TopKSAE, TopKSAEConfig
from hf_matryoshka_sae.space import Library
from hf_matryoshka_sae.space.limits import forget_own_token
from hf_matryoshka_sae.space.subject.library import ROOT


PLACE = "model.layers.2"


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(tokens=300, keep=50)


def small_sae(folder, **fields) -> str:
    """A random SAE on the embedded language model."""
    fields = {"d_in": 128, "num_latents": 32, "k": 4, "base_model": "embedded", "hookpoint": PLACE} | fields
    TopKSAE(TopKSAEConfig(**fields)).save_pretrained(folder)
    return str(folder)


def with_config(folder, drop=(), **fields) -> str:
    small_sae(folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in drop}))
    return str(folder)


def test_the_embedded_sae_is_opened_with_its_model(library):
    found = library.open("embedded")
    assert (found.place, found.num_latents, found.data.hookpoint) == (ROOT, 2048, PLACE)
    assert found.data.tokens == 300 and not found.sae.training
    assert library.open(" embedded ") is found and library.open("embedded", ROOT) is found


def test_an_sae_is_the_same_with_and_without_its_place(tmp_path):
    library, folder = Library(tokens=300), small_sae(tmp_path)
    assert library.open(folder, ROOT) is library.open(folder)


def test_saes_of_one_model_share_its_text(library, tmp_path):
    other = library.open(small_sae(tmp_path))
    assert other.data.model is library.open("embedded").data.model
    assert other.data.batches is library.open("embedded").data.batches


def test_a_folder_of_two_saes_lists_both_and_opens_each(library, tmp_path):
    small_sae(tmp_path / "a", num_latents=16)
    shutil.copytree(embedded_sae_path(), tmp_path / "b")
    assert list(library.saes(str(tmp_path))) == ["a", "b"]
    found = [library.open(str(tmp_path), place) for place in ("a", "b", "")]
    assert [one.num_latents for one in found] == [16, 2048, 16] and [one.place for one in found] == ["a", "b", "a"]
    assert found[0].index is None and found[1].index is not None


def test_what_is_looked_at_stays(tmp_path):
    library = Library(tokens=300, keep=2)
    names = [small_sae(tmp_path / name) for name in ("one", "two", "three")]
    first, second = library.open(names[0]), library.open(names[1])
    library.open(names[0])
    library.open(names[2])
    assert library.open(names[0]) is first and library.open(names[1]) is not second


def test_many_who_come_at_once_open_it_once(monkeypatch):
    library, opened, start = Library(), [], threading.Barrier(8)

    class Found:
        place, reader, load = ROOT, SimpleNamespace(gigabytes=0), lambda self: None

    def slow(source, place):
        opened.append((source, place))
        threading.Event().wait(0.2)
        return Found()

    monkeypatch.setattr(library, "_open", slow)
    monkeypatch.setattr(library, "saes", lambda source: {ROOT: None})
    found = []

    def visit():
        start.wait()
        found.append(library.open("somebody/sae"))

    visitors = [threading.Thread(target=visit) for _ in range(8)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert opened == [("somebody/sae", "")] and len(found) == 8 and len({id(one) for one in found}) == 1


def test_another_model_than_the_sae_names_can_be_given(tmp_path):
    folder = small_sae(tmp_path, base_model="nobody/nothing")
    found = Library(tokens=300, model="embedded").open(folder)
    assert found.sae.config.base_model == "embedded" and found.data.tokens == 300
    with pytest.raises(ValueError, match="'nobody/nothing' cannot be loaded"):
        Library(tokens=300).open(folder)


# What cannot be opened


def test_an_unknown_repository_is_named(library):
    with pytest.raises(ValueError, match="'nobody/nothing' cannot be opened.*Check the name, or open 'embedded'"):
        library.open("nobody/nothing")


@pytest.mark.parametrize("source", ["", "  ", None])
def test_nothing_is_no_name(library, source):
    with pytest.raises(ValueError, match="Name a repository on the Hub"):
        library.open(source)


@pytest.mark.parametrize("source", ["a b/c/d", "x" * 5000, "a\0b", "~nobody-of-this-name/x", "../..//x", "\ud800"])
def test_what_is_no_name_at_all_is_a_value_error(library, source):
    with pytest.raises(ValueError, match=".+"):
        library.open(source)


def test_a_folder_without_an_sae_says_so(library, tmp_path):
    with pytest.raises(ValueError, match="holds no SAE"):
        library.open(str(tmp_path))


def test_places_that_are_there_are_named(library, tmp_path):
    small_sae(tmp_path / "a")
    small_sae(tmp_path / "b")
    with pytest.raises(ValueError, match="no SAE at 'c'. It holds: a, b"):
        library.open(str(tmp_path), "c")
    with pytest.raises(ValueError, match="no SAE at '../b'"):
        library.open(str(tmp_path), "../b")


@pytest.mark.parametrize("field", ["base_model", "hookpoint"])
def test_an_sae_of_an_unknown_place_cannot_be_measured(library, tmp_path, field):
    with pytest.raises(ValueError, match="does not say which language model and hookpoint.*--base_model"):
        library.open(small_sae(tmp_path, **{field: None}))


def test_the_sae_of_another_model_says_so(library, tmp_path):
    with pytest.raises(ValueError, match="width 64, but 'model.layers.2' of 'embedded' gives 128"):
        library.open(small_sae(tmp_path, d_in=64))


def test_a_hookpoint_that_the_model_lacks_says_which_there_are(library, tmp_path):
    with pytest.raises(ValueError, match="model.layers.9.*Near it: model.layers"):
        library.open(small_sae(tmp_path, hookpoint="model.layers.9"))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_latents": "many"},
        {"num_latents": -1},
        {"num_latents": 31},
        {"d_in": 3.5},
        {"k": 0},
        {"hookpoint": 3},
        {"base_model": ["embedded"]},
        {"format_version": 99},
        {"unknown": 1},
        {"drop": ["num_latents"]},
        {"drop": ["d_in"]},
    ],
    ids=str,
)
def test_a_damaged_config_is_a_message(library, tmp_path, fields):
    with pytest.raises(ValueError, match=".{11}"):
        library.open(with_config(tmp_path, **fields))


def test_a_config_that_is_no_json_is_a_message(library, tmp_path):
    small_sae(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "topk')
    with pytest.raises(ValueError, match="config.json is no JSON"):
        library.open(str(tmp_path))


def without_decoder(path):
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "W_dec"}, path, {"format": "pt"})


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:500]),
    "empty": lambda path: path.write_bytes(b""),
    "without decoder": without_decoder,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_weights_are_a_message(library, tmp_path, damage):
    folder = small_sae(tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=str(tmp_path)):
        library.open(folder)


def test_weights_that_are_not_finite_are_a_message(library, tmp_path):
    sae = TopKSAE(TopKSAEConfig(d_in=128, num_latents=32, k=4, base_model="embedded", hookpoint=PLACE))
    sae.W_dec.data[0, 0] = torch.nan
    sae.b_dec.data[0] = torch.nan
    sae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="finite"):
        library.open(str(tmp_path))


def test_a_fork_of_the_process_finds_nothing_locked(tmp_path):
    library = Library(tokens=300)
    opened, inside, leave = library.open(small_sae(tmp_path)), threading.Event(), threading.Event()

    def hold():
        lane, named = library.lanes["text"].turn(), library._opening.held("somebody/sae")
        with lane, named, library._guard, library._loading, opened._reading, opened.reader._lock:
            inside.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    assert inside.wait(5)
    library.renew_locks()  # as in a fork, in which the holder is not
    with library.lanes["text"].turn(), library._opening.held("somebody/sae"):
        assert library._guard.acquire(timeout=1) and library._loading.acquire(timeout=1)
        assert opened._reading.acquire(timeout=1) and opened.reader._lock.acquire(timeout=1)
    leave.set()
    holder.join()


@pytest.mark.parametrize("options", [{"tokens": 0}, {"context_length": 1}, {"keep": 0}])
def test_a_library_of_nothing_is_refused(options):
    with pytest.raises(ValueError, match="must be at least 1, 2 and 1"):
        Library(**options)


# Folders that are none of a visitor's business


def test_closed_folders_stay_closed(tmp_path, monkeypatch):
    (tmp_path / "user").mkdir()
    folder = small_sae(tmp_path / "user" / "sae")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    closed = Library(tokens=300, public=True)
    said = {}
    for source in (folder, "user/sae", "./user/sae", "~/sae", str(embedded_sae_path()), os.sep, "."):
        with pytest.raises(ValueError, match="cannot be opened") as raised:
            closed.open(source)
        with pytest.raises(ValueError, match="cannot be opened"):
            closed.saes(source)
        said[source] = str(raised.value).replace(source, "")
    # Of a folder that is not there they are told the same.
    for there, not_there in ((folder, folder + "x"), ("user/sae", "user/other"), ("~/sae", "~/other")):
        with pytest.raises(ValueError, match="cannot be opened") as raised:
            closed.open(not_there)
        assert str(raised.value).replace(not_there, "") == said[there]
    assert closed.open("embedded").place == ROOT
    assert Library(tokens=300).open("user/sae").num_latents == 32


def test_strangers_open_no_folder_by_way_of_an_sae(tmp_path, monkeypatch):
    folder = small_sae(tmp_path / "sae", base_model=str(tmp_path))
    library = Library(tokens=300, public=True)
    monkeypatch.setattr(library, "_folder", lambda source, ours=False: folder if source == "somebody/sae" else None)
    with pytest.raises(ValueError, match="language model '.*' cannot be loaded: that is no name of a repository"):
        library.open("somebody/sae")


def test_what_was_named_at_the_start_is_open_to_strangers(tmp_path):
    folder = small_sae(tmp_path)
    assert Library(tokens=300, public=True, shown=[folder]).open(folder).num_latents == 32


def test_strangers_do_not_read_with_this_machines_token(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    assert build_hf_headers().get("authorization") == "Bearer hf_loopback"
    forget_own_token()
    assert "authorization" not in build_hf_headers()
    assert build_hf_headers(token="hf_theirs")["authorization"] == "Bearer hf_theirs"
