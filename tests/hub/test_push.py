"""A run becomes a repository in one commit, loads from it, and is never half there."""

import json
import os
import signal
import threading
import time

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_matryoshka_sae import convert
from hf_matryoshka_sae import hub as sae_hub
from hf_matryoshka_sae.features import FeatureIndex, build_index
from hf_matryoshka_sae.hub.card import _same
from hf_matryoshka_sae.models.checkpoint_files import WHOLE_TENSORS
from hf_matryoshka_sae.models.digests import DIGESTS_NAME, row_digests
from hf_matryoshka_sae.models.pieces import PIECES_INDEX_NAME
from hf_matryoshka_sae.training.config.run import RunConfig

from ..axes import each
from ..conftest import SERVER
from ..hub_server import HubServer
from ..models.reference import F, make_sae
from ..models.test_saving import assert_same_tensors, save
from ..processes import FORKS


REPO = "tester/run"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def save_run(folder, *names: str, hookpoints=("layers.0", "layers.1:input"), **fields):
    """A folder as a run leaves it, of small SAEs; returns the SAEs by their places in it."""
    saes, names = {}, names or ("matryoshka",)
    for name in names:
        for hookpoint in hookpoints:
            variant = "topk" if name == "topk" else "matryoshka-batch_topk"
            sae = make_sae(variant, torch.float32, hookpoint=hookpoint, base_model="some/model", **fields)
            place = f"{name}/{hookpoint.replace(':', '-')}"
            sae.save_pretrained(folder / place)
            saes[place] = sae
    kinds = {name: "topk" if name == "topk" else "matryoshka" for name in names}
    entries = [{"type": kind, "name": name, "num_latents": F, "k": 2} for name, kind in kinds.items()]
    run = {"model": "some/model", "dataset": "some/text", "hookpoints": ["layers.*"], "tokens": 9000}
    run = RunConfig.from_dict(run | {"saes": entries, "output_dir": "runs/one"})
    (folder / "run.yaml").write_text(json.dumps(run.to_dict()))
    return saes


def push(run, repo=REPO, **how):
    return sae_hub.push(run, repo, measure=False, show=False, **how)


def requests(hub: HubServer) -> list[str]:
    return [f"{request.method} {request.path}" for request in hub.requests]


# What is there after a push


def test_a_run_is_pushed_in_one_commit_and_loads_by_hookpoint(hub, tmp_path):
    saes = save_run(tmp_path / "run")
    commit = push(tmp_path / "run")
    assert sum("/commit/" in request for request in requests(hub)) == 1
    assert commit.oid == hub.repos[REPO].branches["main"]
    files = hub.files(REPO)
    places = {"layers.0", "layers.1-input"}
    assert {
        f"{place}/{name}" for place in places for name in ("config.json", "model.safetensors", DIGESTS_NAME)
    } <= set(files)
    assert {"README.md", "config.json", "modeling_sae.py", "configuration_sae.py", "collection_sae.py"} <= set(files)
    assert not any(name.endswith(".py") and "/" in name for name in files), "code in a subfolder is never found"
    for place in places:
        sae = saes[f"matryoshka/{place}"]
        assert_same_tensors(AutoModel.from_pretrained(REPO, subfolder=place), sae)
        assert_same_tensors(AutoModel.from_pretrained(REPO, subfolder=place, width=5), sae.truncate(5))
        expected = row_digests(sae.state_dict(), sae.config.num_latents, sae.prefix_widths, WHOLE_TENSORS)
        found = json.loads(files[f"{place}/{DIGESTS_NAME}"])
        assert list(found.pop("headers")) == ["model.safetensors"] and found == expected


def test_several_saes_of_a_hookpoint_keep_their_names(hub, tmp_path):
    saes = save_run(tmp_path / "run", "matryoshka", "topk")
    push(tmp_path / "run")
    assert set(sae_hub.list_saes(REPO)) == set(saes)
    push(tmp_path / "run", "tester/one", saes=["topk"])
    assert list(sae_hub.list_saes("tester/one")) == ["layers.0", "layers.1-input"]
    with pytest.raises(ValueError, match="no SAE named relu. It holds matryoshka/layers.0"):
        push(tmp_path / "run", "tester/none", saes=["relu"])
    assert "tester/none" not in hub.repos


