"""The artefact: files, another order of the latents, the Hub, and models and SAEs that it was not made for."""

import json
from dataclasses import replace

import pytest
import torch

from hf_matryoshka_sae.models import MatryoshkaSAE
from hf_matryoshka_sae.steering import Steering, steered

from .architectures import logits, make_sae, model_of, tokens


@pytest.fixture(scope="module")
def llama():
    model, hookpoint = model_of("llama")
    return model, make_sae(hookpoint)


def test_what_was_saved_does_the_same(llama, tmp_path):
    model, sae = llama
    made = Steering.from_latents(sae, {3: 1.5, 20: -2.0}) + Steering.from_latents(sae, [7], "erase")
    with made.applied(model):
        expected = logits(model, tokens())
    made.save_pretrained(tmp_path)
    loaded = Steering.from_pretrained(tmp_path)
    with loaded.applied(model):
        assert torch.equal(logits(model, tokens()), expected)
    assert [part.facts() for part in loaded.parts] == [
        json.loads(json.dumps(p.facts())) | {name: getattr(p, name) for name in ("latents", "latent_ids", "values")}
        for p in made.parts
    ]
    card = (tmp_path / "README.md").read_text()
    assert "| 3 | 1.5 | add | `model.layers.1` |" in card and "| 7 | - | erase |" in card
    assert made.parts[0].digest[:12] in card and "base model" in card


@pytest.mark.parametrize("mode", ["clamp", "remove"])
def test_the_sae_is_loaded_from_where_it_is_named(llama, tmp_path, mode):
    model, sae = llama
    sae.save_pretrained(tmp_path / "sae")
    made = Steering.from_latents(tmp_path / "sae", {3: 1.5}, mode, width=10)
    made.save_pretrained(tmp_path / "steering")
    loaded = Steering.from_pretrained(tmp_path / "steering")
    assert loaded.parts[0].sae is None and loaded.parts[0].sae_name == str(tmp_path / "sae")
    with steered(model, sae, {3: 1.5}, mode, width=10):
        expected = logits(model, tokens())
    with loaded.applied(model):
        torch.testing.assert_close(logits(model, tokens()), expected)


def test_latents_are_found_in_a_sorted_sae_by_their_ids(llama):
    model, sae = llama
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    changed = MatryoshkaSAE(sae.config).eval()
    changed.load_state_dict(sae.state_dict())
    changed.permute_(order)
    made = Steering.from_latents(sae, {3: 1.5}, "clamp")
    found = replace(made, parts=(replace(made.parts[0], sae=None),)).with_sae(changed)
    assert found.parts[0].latents == ((order == 3).nonzero().item(),)
    with made.applied(model):
        expected = logits(model, tokens())
    with found.applied(model):
        torch.testing.assert_close(logits(model, tokens()), expected)


def test_a_repository_holds_no_paths_of_this_machine(llama, hub, tmp_path):
    model, sae = llama
    sae.save_pretrained(tmp_path / "sae")
    Steering.from_latents(tmp_path / "sae", {3: 1.5}).push_to_hub("user/steering")
    loaded = Steering.from_pretrained("user/steering")
    assert loaded.parts[0].sae_name is None and loaded.parts[0].digest
    with loaded.applied(model):
        found = logits(model, tokens())
    with steered(model, sae, {3: 1.5}):
        assert torch.equal(logits(model, tokens()), found)


def test_another_model_is_named(llama, caplog):
    model, sae = llama
    model.name_or_path = "user/small"
    made = Steering.from_latents(sae, {3: 1.5})
    named = Steering((replace(made.parts[0], base_model="somebody/large"),))
    with named.applied(model):
        pass
    assert "made for somebody/large, and this model is user/small" in caplog.text
    with pytest.raises(ValueError, match="pass `strict=False`"), named.applied(model, strict=True):
        pass
    with Steering((replace(made.parts[0], base_model="somebody/small"),)).applied(model, strict=True):
        pass
    wide = Steering((replace(made.parts[0], vectors=torch.ones(1, 8)),))
    with pytest.raises(ValueError, match="width 8, and LlamaForCausalLM has hidden states of width 16"):
        wide.check(model)


def test_damaged_files_and_other_saes_are_told(llama, tmp_path):
    model, sae = llama
    made = Steering.from_latents(sae, {3: 1.5}, "clamp")
    made.save_pretrained(tmp_path)
    loaded = Steering.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say which"), loaded.applied(model):
        pass
    other = make_sae("model.layers.1")
    other.W_dec.data[3] += 1
    with pytest.raises(ValueError, match=r"No SAE here has the latents \[3\]"):
        loaded.with_sae(other)
    data = json.loads((tmp_path / "steering.json").read_text())
    for change in ({"format_version": 99}, {"parts": [data["parts"][0] | {"mode": "push"}]}, {"parts": [{}]}):
        (tmp_path / "steering.json").write_text(json.dumps(data | change))
        with pytest.raises(ValueError, match="cannot be read"):
            Steering.from_pretrained(tmp_path)
    (tmp_path / "vectors.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        Steering.from_pretrained(tmp_path)
    for place, message in [
        ("/nope", "There is no folder or file '/nope' here"),
        (tmp_path.parent, "holds no steering"),
    ]:
        with pytest.raises(ValueError, match=message):
            Steering.from_pretrained(place)
    with pytest.raises(ValueError, match="needs `data`"):
        Steering.from_latents(sae, {3: 1.5}, dose="auto")
