"""The first latents of a checkpoint: the same SAE as a truncated one, and nothing else is read."""

from collections import Counter

import pytest
import torch
from transformers import AutoModel

from hf_matryoshka_sae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_matryoshka_sae.models import checkpoint_files

from ..axes import each
from .reference import VARIANTS, D, F, hidden_states, make_sae
from .test_saving import assert_same_tensors, save


layouts = pytest.mark.parametrize("layout", ["one file", "shards", "pieces"])


@each(variant=list(VARIANTS), layout=["one file", "shards", "pieces"], width=[1, 2, 6, F])
def test_a_partly_loaded_sae_equals_the_truncated_one(tmp_path, variant, width, layout):
    sae = make_sae(variant, torch.float32)
    sae.permute_(torch.randperm(F))
    save(sae, tmp_path, layout)
    loaded, small = type(sae).from_pretrained(tmp_path, width=width), sae.truncate(width)
    assert_same_tensors(loaded, small)
    assert loaded.config.truncated(width) == small.config.truncated(width) and not loaded.training
    assert getattr(loaded, "k", None) == getattr(small, "k", None)
    x = hidden_states(9, dtype=torch.float32)
    assert torch.equal(loaded(x).reconstruction, small(x).reconstruction)
    assert torch.equal(loaded(x).loss, small(x).loss)


@layouts
def test_auto_model_subfolder_and_dtype_work_with_a_width(tmp_path, layout):
    sae = make_sae("matryoshka-topk", torch.float32)
    save(sae, tmp_path / "layers.3", layout)
    loaded = AutoModel.from_pretrained(tmp_path, subfolder="layers.3", width=6, dtype=torch.bfloat16)
    assert_same_tensors(loaded, sae.truncate(6).to(torch.bfloat16))
    by_class = MatryoshkaSAE.from_pretrained(str(tmp_path), subfolder="layers.3", width=6)
    assert_same_tensors(by_class, sae.truncate(6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_checkpoints_type_is_kept_unless_another_is_asked_for(tmp_path, dtype):
    make_sae("relu", dtype).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, width=4).dtype == dtype
    assert AutoModel.from_pretrained(tmp_path, width=4, dtype="auto").dtype == dtype
    assert AutoModel.from_pretrained(tmp_path, width=4, dtype=torch.float32).dtype == torch.float32


def test_a_partly_loaded_sae_can_be_saved_trained_and_cut_again(tmp_path):
    sae = make_sae("matryoshka-relu", torch.float32)
    sae.save_pretrained(tmp_path / "whole")
    part = AutoModel.from_pretrained(tmp_path / "whole", width=6)
    part.save_pretrained(tmp_path / "part")
    assert_same_tensors(AutoModel.from_pretrained(tmp_path / "part", width=2), sae.truncate(2))
    part.train()(hidden_states(5, dtype=torch.float32)).loss.backward()
    assert all(parameter.grad is not None for parameter in part.parameters())


@pytest.mark.parametrize("load", [AutoModel, MatryoshkaSAE], ids=["AutoModel", "class"])
def test_config_fields_can_be_overridden_with_and_without_a_width(tmp_path, load):
    make_sae("matryoshka-topk").save_pretrained(tmp_path)
    assert load.from_pretrained(tmp_path, width=6, k=2).k == 2
    assert load.from_pretrained(tmp_path, width=6).k == 3 and load.from_pretrained(tmp_path, k=2).k == 2


def test_a_given_config_is_used_and_left_alone(tmp_path):
    make_sae("matryoshka-topk").save_pretrained(tmp_path)
    config = MatryoshkaSAEConfig.from_pretrained(tmp_path)
    assert MatryoshkaSAE.from_pretrained(tmp_path, width=6, config=config).config.num_latents == 6
    assert config.num_latents == F and config.prefix_widths[-1] == F


@each(width=[0, -1, F + 1], load={"AutoModel": AutoModel, "class": MatryoshkaSAE})
def test_widths_outside_the_dictionary_are_refused(tmp_path, load, width):
    make_sae("matryoshka-relu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"`width` must lie between 1 and num_latents \({F}\), got {width}"):
        load.from_pretrained(tmp_path, width=width)


# What is read


class CountingFile:
    """A safetensors file that notes how many elements of each tensor are taken out."""

    taken: Counter[str] = Counter()

    def __init__(self, *args, **kwargs):
        self.file = _safe_open(*args, **kwargs)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_tensor(self, name):
        tensor = self.file.get_tensor(name)
        self.taken[name] += tensor.numel()
        return tensor

    def get_slice(self, name):
        return CountingSlice(self, name, self.file.get_slice(name))


class CountingSlice:
    def __init__(self, file, name, rows):
        self.file, self.name, self.rows = file, name, rows

    def get_shape(self):
        return self.rows.get_shape()

    def __getitem__(self, index):
        tensor = self.rows[index]
        self.file.taken[self.name] += tensor.numel()
        return tensor


_safe_open = checkpoint_files.safe_open


@each(layout=["one file", "shards", "pieces"], variant=["relu", "gated", "matryoshka-jumprelu"])
def test_only_the_asked_rows_are_taken_from_the_file(tmp_path, monkeypatch, variant, layout):
    sae = make_sae(variant)
    save(sae, tmp_path, layout)
    monkeypatch.setattr(checkpoint_files, "safe_open", CountingFile)
    monkeypatch.setattr(CountingFile, "taken", Counter())
    AutoModel.from_pretrained(tmp_path, width=4)
    expected = {name: tensor[:4].numel() for name, tensor in sae.state_dict().items()} | {"b_dec": D}
    assert CountingFile.taken == expected