def test_the_folder_of_one_sae_becomes_the_root(hub, tmp_path):
    saes = save_run(tmp_path / "run", hookpoints=["layers.0"])
    push(tmp_path / "run" / "matryoshka" / "layers.0")
    assert_same_tensors(AutoModel.from_pretrained(REPO), saes["matryoshka/layers.0"])
    assert list(sae_hub.list_saes(REPO)) == [""]


def test_one_sae_is_pushed_from_memory_with_card_code_and_tags(hub, tmp_path):
    sae = make_sae("matryoshka-batch_topk", torch.float32, hookpoint="layers.0")
    sae.push_to_hub("mine", tags=["extra"], commit_message="first", private=True)
    files = hub.files("tester/mine")
    assert {"README.md", "config.json", "model.safetensors", DIGESTS_NAME, "modeling_sae.py"} <= set(files)
    assert "extra" in ModelCard(files["README.md"].decode()).data.tags and hub.repos["tester/mine"].private
    assert_same_tensors(AutoModel.from_pretrained("tester/mine"), sae)
    sae.truncate(4).save_pretrained(tmp_path / "small", push_to_hub=True, repo_id="tester/small")
    assert_same_tensors(AutoModel.from_pretrained("tester/small"), sae.truncate(4))
    assert_same_tensors(AutoModel.from_pretrained(tmp_path / "small"), sae.truncate(4))


# A second push


def test_pushing_again_sends_and_commits_nothing(hub, tmp_path):
    save_run(tmp_path / "run")
    push(tmp_path / "run")
    before = hub.repos[REPO].branches["main"]
    hub.requests.clear()
    push(tmp_path / "run")
    assert hub.repos[REPO].branches["main"] == before
    assert not any("PUT" in request or "/commit/" in request for request in requests(hub))


def test_another_run_joins_the_index_and_takes_nothing_away(hub, tmp_path):
    first = save_run(tmp_path / "first", hookpoints=["layers.0"])
    second = save_run(tmp_path / "second", hookpoints=["layers.1"])
    push(tmp_path / "first")
    push(tmp_path / "second")
    assert list(sae_hub.list_saes(REPO)) == ["layers.0", "layers.1"]
    assert_same_tensors(AutoModel.from_pretrained(REPO, subfolder="layers.0"), first["matryoshka/layers.0"])
    assert_same_tensors(AutoModel.from_pretrained(REPO, subfolder="layers.1"), second["matryoshka/layers.1"])


def test_what_an_earlier_push_put_beside_the_weights_goes_with_them(hub, tmp_path):
    save_run(tmp_path / "run", hookpoints=["layers.0"])
    folder = tmp_path / "run" / "matryoshka" / "layers.0"
    (folder / "statistics.safetensors").write_bytes(b"of the first weights")
    push(tmp_path / "run")
    hub.add(
        REPO, {"plots/layers.0/power_law.png": b"old", "plots/layers.9/power_law.png": b"other", "notes.txt": b"x"}
    )
    (folder / "statistics.safetensors").unlink()
    make_sae("topk", torch.float32, hookpoint="layers.0").save_pretrained(folder)
    push(tmp_path / "run")
    files = hub.files(REPO)
    assert "layers.0/statistics.safetensors" not in files and "plots/layers.0/power_law.png" not in files
    assert "plots/layers.9/power_law.png" in files and "notes.txt" in files


