"""Checkpoints: what is saved comes back bit for bit, and damage is named."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_matryoshka_sae import SAEModel, TopKSAE
from hf_matryoshka_sae.models.pieces import PIECES_INDEX_NAME

from ..axes import each
from .reference import VARIANTS, D, F, assert_close, hidden_states, make_sae


variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def saved(tmp_path):
    """A folder with a small checkpoint, and the SAE in it."""
    sae = make_sae("matryoshka-jumprelu", torch.float32)
    sae.save_pretrained(tmp_path)
    return tmp_path, sae


def assert_same_tensors(actual: SAEModel, expected: SAEModel):
    assert type(actual) is type(expected)
    states = actual.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype and torch.equal(tensor, states[1][name]), name


@each(variant=list(VARIANTS), load=["AutoModel", "class"])
def test_a_saved_sae_comes_back_bit_for_bit_with_its_class(tmp_path, variant, load):
    sae = make_sae(variant, torch.float32, apply_b_dec_to_input=False, base_model="some/model", hookpoint="layers.3")
    sae.permute_(torch.randperm(F))
    sae.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    loaded = (AutoModel if load == "AutoModel" else type(sae)).from_pretrained(tmp_path)
    assert_same_tensors(loaded, sae)
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    x = hidden_states(9, dtype=torch.float32)
    ours, theirs = sae(x), loaded(x)
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.reconstruction, theirs.reconstruction)
    assert torch.equal(ours.latents.to_dense(), theirs.latents.to_dense())
    assert (loaded.config.base_model, loaded.config.hookpoint) == ("some/model", "layers.3")


@variants
def test_a_folded_normalisation_is_in_the_saved_weights(tmp_path, variant):
    sae, raw, mean = make_sae(variant), hidden_states(9) * 4 + 1, torch.randn(D, dtype=torch.float64)
    expected = sae((raw - mean) / 3.7).reconstruction * 3.7 + mean
    sae.fold_normalization_(mean, 3.7)
    sae.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    # Thresholds are loaded as fp32; no pre-activation of this batch lies between the two.
    assert_close(loaded(raw).reconstruction, expected)


@each(variant=["batch_topk", "jumprelu", "matryoshka-batch_topk", "matryoshka-jumprelu"], width=[None, 4])
def test_thresholds_stay_fp32_in_a_bf16_sae(tmp_path, variant, width):
    sae = make_sae(variant, torch.float32)
    sae.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16, width=width)
    assert loaded.W_enc.dtype == torch.bfloat16 and loaded.threshold.dtype == torch.float32
    assert torch.equal(loaded.threshold, sae.threshold[:width])
    small = loaded.truncate(3)
    assert small.threshold.dtype == torch.float32 and torch.equal(small.threshold, sae.threshold[:3])
    small.save_pretrained(tmp_path / "small")
    again = AutoModel.from_pretrained(tmp_path / "small")
    assert_same_tensors(again, small)
    x = hidden_states(500, dtype=torch.bfloat16)
    assert torch.equal(small.encode(x).to_dense(), loaded.encode(x, width=3).to_dense()[:, :3])


def test_loading_does_not_advance_the_random_state(saved):
    state = torch.get_rng_state()
    AutoModel.from_pretrained(saved[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_info_is_given_where_it_is_asked_for(saved):
    sae, info = AutoModel.from_pretrained(saved[0], output_loading_info=True)
    assert isinstance(sae, SAEModel) and not info["missing_keys"] and not info["unexpected_keys"]


def save(sae: SAEModel, folder, layout: str, size: int = 400) -> None:
    """Save in one file, in pieces by latents, or in the shards of transformers, as repositories of before have."""
    if layout == "shards":
        PreTrainedModel.save_pretrained(sae, folder, max_shard_size=size)
    else:
        sae.save_pretrained(folder, max_shard_size="5GB" if layout == "one file" else size)
    names = {"one file": "model.safetensors", "shards": SAFE_WEIGHTS_INDEX_NAME, "pieces": PIECES_INDEX_NAME}
    assert {other: (folder / name).exists() for other, name in names.items()} == {
        other: other == layout for other in names
    }


# Damage


def rewrite_weights(folder, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


@each(variant=list(VARIANTS), width=[None, 4])
def test_a_missing_tensor_is_named_never_invented(tmp_path, variant, width):
    sae = make_sae(variant)
    for name in sae.state_dict():
        sae.save_pretrained(tmp_path)
        rewrite_weights(tmp_path, lambda state, name=name: state.pop(name))
        with pytest.raises(ValueError, match=f"do not fit its config.*missing_keys.*{name}"):
            type(sae).from_pretrained(tmp_path, width=width)


@each(width=[None, 4], field=[{"d_in": D + 2}, {"num_latents": F + 1, "prefix_widths": [F + 1]}])
def test_shapes_other_than_the_config_says_are_refused(saved, field, width):
    folder, sae = saved
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    with pytest.raises(ValueError, match=r"W_enc|W_dec|b_enc|b_dec|latent_ids|threshold") as caught:
        type(sae).from_pretrained(folder, width=width)
    assert str(folder) in str(caught.value)


@each(
    width=[None, 4],
    load=["AutoModel", "class"],
    damage={
        "half": lambda data: data[: len(data) // 2],
        "one byte short": lambda data: data[:-1],
        "in the header": lambda data: data[:20],
        "empty": lambda data: b"",
        "garbage": lambda data: b"garbage" * 100,
        "header overwritten": lambda data: b"\xff" * 64 + data[64:],
        "one byte long": lambda data: data + b"x",
    },
)
def test_a_damaged_file_is_refused_with_its_place_and_what_to_do(saved, load, damage, width):
    folder, sae = saved
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    loader = AutoModel if load == "AutoModel" else type(sae)
    with pytest.raises(ValueError, match="damaged or half-written: save or download it again") as caught:
        loader.from_pretrained(folder, width=width)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(("text", "width"), [("{", None), ("{", 4), ("", None), ("", 4), ("{}", 4)])
@pytest.mark.parametrize("layout", ["shards", "pieces"])
def test_a_damaged_index_is_refused(tmp_path, layout, text, width):
    sae, folder = make_sae("matryoshka-jumprelu", torch.float32), tmp_path
    save(sae, folder, layout)
    (folder / {"shards": SAFE_WEIGHTS_INDEX_NAME, "pieces": PIECES_INDEX_NAME}[layout]).write_text(text)
    with pytest.raises(ValueError, match="damaged or half-written"):
        type(sae).from_pretrained(folder, width=width)


@each(width=[None, 4], load=[TopKSAE, SAEModel])
def test_a_checkpoint_of_another_family_is_refused(saved, load, width):
    with pytest.raises(ValueError, match="holds a matryoshka_sae.*AutoModel"):
        load.from_pretrained(saved[0], width=width)


def test_a_family_without_fields_of_its_own_is_not_taken_for_another(tmp_path):
    make_sae("relu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a relu_sae, not a topk_sae"):
        TopKSAE.from_pretrained(tmp_path)


# Saving


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("existing", [True, False], ids=["over an earlier save", "first save"])
def test_an_interrupted_save_leaves_earlier_files_and_no_litter(saved, tmp_path, monkeypatch, existing):
    folder, sae = saved
    if not existing:
        folder = tmp_path / "new"
    before = contents(folder) if existing else {}
    inner = PreTrainedModel.save_pretrained

    def disk_full(self, directory, **kwargs):
        inner(self, directory, **kwargs)
        with open(os.path.join(directory, "model.safetensors"), "r+b") as file:
            file.truncate(100)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", disk_full)
    other = make_sae("topk")
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(folder)
    assert contents(folder) == before
    if existing:
        assert_same_tensors(AutoModel.from_pretrained(folder), sae)


@pytest.mark.parametrize(
    ("first", "second"),
    [("5GB", 400), (400, "5GB"), (400, 700), (400, 420), ("shards", 400), ("shards", "5GB")],
    ids=str,
)
def test_a_save_in_other_pieces_replaces_the_earlier_one(tmp_path, first, second):
    old, new = make_sae("matryoshka-relu"), make_sae("topk")
    (tmp_path / "README.md").write_text("kept")
    (tmp_path / "model_notes.txt").write_text("kept")
    save(old, tmp_path, "shards") if first == "shards" else old.save_pretrained(tmp_path, max_shard_size=first)
    new.save_pretrained(tmp_path, max_shard_size=second)
    alone = tmp_path / "alone"
    new.save_pretrained(alone, max_shard_size=second)
    expected = set(os.listdir(alone)) | {"README.md", "model_notes.txt", "alone"}
    assert set(os.listdir(tmp_path)) == expected
    for width in (None, 4):
        loaded = AutoModel.from_pretrained(tmp_path, width=width)
        assert_same_tensors(loaded, new if width is None else new.truncate(width))
