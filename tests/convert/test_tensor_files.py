"""Files of tensors that anybody may have written: nothing in them is run, and none unfolds to far more than it is."""

import io
import json
import math
import os
import pickle
import time
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_matryoshka_sae import convert
from hf_matryoshka_sae.convert.tensor_files import read_tensors

from ..axes import each
from ..processes import peak_memory
from .reference import weights


class Call:
    """What a hostile pickle holds."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture(autouse=True)
def _bounded():
    """No test takes more than 200 MB or 5 seconds of its own."""
    before, began = peak_memory(), time.process_time()
    yield
    assert peak_memory() - before < 200 * 1024**2
    assert time.process_time() - began < 5


def linear(num_latents=64, d_in=16):
    return {
        "encoder.weight": torch.randn(num_latents, d_in),
        "encoder.bias": torch.zeros(num_latents),
        "decoder.weight": torch.randn(d_in, num_latents),
        "bias": torch.zeros(d_in),
    }


def refused(file, message):
    """That it is refused by `load` and by the reader, in words of ours that name it."""
    for read in (convert.load, read_tensors):
        with pytest.raises(ValueError, match=message) as caught:
            read(file)
        assert str(file) in str(caught.value) and "weights_only" not in str(caught.value)


# Pickles


@each(
    layout=["archive", "older", "bare 0", "bare 2", "bare 4"],
    function={"open": open, "system": os.system, "exec": exec},
)
def test_the_code_that_a_pickle_asks_for_is_named_and_not_run(tmp_path, layout, function):
    file, marker = tmp_path / "ae.pt", tmp_path / "marker"
    arguments = {open: (str(marker), "w"), os.system: (f"touch {marker}",), exec: (f"open({str(marker)!r}, 'w')",)}
    call = Call(function, *arguments[function])
    if layout.startswith("bare"):
        file.write_bytes(pickle.dumps({"a": call}, protocol=int(layout[-1])))
    else:
        torch.save(linear() | {"more": call}, file, _use_new_zipfile_serialization=layout == "archive")
    refused(file, rf"would import \S*\.{function.__name__}, and that would run code from the file")
    assert not marker.exists()


@each(older=[True, False], function={"bytearray": bytearray, "Tensor": torch.Tensor})
def test_a_pickle_cannot_ask_for_memory(tmp_path, older, function):
    call = Call(function, 2**31)
    torch.save(linear() | {"more": call}, tmp_path / "ae.pt", _use_new_zipfile_serialization=not older)
    refused(tmp_path / "ae.pt", "holds more than tensors and plain values")


@pytest.mark.parametrize("older", [True, False])
def test_a_tensor_is_no_larger_than_what_is_stored_of_it(tmp_path, older):
    size = 2**15
    state = {name: torch.ones((), dtype=torch.half).expand([size] * value.dim()) for name, value in linear().items()}
    torch.save(state, tmp_path / "ae.pt", _use_new_zipfile_serialization=not older)
    assert (tmp_path / "ae.pt").stat().st_size < 40_000
    refused(tmp_path / "ae.pt", r"has shape \(32768, 32768\), 2,147,483,648 bytes, of which 2 are stored")


def test_views_and_small_repeated_vectors_are_plain_tensors(tmp_path):
    state = linear()
    state["encoder.bias"] = torch.tensor([0.5]).expand(64)
    state["decoder.weight"] = torch.randn(64, 32)[:, :16].T
    torch.save(state, tmp_path / "ae.pt")
    sae = convert.load(tmp_path / "ae.pt")
    assert torch.equal(sae.W_dec, state["decoder.weight"].T) and (sae.b_enc == 0.5).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (2**30, 2**30)),
        lambda: torch.empty(2**40, device="meta"),
        lambda: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "meta", "quantised"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds_are_refused(tmp_path, make):
    torch.save(linear() | {"encoder.bias": make()}, tmp_path / "ae.pt")
    refused(tmp_path / "ae.pt", "would import torch._utils|no plain tensor")


@pytest.mark.filterwarnings("ignore")
def test_an_archive_of_code_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ae.pt")
    refused(tmp_path / "ae.pt", "TorchScript.*not run here. Save its state dict")


def test_what_lies_deep_in_a_pickle_is_no_recursion(tmp_path):
    deep: tuple = ()
    for _ in range(500):
        deep = (deep,)
    torch.save(linear() | {"more": deep, deep: torch.zeros(2)}, tmp_path / "ae.pt")
    sae = convert.load(tmp_path / "ae.pt")
    assert sae.config.num_latents == 64


@each(cut=[1, 60, 300], older=[True, False])
def test_half_a_pickle_says_that_it_is_damaged(tmp_path, older, cut):
    file = tmp_path / "ae.pt"
    torch.save(linear(), file, _use_new_zipfile_serialization=not older)
    file.write_bytes(file.read_bytes()[:cut])
    refused(file, "cannot be read as a torch file .*damaged or half-written")


# Archives


def npz_of_zeros(file, shapes, said=None):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, shape in shapes.items():
            with archive.open(f"{name}.npy", "w") as entry:
                header = {"descr": "<f4", "fortran_order": False, "shape": (said or {}).get(name, shape)}
                np.lib.format.write_array_header_1_0(entry, header)
                left, zeros = 4 * math.prod(shape), bytes(2**22)
                while left:
                    left -= entry.write(zeros[:left])


@pytest.mark.slow
def test_zeros_that_unfold_to_far_more_are_refused(tmp_path):
    file = tmp_path / "params.npz"
    npz_of_zeros(file, {"W_enc": (2**12, 2**14), "W_dec": (2**14, 2**12), "b_enc": (2**14,), "b_dec": (2**12,)})
    refused(file, r"would unfold to 536,\d+,\d+: that is no file of weights.*without compression")
    torch.save({"W_enc": torch.zeros(2**24)}, plain := io.BytesIO())
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "ae.pt", "w", zipfile.ZIP_DEFLATED) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
            out.writestr(f"{name}/again", source.read(name))
    refused(tmp_path / "ae.pt", "would unfold to")


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20), (0, 5), (3,)], ids=str)
def test_a_numpy_header_says_as_much_as_there_is(tmp_path, shape):
    npz_of_zeros(tmp_path / "params.npz", {"W_enc": (4, 8)}, {"W_enc": shape})
    refused(tmp_path / "params.npz", r"W_enc.npy says it has shape .*, and has 128 bytes.*damaged")


def test_compressed_archives_of_weights_are_read(tmp_path):
    tensors = weights(16, 64)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()} | {"W_enc": tensors["W_enc"].T.numpy()}
    np.savez_compressed(tmp_path / "params.npz", **arrays)
    assert torch.equal(convert.load(tmp_path).W_dec, tensors["W_dec"])


@pytest.mark.parametrize("kind", [object, "U3", "c8", "datetime64[s]"])
def test_arrays_of_something_else_are_refused(tmp_path, kind):
    np.savez(tmp_path / "params.npz", W_enc=np.zeros(3, dtype=kind))
    refused(tmp_path / "params.npz", "W_enc.npy is of type .*plain numbers|numpy archive of plain numbers")


# safetensors


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 100 * 2**20])
def test_a_header_that_is_longer_than_its_file_is_damage(tmp_path, length):
    file = tmp_path / "sae_weights.safetensors"
    save_file({"W_enc": torch.zeros(4)}, file)
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    refused(file, "cannot be read as a safetensors file .*damaged")


# What is read of them


def saelens(folder, changed, **config):
    tensors = weights(16, 64) | changed
    folder.mkdir(exist_ok=True)
    tensors["W_enc"] = tensors["W_enc"].T if tensors["W_enc"].shape == (64, 16) else tensors["W_enc"]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    content = {"d_in": 16, "d_sae": 64, "architecture": "jumprelu", "metadata": {}} | config
    (folder / "cfg.json").write_text(json.dumps(content))
    return folder


@each(name=["W_enc", "W_dec", "b_enc", "b_dec"], value=[float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, value):
    changed = weights(16, 64)[name]
    changed.view(-1)[5] = value
    with pytest.raises(ValueError, match=f"{name} of .*sae_weights.safetensors has 1 entries.*no finite numbers"):
        convert.load(saelens(tmp_path, {name: changed}))


@each(dtype=[torch.bool, torch.int8, torch.int32], name=["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_weights_that_are_no_floating_numbers_are_refused(tmp_path, name, dtype):
    with pytest.raises(ValueError, match=f"{name} of .*safetensors should hold floating numbers, is of type {dtype}"):
        convert.load(saelens(tmp_path, {name: weights(16, 64)[name].to(dtype)}))


def test_thresholds_that_were_never_set_are_refused_and_single_ones_below_0_told(tmp_path, caplog):
    for value in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="never set|no finite numbers"):
            convert.load(saelens(tmp_path, {"threshold": torch.full((64,), value)}))
    threshold = weights(16, 64)["threshold"]
    threshold[:3], threshold[3] = -0.2, float("inf")
    sae = convert.load(saelens(tmp_path, {"threshold": threshold}))
    assert (sae.threshold[:3] == 0).all() and sae.threshold[3] == torch.inf and sae.threshold[4] == threshold[4]
    assert "3 thresholds of" in caplog.text and "they act as 0" in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        {"metadata": [1]},
        {"metadata": {"model_name": 3}},
        {"metadata": {"training_architecture_details": {"k": "a"}}},
        {"architecture": []},
        {"architecture": "topk", "k": float("inf")},
        {"architecture": "topk", "k": True},
        {"architecture": "topk", "k": 10**400},
        {"d_in": "16"},
        {"normalize_activations": 3},
        {"rescale_acts_by_decoder_norm": "yes"},
        {"activation_fn_kwargs": "k"},
        {"more": [[[]]] * 2 + [json.loads("[" * 60 + "]" * 60)]},
        {"matryoshka_widths": 7},
        {"matryoshka_widths": [64, 16]},
    ],
    ids=str,
)
def test_absurd_fields_are_one_kind_of_error_that_names_the_file(tmp_path, config):
    saelens(tmp_path, {}, **config)
    with pytest.raises(ValueError, match=r"cfg\.json|sae_weights\.safetensors"):
        convert.load(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"d_in": ' + "9" * 5000 + "}", "\ufffe"])
def test_json_that_cannot_be_read_is_one_kind_of_error(tmp_path, text):
    (saelens(tmp_path, {}) / "cfg.json").write_text(text)
    with pytest.raises(ValueError, match=r"cfg\.json is no JSON"):
        convert.load(tmp_path)
