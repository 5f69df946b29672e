"""Two processes find what one finds: the search by pattern, and the tree."""

from dataclasses import dataclass

import pytest
import torch

from hf_matryoshka_sae.evaluation.data import HeldOut
from hf_matryoshka_sae.features.patterns.matching import TokenPattern
from hf_matryoshka_sae.features.patterns.search import search_latents
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


def _one_of_two(rank: int, data: Harvested, pattern: TokenPattern, slow: TokenPattern):
    hits, tree = found_by(data, pattern)
    try:
        search_latents(slow if rank else pattern, build(), data, show=False, timeout=0.2)
        stopped = ""
    except ValueError as error:
        stopped = str(error)
    return hits, tree, stopped


@pytest.mark.slow
def test_two_processes_find_what_one_finds(two_processes):
    opened = open_data()
    harvested = [opened.states(batch) for batch in opened.batches]
    data = Harvested(None, opened.batches, opened.hookpoint, harvested=harvested)
    patterns = [TokenPattern.compile(source, opened.tokenizer) for source in (CAPITAL, "(.|..)+(.|..)+ the")]
    results = two_processes.run(_one_of_two, data, *patterns)
    hits, tree = found_by(data, patterns[0])
    for other_hits, other, _ in results:
        assert [hit.latent for hit in other_hits] == [hit.latent for hit in hits]
        for left, right in zip(other_hits, hits, strict=True):
            assert left.cosine == pytest.approx(right.cosine, rel=1e-6)
            assert (left.precision, left.recall) == pytest.approx((right.precision, right.recall))
        assert torch.equal(other.parent, tree.parent) and other.tokens == tree.tokens == data.tokens
        for name in ("score", "frequency", "maximum"):
            torch.testing.assert_close(getattr(other, name), getattr(tree, name))
    assert (tree.parent >= 0).sum() > 5
    # A time limit in one process ends the search in both.
    stopped = [result[2] for result in results]
    assert "failed in another process" in stopped[0] and "takes longer than" in stopped[1]
