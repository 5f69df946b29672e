"""Sparse latents behave as the dense tensor they stand for; an SAE prints what it is."""

import pytest
import torch
from accelerate.utils import send_to_device

from hf_matryoshka_sae import MatryoshkaSAE, MatryoshkaSAEConfig, ReluSAE, ReluSAEConfig

from .reference import D, F, hidden_states, make_sae


MASK = torch.tensor([[True, False, True], [False, False, True]])
INDICES = {
    "one": 1,
    "last": -1,
    "token": (1, 2),
    "slice": slice(1, None),
    "columns": (slice(None), slice(0, 2)),
    "mask": MASK,
    "list": [1, 0, 1],
    "tensors": (torch.tensor([0, 1]), torch.tensor([2, 0])),
    "new axis": None,
    "ellipsis": (0, ...),
    "none at all": slice(0, 0),
}


@pytest.fixture(params=["topk", "normalised"])
def sae(request):
    return make_sae("topk", **({"input_normalization": "layer_norm"} if request.param == "normalised" else {}))


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_indexing_tokens_gives_what_indexing_the_dense_tensor_gives(sae, index):
    x = hidden_states(2, 3)
    latents = sae.encode(x)
    part, dense = latents[index], latents.to_dense()[index]
    assert torch.equal(part.to_dense(), dense) and part.shape == dense.shape
    assert torch.equal(part.l0, (dense > 0).sum(-1))
    torch.testing.assert_close(sae.decode(part), sae.decode(latents)[index])


def test_length_and_iteration_are_over_the_first_axis_of_the_tokens():
    latents = make_sae("relu").encode(hidden_states(4))
    assert len(latents) == 4 and latents.shape == (4, F)
    assert torch.equal(torch.stack([token.to_dense() for token in latents]), latents.to_dense())
    with pytest.raises(TypeError, match="no length"):
        len(latents[0])


REFUSED = {"past the end": 4, "slot": (0, 0), "mask of slots": torch.ones(4, F, dtype=torch.bool), "latent": (..., 0)}


@pytest.mark.parametrize("index", REFUSED.values(), ids=REFUSED)
def test_slots_and_tokens_that_are_not_there_are_refused(index):
    with pytest.raises(IndexError):
        make_sae("relu").encode(hidden_states(4))[index]


def test_latents_move_and_change_their_type_like_a_tensor(sae):
    latents = sae.encode(hidden_states(4))
    half = latents.to(torch.float16)
    assert half.dtype == torch.float16 and half.indices.dtype == torch.int64 and half.num_latents == F
    assert torch.equal(half.to_dense(), latents.to_dense().half())
    for moved in (latents.to("meta"), latents.to(device="meta", dtype=torch.float32), send_to_device(latents, "meta")):
        assert moved.device == moved.indices.device == torch.device("meta") and moved.shape == (4, F)
        assert all(part.device == moved.device for part in moved.input_norm or ())
    sent = send_to_device({"output": [sae(hidden_states(2))]}, "meta")["output"][0]
    assert sent["latents"].device == sent["reconstruction"].device == torch.device("meta")


def test_detached_latents_carry_no_gradient(sae):
    latents = sae.encode(hidden_states(4).requires_grad_())
    assert latents.values.requires_grad and not sae.decode(latents.detach()).sub(sae.b_dec).detach().requires_grad
    tensors = [latents.detach().values, *(latents.detach().input_norm or ())]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_print_tells_what_an_sae_is():
    config = MatryoshkaSAEConfig(d_in=D, num_latents=F, k=3, prefix_widths=[4, F], hookpoint="layers.3")
    parameters = 2 * F * D + F + D  # both matrices, both biases
    assert str(MatryoshkaSAE(config)) == (
        f"MatryoshkaSAE(d_in={D}, num_latents={F}, activation_name='batch_topk', k=3, prefix_widths=[4, {F}], "
        f"hookpoint='layers.3', parameters={parameters})"
    )
    plain = str(ReluSAE(ReluSAEConfig(d_in=D, num_latents=F, base_model="some/model")))
    assert "base_model='some/model'" in plain and "prefix_widths" not in plain and "k=" not in plain
