"""Only the first latents come over the wire, a later width extends them, and nothing half is ever used."""

import json
import os
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache
from safetensors import torch as safetensors_torch
from transformers import AutoModel

from hf_matryoshka_sae import MatryoshkaSAE, MatryoshkaSAEConfig, SAEModel
from hf_matryoshka_sae.models import partial_download
from hf_matryoshka_sae.models.checkpoint_files import WHOLE_TENSORS
from hf_matryoshka_sae.models.digests import DIGESTS_NAME, digest, row_digests

from ..axes import each
from ..hub_server import HubServer
from ..processes import FORKS
from .test_saving import assert_same_tensors, save


REPO = "tester/sae"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def put(hub: HubServer, sae: SAEModel, folder, digests=True, layout="one file") -> None:
    """Commit a saved SAE to the loopback Hub."""
    save(sae, folder, layout, 40_000)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    if digests:
        found = row_digests(sae.state_dict(), sae.config.num_latents, sae.prefix_widths, WHOLE_TENSORS)
        files[DIGESTS_NAME] = json.dumps(found).encode()
    hub.add(REPO, files)
    hub.requests.clear()


def large(dtype=torch.float32, latents: int = 512, d_in: int = 64) -> MatryoshkaSAE:
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(d_in=d_in, num_latents=latents, k=4)).to(dtype).eval()
    sae.threshold.data = sae.threshold.float().uniform_()  # kept in fp32
    return sae


def row_bytes(sae: SAEModel, start: int, stop: int) -> int:
    """Bytes of these latents in all tensors, and of what has no latent axis where it begins with them."""
    state = sae.state_dict()
    rows = sum(tensor[start:stop].nbytes for name, tensor in state.items() if name not in WHOLE_TENSORS)
    return rows + (sum(state[name].nbytes for name in WHOLE_TENSORS) if start == 0 else 0)


@pytest.fixture
def sae(hub, tmp_path) -> MatryoshkaSAE:
    """An SAE that is on the Hub, and in `tmp_path / "saved"`."""
    sae = large()
    put(hub, sae, tmp_path / "saved")
    return sae


def weights_sent(hub: HubServer) -> int:
    """Bytes of the weights' rows that were sent since the last time."""
    found = [request for request in hub.requests if ".safetensors" in request.path and request.range != "bytes=0-8191"]
    hub.requests.clear()
    return sum(request.sent for request in found)


@each(layout=["one file", "shards", "pieces"], dtype=[torch.float32, torch.bfloat16, torch.float64])
def test_a_width_fetches_its_rows_and_a_larger_one_the_difference(hub, tmp_path, dtype, layout):
    sae = large(dtype)
    put(hub, sae, tmp_path / "saved", layout=layout)
    shards, before = len(list((tmp_path / "saved").glob("*.safetensors"))), 0
    for width in (1, 32, 20, 300, 512):
        assert_same_tensors(AutoModel.from_pretrained(REPO, width=width), sae.truncate(width))
        new = max(width, before)
        expected = row_bytes(sae, before, new)
        # Each shard's header is read with 8 KB of what follows.
        assert expected <= weights_sent(hub) <= expected + (before == 0) * shards * 8192
        before = new
    assert_same_tensors(AutoModel.from_pretrained(REPO), sae)
    assert weights_sent(hub) == 0  # the file was complete


def test_the_whole_after_a_part_fetches_only_the_rest(hub, sae, tmp_path):
    AutoModel.from_pretrained(REPO, width=128)
    assert weights_sent(hub) == row_bytes(sae, 0, 128)
    assert_same_tensors(AutoModel.from_pretrained(REPO), sae)
    assert weights_sent(hub) == row_bytes(sae, 128, 512)
    storage = tmp_path / "cache" / "models--tester--sae"
    assert not list((storage / "partial").rglob("*.safetensors"))
    whole = try_to_load_from_cache(REPO, "model.safetensors", cache_dir=tmp_path / "cache")
    assert (
        os.path.islink(whole) and open(whole, "rb").read() == (tmp_path / "saved" / "model.safetensors").read_bytes()
    )


