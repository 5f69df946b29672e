"""A dictionary in pieces by latents is the same dictionary, whoever wrote it and however much of it is read."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_matryoshka_sae import MatryoshkaSAE, MatryoshkaSAEConfig, TopKSAE, TopKSAEConfig
from hf_matryoshka_sae.models.checkpoint_files import read_latents
from hf_matryoshka_sae.models.digests import DIGESTS_NAME, row_digests
from hf_matryoshka_sae.models.pieces import (
    PIECES_INDEX_NAME,
    WHOLE_TENSORS,
    allocate_files,
    plan_files,
    read_index,
    write_index,
    write_latents,
)
from hf_matryoshka_sae.models.safetensors_file import write_tensors
from hf_matryoshka_sae.models.saving import staged_files

from ..axes import each
from ..hub_server import HubServer
from ..processes import FORKS
from .reference import VARIANTS, F, make_sae
from .test_partial_download import REPO, large, put, row_bytes, weights_sent
from .test_saving import assert_same_tensors, contents, save


def pieces_of(folder) -> list[tuple[str, int, int]]:
    return [(piece.file, piece.start, piece.stop) for piece in read_index(folder / PIECES_INDEX_NAME)]


# Planning


def test_everything_that_fits_a_file_is_one_file_as_transformers_has_it():
    sae = large()
    size = sum(tensor.nbytes for tensor in sae.state_dict().values())
    (only,) = plan_files(sae.state_dict(), 512, size).pieces
    assert (only.file, only.start, only.stop) == ("model.safetensors", 0, 512)
    assert [piece.file for piece in plan_files(sae.state_dict(), 512, size - 1).pieces] == [
        "latents-00001-of-00002.safetensors",
        "latents-00002-of-00002.safetensors",
    ]


@each(limit=[1, 600, 700, 5000, 5440, 40_000, 200_000], latents=[1, 64, 509])
def test_pieces_keep_to_the_bound_and_are_as_few_and_as_equal_as_can_be(limit, latents):
    sae = TopKSAE(TopKSAEConfig(d_in=64, num_latents=latents, k=1))
    row, whole = row_bytes(sae, 1, 2) if latents > 1 else 64 * 8 + 4 + 8, 64 * 4
    plan = plan_files(sae.state_dict(), latents, limit)
    sizes = [piece.stop - piece.start for piece in plan.pieces]
    assert sum(sizes) == latents and max(sizes) - min(sizes) <= 1
    assert max(sizes) == 1 or max(sizes) * row + whole <= limit
    fewer = len(sizes) - 1
    assert len(sizes) in (1, latents) or fewer * ((limit - whole) // row) < latents


@pytest.mark.parametrize("size", ["5 GB", "5gb", "0.005TB", "5000MB", 5 * 10**9, "5000000KB"])
def test_sizes_are_read_as_transformers_reads_them(size):
    state = {"W_enc": torch.empty(1, 1000, device="meta")}
    assert len(plan_files(state, 1_250_000, size).pieces) == 1
    assert len(plan_files(state, 1_250_001, size).pieces) == 2


@pytest.mark.parametrize("size", ["5", "5GiB", "x", "", "GB", 0, -1, "-1GB", "infGB"])
def test_what_is_no_size_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match="size such as|at least 1 byte"):
        make_sae("topk").save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new" / "config.json").exists()


# Saving and loading


@each(variant=list(VARIANTS), size=[1, 400, "0.5KB"])
def test_pieces_load_as_the_single_file_does(tmp_path, variant, size):
    sae = make_sae(variant, torch.float32)
    sae.permute_(torch.randperm(F))
    sae.save_pretrained(tmp_path / "one")
    sae.save_pretrained(tmp_path / "pieces", max_shard_size=size)
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "pieces" / "config.json").read_bytes()
    names = [file for file, _, _ in pieces_of(tmp_path / "pieces")]
    assert set(contents(tmp_path / "pieces")) == {"config.json", PIECES_INDEX_NAME, *names} and len(names) > 1
    whole = load_file(tmp_path / "one" / "model.safetensors")
    for number, (file, start, stop) in enumerate(pieces_of(tmp_path / "pieces")):
        found = load_file(tmp_path / "pieces" / file)
        expected = {name: tensor[start:stop] for name, tensor in whole.items() if name not in WHOLE_TENSORS}
        expected |= {} if number else {"b_dec": whole["b_dec"]}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for load in (AutoModel, type(sae)):
        assert_same_tensors(load.from_pretrained(tmp_path / "pieces"), sae)
    for width in range(1, F + 1):
        assert_same_tensors(AutoModel.from_pretrained(tmp_path / "pieces", width=width), sae.truncate(width))


def test_loading_info_and_overrides_work_with_pieces(tmp_path):
    make_sae("topk", torch.float32).save_pretrained(tmp_path / "layers.3", max_shard_size=400)
    sae, info = AutoModel.from_pretrained(tmp_path, subfolder="layers.3", k=2, output_loading_info=True)
    assert sae.k == 2 and not info["missing_keys"] and not info["unexpected_keys"]


def test_a_save_interrupted_while_pieces_are_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    sae = make_sae("topk", torch.float32)
    sae.save_pretrained(tmp_path, max_shard_size=400)
    before = contents(tmp_path)

    def disk_full(folder, plan):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_matryoshka_sae.models.saving.write_index", disk_full)
    with pytest.raises(OSError, match="No space left"):
        make_sae("topk").save_pretrained(tmp_path, max_shard_size=300)
    assert contents(tmp_path) == before


@each(killed_after=range(8), sizes=[(400, 400), (400, 300), ("5GB", 400), (400, "5GB")])
def test_a_save_killed_while_files_take_their_places_never_leaves_a_mixture(
    tmp_path, monkeypatch, sizes, killed_after
):
    old, new = make_sae("matryoshka-relu", torch.float32), make_sae("matryoshka-relu", torch.float32)
    with torch.no_grad():
        new.W_dec.add_(1)
    old.save_pretrained(tmp_path, max_shard_size=sizes[0])
    done = [0]

    def dies(act):
        def wrapped(*args, **kwargs):
            if Path(args[0]).suffix in (".json", ".safetensors"):
                done[0] += 1
                if done[0] > killed_after:
                    raise KeyboardInterrupt
            return act(*args, **kwargs)

        return wrapped

    monkeypatch.setattr("hf_matryoshka_sae.models.checkpoint_files.os.replace", dies(os.replace))
    monkeypatch.setattr("pathlib.Path.unlink", dies(Path.unlink))
    try:
        new.save_pretrained(tmp_path, max_shard_size=sizes[1])
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    for width in (None, 9):
        try:
            found = AutoModel.from_pretrained(tmp_path, width=width)
        except (OSError, ValueError):
            continue
        assert any(torch.equal(found.W_dec, sae.W_dec[:width]) for sae in (old, new))


# Written by several


def write_part(folder: Path, first: int, last: int, size: str) -> None:
    """What a process does that has some latents, made here by a rule."""
    state = {name: tensor if name in WHOLE_TENSORS else tensor[first:last] for name, tensor in by_rule().items()}
    write_latents(folder, plan_files(state, 512, size), first, state)


def by_rule() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return large().state_dict()


@each(size={"pieces": "20KB", "one file": "5GB"}, ends={"one": [0, 512], "four": [0, 170, 170, 341, 512]})
def test_parts_written_in_any_order_make_the_files_that_one_makes(tmp_path, ends, size):
    sae = large()
    sae.load_state_dict(by_rule())
    sae.save_pretrained(tmp_path / "one", max_shard_size=size)
    with staged_files(tmp_path / "many") as staging:
        plan = plan_files(by_rule(), 512, size)
        allocate_files(staging, plan)
        for first, last in reversed(list(zip(ends, ends[1:], strict=False))):
            write_part(staging, first, last, size)
        write_index(staging, plan)
        sae.config.save_pretrained(staging)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def _write_one_of_two(rank: int, staging: Path, size: str) -> None:
    write_part(staging, *((0, 230), (230, 512))[rank], size)


@pytest.mark.slow
def test_processes_that_write_their_latents_at_once_make_the_files_that_one_makes(tmp_path, two_processes):
    sae, size = large(), "20KB"
    sae.load_state_dict(by_rule())
    sae.save_pretrained(tmp_path / "one", max_shard_size=size)
    with staged_files(tmp_path / "many") as staging:
        plan = plan_files(by_rule(), 512, size)
        allocate_files(staging, plan)
        two_processes.run(_write_one_of_two, staging, size)
        write_index(staging, plan)
        sae.config.save_pretrained(staging)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert_same_tensors(AutoModel.from_pretrained(tmp_path / "many"), sae)


def test_rows_other_than_planned_are_refused(tmp_path):
    state = by_rule()
    plan = plan_files(state, 512, "20KB")
    allocate_files(tmp_path, plan)
    for wrong in ({"threshold": state["threshold"][1:]}, {"more": state["threshold"]}):
        with pytest.raises(ValueError, match="As many rows of each of .*'threshold'.* should be written, got .*: 512"):
            write_latents(tmp_path, plan, 0, state | wrong)
    for first in (-1, 1):
        with pytest.raises(ValueError, match=f"512 rows from {first} on do not lie in a dictionary of 512 latents"):
            write_latents(tmp_path, plan, first, state)
    for name in state:
        with pytest.raises(ValueError, match="should be written"):
            write_latents(tmp_path, plan, 0, {other: state[other] for other in state if other != name})


# Some latents


RANGES = [(0, 512), (0, 1), (511, 512), (0, 200), (70, 71), (100, 300), (256, 512)]


@each(layout=["one file", "shards", "pieces"], rows=RANGES)
def test_any_latents_are_read_from_a_folder(tmp_path, layout, rows):
    (start, stop), sae = rows, large(torch.bfloat16)
    save(sae, tmp_path / "layers.3", layout, 20_000)
    config, state = read_latents(tmp_path, start, stop, subfolder="layers.3")
    assert config.num_latents == 512 and config.prefix_widths == sae.prefix_widths
    expected = sae.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        rows = expected[name] if name in WHOLE_TENSORS else expected[name][start:stop]
        assert tensor.dtype == rows.dtype and torch.equal(tensor, rows), name


@each(layout=["one file", "shards", "pieces"], rows=RANGES)
def test_any_latents_are_read_from_the_hub(hub, tmp_path, layout, rows):
    (start, stop), sae = rows, large()
    put(hub, sae, tmp_path / "saved", layout=layout)
    expected = sae.state_dict()
    for _ in range(2):
        config, state = read_latents(REPO, start, stop)
        assert isinstance(config, MatryoshkaSAEConfig) and config.num_latents == 512
        for name, tensor in state.items():
            assert torch.equal(tensor, expected[name] if name in WHOLE_TENSORS else expected[name][start:stop]), name
    files = pieces_of(tmp_path / "saved") if layout == "pieces" else [("", 0, 512)]
    touched = [(file, first) for file, first, last in files if first < stop and start < last]
    least = row_bytes(sae, min(first for _, first in touched), stop) - (touched[0][1] == 0) * expected["b_dec"].nbytes
    headers = (len(touched) + 1) * (3 if layout == "shards" else 1)
    assert least <= weights_sent(hub) <= least + expected["b_dec"].nbytes + headers * 8192
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO), sae)
    assert weights_sent(hub) <= row_bytes(sae, 0, 512) - least + 20 * 8192


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (4, 3), (0, 513), (600, 700)])
def test_a_range_outside_the_dictionary_is_refused(tmp_path, start, stop):
    large().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"range of latents between 0 and num_latents \(512\)"):
        read_latents(tmp_path, start, stop)


def test_latents_of_what_is_no_sae_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="no SAE: its config names the model type 'llama'"):
        read_latents(tmp_path, 0, 1)
    with pytest.raises(TypeError, match="revisoin"):
        read_latents(tmp_path, 0, 1, revisoin="main")


# The Hub


def test_a_width_fetches_no_piece_a_piece_past_it(hub, tmp_path):
    sae = large()
    put(hub, sae, tmp_path / "saved", layout="pieces")
    files = pieces_of(tmp_path / "saved")
    width = files[1][2] - 3
    AutoModel.from_pretrained(REPO, width=width)
    asked = {request.path.rsplit("/", 1)[1] for request in hub.requests if "latents-" in request.path}
    assert asked == {files[0][0], files[1][0]}
    sent = weights_sent(hub)
    assert row_bytes(sae, 0, width) <= sent <= row_bytes(sae, 0, width) + 2 * 8192
    AutoModel.from_pretrained(REPO, width=width + 1)
    assert weights_sent(hub) == row_bytes(sae, width, width + 1)


def test_rows_of_a_piece_that_were_damaged_on_the_way_are_found(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    sae = large()
    put(hub, sae, tmp_path / "saved", layout="pieces")
    pieces = [stop for _, _, stop in pieces_of(tmp_path / "saved")]
    sae_hub_digests(hub, sae, pieces)
    damaged = [0]

    def flip(number, method, path):
        if method == "GET" and "latents-00003" in path and not damaged[0]:
            damaged[0] = number
            hub.fail(2, "corrupt")

    hub.watch(flip)
    with pytest.raises(ValueError, match="in latents-00003-of-.* are not what was pushed"):
        MatryoshkaSAE.from_pretrained(REPO, width=512)
    hub.watch(None)
    assert_same_tensors(MatryoshkaSAE.from_pretrained(REPO, width=512), sae)


def sae_hub_digests(hub: HubServer, sae, ends: list[int]) -> None:
    """Digests as a push makes them: blocks end where pieces do."""
    found = row_digests(sae.state_dict(), 512, [*sae.prefix_widths, *ends], WHOLE_TENSORS)
    hub.add(REPO, {DIGESTS_NAME: json.dumps(found).encode()})


def test_latents_whose_connection_stays_broken_say_so_and_go_on(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    sae = large()
    put(hub, sae, tmp_path / "saved", layout="pieces")
    read_latents(REPO, 0, 1)
    hub.fail(2, "drop", times=1000)
    with pytest.raises(OSError, match="same call again goes on"):
        read_latents(REPO, 0, 300)
    hub.fail(1, "drop", times=0)
    assert torch.equal(read_latents(REPO, 0, 300)[1]["W_dec"], sae.W_dec[:300])


# Damage


@pytest.fixture
def saved(tmp_path):
    sae = make_sae("matryoshka-jumprelu", torch.float32)
    sae.save_pretrained(tmp_path, max_shard_size=400)
    return tmp_path, sae


@pytest.mark.parametrize("width", [None, F])
def test_a_missing_piece_is_named(saved, width):
    folder, sae = saved
    gone, first, _ = pieces_of(folder)[1]
    (folder / gone).unlink()
    with pytest.raises(OSError, match=gone):
        type(sae).from_pretrained(folder, width=width)
    assert_same_tensors(type(sae).from_pretrained(folder, width=first), sae.truncate(first))


@pytest.mark.parametrize("read", ["whole", "width", "latents"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(W_dec=state["W_dec"][:-1].clone()), "W_dec in .*{file} has .* rows where"),
        (lambda state: state.pop("b_enc"), "{file} does not hold the same tensors .*: b_enc"),
        (lambda state: state.update(more=state["b_enc"].clone()), "{file} does not hold the same tensors .*: more"),
        (lambda state: state.update(b_enc=state["b_enc"].double()), "b_enc in .*{file} is of another type or shape"),
        (lambda state: state.update(W_enc=state["W_enc"][:, :2].clone()), "W_enc in .*{file} is of another type or"),
    ],
    ids=["rows", "missing", "more", "type", "shape"],
)
def test_a_piece_that_does_not_fit_the_others_is_named(saved, change, message, read):
    folder, sae = saved
    file = pieces_of(folder)[1][0]
    state = load_file(folder / file)
    change(state)
    save_file(state, folder / file)
    with pytest.raises(ValueError, match=message.format(file=file)):
        if read == "latents":
            read_latents(folder, 0, F)
        else:
            type(sae).from_pretrained(folder, width=None if read == "whole" else F)


@each(
    read=["whole", "width", "latents"],
    damage=[lambda data: data[:-1], lambda data: b"", lambda data: b"\xff" * 64 + data[64:]],
)
def test_a_damaged_piece_is_refused_with_what_to_do(saved, damage, read):
    folder, sae = saved
    path = folder / pieces_of(folder)[1][0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged or half-written: save or download it again"):
        if read == "latents":
            read_latents(folder, 0, F)
        else:
            type(sae).from_pretrained(folder, width=None if read == "whole" else F)


def _changed(folder, **fields) -> None:
    path = folder / PIECES_INDEX_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@each(
    width=[None, 2],
    change={
        "last gone": lambda index: index["pieces"].pop(),
        "middle gone": lambda index: index["pieces"].pop(1),
        "order": lambda index: index["pieces"].reverse(),
        "overlap": lambda index: index["pieces"][0].update(stop=index["pieces"][0]["stop"] + 1),
        "another folder": lambda index: index["pieces"][1].update(file="../other/model.safetensors"),
        "count": lambda index: index.update(num_latents=F + 1),
        "no pieces": lambda index: index.pop("pieces"),
        "empty": lambda index: index.update(pieces=[]),
        "text": lambda index: index.update(pieces="none"),
        "a": lambda index: index["pieces"][0].update(start="a"),
    },
)
def test_an_index_whose_pieces_do_not_make_the_dictionary_is_refused(saved, change, width):
    folder, sae = saved
    index = json.loads((folder / PIECES_INDEX_NAME).read_text())
    change(index)
    (folder / PIECES_INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"latents.index.json is no index of pieces.*save or download it again"):
        type(sae).from_pretrained(folder, width=width)


def test_an_index_of_another_dictionary_or_a_newer_format_is_refused(saved):
    folder, sae = saved
    _changed(folder, format=2)
    with pytest.raises(ValueError, match=r"is of format 2.*reads up to 1.*pip install -U"):
        type(sae).from_pretrained(folder)
    _changed(folder, format=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_latents": F + 1, "prefix_widths": [F + 1]}))
    with pytest.raises(ValueError, match=f"is of {F} latents where the config says {F + 1}"):
        type(sae).from_pretrained(folder)


# Memory


def _peak() -> int:
    """Bytes; not `ru_maxrss`, which a process inherits from the one that started it."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def _write(folder: Path, what: str) -> int:
    tensors = {"W_enc": torch.rand(300_000, 128), "W_dec": torch.rand(128, 300_000).T}
    write_tensors(folder / "small", {"a": torch.rand(1000)})
    before = _peak()
    if what == "file":
        write_tensors(folder / "file", tensors)
    else:
        plan = plan_files(tensors, 300_000, "40MB")
        allocate_files(folder, plan)
        write_latents(folder, plan, 0, tensors)
        write_index(folder, plan)
    return _peak() - before


