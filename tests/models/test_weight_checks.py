"""Weights and configs that anybody may have written: what does not fit is refused before anything is made of it."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_matryoshka_sae import MatryoshkaSAE
from hf_matryoshka_sae.models import SAECollection, weight_checks
from hf_matryoshka_sae.models.checkpoint_files import read_latents
from hf_matryoshka_sae.models.pieces import PIECES_INDEX_NAME
from hf_matryoshka_sae.models.weight_checks import is_file_name, is_inner_folder, tensor_shapes

from ..axes import each
from ..processes import peak_memory
from .reference import VARIANTS, D, F, hidden_states, make_sae
from .test_saving import assert_same_tensors, rewrite_weights, save


@pytest.fixture
def folder(tmp_path):
    make_sae("matryoshka-jumprelu", torch.float32).save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_header(folder, change):
    """Change the header of a file, and nothing of its data."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


# Headers


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_by_the_config_are_those_of_the_model(variant):
    sae = make_sae(variant)
    assert tensor_shapes(sae.config) == {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}


@each(
    load={"AutoModel": AutoModel, "class": MatryoshkaSAE},
    width=[None, 4],
    name=["W_enc", "b_dec", "threshold"],
    dtype=["I32", "bool", "int8"],
)
def test_weights_that_are_no_floating_numbers_are_refused(folder, load, width, name, dtype):
    if dtype == "I32":  # the bytes of floating numbers by another name
        edit_header(folder, lambda header: header[name].update(dtype="I32"))
    else:
        rewrite_weights(folder, lambda state: state.update({name: state[name].to(getattr(torch, dtype))}))
    with pytest.raises(ValueError, match=rf"{name} in .*{folder.name}.* is of type .*should be one of F32"):
        load.from_pretrained(folder, width=width)


@each(load={"AutoModel": AutoModel, "class": MatryoshkaSAE}, width=[None, 4], shape=[(), (1,), (F, D, 1)])
def test_weights_of_other_axes_are_refused(folder, load, width, shape):
    rewrite_weights(folder, lambda state: state.update(W_dec=torch.zeros(shape)))
    with pytest.raises(ValueError, match=rf"W_dec in .*{folder.name}"):
        load.from_pretrained(folder, width=width)


@each(load={"AutoModel": AutoModel, "class": MatryoshkaSAE}, width=[None, 4])
def test_sizes_that_no_memory_has_are_refused_before_anything_is_made(folder, load, width):
    edit_config(folder, num_latents=10**12, prefix_widths=[10**12], d_in=10**9)
    before, began = peak_memory(), time.process_time()
    with pytest.raises(ValueError, match=rf"in .*{folder.name}.* the config"):
        load.from_pretrained(folder, width=width)
    assert peak_memory() - before < 50 * 1024**2
    assert time.process_time() - began < 5


def test_weights_in_a_pickle_are_not_read(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="neither model.safetensors nor model.safetensors.index.json"):
        MatryoshkaSAE.from_pretrained(folder)


def test_a_variant_is_checked_and_loads(folder):
    sae = AutoModel.from_pretrained(folder)
    sae.save_pretrained(folder, variant="fp32")
    (folder / "model.safetensors").unlink()
    assert_same_tensors(AutoModel.from_pretrained(folder, variant="fp32"), sae)


# Names


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "C:\\a", "C:a", "..\\a", "a\0", "", ".", "..", 3, None])
def test_only_a_plain_name_is_one_of_a_file_in_a_folder(name):
    assert not is_file_name(name)
    assert is_file_name("model-00001-of-00002.safetensors")


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "C:\\a", "C:a", "a\\..\\b", "\\\\host\\a", "a\0", 3])
def test_only_a_relative_path_without_steps_up_is_a_folder_inside(name):
    assert not is_inner_folder(name)
    assert is_inner_folder("") and is_inner_folder("sae/model.layers.3-input") and is_inner_folder("layers.3:input")


