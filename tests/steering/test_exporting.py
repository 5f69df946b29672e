"""Files for other tools, read back as these tools read them, and run beside the hook."""

import json

import pytest
import torch

from hf_matryoshka_sae.steering import Steering

from .architectures import logits, make_sae, model_of, tokens


@pytest.fixture(scope="module")
def llama():
    model, hookpoint = model_of("llama")
    return model, make_sae(hookpoint)


def added(model, vectors, **options):
    """Logits with vectors added after blocks, by their numbers: what these tools do."""
    handles = [
        model.model.layers[layer].register_forward_hook(lambda _, __, out, vector=vector: out + vector)
        for layer, vector in vectors.items()
    ]
    found = logits(model, tokens(), **options)
    for handle in handles:
        handle.remove()
    return found


def two_layers(sae):
    return Steering.from_latents(sae, {3: 1.5, 20: -2.0}) + Steering.from_latents(make_sae("model.layers.2"), {4: 1.0})


def test_llama_cpp_reads_a_control_vector(llama, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the extra `steering`")
    model, sae = llama
    steering = two_layers(sae)
    reader = gguf.GGUFReader(steering.export(tmp_path, "gguf", model))
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    vectors = {int(tensor.name.split(".")[1]): torch.tensor(tensor.data) for tensor in reader.tensors}
    with steering.applied(model):
        expected = logits(model, tokens())
    torch.testing.assert_close(added(model, vectors), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="after the second block at the earliest"):
        Steering.from_latents(sae, {3: 1.0}, hookpoint="model.layers.0").export(tmp_path, "gguf", model)


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_servers_read_vectors_of_layers(llama, tmp_path, positions):
    model, sae = llama
    steering = Steering.from_latents(sae, {3: 1.5, 20: -2.0}, positions=positions)
    requests = json.loads((steering.export(tmp_path, "vectors", model) / "requests.json").read_text())
    assert requests == [{"id": "steering-layer1", "layer": 1, "scale": 1.0, "decode_only": positions == "generated"}]
    vector = torch.load(tmp_path / "steering-layer1.pt", weights_only=True)
    torch.testing.assert_close(vector, 1.5 * sae.W_dec[3].detach() - 2.0 * sae.W_dec[20].detach())


def test_hotwire_loads_the_vectors(llama, tmp_path):
    state = pytest.importorskip("hotwire._state", reason="needs hotwire-vllm")
    model, sae = llama
    two_layers(sae).export(tmp_path, "vectors", model)
    served = state.SteerState(3, 16, 8, torch.device("cpu"), torch.float32, 4)
    served.load_store(str(tmp_path))
    vectors = {}
    for request in state.parse_spec((tmp_path / "requests.json").read_text()):
        slot = served.slot_for(request["id"], request["layer"], request["scale"])
        vectors[request["layer"]] = served.bank.bank[slot] * served.bank.scales[slot]
    with two_layers(sae).applied(model):
        expected = logits(model, tokens())
    torch.testing.assert_close(added(model, vectors), expected, rtol=0, atol=1e-5)


def harness_actions(path):
    """What the harness's model `steered` makes of its file, written from its documentation of the format."""
    actions = {}
    for hookpoint, info in torch.load(path, weights_only=True).items():
        assert set(info) == {"action", "steering_vector", "steering_coefficient", "bias", "head_index"}
        assert info["bias"] is None and info["head_index"] is None
        vector, value = info["steering_vector"], info["steering_coefficient"]
        unit = vector / vector.norm()
        actions[hookpoint] = {
            "add": lambda x, moved=vector * value: x + moved,
            "clamp": lambda x, unit=unit, value=value: x + (value - x @ unit)[..., None] * unit,
        }[info["action"]]
    return actions


@pytest.mark.parametrize("mode, latents", [("add", {3: 1.5, 20: -2.0}), ("erase", [3])])
def test_the_harness_reads_its_file(llama, tmp_path, mode, latents):
    model, sae = llama
    steering = Steering.from_latents(sae, latents, mode)
    handles = [
        model.base_model.get_submodule(name).register_forward_hook(lambda _, __, out, act=act: act(out))
        for name, act in harness_actions(steering.export(tmp_path, "lm_eval", model)).items()
    ]
    found = logits(model, tokens())
    for handle in handles:
        handle.remove()
    with steering.applied(model):
        torch.testing.assert_close(found, logits(model, tokens()), rtol=0, atol=1e-5)


def test_what_a_format_cannot_say_is_refused(llama, tmp_path):
    model, sae = llama
    for format, options, message in [
        ("gguff", {}, "Did you mean 'gguf'"),
        ("gguf", dict(mode="clamp"), "depends on what fires"),
        ("gguf", dict(positions="generated"), "at some positions alone"),
        ("gguf", dict(mode="erase"), "export to 'peft'"),
        ("vectors", dict(positions="new"), "at some positions alone"),
        ("vectors", dict(hookpoint="model.layers.1.mlp"), "is no such place"),
        ("vectors", dict(hookpoint="model.layers.0:input"), "is no such place"),
        ("lm_eval", dict(hookpoint="model.layers.1:input"), "outputs of modules of LlamaModel"),
        ("lm_eval", dict(mode="remove"), "depends on what fires"),
    ]:
        with pytest.raises(ValueError, match=message):
            Steering.from_latents(sae, {3: 1.0}, **options).export(tmp_path, format, model)
    with pytest.raises(ValueError, match="erase one"):
        Steering.from_latents(sae, [3, 4], "erase").export(tmp_path, "lm_eval", model)
    with pytest.raises(ValueError, match="names no language model"):
        Steering.from_latents(sae, {3: 1.0}).export(tmp_path, "gguf")
    assert not list(tmp_path.iterdir())