def test_a_part_of_a_whole_file_in_the_cache_fetches_nothing(hub, sae):
    MatryoshkaSAE.from_pretrained(REPO)
    hub.requests.clear()
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO, width=9), sae.truncate(9))
    assert weights_sent(hub) == 0


def test_a_cache_with_parts_is_a_sound_cache(sae, tmp_path):
    AutoModel.from_pretrained(REPO, width=9)
    found = scan_cache_dir(tmp_path / "cache")
    assert not found.warnings and [repo.repo_id for repo in found.repos] == [REPO]


def test_ranges_are_fetched_where_the_hub_redirects_to_without_its_token(hub, sae):
    hub.serve_large_files_elsewhere()
    assert_same_tensors(AutoModel.from_pretrained(REPO, width=100), sae.truncate(100))
    assert_same_tensors(AutoModel.from_pretrained(REPO), sae)
    elsewhere = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert len(elsewhere) > 6 and all(request.status == 206 for request in elsewhere)
    assert all(request.authorization is None for request in elsewhere)
    assert any(request.authorization for request in hub.requests)


def test_a_new_commit_is_fetched_anew_and_the_old_one_stays(hub, tmp_path):
    first, second = large(), large()
    put(hub, first, tmp_path / "first")
    before = hub.repos[REPO].branches["main"]
    assert_same_tensors(AutoModel.from_pretrained(REPO, width=20), first.truncate(20))
    put(hub, second, tmp_path / "second")
    assert_same_tensors(AutoModel.from_pretrained(REPO, width=20), second.truncate(20))
    weights_sent(hub)
    assert_same_tensors(AutoModel.from_pretrained(REPO, width=20, revision=before), first.truncate(20))
    assert weights_sent(hub) == 0


def test_force_download_starts_over(hub, sae):
    AutoModel.from_pretrained(REPO, width=20)
    weights_sent(hub)
    assert_same_tensors(AutoModel.from_pretrained(REPO, width=20, force_download=True), sae.truncate(20))
    assert weights_sent(hub) == row_bytes(sae, 0, 20)


# Where there is no connection


@each(layout=["one file", "shards", "pieces"], how=["offline", "local_files_only"])
def test_without_a_connection_what_was_fetched_loads_and_more_is_refused(hub, tmp_path, monkeypatch, how, layout):
    sae = large()
    put(hub, sae, tmp_path / "saved", layout=layout)
    AutoModel.from_pretrained(REPO, width=20)
    hub.requests.clear()
    offline = {"local_files_only": True} if how == "local_files_only" else {}
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same_tensors(AutoModel.from_pretrained(REPO, width=20, **offline), sae.truncate(20))
    with pytest.raises(OSError, match="20 latents of it in the cache, and this is offline"):
        AutoModel.from_pretrained(REPO, width=21, **offline)
    assert not hub.requests


def test_offline_with_nothing_in_the_cache_says_so(sae, monkeypatch):
    MatryoshkaSAEConfig.from_pretrained(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="not in the cache, and this is offline"):
        MatryoshkaSAE.from_pretrained(REPO, width=3)


def test_a_width_it_does_not_have_is_refused_before_weights_are_fetched(hub, sae):
    with pytest.raises(ValueError, match="between 1 and num_latents"):
        AutoModel.from_pretrained(REPO, width=513)
    assert not any("safetensors" in request.path for request in hub.requests)


# Servers and connections that misbehave


def test_where_ranges_are_refused_the_whole_file_comes_with_a_warning(hub, sae):
    hub.ranges = False
    with pytest.warns(UserWarning, match="whole of model.safetensors of tester/sae is downloaded"):
        assert_same_tensors(AutoModel.from_pretrained(REPO, width=20), sae.truncate(20))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same_tensors(AutoModel.from_pretrained(REPO, width=30), sae.truncate(30))


def test_ranges_that_stop_being_served_fall_back_too(hub, sae):
    AutoModel.from_pretrained(REPO, width=20)
    hub.ranges = False
    with pytest.warns(UserWarning, match="200 to a request for a part"):
        assert_same_tensors(AutoModel.from_pretrained(REPO, width=30), sae.truncate(30))


def requests_of_a_pull(hub: HubServer) -> int:
    hub.watch(None)
    MatryoshkaSAE.from_pretrained(REPO, width=100)
    return hub.counted


