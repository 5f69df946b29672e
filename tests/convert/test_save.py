"""Exports: every family, in every format that can express it, computes the same; the others refuse with a reason."""

import json

import pytest
import torch

from hf_matryoshka_sae import CONFIGS, build_sae, convert
from hf_matryoshka_sae.convert import registry
from hf_matryoshka_sae.convert.formats import saelens

from ..axes import each
from .reference import SHAPES, assert_computes, inputs


VARIANTS = {
    "relu": {"type": "relu"},
    "relu added": {"type": "relu", "apply_b_dec_to_input": False},
    "relu scaled": {"type": "relu", "scale_by_decoder_norm": True},
    "relu layer_norm": {"type": "relu", "input_normalization": "layer_norm"},
    "relu constant_norm": {"type": "relu", "input_normalization": "constant_norm"},
    "relu transcoder": {"type": "relu", "output_hookpoint": "model.layers.1.mlp"},
    "topk": {"type": "topk", "k": 3},
    "topk added": {"type": "topk", "k": 3, "apply_b_dec_to_input": False},
    "topk scaled": {"type": "topk", "k": 3, "scale_by_decoder_norm": True},
    "topk layer_norm": {"type": "topk", "k": 3, "input_normalization": "layer_norm"},
    "topk tied": {"type": "topk", "k": 3, "tied": True},
    "topk tied layer_norm": {"type": "topk", "k": 3, "tied": True, "input_normalization": "layer_norm"},
    "topk groups": {"type": "topk", "k": 2, "groups": 2},
    "topk transcoder": {"type": "topk", "k": 3, "output_hookpoint": "model.layers.1.mlp"},
    "batch_topk": {"type": "batch_topk", "k": 2.5},
    "batch_topk one threshold": {"type": "batch_topk", "k": 3, "threshold": 0.3},
    "jumprelu": {"type": "jumprelu"},
    "jumprelu added": {"type": "jumprelu", "apply_b_dec_to_input": False},
    "jumprelu transcoder": {"type": "jumprelu", "output_hookpoint": "model.layers.1.mlp"},
    "gated": {"type": "gated"},
    "gated added scaled": {"type": "gated", "apply_b_dec_to_input": False, "scale_by_decoder_norm": True},
    "matryoshka batch_topk": {"type": "matryoshka", "activation": "batch_topk", "k": 3, "threshold": 0.3},
    "matryoshka relu": {"type": "matryoshka", "activation": "relu"},
    "matryoshka topk": {"type": "matryoshka", "activation": "topk", "k": 3},
    "matryoshka jumprelu": {"type": "matryoshka", "activation": "jumprelu"},
}

# saelens, dictionary_learning, sparsify, openai, gemma_scope, csr
EXPRESSED = {
    "relu": "sd-o--",
    "relu added": "sd-o--",
    "relu scaled": "sd-o--",
    "relu layer_norm": "s-----",
    "relu constant_norm": "s-----",
    "relu transcoder": "s-----",
    "topk": "sdp---",
    "topk added": "sdp---",
    "topk scaled": "sdp---",
    "topk layer_norm": "s--o--",
    "topk tied": "sdp--c",
    "topk tied layer_norm": "s--o-c",
    "topk groups": "--p---",
    "topk transcoder": "--p---",
    "batch_topk": "s-----",
    "batch_topk one threshold": "sd----",
    "jumprelu": "sd--g-",
    "jumprelu added": "sd--g-",
    "jumprelu transcoder": "s-----",
    "gated": "sd----",
    "gated added scaled": "sd----",
    "matryoshka batch_topk": "sd----",
    "matryoshka relu": "s-----",
    "matryoshka topk": "s-----",
    "matryoshka jumprelu": "s-----",
}
FORMATS = ("saelens", "dictionary_learning", "sparsify", "openai", "gemma_scope", "csr")


