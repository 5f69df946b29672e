"""Libraries that expect layers: FSDP2 works, quantisers and PEFT are told what to do instead."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig
from transformers.integrations import PeftAdapterMixin

from hf_matryoshka_sae import MatryoshkaSAE

from ..axes import each
from .reference import D, hidden_states, make_sae
from .test_saving import assert_same_tensors, contents


@pytest.fixture
def group():
    """A group of this process alone: tensors are spread over it as over many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


FAMILIES = [
    ("matryoshka-batch_topk", {}),
    ("gated", {}),
    ("relu", {}),
    ("topk", {"input_normalization": "layer_norm"}),
]


@pytest.mark.parametrize(("variant", "options"), FAMILIES, ids=str)
def test_encode_and_decode_work_on_weights_that_fsdp2_has_spread(group, variant, options):
    sae, x = make_sae(variant, torch.float32, **options), hidden_states(2, 9, dtype=torch.float32)
    spread = fully_shard(copy.deepcopy(sae))
    assert isinstance(spread.W_enc, DTensor)
    for _ in range(2):  # at the second call the methods are known
        for width in (None, 4):
            latents, expected = spread.encode(x, width=width), sae.encode(x, width=width)
            assert torch.equal(latents.to_dense(), expected.to_dense())
            assert torch.equal(spread.decode(latents, width), sae.decode(expected, width))
            assert torch.equal(spread.decode_prefixes(latents), sae.decode_prefixes(expected))
        assert torch.equal(spread(x).loss, sae(x).loss)
    for one in (spread, sae):
        latents = one.encode(x)
        ((one.decode(latents) - x).square().sum() + latents.values.abs().sum()).backward()
    for (name, tensor), other in zip(sae.named_parameters(), spread.parameters(), strict=True):
        assert isinstance(other.grad, DTensor), name
        torch.testing.assert_close(other.grad.full_tensor(), tensor.grad, msg=name)


def one_of_two(rank: int, folder: str) -> None:
    """Encode, decode and backward with weights spread over two processes, each with hidden states of its own."""
    sae = make_sae("matryoshka-topk", torch.float32)
    batches = torch.randn(2, 9, D)
    spread = fully_shard(copy.deepcopy(sae))
    assert len(spread.W_enc.to_local()) < len(sae.W_enc)
    latents = spread.encode(batches[rank])
    reconstruction = spread.decode(latents)
    assert torch.equal(reconstruction, sae.decode(sae.encode(batches[rank])))
    (reconstruction - batches[rank]).square().sum().backward()
    sum((sae.decode(sae.encode(x)) - x).square().sum() / 2 for x in batches).backward()  # FSDP takes the mean
    for (name, tensor), other in zip(sae.named_parameters(), spread.parameters(), strict=True):
        torch.testing.assert_close(other.grad.full_tensor(), tensor.grad, msg=name)
    state = get_model_state_dict(spread, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert bool(state) == (rank == 0)
    spread.save_pretrained(folder, state_dict=state)
    dist.barrier()
    assert_same_tensors(AutoModel.from_pretrained(folder), sae)


@pytest.mark.slow
def test_two_processes_encode_decode_and_save_what_is_spread_over_them(tmp_path, two_processes):
    two_processes.run(one_of_two, str(tmp_path / "saved"))


def test_weights_that_fsdp2_has_spread_are_saved_gathered_or_refused(group, tmp_path):
    sae = make_sae("matryoshka-topk", torch.float32)
    spread = fully_shard(copy.deepcopy(sae))
    sae.save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="spread over processes .*state_dict=accelerator.get_state_dict"):
        spread.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    state = get_model_state_dict(spread, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    spread.save_pretrained(tmp_path / "gathered", state_dict=state)
    assert_same_tensors(AutoModel.from_pretrained(tmp_path / "gathered"), sae)


@each(width=[None, 4], load=[AutoModel, MatryoshkaSAE])
def test_a_quantisation_is_refused_before_anything_is_read(tmp_path, load, width):
    make_sae("matryoshka-topk", torch.float32).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for quantization in (BitsAndBytesConfig(load_in_8bit=True), {"quant_method": "bitsandbytes"}):
        with pytest.raises(ValueError, match="cannot be quantised .*Leave `quantization_config` out"):
            load.from_pretrained(tmp_path, quantization_config=quantization, width=width)


def test_a_config_has_no_quantisation(tmp_path):
    make_sae("topk").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("{", '{"quantization_config": {"quant_method": "gptq"}, ', 1))
    with pytest.raises(ValueError, match="Unknown field 'quantization_config'"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["add_adapter", "load_adapter"])
def test_an_adapter_is_refused_with_the_way_to_have_one(method):
    assert hasattr(PeftAdapterMixin, method)
    with pytest.raises(
        ValueError, match=r"nn.Sequential\(sae\), LoraConfig\(target_parameters=\['0.W_enc', '0.W_dec'"
    ):
        getattr(make_sae("topk"), method)("adapter")


def test_the_way_to_have_an_adapter_works():
    peft = pytest.importorskip("peft")
    sae, x = make_sae("matryoshka-topk", torch.float32), torch.randn(50, D)
    before = sae(x).loss
    config = peft.LoraConfig(target_parameters=["0.W_enc", "0.W_dec"], r=2)
    adapted = peft.get_peft_model(torch.nn.Sequential(sae), config)
    assert torch.equal(adapted(x).loss, before)
    optimizer = torch.optim.Adam([tensor for tensor in adapted.parameters() if tensor.requires_grad], lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        adapted(x).loss.backward()
        optimizer.step()
    merged = adapted.merge_and_unload()[0]
    assert type(merged) is MatryoshkaSAE and merged(x).loss < 0.9 * before