@each(layout=["one file", "pieces"], how=["drop", "503", "truncate"])
def test_each_request_failed_once_leaves_nothing_half(hub, tmp_path, monkeypatch, how, layout):
    sae = large()
    put(hub, sae, tmp_path / "saved", layout=layout)
    total = requests_of_a_pull(hub)
    assert total >= 8
    survived = 0
    for number in range(1, total + 1):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache-{number}"))
        hub.fail(number, how)
        try:
            part = MatryoshkaSAE.from_pretrained(REPO, width=100)
            survived += 1
        except OSError:
            part = MatryoshkaSAE.from_pretrained(REPO, width=100)
        assert_same_tensors(part, sae.truncate(100))
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO), sae)
    assert survived >= total - 4  # what fails for good are requests that huggingface_hub makes but once


def test_a_connection_that_breaks_again_and_again_goes_on_where_it_broke(hub, sae):
    hub.fail(1 + requests_of_a_pull(hub), "truncate", times=4)  # of the rows that 300 latents lack
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO, width=300), sae.truncate(300))


def test_a_connection_that_stays_broken_keeps_what_came(hub, sae):
    MatryoshkaSAE.from_pretrained(REPO, width=100)
    weights_sent(hub)
    hub.fail(4, "drop", times=1000)
    with pytest.raises(OSError, match="same call again goes on"):
        MatryoshkaSAE.from_pretrained(REPO, width=500)
    first = weights_sent(hub)
    hub.fail(1, "drop", times=0)
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO, width=500), sae.truncate(500))
    assert first > 0 and first + weights_sent(hub) == row_bytes(sae, 100, 500)


def test_rows_damaged_on_the_way_are_found_and_fetched_again(hub, sae, tmp_path, monkeypatch):
    total, found = requests_of_a_pull(hub), 0
    for number in range(total - 6, total + 1):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache-{number}"))
        hub.watch(None)
        hub.fail(number, "corrupt")
        # Width 128 is a power of two: every row is in a block that has a digest.
        try:
            MatryoshkaSAE.from_pretrained(REPO, width=128)
        except (ValueError, OSError) as error:
            found += "not what was pushed" in str(error)
        assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO, width=128), sae.truncate(128))
    assert found >= 6  # W_enc, W_dec, b_enc, b_dec, threshold, latent_ids


def test_without_digests_a_complete_file_is_checked_against_the_hubs_sum(hub, tmp_path):
    sae = large()
    put(hub, sae, tmp_path / "saved", digests=False)
    requests_of_a_pull(hub)
    hub.fail(3, "corrupt")
    with pytest.raises(ValueError, match="sha256.*damaged on the way"):
        MatryoshkaSAE.from_pretrained(REPO, width=512)
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO, width=512), sae)


def test_a_full_disk_leaves_what_was_there(hub, sae, tmp_path, monkeypatch):
    MatryoshkaSAE.from_pretrained(REPO, width=20)
    synced = []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) >= 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(partial_download, "_PIECE", 10_000)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        MatryoshkaSAE.from_pretrained(REPO, width=400)
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.requests.clear()
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO, width=20), sae.truncate(20))
    assert weights_sent(hub) == 0
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO, width=400), sae.truncate(400))


@pytest.mark.parametrize("damage", ["record", "weights", "nothing left"])
def test_a_damaged_cache_is_made_anew(sae, tmp_path, damage):
    MatryoshkaSAE.from_pretrained(REPO, width=20)
    (weights,) = (tmp_path / "cache" / "models--tester--sae" / "partial").glob("*/weights-*.safetensors")
    if damage == "record":
        weights.with_name("rows.json").write_text('{"size": ')
    elif damage == "weights":
        os.truncate(weights, 100)
    else:
        weights.unlink()
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO, width=20), sae.truncate(20))