def test_a_feature_index_goes_with_its_weights_and_no_others(hub, tmp_path, caplog):
    sae = make_sae("matryoshka-batch_topk", torch.float32, d_in=128, hookpoint="model.layers.1", base_model="embedded")
    folder = tmp_path / "run" / "sae" / "model.layers.1"
    sae.save_pretrained(folder)
    build_index(folder, tokens=300, context_length=32, lm_batch_size=4, show=False)
    push(tmp_path / "run")
    index = FeatureIndex.open(REPO, subfolder="model.layers.1")
    assert len(index) == F and index.feature(3).latent == 3
    other = make_sae("matryoshka-batch_topk", torch.float32, d_in=128, hookpoint="model.layers.1")
    other.save_pretrained(folder)
    push(tmp_path / "run")
    assert "is left out" in caplog.text and not any("/features/" in name for name in hub.files(REPO))


def test_saes_of_both_layouts_are_told_apart(hub, tmp_path):
    saes = save_run(tmp_path / "run", "matryoshka", "topk", hookpoints=["layers.0"])
    push(tmp_path / "run", saes=["matryoshka"])
    push(tmp_path / "run")
    assert list(sae_hub.list_saes(REPO)) == ["layers.0", "matryoshka/layers.0", "topk/layers.0"]
    assert_same_tensors(sae_hub.load(REPO, "layers.0"), saes["matryoshka/layers.0"])
    assert_same_tensors(sae_hub.load(REPO, "topk/layers.0"), saes["topk/layers.0"])
    assert "Also in this repository, from other pushes: `layers.0`" in hub.files(REPO)["README.md"].decode()


def test_a_licence_is_stated_where_it_is_known_alone(hub, tmp_path):
    save_run(tmp_path / "run", hookpoints=["layers.0"])
    push(tmp_path / "run", license="mit")
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.license == "mit"
    sae = make_sae("batch_topk", torch.float32, hookpoint="layers.0")
    sae.permute_(torch.randperm(F))
    sae.push_to_hub("tester/found")
    card = ModelCard(hub.files("tester/found")["README.md"].decode())
    assert card.data.license is None and "were sorted or pruned" in card.text
    assert "was solved for" not in card.text and "normalisation of its training" not in card.text


