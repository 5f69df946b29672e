"""Latents sharded over processes: the cut, its fallback and ties, and rows that change places, against one process."""

import pytest
import torch
import torch.distributed as dist

from hf_matryoshka_sae.models.encoder_blocks import EncoderBlocks
from hf_matryoshka_sae.models.selection import select_batch_topk, select_topk
from hf_matryoshka_sae.models.sharding import Layout, exchange_rows, shard_rows


N, F = 12, 22  # F is no multiple of the shards


def matrices() -> dict[str, tuple[torch.Tensor, float, float]]:
    """Pre-activations of the joined batch, k, and the capacity factor."""
    torch.manual_seed(0)
    ties = torch.randint(0, 3, (N, F)).float()
    skewed = torch.rand(N, F)
    skewed[:, : F // 4] += 5  # all winners are in one shard
    negative = -torch.rand(N, F)
    repeated = torch.rand(N, F)
    repeated[1::2] = repeated[::2]
    return {
        "plain": (torch.rand(N, F), 4, 4.0),
        "no room to spare": (torch.rand(N, F), 5, 1.0),
        "ties": (ties, 5, 2.0),
        "skewed": (skewed, 4, 1.0),
        "negative": (negative, 3, 1.0),
        "repeated rows": (repeated, 3, 2.0),
        "more places than latents": (torch.rand(N, F), F + 9, 1.5),
        "one place": (torch.rand(N, F), 1, 4.0),
    }


def blocks_of(pre: torch.Tensor) -> EncoderBlocks:
    return EncoderBlocks(torch.eye(len(pre)), pre.T.contiguous(), torch.zeros(pre.shape[1]))


def topk_reference(pre: torch.Tensor, k: int) -> torch.Tensor:
    best = pre.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(pre, dtype=torch.bool).scatter(1, best, True)


def batch_reference(pre: torch.Tensor, k: float) -> torch.Tensor:
    best = pre.flatten().sort(descending=True, stable=True).indices[: int(k * len(pre))]
    mask = torch.zeros(pre.numel(), dtype=torch.bool)
    mask[best] = True
    return mask.view(pre.shape) & (pre > 0)


def layout_of(rank: int, replicas: int, shards: int, factor: float) -> Layout:
    mesh = dist.init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replica", "latent"))
    replica, shard = divmod(rank, shards)
    groups = mesh["replica"].get_group(), mesh["latent"].get_group(), dist.group.WORLD
    return Layout(F, replica, replicas, shard, shards, *groups, factor)


def work(rank: int, replicas: int, shards: int) -> dict[str, tuple]:
    found = {}
    for name, (pre, k, factor) in matrices().items():
        layout = layout_of(rank, replicas, shards, factor)
        start, stop = layout.rows
        mine = pre.chunk(replicas)[layout.replica][:, start:stop]
        for kind, select in (("topk", select_topk), ("batch", select_batch_topk)):
            layout.selections = layout.fallbacks = 0
            rows, cols, values = select(blocks_of(mine), int(k), layout=layout)
            assert torch.equal(values, mine[rows, cols])
            found[f"{kind} {name}"] = rows + layout.replica * len(mine), cols + start, layout.fallbacks
    layout = layout_of(rank, replicas, shards, 1.0)
    start, stop = layout.rows
    order = torch.randperm(F, generator=torch.Generator().manual_seed(3))
    for name, whole in tensors().items():
        part = whole[start:stop].clone()
        exchange_rows(part, order, layout, budget=3 * (stop - start))
        found[f"order {name}"] = part, start, stop
    return found


def tensors() -> dict[str, torch.Tensor]:
    values = torch.arange(F * 7).view(F, 7)
    return {
        "float": values.float(),
        "bf16": values.bfloat16(),
        "long": values[:, 0].clone(),
        "bool": values[:, 0] % 3 == 0,
        "int8": values.to(torch.int8),
        "cube": values.float().view(F, 7, 1).expand(-1, -1, 2).contiguous(),
    }


SHAPES = [(1, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((2, 2), (1, 4)))]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def outcomes(request):
    processes = request.getfixturevalue("two_processes" if request.param == (1, 2) else "four_processes")
    return processes.run(work, *request.param)


def mask_of(outcomes: list[dict], key: str) -> torch.Tensor:
    mask = torch.zeros(N, F, dtype=torch.int64)
    for found in outcomes:
        rows, cols, _ = found[key]
        mask[rows, cols] += 1
    assert mask.max() <= 1  # nobody claims another's pairs
    return mask.bool()


@pytest.mark.parametrize("name", matrices())
def test_the_cut_is_that_of_one_process(outcomes, name):
    pre, k, _ = matrices()[name]
    assert torch.equal(mask_of(outcomes, f"topk {name}"), topk_reference(pre, k))
    assert torch.equal(mask_of(outcomes, f"batch {name}"), batch_reference(pre, k))


def test_a_shard_that_has_more_winners_than_its_capacity_sends_them_all(outcomes):
    fallbacks = {key: [found[key][2] for found in outcomes] for key in outcomes[0] if not key.startswith("order")}
    assert all(len(set(counts)) == 1 for counts in fallbacks.values())  # or some would wait for ever
    assert fallbacks["topk skewed"][0] == fallbacks["batch skewed"][0] == 1
    assert fallbacks["topk one place"][0] == 0  # all is sent at once
    assert fallbacks["batch plain"][0] == 0


def test_rows_change_places_over_shards(outcomes):
    order = torch.randperm(F, generator=torch.Generator().manual_seed(3))
    for name, whole in tensors().items():
        for found in outcomes:
            part, start, stop = found[f"order {name}"]
            assert torch.equal(part, whole[order][start:stop]), name


def test_shards_cover_the_dictionary_in_order():
    for num_latents, shards in ((22, 4), (4, 4), (1000, 7)):
        rows = [shard_rows(num_latents, shard, shards) for shard in range(shards)]
        assert rows[0][0] == 0 and rows[-1][1] == num_latents
        assert all(a[1] == b[0] for a, b in zip(rows, rows[1:], strict=False))
        assert max(b - a for a, b in rows) - min(b - a for a, b in rows) <= 1


def test_widths_of_a_shard_are_those_of_its_own_latents():
    layout = Layout(20, shard=1, shards=4)
    assert layout.rows == (5, 10)
    assert layout.own_widths([3, 5, 7, 12, 20]) == [0, 0, 2, 5, 5]