def test_a_file_that_is_no_safetensors_file_is_refused(hub):
    hub.add(REPO, {"model.safetensors": b"\xff" * 20_000})
    config = MatryoshkaSAEConfig(d_in=4, num_latents=64)
    hub.add(REPO, {"config.json": config.to_json_string().encode()})
    with pytest.raises(ValueError, match="no safetensors file, or a damaged one"):
        MatryoshkaSAE.from_pretrained(REPO, width=3)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [0, 4]},
        {"shape": [64, 0]},
        {"shape": [-64, 4]},
        {"shape": "64"},
        {"shape": [64.0, 4]},
        {"shape": [True, 4]},
        {"shape": [2**70, 4]},
        {"shape": None},
        {"data_offsets": [0, 0]},
        {"data_offsets": [0, 2**62]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0]},
        {"data_offsets": "ab"},
        "an entry",
        [[]] * 3,
    ],
    ids=str,
)
def test_an_absurd_header_is_refused(hub, tmp_path, entry):
    put(hub, large(), tmp_path / "saved", digests=False)
    data = hub.files(REPO)["model.safetensors"]
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["W_enc"] = header["W_enc"] | entry if isinstance(entry, dict) else entry
    text = json.dumps(header).encode()
    hub.add(REPO, {"model.safetensors": len(text).to_bytes(8, "little") + text + data[end:]})
    with pytest.raises(ValueError, match=r"header of model\.safetensors of tester/sae is damaged: .*W_enc"):
        MatryoshkaSAE.from_pretrained(REPO, width=3)


@pytest.mark.parametrize("text", [b"[]", b"3", b"[" * 100_000, b'{"__metadata__": {}}', b'"W_enc"', b"\xff{}"])
def test_a_header_of_something_else_is_refused(hub, tmp_path, text):
    put(hub, large(), tmp_path / "saved", digests=False)
    hub.add(REPO, {"model.safetensors": len(text).to_bytes(8, "little") + text + bytes(200_000)})
    with pytest.raises(ValueError, match=r"header of model\.safetensors of tester/sae is damaged"):
        MatryoshkaSAE.from_pretrained(REPO, width=3)


def test_rows_other_than_the_config_says_are_refused(hub, sae):
    state = sae.state_dict() | {"W_dec": sae.W_dec[:100].clone()}
    hub.add(REPO, {"model.safetensors": safetensors_torch.save(state, {"format": "pt"}), DIGESTS_NAME: b"{}"})
    with pytest.raises(ValueError, match="W_dec"):
        MatryoshkaSAE.from_pretrained(REPO, width=90)


# Several at once


# (Threads would share what transformers patches while it loads.)


@contextmanager
def _hub_of_another_process(url: str, cache: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", cache)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        yield


def _pull(rank: int, url: str, cache: str, widths: list[int | None]) -> float:
    with _hub_of_another_process(url, cache):
        options = {} if widths[rank] is None else {"width": widths[rank]}
        return MatryoshkaSAE.from_pretrained(REPO, **options).W_dec.sum().item()


def _pull_slowly(url: str, cache: str) -> None:
    partial_download._PIECE = 2**16
    _pull(0, url, cache, [2048])


def _start_over_or_read(rank: int, url: str, cache: str, done: Path, expected: torch.Tensor) -> None:
    with _hub_of_another_process(url, cache):
        for _ in range(10 * (1 - rank)):
            MatryoshkaSAE.from_pretrained(REPO, width=64, force_download=True)
        while rank and not done.exists():
            assert torch.equal(MatryoshkaSAE.from_pretrained(REPO, width=64).W_dec, expected)
        done.touch()


def test_processes_that_pull_at_once_get_the_same_and_fetch_it_once(hub, tmp_path, two_processes):
    sae = large(latents=4096)
    put(hub, sae, tmp_path / "saved")
    found = two_processes.run(_pull, hub.url, str(tmp_path / "cache"), [4096, 1024])
    assert found == [sae.W_dec[:width].sum().item() for width in (4096, 1024)]
    assert weights_sent(hub) <= row_bytes(sae, 0, 4096)


@pytest.mark.release
def test_a_process_killed_in_the_middle_leaves_a_cache_that_goes_on(hub, tmp_path, monkeypatch):
    sae = large(latents=4096)
    put(hub, sae, tmp_path / "saved")
    reached = threading.Event()

    def hold(number, method, path):
        if number == 12:  # a range of rows
            reached.set()
            threading.Event().wait(3)

    hub.watch(hold)
    arguments = (hub.url, str(tmp_path / "cache"))
    worker = FORKS.Process(target=_pull_slowly, args=arguments)
    worker.start()
    assert reached.wait(60)
    worker.kill()
    worker.join()
    hub.watch(None)
    first = weights_sent(hub)
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO, width=2048), sae.truncate(2048))
    assert first > 0 and weights_sent(hub) < row_bytes(sae, 0, 2048)