@each(
    load={"AutoModel": AutoModel, "class": MatryoshkaSAE},
    width=[None, 4],
    layout=["shards", "pieces"],
    absolute=[True, False],
)
def test_an_index_names_no_files_outside_its_folder(tmp_path, load, width, layout, absolute):
    folder, outside = tmp_path / "sae", tmp_path / "outside"
    outside.mkdir()
    save(make_sae("matryoshka-jumprelu", torch.float32), folder, layout)
    for path in folder.glob("*.safetensors"):
        shutil.move(path, outside / path.name)  # where it would be found
    path = folder / {"shards": SAFE_WEIGHTS_INDEX_NAME, "pieces": PIECES_INDEX_NAME}[layout]
    prefix = {"shards": '"model-', "pieces": '"latents-'}[layout]
    named = f"{outside}/" if absolute else "../outside/"
    path.write_text(path.read_text().replace(prefix, f'"{named}{prefix[1:]}'))
    with pytest.raises(ValueError, match=rf"{path.name}"):
        load.from_pretrained(folder, width=width)


@pytest.mark.parametrize("place", ["../other", "layers.2/../../other", "{}/other"])
def test_the_index_of_a_repository_names_no_folders_outside_it(hub, tmp_path, place):
    root, place = tmp_path / "root", place.format(tmp_path)
    root.mkdir()
    make_sae("relu").save_pretrained(tmp_path / "other")
    index = {"model_type": "sae_collection", "saes": {place: {"model_type": "relu_sae"}}}
    (root / "config.json").write_text(json.dumps(index))
    hub.add("tester/sae", {"config.json": json.dumps(index).encode()})
    for load in (AutoModel, SAECollection):
        with pytest.raises(ValueError, match="holds 0 SAEs"):  # in a folder what is there counts, not its index
            load.from_pretrained(root)
        with pytest.raises(ValueError, match="index .*tester/sae names 'relu_sae' in the folder .*no SAE in it"):
            load.from_pretrained("tester/sae")


@pytest.mark.parametrize("entry", [{"model_type": "llama"}, {}, {"model_type": []}])
def test_the_index_of_a_repository_names_saes_alone(hub, entry):
    index = {"model_type": "sae_collection", "saes": {"a": entry}}
    hub.add("tester/sae", {"config.json": json.dumps(index).encode()})
    with pytest.raises(ValueError, match="in the folder 'a', which is no SAE"):
        AutoModel.from_pretrained("tester/sae")


def test_an_index_of_a_million_pieces_is_refused_at_once(tmp_path):
    save(make_sae("matryoshka-jumprelu", torch.float32), tmp_path, "pieces")
    piece = '{"file": "latents-0000001-of-1000000.safetensors", "start": %d, "stop": %d}'
    pieces = ",".join(piece % (n, n + 1) for n in range(10**6))
    (tmp_path / PIECES_INDEX_NAME).write_text(f'{{"format": 1, "num_latents": {10**6}, "pieces": [{pieces}]}}')
    began = time.process_time()
    with pytest.raises(ValueError, match=r"latents.index.json is no index of pieces.*at most"):
        AutoModel.from_pretrained(tmp_path)
    assert time.process_time() - began < 2


# Numbers


