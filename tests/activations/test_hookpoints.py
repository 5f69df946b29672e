import pytest
import torch

from hf_matryoshka_sae.activations import harvest, hookpoint_widths, resolve_hookpoints

from . import tiny


@pytest.fixture(params=tiny.ARCHITECTURES)
def architecture(request):
    build, layers = tiny.ARCHITECTURES[request.param]
    return build(), layers


def _tokens(padded: bool = False):
    input_ids = torch.randint(7, 200, (3, 12))
    attention_mask = torch.ones_like(input_ids)
    if padded:
        attention_mask[1, 9:] = 0
    return input_ids, attention_mask


def _count_calls(model) -> dict[str, int]:
    calls = {name: 0 for name, _ in model.named_modules()}

    def counter(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    for name, module in model.named_modules():
        module.register_forward_pre_hook(counter(name))
    return calls


@pytest.mark.parametrize("padded", [False, True])
def test_harvest_equals_the_hidden_states_of_the_full_forward(architecture, padded):
    model, layers = architecture
    input_ids, attention_mask = _tokens(padded)
    with torch.no_grad():
        expected = model(input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states
    hookpoints = [f"{layers}.0:input", f"{layers}.0", f"{layers}.1"]
    states = harvest(model, input_ids, attention_mask, hookpoints)
    assert list(states) == hookpoints
    for name, full in zip(hookpoints, expected, strict=False):
        torch.testing.assert_close(states[name], full, rtol=0, atol=0)
    assert not any(value.requires_grad for value in states.values())


def test_without_padding_no_mask_is_needed(architecture):
    model, layers = architecture
    input_ids, attention_mask = _tokens()
    with_mask = harvest(model, input_ids, attention_mask, [f"{layers}.1"])
    without = harvest(model, input_ids, None, [f"{layers}.1"])
    torch.testing.assert_close(with_mask, without)


def test_nothing_runs_after_the_last_hookpoint(architecture):
    model, layers = architecture
    calls = _count_calls(model)
    harvest(model, *_tokens(), [f"{layers}.0", f"{layers}.1:input"])
    assert calls[f"{layers}.0"] == calls[f"{layers}.1"] == 1
    inner = [name for name, _ in model.named_modules() if name.startswith((f"{layers}.1.", f"{layers}.2"))]
    assert inner and not any(calls[name] for name in inner)


def test_the_order_of_hookpoints_does_not_matter(architecture):
    model, layers = architecture
    tokens = _tokens()
    forward = harvest(model, *tokens, [f"{layers}.0", f"{layers}.2"])
    backward = harvest(model, *tokens, [f"{layers}.2", f"{layers}.0"])
    assert all(torch.equal(forward[name], backward[name]) for name in forward)


def test_hooks_are_gone_even_after_an_error():
    model = tiny.llama()
    harvest(model, *_tokens(), ["model.layers.0", "model.layers.1:input"])
    with pytest.raises(ValueError, match="rotary_emb"):
        harvest(model, *_tokens(), ["model.layers.0", "model.rotary_emb"])
    with pytest.raises(ValueError, match=r"model\.layer\.1"):
        harvest(model, *_tokens(), ["model.layers.0", "model.layer.1"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hidden_states_given_by_keyword_are_found():
    states = harvest(tiny.llama(), *_tokens(), ["model.layers.0.self_attn:input"])
    assert states["model.layers.0.self_attn:input"].shape == (3, 12, 16)


def test_the_type_of_the_model_is_kept():
    model = tiny.llama().to(torch.bfloat16)
    assert harvest(model, *_tokens(), ["model.layers.0"])["model.layers.0"].dtype == torch.bfloat16


def test_widths():
    widths = hookpoint_widths(tiny.llama(), ["model.layers.0", "model.layers.0.mlp.gate_proj"])
    assert widths == {"model.layers.0": 16, "model.layers.0.mlp.gate_proj": 32}


def test_router_logits_are_refused():
    with pytest.raises(ValueError, match=r"mlp.gate.*expected hidden states.*Choose a module"):
        harvest(tiny.mixtral(), *_tokens(), ["model.layers.0.mlp.gate"])


def test_a_module_that_is_never_called_is_named():
    model = tiny.llama()
    model.spare = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="never reached spare"):
        harvest(model, *_tokens(), ["model.layers.0", "spare"])


def test_resolve_expands_globs_in_module_order():
    model = tiny.llama()
    assert resolve_hookpoints(model, ["model.layers.2", "model.layers.*"]) == [f"model.layers.{i}" for i in range(3)]
    assert resolve_hookpoints(model, "model.layers.[12]:input") == ["model.layers.1:input", "model.layers.2:input"]
    assert resolve_hookpoints(model, ["model.layers.1:output"]) == ["model.layers.1"]
    assert resolve_hookpoints(model, "*.mlp") == [f"model.layers.{i}.mlp" for i in range(3)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers.1", "No module matches.*model.layers.1"),
        ("model.layer.1", "Near it.*model.layers.1"),
        ("model.layers.9", "Near it.*model.layers"),
        ("model.layers.1:residual", "':input', ':output' or nothing"),
        ([], "No hookpoints given"),
    ],
)
def test_resolve_says_what_is_near(pattern, message):
    with pytest.raises(ValueError, match=message):
        resolve_hookpoints(tiny.llama(), pattern)
