"""Several processes that save into one folder leave one whole SAE in it."""

import threading

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModel

from benchmarks.fault_kinds.saves import save_often

from .reference import F, make_sae
from .test_saving import assert_same_tensors, contents


sizes = pytest.mark.parametrize("size", ["5GB", 400], ids=["one file", "pieces"])


@sizes
def test_a_process_that_is_not_the_main_one_touches_nothing(tmp_path, size):
    sae = make_sae("matryoshka-topk", torch.float32)
    sae.save_pretrained(tmp_path / "saved", max_shard_size=size)
    before = contents(tmp_path / "saved")
    for folder in ("saved", "new"):
        for state_dict in (None, {}, sae.state_dict()):
            make_sae("relu").save_pretrained(tmp_path / folder, is_main_process=False, state_dict=state_dict)
            make_sae("relu").save_pretrained(tmp_path / folder, False, max_shard_size="5GB", push_to_hub=True)
    assert contents(tmp_path / "saved") == before and not (tmp_path / "new").exists()


@sizes
def test_a_given_state_dict_is_what_is_saved(tmp_path, size):
    sae, other = make_sae("relu", torch.float32), make_sae("relu", torch.float32)
    state = other.state_dict()
    sae.save_pretrained(tmp_path, True, state, max_shard_size=size, save_function=torch.save)
    assert_same_tensors(AutoModel.from_pretrained(tmp_path), other)
    assert state.keys() == other.state_dict().keys()  # it can be saved again


def test_saves_at_the_same_time_leave_one_of_them_whole(tmp_path):
    """Each with its own family and its own pieces, which the others sweep away."""
    sizes = {"relu": 400, "topk": 700, "gated": "5GB", "jumprelu": 420}
    saes = {variant: make_sae(variant, torch.float32) for variant in sizes}
    together, failures = threading.Barrier(len(saes)), []

    def save(variant):
        try:
            for _ in range(10):
                together.wait()
                saes[variant].save_pretrained(tmp_path, max_shard_size=sizes[variant])
                together.wait()
                if variant == "relu":
                    loaded = AutoModel.from_pretrained(tmp_path)
                    assert_same_tensors(loaded, saes[loaded.config.model_type.removesuffix("_sae")])
        except BaseException as error:
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=save, args=(variant,)) for variant in saes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not [error for error in failures if not isinstance(error, threading.BrokenBarrierError)]


def test_every_process_of_a_group_can_save_an_sae_of_its_own(tmp_path, monkeypatch):
    for name, value in {"is_available": True, "is_initialized": True, "get_rank": 1}.items():
        monkeypatch.setattr(dist, name, lambda *_, value=value: value)
    sae = make_sae("matryoshka-relu", torch.float32)
    sae.save_pretrained(tmp_path)
    assert_same_tensors(AutoModel.from_pretrained(tmp_path), sae)
    make_sae("topk").save_pretrained(tmp_path, state_dict={})  # gathered by the first process
    assert AutoModel.from_pretrained(tmp_path).config.num_latents == F


def _save_often(rank, folder):
    save_often(folder, seed=1, count=12)


def test_two_processes_under_accelerate_save_whole_each_time(tmp_path, two_processes):
    two_processes.run(_save_often, tmp_path)
    assert (tmp_path / "results.jsonl").read_text().splitlines() == 12 * ['""']  # no faults