def test_those_who_wait_while_another_completes_the_file_get_it_too(hub, tmp_path, two_processes):
    sae = large(latents=4096)
    put(hub, sae, tmp_path / "saved")
    MatryoshkaSAE.from_pretrained(REPO, width=100)
    found = two_processes.run(_pull, hub.url, str(tmp_path / "cache"), [None, 4096])
    assert found == [sae.W_dec.sum().item()] * 2


@each(byte=[0, 3, 9, 60, 200, 400], digests={"digests": True, "none": False})
def test_a_header_damaged_on_the_way_is_fetched_again(hub, tmp_path, monkeypatch, byte, digests):
    sae = large()
    put(hub, sae, tmp_path / "saved", digests=False)
    if digests:
        data = hub.files(REPO)["model.safetensors"]
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        found = row_digests(sae.state_dict(), 512, sae.prefix_widths, WHOLE_TENSORS)
        found["headers"] = {"model.safetensors": digest(header)}
        hub.add(REPO, {DIGESTS_NAME: json.dumps(found).encode()})
    real = partial_download._check_answer
    pending = [True]

    def flip(response, record, start, stop):
        real(response, record, start, stop)
        if start == 0 and pending.pop() if pending else False:
            body = bytearray(response.read())
            body[byte] ^= 4
            monkeypatch.setattr(response, "iter_bytes", lambda size: [bytes(body)])

    monkeypatch.setattr(partial_download, "_check_answer", flip)
    for _ in range(2):
        try:
            MatryoshkaSAE.from_pretrained(REPO, width=64)
        except (ValueError, OSError):
            continue
    # Without digests wrong numbers may pass for right ones, until the whole is checked or it is fetched anew.
    loaded = MatryoshkaSAE.from_pretrained(REPO, width=64, force_download=not digests)
    assert_same_tensors(loaded, sae.truncate(64))
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO), sae)


def test_damaged_digests_are_fetched_again(sae, tmp_path):
    whole = tmp_path / "cache" / "models--tester--sae"
    MatryoshkaSAE.from_pretrained(REPO, width=8)
    (found,) = whole.glob(f"snapshots/*/{DIGESTS_NAME}")
    damaged = {16: "[]", 32: "{", 64: found.read_text().replace("a", "b")}
    for width, text in damaged.items():
        found.resolve().write_text(text)
        assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO, width=width), sae.truncate(width))


def test_force_download_mends_a_damaged_whole_file(sae, tmp_path):
    MatryoshkaSAE.from_pretrained(REPO)
    blob = Path(try_to_load_from_cache(REPO, "model.safetensors", cache_dir=tmp_path / "cache")).resolve()
    data = bytearray(blob.read_bytes())
    data[5000:6000] = bytes(1000)
    blob.write_bytes(data)
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO, width=512, force_download=True), sae)
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO), sae)


def test_who_reads_while_another_starts_over_sees_no_holes(hub, sae, tmp_path, two_processes):
    MatryoshkaSAE.from_pretrained(REPO, width=64)
    expected = sae.W_dec[:64].detach().clone()
    two_processes.run(_start_over_or_read, hub.url, str(tmp_path / "cache"), tmp_path / "done", expected)


def test_a_cache_that_cannot_be_written_to_serves_what_it_has(sae, monkeypatch):
    MatryoshkaSAE.from_pretrained(REPO, width=64)

    def locked(path):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(partial_download, "WeakFileLock", locked)
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO, width=64), sae.truncate(64))
    with pytest.raises(OSError, match="Read-only"):
        MatryoshkaSAE.from_pretrained(REPO, width=65)


@pytest.mark.parametrize("width", ["64", 2.5, True, None.__class__], ids=str)
def test_a_width_that_is_no_number_is_refused(sae, width):
    with pytest.raises(ValueError, match="`width` must lie between 1 and num_latents"):
        MatryoshkaSAE.from_pretrained(REPO, width=width)