def test_an_sae_at_the_root_and_saes_in_folders_do_not_hide_each_other(hub, tmp_path):
    (sae,) = save_run(tmp_path / "run", hookpoints=["layers.0"]).values()
    push(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds SAEs in folders \(layers.0\); one at its root would hide them"):
        sae.push_to_hub(REPO)
    sae.push_to_hub("tester/alone")
    with pytest.raises(ValueError, match="holds an SAE at its root, which an index of others would hide"):
        push(tmp_path / "run", "tester/alone")
    sae.truncate(4).push_to_hub("tester/alone")
    assert_same_tensors(AutoModel.from_pretrained("tester/alone"), sae.truncate(4))


@each(second=["one file", "shards", "pieces"], first=["one file", "shards", "pieces"])
def test_weights_of_an_earlier_push_in_other_files_are_taken_away(hub, tmp_path, first, second):
    (sae,) = save_run(tmp_path / "run", hookpoints=["layers.0"]).values()
    folder = tmp_path / "run" / "matryoshka" / "layers.0"
    for layout in (first, second):
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        (folder / PIECES_INDEX_NAME).unlink(missing_ok=True)
        save(sae, folder, layout)
        push(tmp_path / "run")
    there = {name.split("/")[1] for name in hub.files(REPO) if name.startswith("layers.0/")}
    assert there == {path.name for path in folder.iterdir()} | {DIGESTS_NAME}
    assert_same_tensors(AutoModel.from_pretrained(REPO, subfolder="layers.0"), sae)


def test_pieces_are_pushed_with_digests_of_their_rows_listed_and_loaded_by_width(hub, tmp_path):
    (sae,) = save_run(tmp_path / "run", hookpoints=["layers.0"]).values()
    sae.save_pretrained(tmp_path / "run" / "matryoshka" / "layers.0", max_shard_size=400)
    push(tmp_path / "run")
    files = hub.files(REPO)
    digests = json.loads(files[f"layers.0/{DIGESTS_NAME}"])
    pieces = json.loads(files[f"layers.0/{PIECES_INDEX_NAME}"])["pieces"]
    stops = [piece["stop"] for piece in pieces]
    assert set(stops) <= set(digests["blocks"]) and len(stops) > 1
    assert set(digests["headers"]) == {piece["file"] for piece in pieces}
    del digests["headers"]
    assert digests == row_digests(sae.state_dict(), F, [*sae.prefix_widths, *stops], WHOLE_TENSORS)
    assert list(sae_hub.list_saes(REPO)) == ["layers.0"] and sae_hub.list_saes(REPO)["layers.0"].num_latents == F
    for width in (1, stops[0], stops[0] + 1, F, None):
        expected = sae if width is None else sae.truncate(width)
        assert_same_tensors(sae_hub.load(REPO, width=width), expected)
        assert_same_tensors(convert.load(REPO, width=width, dtype=torch.float32), expected)
    sae.save_pretrained(tmp_path / "run" / "matryoshka" / "layers.0")
    push(tmp_path / "run")
    assert hub.files(REPO)["README.md"] == files["README.md"]  # thresholds and all


def test_an_sae_that_was_loaded_from_pieces_is_known_again_on_its_card(hub, tmp_path):
    (sae,) = save_run(tmp_path / "run", hookpoints=["layers.0"]).values()
    folder = tmp_path / "run" / "matryoshka" / "layers.0"
    sae.save_pretrained(folder, max_shard_size=400)
    loaded = AutoModel.from_pretrained(folder)
    assert _same(loaded, folder)
    with torch.no_grad():
        loaded.b_enc[-1] += 1
    assert not _same(loaded, folder) and not _same(loaded.truncate(3), folder)
    loaded.push_to_hub("tester/alone", max_shard_size=400)
    assert PIECES_INDEX_NAME in hub.files("tester/alone")
    assert_same_tensors(AutoModel.from_pretrained("tester/alone"), loaded)


def test_a_branch_is_made_and_main_stays(hub, tmp_path):
    save_run(tmp_path / "run")
    push(tmp_path / "run", revision="v2")
    assert hub.files(REPO) == {} and "layers.0/config.json" in hub.files(REPO, "v2")
    assert len(sae_hub.list_saes(REPO, revision="v2")) == 2
    push(tmp_path / "run", revision="v2")


def test_a_commit_of_another_in_between_is_not_overwritten(hub, tmp_path):
    save_run(tmp_path / "run")
    push(tmp_path / "run")
    (tmp_path / "run" / "matryoshka" / "layers.0" / "statistics.safetensors").write_bytes(b"1")

    def meddle(number, method, path):
        if "/preupload/" in path:
            hub.watch(None)
            hub.add(REPO, {"notes.txt": b"mine"})

    hub.watch(meddle)
    with pytest.raises(ValueError, match="another commit during the push; nothing was changed"):
        push(tmp_path / "run")
    push(tmp_path / "run")
    assert {"notes.txt", "layers.0/statistics.safetensors"} <= set(hub.files(REPO))


# Who may


def test_a_private_repository_needs_its_token_which_is_written_nowhere(hub, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setattr(hub, "token", "hf_secret_of_this_test")
    save_run(tmp_path / "run")
    with pytest.raises(HfHubHTTPError):
        push(tmp_path / "run", private=True)
    push(tmp_path / "run", private=True, token="hf_secret_of_this_test")
    with pytest.raises(OSError, match=REPO):
        AutoModel.from_pretrained(REPO, subfolder="layers.0", width=3)
    part = AutoModel.from_pretrained(REPO, subfolder="layers.0", width=3, token="hf_secret_of_this_test")
    assert part.config.num_latents == 3
    assert len(sae_hub.load_many(REPO, token="hf_secret_of_this_test")) == 2
    secret = b"hf_secret_of_this_test"
    assert not any(secret in data for data in hub.files(REPO).values())
    written = [path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert not written and secret.decode() not in caplog.text + "".join(capfd.readouterr())


# What cannot be pushed


@pytest.mark.parametrize("damage", ["half", "no weights", "other shapes", "no piece", "short piece", "half an index"])
def test_a_damaged_sae_is_refused_before_anything_is_sent(hub, tmp_path, damage):
    save_run(tmp_path / "run")
    weights = tmp_path / "run" / "matryoshka" / "layers.0" / "model.safetensors"
    if damage == "half":
        weights.write_bytes(weights.read_bytes()[:300])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "other shapes":
        config = weights.with_name("config.json")
        config.write_text(config.read_text().replace('"d_in": 6', '"d_in": 8'))
    else:
        make_sae("matryoshka-batch_topk", torch.float32).save_pretrained(weights.parent, max_shard_size=400)
        piece = sorted(weights.parent.glob("latents-*.safetensors"))[1]
        index = weights.parent / PIECES_INDEX_NAME
        if damage == "no piece":
            piece.unlink()
        elif damage == "short piece":
            save_file({name: tensor[:1].clone() for name, tensor in load_file(piece).items()}, piece)
        else:
            index.write_text(index.read_text()[:100])
    with pytest.raises(ValueError, match="Save it again"):
        push(tmp_path / "run")
    assert not hub.requests


def test_a_folder_without_saes_is_refused(hub, tmp_path):
    with pytest.raises(ValueError, match="holds no SAE"):
        push(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        push(tmp_path / "nowhere")


# Connections that break


def push_alone(url: str, run: str, cache: str) -> None:
    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = url, False, cache
    sae_hub.push(run, REPO, measure=False, show=False)


def is_whole(hub: HubServer, saes) -> bool:
    """Whether the repository has what a push puts there; anything but all or nothing is wrong."""
    if REPO not in hub.repos or not hub.files(REPO):
        return False
    for place, sae in saes.items():
        assert_same_tensors(AutoModel.from_pretrained(REPO, subfolder=place.split("/")[1]), sae)
    return True


@pytest.mark.parametrize(
    "how", ["lost answer", *(pytest.param(how, marks=pytest.mark.release) for how in ("drop", "503", "truncate"))]
)
def test_each_request_of_a_push_failed_once_leaves_all_or_nothing(hub, tmp_path, monkeypatch, how):
    saes = save_run(tmp_path / "run", hookpoints=["layers.0"])
    hub.watch(None)
    push(tmp_path / "run")
    total, failed = hub.counted, 0
    assert total >= 8
    for number in range(1, total + 1):
        hub.reset()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache-{number}"))
        hub.fail(number, how)
        try:
            push(tmp_path / "run")
            assert is_whole(hub, saes)
        except OSError:
            failed += 1
            is_whole(hub, saes)
        push(tmp_path / "run")  # completes it, or finds it complete
        assert is_whole(hub, saes)
    assert failed < total


def test_a_push_into_a_repository_that_fails_leaves_the_old_one_working(hub, tmp_path, monkeypatch):
    old = save_run(tmp_path / "old", hookpoints=["layers.0"])
    new = save_run(tmp_path / "new", hookpoints=["layers.0"])
    push(tmp_path / "old")
    hub.watch(None)
    hub.fail(7, "drop", times=100)
    with pytest.raises(OSError, match=".+"):
        push(tmp_path / "new")
    hub.fail(1, "drop", times=0)
    assert is_whole(hub, old)
    push(tmp_path / "new")
    assert is_whole(hub, new)


@pytest.mark.release
def test_a_push_killed_in_the_middle_is_completed_by_the_next(hub, tmp_path):
    saes = save_run(tmp_path / "run")
    reached = threading.Event()

    def hold(number, method, path):
        if method == "PUT":
            reached.set()
            threading.Event().wait(2)

    hub.watch(hold)
    arguments = (SERVER.url, str(tmp_path / "run"), str(tmp_path / "cache"))
    worker = FORKS.Process(target=push_alone, args=arguments)
    worker.start()
    assert reached.wait(120)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    hub.watch(None)
    assert hub.files(REPO) == {}
    push(tmp_path / "run")
    assert is_whole(hub, saes)
