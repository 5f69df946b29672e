"""Two processes find what one finds: the search by pattern, and the tree."""

from dataclasses import astuple, dataclass

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hf_matryoshka_sae.evaluation.data import HeldOut
from hf_matryoshka_sae.features.patterns.matching import TokenPattern
from hf_matryoshka_sae.features.patterns.search import PatternHit, search_latents
from hf_matryoshka_sae.features.tree.tree import build_tree

from .patterns.test_search import CAPITAL, build, open_data


@dataclass
class Harvested(HeldOut):
    """Hidden states read before: to load text and model in each process would take most of the test's time."""

    harvested: list[torch.Tensor] | None = None

    device = torch.device("cpu")

    def states(self, batch):
        (number,) = (i for i, other in enumerate(self.batches) if other.input_ids.equal(batch.input_ids))
        return self.harvested[number]


def found_by(data: Harvested, pattern: TokenPattern):
    sae = build()
    return search_latents(pattern, sae, data, top=7, show=False), build_tree(sae, data, 0.4, show=False)


def _one_of_two(rank: int, folder, data: Harvested, pattern: TokenPattern, slow: TokenPattern) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    hits, tree = found_by(data, pattern)
    try:
        search_latents(slow if rank else pattern, build(), data, show=False, timeout=0.2)
        stopped = ""
    except ValueError as error:
        stopped = str(error)
    tensors = {name: getattr(tree, name) for name in ("parent", "score", "frequency", "maximum")}
    found = {"hits": [astuple(hit) for hit in hits], "tree": tensors, "tokens": tree.tokens, "stopped": stopped}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    opened = open_data()
    harvested = [opened.states(batch) for batch in opened.batches]
    data = Harvested(None, opened.batches, opened.hookpoint, harvested=harvested)
    patterns = [TokenPattern.compile(source, opened.tokenizer) for source in (CAPITAL, "(.|..)+(.|..)+ the")]
    mp.spawn(_one_of_two, args=(tmp_path, data, *patterns), nprocs=2)
    hits, tree = found_by(data, patterns[0])
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for other in found:
        other_hits = [PatternHit(*hit) for hit in other["hits"]]
        assert [hit.latent for hit in other_hits] == [hit.latent for hit in hits]
        for left, right in zip(other_hits, hits, strict=True):
            assert left.cosine == pytest.approx(right.cosine, rel=1e-6)
            assert (left.precision, left.recall) == pytest.approx((right.precision, right.recall))
        assert torch.equal(other["tree"]["parent"], tree.parent) and other["tokens"] == tree.tokens == data.tokens
        for name in ("score", "frequency", "maximum"):
            torch.testing.assert_close(other["tree"][name], getattr(tree, name))
    assert (tree.parent >= 0).sum() > 5
    # A time limit in one process ends the search in both.
    assert "failed in another process" in found[0]["stopped"] and "takes longer than" in found[1]["stopped"]