def random_sae(variant: str, d_in: int = 16, num_latents: int = 64):
    fields = {"d_in": d_in, "num_latents": num_latents, "hookpoint": "model.layers.1"} | VARIANTS[variant]
    kind, threshold, groups, tied = (fields.pop(name, None) for name in ("type", "threshold", "groups", "tied"))
    if groups:
        fields["group_size"] = num_latents // groups
    if kind == "matryoshka":
        fields["prefix_widths"] = [3, num_latents // 2, num_latents]
    sae = build_sae(CONFIGS[kind](**fields)).eval()
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if name == "threshold":
                tensor.copy_(torch.rand(num_latents) * 0.5 + 0.1)
                if threshold:
                    tensor.fill_(threshold)
            elif name != "latent_ids":
                tensor.copy_(torch.randn(tensor.shape) * (d_in**-0.5 if tensor.dim() == 2 else 0.3))
        if tied:
            sae.W_dec.copy_(sae.W_enc)
    return sae


@each(shape=SHAPES, variant=list(VARIANTS))
def test_every_export_computes_the_same(tmp_path, variant, shape):
    sae, x = random_sae(variant, *shape), inputs(shape[0])
    with torch.no_grad():
        latents = sae.encode(x)
        expected = latents.to_dense(), sae.decode(latents)
    for name in (*convert.able_to_write(sae),):
        convert.save(sae, tmp_path / name, name)
        back = convert.load(tmp_path / name)
        assert_computes(back, x, *expected)
        assert type(back) is type(sae) and back.prefix_widths == sae.prefix_widths


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_cannot_be_expressed_is_refused_with_who_can(tmp_path, variant):
    sae = random_sae(variant)
    letters = dict(zip(FORMATS, EXPRESSED[variant], strict=True))
    able = [name for name in FORMATS if letters[name] != "-"]
    assert sorted(convert.able_to_write(sae)) == sorted([*able, "hf_matryoshka_sae"])
    for name in FORMATS:
        if name not in able:
            with pytest.raises(ValueError, match=f"{name} cannot express this SAE: .+ What can: hf_matryoshka_sae"):
                convert.save(sae, tmp_path / name, name)
            assert not (tmp_path / name).exists()


def test_reasons(tmp_path):
    for variant, name, reason in (
        ("batch_topk", "dictionary_learning", "one threshold for all latents, and this one has several, from 0.1"),
        ("matryoshka topk", "dictionary_learning", "its Matryoshka SAEs are all BatchTopK"),
        ("topk", "openai", "normalise each hidden state"),
        ("relu", "sparsify", "this SAE is relu"),
        ("gated", "gemma_scope", "this one is gated"),
        ("topk", "csr", "this SAE's are two matrices"),
    ):
        with pytest.raises(ValueError, match=reason):
            convert.save(random_sae(variant), tmp_path / name, name)
    with pytest.raises(ValueError, match="qwen_scope is only read"):
        convert.save(random_sae("topk"), tmp_path, "qwen_scope")
    with pytest.raises(ValueError, match="Did you mean 'sparsify'"):
        convert.save(random_sae("topk"), tmp_path, "sparsifi")


def test_the_sae_is_not_changed(tmp_path):
    sae = random_sae("gated added scaled")
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    for name in convert.able_to_write(sae):
        convert.save(sae, tmp_path / name, name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    assert sae.config.scale_by_decoder_norm and not sae.config.apply_b_dec_to_input


def test_a_failed_export_leaves_the_last_one(tmp_path, monkeypatch):
    sae = random_sae("topk")
    convert.save(sae, tmp_path, "saelens")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(saelens, "write_json", fail)
    with pytest.raises(OSError, match="No space left"):
        convert.save(random_sae("topk"), tmp_path, "saelens")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_ids_of_pruned_latents_are_lost_which_is_said(tmp_path, caplog):
    sae = random_sae("topk")
    sae.permute_(torch.randperm(64))
    convert.save(sae, tmp_path / "ours")
    assert torch.equal(convert.load(tmp_path / "ours").latent_ids, sae.latent_ids) and not caplog.text
    convert.save(sae, tmp_path / "theirs", "saelens")
    assert "original ids" in caplog.text


def test_half_precision(tmp_path):
    sae = random_sae("matryoshka batch_topk").to(torch.bfloat16)
    for name in convert.able_to_write(sae):
        convert.save(sae, tmp_path / name, name)
        back = convert.load(tmp_path / name, dtype=torch.bfloat16)
        assert torch.equal(back.W_enc, sae.W_enc) and torch.equal(back.W_dec, sae.W_dec)
    assert json.loads((tmp_path / "saelens" / "cfg.json").read_text())["dtype"] == "bfloat16"


def test_formats_are_described():
    assert {*FORMATS, "hf_matryoshka_sae"} == set(convert.formats(writable=True))
    assert set(convert.formats()) >= {"qwen_scope", "llama_scope", "bussmann", "nabeshima", "gemma_scope_2"}
    assert all(about and "\n" not in about for about in convert.formats().values())
    assert {name: format.write is not None for name, format in registry.FORMATS.items()} == {
        name: name in convert.formats(writable=True) for name in convert.formats()
    }


def test_a_folder_holds_an_sae_of_one_format(tmp_path):
    sae = build_sae(CONFIGS["relu"](d_in=4, num_latents=8))
    convert.save(sae, tmp_path, "saelens")
    convert.save(sae, tmp_path, "saelens")
    for other in ("hf_matryoshka_sae", "dictionary_learning"):
        with pytest.raises(ValueError, match="holds an SAE in the format saelens"):
            convert.save(sae, tmp_path, other)
    assert convert.load(tmp_path).config.num_latents == 8


def test_hints_that_contradict_the_files_are_said(tmp_path, caplog):
    sae = build_sae(CONFIGS["matryoshka"](d_in=4, num_latents=8, k=2, prefix_widths=[2, 8]))
    convert.save(sae, tmp_path, "dictionary_learning")
    loaded = convert.load(tmp_path, k=3, prefix_widths=[4, 8])
    assert loaded.prefix_widths == [4, 8] and loaded.k == 3
    assert "says k = 2; it is loaded with k = 3" in caplog.text and "was trained at widths [2, 8]" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("variant", ["topk tied", "topk tied layer_norm"])
def test_sentence_transformers_computes_the_same(tmp_path, variant):
    module = pytest.importorskip("sentence_transformers.sparse_encoder.modules").SparseAutoEncoder
    sae, x = random_sae(variant), inputs(16)
    convert.save(sae, tmp_path, "csr")
    loaded = module.load(str(tmp_path)).eval()
    found = loaded({"sentence_embedding": x.clone()})
    torch.testing.assert_close(found["sentence_embedding"], sae.encode(x).to_dense(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["decoded_embedding_k"], sae.decode(sae.encode(x)), rtol=1e-4, atol=1e-5)