@each(
    load={"AutoModel": AutoModel, "class": MatryoshkaSAE},
    width=[None, 4],
    value=[float("nan"), float("inf"), float("-inf")],
    name=["W_enc", "W_dec", "b_enc", "b_dec"],
)
def test_weights_that_are_not_finite_are_refused(folder, load, width, value, name):
    rewrite_weights(folder, lambda state: state[name].view(-1)[:2].fill_(value))
    with pytest.raises(ValueError, match=f"{name} of .*{folder.name} has 2 entries of .* that are no finite numbers"):
        load.from_pretrained(folder, width=width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_numbers_are_checked_in_every_type_and_block(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(weight_checks, "_ENTRIES_AT_ONCE", 2 * D)
    sae = make_sae("relu", dtype)
    sae.save_pretrained(tmp_path)
    assert_same_tensors(AutoModel.from_pretrained(tmp_path), sae)
    rewrite_weights(tmp_path, lambda state: state["W_dec"][-1, -1:].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"W_dec of .* has 1 entries of {F * D}"):
        AutoModel.from_pretrained(tmp_path)
    assert_same_tensors(AutoModel.from_pretrained(tmp_path, width=F - 1), sae.truncate(F - 1))
    with pytest.raises(ValueError, match="W_dec of "):
        read_latents(tmp_path, F - 2, F)
    assert torch.equal(read_latents(tmp_path, 2, 5)[1]["W_enc"], sae.W_enc[2:5])


def test_weights_too_large_for_a_type_are_told_of_it(folder):
    rewrite_weights(folder, lambda state: state["b_enc"][:1].fill_(1e6))
    AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="as torch.float16.*dtype=torch.float32"):
        AutoModel.from_pretrained(folder, dtype=torch.float16)


def test_a_latent_may_never_fire_but_no_threshold_of_jumprelu_is_below_0(folder):
    rewrite_weights(folder, lambda state: state["threshold"][:1].fill_(float("inf")))
    latents = AutoModel.from_pretrained(folder).encode(hidden_states(20, dtype=torch.float32)).to_dense()
    assert (latents[:, 0] == 0).all() and (latents[:, 1:] > 0).any()
    for value in (-0.1, float("-inf"), float("nan")):
        rewrite_weights(folder, lambda state, value=value: state["threshold"][:1].fill_(value))
        with pytest.raises(ValueError, match="threshold of .*(0 or more|no finite)"):
            AutoModel.from_pretrained(folder)


def test_ids_below_0_are_refused(folder):
    rewrite_weights(folder, lambda state: state["latent_ids"][:1].fill_(-1))
    with pytest.raises(ValueError, match="latent_ids of .* go down to -1"):
        AutoModel.from_pretrained(folder)


# Configs

ABSURD = [
    {"d_in": "6"},
    {"d_in": True},
    {"num_latents": 10**400},
    {"num_latents": None},
    {"prefix_widths": "2"},
    {"prefix_widths": [2, None]},
    {"prefix_widths": list(range(1, 10**6))},
    {"hookpoint": list(range(10**6))},
    {"prefix_weights": [1, 1, list(range(10**6))]},
    {"base_model": {"a": 1}},
    {"activation": ["relu"]},
    {"bandwidth": float("nan")},
    {"bandwidth": 10**400},
    {"format_version": "1"},
    {"dtype": "nonsense"},
    {"dtype": "int64"},
    {"dtype": [1.0]},
    {"transformers_weights": "../model.safetensors"},
]


@each(fields={str(fields)[:40]: fields for fields in ABSURD}, load={"AutoModel": AutoModel, "class": MatryoshkaSAE})
def test_absurd_fields_are_one_kind_of_error_that_names_the_folder(folder, load, fields):
    edit_config(folder, **fields)
    began = time.process_time()
    with pytest.raises(ValueError, match=next(iter(fields))) as caught:
        load.from_pretrained(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 2000
    assert time.process_time() - began < 2


@pytest.mark.parametrize("text", ["{", "[1]", "3", '"a"', "[" * 100_000, '{"model_type": {}}', "\ufeff", "{}"])
def test_a_config_of_something_else_is_one_kind_of_error(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config"):
        MatryoshkaSAE.from_pretrained(folder, d_in=3)


def test_a_damaged_config_in_the_cache_says_how_to_replace_it(hub, tmp_path):
    sae = make_sae("matryoshka-jumprelu", torch.float32)
    sae.save_pretrained(tmp_path / "saved")
    hub.add("tester/sae", {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()})
    MatryoshkaSAE.from_pretrained("tester/sae")
    (cached,) = (tmp_path / "cache").glob("models--tester--sae/snapshots/*/config.json")
    cached.resolve().write_text('{"d_in": ')
    with pytest.raises(ValueError, match="config.json of tester/sae is damaged.*force_download=True"):
        MatryoshkaSAE.from_pretrained("tester/sae")
    assert_same_tensors(MatryoshkaSAE.from_pretrained("tester/sae", force_download=True), sae)
    assert_same_tensors(MatryoshkaSAE.from_pretrained("tester/sae"), sae)


def test_header_and_numbers_of_shards_are_checked(tmp_path):
    save(make_sae("matryoshka-jumprelu", torch.float32), tmp_path, "shards")
    path = sorted(tmp_path.glob("model-*.safetensors"))[0]
    state = load_file(path)
    name = next(name for name in state if name != "latent_ids")
    save_file(state | {name: state[name].int()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} in .*{path.name} is of type I32"):
        AutoModel.from_pretrained(tmp_path)