def _read(folder: Path, what: str) -> int:
    TopKSAE(TopKSAEConfig(d_in=4, num_latents=64)).save_pretrained(folder / "small", max_shard_size="1KB")
    TopKSAE.from_pretrained(folder / "small")
    before = _peak()
    if what == "whole":
        sae = TopKSAE.from_pretrained(folder)
        assert sae.W_enc.sum() > 0 and sae.W_dec.sum() != 0
    else:
        _, state = read_latents(folder, 100_000, 150_000)
        assert all(tensor.sum() != 0 for name, tensor in state.items() if name.startswith("W"))
    return _peak() - before


def _grown(act: Callable, *arguments) -> int:
    """Bytes by which the peak memory of a process of its own grows."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    with FORKS.Pool(1) as pool:
        return pool.apply(act, arguments)


@pytest.mark.release
@pytest.mark.parametrize("what", ["file", "pieces"])
def test_writing_needs_a_chunk_of_memory_not_a_copy(tmp_path, what):
    assert _grown(_write, tmp_path, what) < 150 * 2**20  # of 307 MB; the transposed half goes in chunks of 64 MB


@pytest.mark.release
@pytest.mark.parametrize("size", ["40MB", "5GB"], ids=["pieces", "one file"])
def test_reading_needs_the_rows_and_no_more_than_a_piece_besides(tmp_path, size):
    sae = TopKSAE(TopKSAEConfig(d_in=128, num_latents=300_000))
    torch.nn.init.uniform_(sae.W_enc)
    sae.save_pretrained(tmp_path, max_shard_size=size)
    total = sum(tensor.nbytes for tensor in sae.state_dict().values())
    del sae
    assert 0.9 * total <= _grown(_read, tmp_path, "whole") < 1.2 * total + 50 * 2**20
    rows = total / 6
    assert 0.9 * rows <= _grown(_read, tmp_path, "latents") < 1.5 * rows + 50 * 2**20
