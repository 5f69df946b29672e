"""Files that are damaged, hold code, lack something or have other shapes; and matrices stored the other way round."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_matryoshka_sae import MatryoshkaSAEConfig, TopKSAEConfig, build_sae, convert
from hf_matryoshka_sae.convert.checkpoint import cumulated, number_list

from ..axes import each
from .reference import weights


def saelens(folder, tensors, **config):
    state = {name: tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec") if name in tensors}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "sae_weights.safetensors")
    sizes = {"d_in": len(tensors["b_dec"]), "d_sae": len(tensors["b_enc"])}
    content = sizes | {"architecture": "standard", "metadata": {}} | config
    (folder / "cfg.json").write_text(json.dumps(content))
    return folder


def test_a_whole_module_as_older_code_saved_it_is_not_run(tmp_path):
    file = tmp_path / "ae.pt"
    torch.save(torch.nn.Linear(2, 2), file)
    with pytest.raises(ValueError, match="Save its state dict instead"):
        convert.load(file)


@each(name=["ae.pt", "5.pt", "layer0.sae.pt", "params.npz", "sae_weights.safetensors"], kept=[0, 10, 0.5])
def test_half_written_files(tmp_path, name, kept):
    tensors = weights(16, 64)
    if name.endswith(".pt"):
        torch.save(tensors, tmp_path / name)
    elif name.endswith(".npz"):
        np.savez(tmp_path / name, **{key: tensor.numpy() for key, tensor in tensors.items()})
    else:
        save_file(tensors, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="damaged or half-written"):
        convert.load(tmp_path)


def test_damaged_config(tmp_path):
    saelens(tmp_path, weights(16, 64))
    (tmp_path / "cfg.json").write_text('{"d_in": 16, "d_s')
    with pytest.raises(ValueError, match="cfg.json is no JSON"):
        convert.load(tmp_path)
    (tmp_path / "cfg.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="should hold a JSON object"):
        convert.load(tmp_path)


@pytest.mark.parametrize("missing", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_whatever_is_missing_is_named(tmp_path, missing):
    tensors = weights(16, 64)
    saelens(tmp_path, tensors)
    save_file(
        {k: v for k, v in tensors.items() if k not in (missing, "threshold")}, tmp_path / "sae_weights.safetensors"
    )
    with pytest.raises(ValueError, match=f"lacks the tensor {missing}; it holds"):
        convert.load(tmp_path)


def test_what_is_missing_is_named_with_what_is_there(tmp_path):
    tensors = weights(16, 64)
    saelens(tmp_path, tensors, architecture="jumprelu")
    with pytest.raises(ValueError, match=r"lacks the tensor threshold; it holds W_dec \(64, 16\)"):
        convert.load(tmp_path)
    torch.save([1, 2], tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="should hold a dictionary of tensors, holds a list"):
        convert.load(tmp_path / "ae.pt")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"W_enc": torch.zeros(16, 60)}, r"W_enc of .* should be 64 x 16 or its transpose.*\(16, 60\)"),
        ({"W_dec": torch.zeros(64, 16, 2)}, r"W_dec of .* has shape \(64, 16, 2\)"),
        ({"b_enc": torch.zeros(64, 1)}, "b_enc of .* should have one axis"),
        ({"W_dec": torch.zeros(64, 20)}, "transcoder into another width"),
    ],
)
def test_shapes(tmp_path, changed, message):
    saelens(tmp_path, weights(16, 64) | changed)
    with pytest.raises(ValueError, match=message):
        convert.load(tmp_path)


@pytest.mark.parametrize("wrong", [{"d_in": 32}, {"d_sae": 128}])
def test_a_config_of_another_checkpoint(tmp_path, wrong):
    saelens(tmp_path, weights(16, 64), **wrong)
    ((name, said),) = wrong.items()
    with pytest.raises(ValueError, match=f"where its config says {name} {said}"):
        convert.load(tmp_path)


@pytest.mark.parametrize("shape", [(16, 64), (24, 10)])
def test_shapes_decide_which_axis_is_which(tmp_path, shape):
    tensors = weights(*shape)
    for name, state in (
        ("as documented", tensors | {"W_enc": tensors["W_enc"].T}),
        ("both the other way", tensors | {"W_dec": tensors["W_dec"].T}),
    ):
        sae = convert.load(saelens(tmp_path / name, state))
        torch.testing.assert_close(sae.W_enc, tensors["W_enc"])
        torch.testing.assert_close(sae.W_dec, tensors["W_dec"])


def test_square_matrices_the_wrong_way_round_are_noticed(tmp_path):
    tensors = weights(32, 32)
    tied = tensors | {"W_dec": tensors["W_enc"] + 0.02 * torch.randn(32, 32)}
    right = convert.load(saelens(tmp_path / "right", tied | {"W_enc": tensors["W_enc"].T}))
    torch.testing.assert_close(right.W_enc, tensors["W_enc"])
    with pytest.raises(ValueError, match="fit each other only when one is transposed"):
        convert.load(saelens(tmp_path / "wrong", tied))
    with pytest.raises(ValueError, match="fit each other only when one is transposed"):
        convert.load(saelens(tmp_path / "decoder", tied | {"W_enc": tensors["W_enc"].T, "W_dec": tied["W_dec"].T}))


def test_random_square_matrices_follow_the_documentation(tmp_path):
    tensors = weights(32, 32)
    sae = convert.load(saelens(tmp_path, tensors))
    torch.testing.assert_close(sae.W_enc, tensors["W_enc"].T)


def test_unknown_files_are_described(tmp_path):
    torch.save({"lm_head.weight": torch.zeros(3, 4)}, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    with pytest.raises(ValueError, match=r"lm_head.weight \(3, 4\).*fields: hidden_size.*pass `format`"):
        convert.load(tmp_path)


def test_unknown_names(tmp_path):
    saelens(tmp_path, weights(16, 64))
    with pytest.raises(ValueError, match="Did you mean 'saelens'"):
        convert.load(tmp_path, "saelense")
    with pytest.raises(TypeError, match="subfoldr"):
        convert.load(tmp_path, subfoldr="a")
    with pytest.raises(ValueError, match="lacks the tensor"):
        convert.load(tmp_path, "openai")


def test_the_users_word_wins(tmp_path):
    saelens(tmp_path, weights(16, 64), architecture="topk", k=4)
    sae = convert.load(tmp_path, k=2, base_model="a/b", hookpoint="c", prefix_widths=[8, 64], width=8)
    assert (sae.config.k, sae.config.base_model, sae.config.hookpoint) == (2, "a/b", "c")
    assert sae.prefix_widths == [8] and sae.W_enc.shape == (8, 16)
    with pytest.raises(ValueError, match="end at num_latents"):
        convert.load(tmp_path, prefix_widths=[8, 32])


def test_our_own_format(tmp_path):
    sae = build_sae(TopKSAEConfig(d_in=16, num_latents=64, k=4))
    sae.save_pretrained(tmp_path)
    back = convert.load(tmp_path, width=8, hookpoint="model.layers.1")
    assert torch.equal(back.W_enc, sae.W_enc[:8]) and back.config.hookpoint == "model.layers.1"
    with pytest.raises(ValueError, match="topk_sae, which has no `prefix_widths`"):
        convert.load(tmp_path, prefix_widths=[8, 64])
    nested = build_sae(MatryoshkaSAEConfig(d_in=16, num_latents=64, k=4))
    nested.save_pretrained(tmp_path / "nested")
    back = convert.load(tmp_path / "nested", prefix_widths=[8, 64], k=3)
    assert back.prefix_widths == [8, 64] and back.config.k == 3
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged or half-written"):
        convert.load(tmp_path)


def test_lists_written_as_strings():
    assert number_list("[2304, 4608]") == number_list([2304.0, 4608]) == number_list(torch.tensor([2304, 4608]))
    assert number_list(None) is None and cumulated(None) is None
    assert cumulated([2, 3, 4]) == [2, 5, 9]
    for wrong in ("[a]", "open('x')", "3", [1.5], {"a": 1}, "[True]"):
        with pytest.raises(ValueError, match="list of whole numbers"):
            number_list(wrong)
