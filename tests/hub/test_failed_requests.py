"""Requests that fail for good, and bytes that come damaged: an OSError that says how to go on, and nothing half."""

import re
import time

import pytest
from huggingface_hub import constants

from hf_matryoshka_sae import MatryoshkaSAE
from hf_matryoshka_sae import hub as sae_hub
from hf_matryoshka_sae.hub.command import pull_main, push_main

from ..axes import each
from ..models.test_saving import assert_same_tensors
from .test_push import REPO, push, save_run


PLACE = "layers.0"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def run(tmp_path):
    """The folder of a run with one SAE, and that SAE."""
    (sae,) = save_run(tmp_path / "run", hookpoints=[PLACE]).values()
    return tmp_path / "run", sae


@pytest.fixture
def repo(hub, run, tmp_path, monkeypatch):
    """A repository with the SAE, and an empty cache."""
    push(run[0])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    return REPO


def fail(hub, act, tmp_path, monkeypatch, what: str, how: str, for_good: bool = True) -> None:
    """Do something once, and let the first of its requests in which a pattern is found fail from now on."""
    noted = []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "noted"))
    hub.watch(lambda number, method, path: noted.append((method, path)))
    act()
    hub.watch(None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "fresh"))
    request = next(request for request in noted if re.search(what, " ".join(request)))
    hub.fail_request(*request, 1, how, for_good)


PUSHES = [
    ("PUT", "503", "Error while uploading 'layers.0/model.safetensors'.*503"),
    ("/preupload/", "html", "Expecting value"),
    ("/commit/", "cut", "Unterminated|Expecting|delimiter"),
    ("/commit/", "500", "500"),
    ("/validate-yaml", "429", "429"),
    ("/repos/create", "drop", "disconnected"),
    ("lfs/objects/batch", "html", "Expecting value"),
]


@each(failure=PUSHES, command={"call": False, "command": True})
def test_a_push_that_fails_says_what_failed_and_goes_on(hub, run, tmp_path, monkeypatch, capsys, failure, command):
    (folder, sae), (what, how, reason) = run, failure
    fail(hub, lambda: push(folder), tmp_path, monkeypatch, what, how)
    whole = hub.files(REPO)
    hub.repos.clear()
    hub.objects.clear()
    message = rf"The push to {REPO} failed \(.*({reason}).*Nothing half was committed.*Push again"
    if command:
        assert push_main([str(folder), REPO, "--no_measure"]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        with pytest.raises(OSError, match=message):
            raise OSError(error)
    else:
        with pytest.raises(OSError, match=message):
            push(folder)
    assert REPO not in hub.repos or hub.files(REPO) in ({}, whole)
    hub.heal()
    push(folder)
    assert hub.files(REPO) == whole
    assert_same_tensors(sae_hub.load(REPO), sae)


PULLS = {
    "list": lambda: sae_hub.list_saes(REPO),
    "width": lambda: MatryoshkaSAE.from_pretrained(REPO, subfolder=PLACE, width=5),
    "whole": lambda: MatryoshkaSAE.from_pretrained(REPO, subfolder=PLACE),
    "many": lambda: sae_hub.load_many(REPO, width=5)[PLACE],
}


@pytest.mark.parametrize(
    ("pull", "what", "how"),
    [
        ("list", "GET .*config.json", "500"),
        ("list", "/resolve/", "drop"),
        ("width", f"{PLACE}/config.json", "drop"),
        ("width", "latents.index.json", "503"),
        ("width", "GET /tester/run/resolve/.*model.safetensors", "500"),
        ("whole", "model.safetensors", "503"),
        ("many", "model.digests.json", "429"),
        ("many", f"GET .*{PLACE}/config.json", "html"),
    ],
)
def test_a_pull_that_fails_says_so_and_goes_on(hub, repo, run, tmp_path, monkeypatch, pull, what, how):
    act = PULLS[pull]
    fail(hub, act, tmp_path, monkeypatch, what, how)
    with pytest.raises(OSError, match=f"{REPO}.*[Tt]he same call again"):
        act()
    hub.heal()
    found = act()
    if pull != "list":
        assert_same_tensors(found, run[1] if pull == "whole" else run[1].truncate(5))


def test_the_command_pull_ends_with_a_status_and_the_reason(hub, repo, tmp_path, monkeypatch, capsys):
    arguments = [repo, "--width", "5"]
    fail(hub, lambda: pull_main(arguments), tmp_path, monkeypatch, "model.safetensors", "drop")
    assert pull_main(arguments) == 2
    assert f"The connection to the Hub broke while {REPO} was fetched" in capsys.readouterr().err
    hub.heal()
    assert pull_main(arguments) == 0


@pytest.mark.parametrize("pull", ["list", "whole", "many"])
def test_whole_files_that_come_damaged_are_dropped_and_fetched_again(hub, repo, run, tmp_path, monkeypatch, pull):
    act, what = PULLS[pull], "model.safetensors" if pull == "whole" else "config.json"
    fail(hub, act, tmp_path, monkeypatch, f"GET .*{what}", "corrupt", for_good=False)
    with pytest.raises(OSError, match="damaged on the way.*the same call again"):
        act()
    found = act()
    if pull != "list":
        assert_same_tensors(found, run[1] if pull == "whole" else run[1].truncate(5))
