"""Files written row by row are byte for byte what safetensors writes, and need no second copy."""

import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from hf_matryoshka_sae.models import safetensors_file
from hf_matryoshka_sae.models.safetensors_file import allocate, specs_of, write_rows, write_tensors


DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
DTYPES += "uint16 uint32 uint64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu".split()


def tensors() -> dict[str, torch.Tensor]:
    found = {name: (torch.rand(5, 3) * 100).to(getattr(torch, name)) for name in DTYPES}
    found |= {"empty": torch.empty(0, 4), "no columns": torch.empty(4, 0), "scalar": torch.tensor(3.5)}
    return found | {'odd "name" é': torch.arange(7)}


@pytest.fixture(autouse=True, params=[2**26, 7], ids=["at once", "in chunks"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_CHUNK", request.param)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=str)
def test_a_file_is_byte_for_byte_that_of_safetensors(tmp_path, metadata):
    write_tensors(tmp_path / "a.safetensors", tensors() | {"again": torch.ones(2)}, metadata)
    torch.manual_seed(0)
    write_tensors(tmp_path / "b.safetensors", first := tensors(), metadata)
    assert (tmp_path / "b.safetensors").read_bytes() == save(first, metadata)
    loaded = load_file(tmp_path / "b.safetensors")
    assert loaded.keys() == first.keys()
    for name, tensor in first.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
        assert loaded[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8)), name
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == metadata and torch.equal(file.get_tensor("again"), torch.ones(2))


def test_views_and_parameters_are_written_as_they_are_seen(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    found = {"transposed": base.T, "strided": base[::2, 1::2], "parameter": torch.nn.Parameter(base)}
    found |= {"expanded": torch.ones(1, 3).expand(5, 3), "shared": base[1:]}
    write_tensors(tmp_path / "a.safetensors", found)
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in found.items())


def test_a_type_that_safetensors_lacks_is_refused_before_a_file_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"a is of type torch.complex64"):
        write_tensors(tmp_path / "a", {"a": torch.ones(2, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())


def test_writers_of_different_rows_at_once_make_the_same_file(tmp_path):
    whole = {"a": torch.rand(100, 7), "b": torch.randint(9, (100,)), "c": torch.rand(100, 3).bfloat16()}
    path, specs = tmp_path / "a", specs_of(whole)
    allocate(path, specs, {"format": "pt"})
    assert path.stat().st_size == len(save(whole, {"format": "pt"}))
    assert not any(tensor.any() for tensor in load_file(path).values())

    def write(start, stop):
        rows = {name: tensor[start:stop] for name, tensor in whole.items()}
        write_rows(path, specs, rows, start, {"format": "pt"})

    ends = [0, 1, 30, 64, 64, 100]
    writers = [threading.Thread(target=write, args=pair) for pair in zip(ends, ends[1:], strict=False)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_bytes() == save(whole, {"format": "pt"})
