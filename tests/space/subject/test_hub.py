"""What the page asks the Hub, against the loopback one: sizes before files, a bound on answers, memory of silence."""

import socket
import threading
import time

import pytest
import torch
from huggingface_hub import HfApi, constants

from hf_matryoshka_sae.assets import embedded_lm_path
from hf_matryoshka_sae.models import TopKSAE, TopKSAEConfig
from hf_matryoshka_sae.space import Library
from hf_matryoshka_sae.space.subject import hub as hub_module
from hf_matryoshka_sae.space.subject.hub import Hub, Repository, within


NAME = "somebody/sae"


def small_sae(folder, **fields) -> dict[str, bytes]:
    """The files of a random SAE on the embedded language model."""
    fields = {"d_in": 128, "num_latents": 32, "k": 4, "base_model": "embedded", "hookpoint": "model.layers.2"} | fields
    TopKSAE(TopKSAEConfig(**fields)).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def deaf(monkeypatch):
    """A Hub that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(20)
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(hub_module, "HfApi", lambda: HfApi(endpoint=address))
        yield address


def test_a_repository_is_known_by_one_request(hub, tmp_path):
    files = small_sae(tmp_path / "sae")
    commit = hub.add(NAME, files)
    found = Hub().repository(NAME)
    assert (found.commit, dict(found.sizes)) == (commit, {name: len(data) for name, data in files.items()})
    assert len(hub.requests) == 1


def test_an_sae_of_the_hub_is_opened_and_opens_without_it(hub, tmp_path):
    hub.add(NAME, {f"a/{name}": data for name, data in small_sae(tmp_path / "sae").items()})
    library = Library(tokens=300)
    first = library.open(NAME, "a")
    hub.fail(1, "503", times=1000)
    for library in (Library(tokens=300), Library(tokens=300, public=True)):
        again = library.open(NAME)
        assert again.place == "a" and torch.equal(again.sae.W_dec, first.sae.W_dec)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "nobody/nothing",
            "'nobody/nothing' cannot be opened: there is no such repository on the Hub, or it is private",
        ),
        ("nobody/nothing/at/all", "no name of a repository on the Hub"),
    ],
)
def test_what_the_hub_does_not_have_is_said(hub, name, message):
    with pytest.raises(ValueError, match=message):
        Library(tokens=300).open(name)


def test_what_is_too_large_is_refused_before_a_file_is_fetched(hub, tmp_path):
    files = small_sae(tmp_path / "sae")
    hub.add(NAME, files)
    size = sum(len(data) for data in files.values()) / 1e9
    with pytest.raises(ValueError, match=f"'{NAME}' has .* GB of weights; this page opens up to"):
        Library(tokens=300, public=True, most_gigabytes=size / 2).open(NAME)
    assert hub.bytes_sent("safetensors") == 0
    assert Library(tokens=300, public=True, most_gigabytes=2 * size).open(NAME).num_latents == 32


def test_a_language_model_that_is_too_large_is_refused_before_it_is_fetched(hub, tmp_path):
    hub.add(NAME, small_sae(tmp_path / "sae", base_model="somebody/lm"))
    hub.add("somebody/lm", {"config.json": b"{}", "model.safetensors": b"0" * 1_000_000, "other.h5": b"0" * 9_000_000})
    with pytest.raises(ValueError, match="The language model 'somebody/lm' has 0.0 GB of weights"):
        Library(tokens=300, public=True, most_gigabytes=5e-4).open(NAME)
    assert hub.bytes_sent("somebody/lm/resolve") == 0


def test_a_language_model_of_the_hub_is_loaded_from_the_files_it_needs(hub, tmp_path):
    files = {path.name: path.read_bytes() for path in embedded_lm_path().iterdir()}
    hub.add("somebody/lm", files | {"pytorch_model.bin": b"0" * 1000, "flax_model.msgpack": b"0", "code.py": b""})
    hub.add(NAME, small_sae(tmp_path / "sae", base_model="somebody/lm"))
    opened = Library(tokens=300).open(NAME)
    assert opened.data.model.name_or_path == opened.tokenizer.name_or_path == "somebody/lm"
    fetched = {request.path.rpartition("/")[2] for request in hub.requests if "somebody/lm/resolve" in request.path}
    assert "model.safetensors" in fetched and not fetched & {"pytorch_model.bin", "flax_model.msgpack", "code.py"}


def test_no_more_models_are_kept_than_fit(hub, tmp_path):
    lm = {path.name: path.read_bytes() for path in embedded_lm_path().iterdir()}
    for name in "abc":
        hub.add(f"lm/{name}", lm)
        hub.add(f"sae/{name}", small_sae(tmp_path / name, base_model=f"lm/{name}"))
    gigabytes = sum(len(data) for data in lm.values()) / 1e9
    library = Library(tokens=300, most_gigabytes=1.2 * gigabytes)
    first, second = library.look("sae/a"), library.look("sae/b")
    assert library.look("sae/a") is first and library.look("sae/b") is second
    library.look("sae/c")
    assert library.look("sae/b") is second and library.look("sae/a") is not first


def test_a_hub_that_does_not_answer_is_told_at_once_and_remembered(deaf):
    library, began = Library(tokens=300), time.monotonic()
    library.hub.seconds = 0.3
    with pytest.raises(
        ValueError, match=f"'{NAME}' cannot be opened: {deaf} (did not answer within|cannot be reached)"
    ):
        library.open(NAME)
    assert 0.2 < time.monotonic() - began < 2
    began = time.monotonic()
    with pytest.raises(ValueError, match="'other/sae' cannot be opened.*Try again in a minute"):
        library.open("other/sae")
    assert time.monotonic() - began < 0.2
    library.hub._silent.seconds = library.hub._silent._until = 0
    with pytest.raises(ValueError, match="cannot be opened"):
        library.open("other/sae")
    assert time.monotonic() - began > 0.2


def test_nobody_waits_for_who_opens_something_else(hub, tmp_path):
    """Neither those who open another repository, nor those who read a text with what is open."""
    files, asked, answer = small_sae(tmp_path / "sae"), threading.Event(), threading.Event()
    hub.add("slow/sae", files)
    hub.add(NAME, files)

    def slowly(number, method, path):
        if "slow/sae/resolve" in path:
            asked.set()
            answer.wait(10)

    hub.watch(slowly)
    library, found = Library(tokens=300), []
    thread = threading.Thread(target=lambda: found.append(library.open("slow/sae")))
    thread.start()
    assert asked.wait(10)
    assert library.open(NAME).num_latents == 32 and not found
    for lane in library.lanes.values():
        with lane.turn():
            pass
    answer.set()
    thread.join(20)
    assert found[0].num_latents == 32


def test_a_call_that_hangs_is_left_to_itself():
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        within(0.05, lambda: time.sleep(0.5))
    assert time.monotonic() - began < 0.4 and within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(5, lambda: {}["nothing"])


SIZES = {
    "config.json": 10,
    "model.safetensors": 1000,
    "README.md": 5,
    "a/config.json": 10,
    "a/model-00001-of-00002.safetensors": 100,
    "a/model.safetensors.index.json": 3,
    "a/features/latents.parquet": 5000,
    "b/cfg.json": 10,
    "b/resid/sae_weights.safetensors": 200,
    "c.pt": 300,
}


@pytest.mark.parametrize(
    "place, size",
    [("", 1010), ("a", 123), ("b/resid", 220), ("c.pt", 310)],
)
def test_the_files_of_an_sae_are_its_own(place, size):
    found = Repository(NAME, "0" * 40, SIZES)
    assert found.bytes_of(found.files_of_sae(place)) == size
