"""Against scores from dense activations, pair by pair."""

import json

import pytest
import torch

from hf_matryoshka_sae.features.tree import sums as tree_sums
from hf_matryoshka_sae.features.tree.tree import EdgeSums, LatentTree, build_tree
from hf_matryoshka_sae.models import MatryoshkaSAE, MatryoshkaSAEConfig, TopKSAE, TopKSAEConfig


WIDTHS = [6, 16, 40]


def build(**fields) -> MatryoshkaSAE:
    torch.manual_seed(3)
    fields = dict(d_in=12, num_latents=40, prefix_widths=WIDTHS, k=8, activation="topk") | fields
    return MatryoshkaSAE(MatryoshkaSAEConfig(**fields)).eval()


def states(tokens: int = 300) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return list(torch.randn(tokens, 12, generator=generator).split(70))


def score_by_hand(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of parent activations and child activations `(N,)`."""
    on = b > 0
    if not on.any() or not (a[on] > 0).any():
        return 0.0
    cosine = torch.dot(a[on], b[on]) / (a[on].norm() * b[on].norm())
    return float(cosine * min(1.0, float(b.max() / a.max())))


def parents_by_hand(acts: torch.Tensor, level: list[int], threshold: float):
    parents, scores = [], []
    for child in range(acts.shape[1]):
        candidates = [latent for latent in range(acts.shape[1]) if level[latent] < level[child]]
        found = [score_by_hand(acts[:, latent], acts[:, child]) for latent in candidates]
        best = max(found, default=0.0)
        scores.append(best)
        parents.append(candidates[found.index(best)] if best >= threshold else -1)
    return parents, scores


@pytest.mark.parametrize("at_once", [2**22, 50])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_scores_are_those_of_dense_activations(activation, at_once, monkeypatch):
    monkeypatch.setattr(tree_sums, "_PRODUCTS_AT_ONCE", at_once)
    sae = build(activation=activation)
    data = states()
    with torch.no_grad():
        acts = sae.encode(torch.cat(data)).to_dense().double()
    level = [0] * 6 + [1] * 10 + [2] * 24
    threshold = sorted(parents_by_hand(acts, level, 0.5)[1])[20] + 1e-6  # some have a parent, some do not
    parents, scores = parents_by_hand(acts, level, threshold)
    found = build_tree(sae, data, threshold, show=False)
    assert found.level.tolist() == level
    assert found.parent.tolist() == parents
    assert found.score.tolist() == pytest.approx(scores, abs=1e-9)
    assert found.frequency.tolist() == pytest.approx((acts > 0).double().mean(0).tolist())
    assert found.maximum.tolist() == pytest.approx(acts.amax(0).tolist())
    assert sum(parent >= 0 for parent in parents) == 19


def test_two_saes_are_two_levels():
    small = TopKSAE(TopKSAEConfig(d_in=12, num_latents=9, k=3)).eval()
    large = TopKSAE(TopKSAEConfig(d_in=12, num_latents=30, k=5)).eval()
    data = states()
    found = build_tree(small, data, threshold=0.3, other=large, show=False)
    with torch.no_grad():
        acts = torch.cat([one.encode(torch.cat(data)).to_dense().double() for one in (small, large)], 1)
    parents, scores = parents_by_hand(acts, [0] * 9 + [1] * 30, 0.3)
    assert found.starts == [0, 9] and found.parent.tolist() == parents
    assert found.score.tolist() == pytest.approx(scores, abs=1e-9)


def test_planted_children_are_found():
    """A parent that fires on both of two kinds of tokens, children on one each, and a bystander."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 4, (400,), generator=generator)
    size = 1 + 0.1 * torch.rand(400, generator=generator)
    acts = torch.stack([(kind < 2) * size, (kind == 3) * size, *[(kind == k) * size for k in range(4)]], 1)
    sae = build(num_latents=6, prefix_widths=[2, 6], d_in=6, k=6)
    sums = EdgeSums(sae)
    sums.add(_pairs(acts))
    parent, score = sums.parents()
    assert parent.tolist() == [-1, -1, 0, 0, -1, 1]
    assert score[2:4].min() > 0.9 and score[4] == 0


def _pairs(acts: torch.Tensor):
    from hf_matryoshka_sae.models.sparse_ops import LatentPairs, PairIndex

    rows, cols = acts.nonzero(as_tuple=True)
    return LatentPairs(PairIndex(rows, cols, *acts.shape), acts[rows, cols])


def test_a_latent_that_hardly_fires_is_no_parent():
    acts = torch.zeros(50, 4)
    acts[:, 0] = 0.01  # far weaker than its children, and everywhere
    acts[:25, 2], acts[25:, 3] = 10.0, torch.arange(25.0) ** 2
    sums = EdgeSums(build(num_latents=4, prefix_widths=[2, 4], d_in=4, k=4))
    sums.add(_pairs(acts))
    assert sums.parents()[1].max() <= 1


def small_tree() -> LatentTree:
    number = torch.tensor([0.0, 0.0, 0.9, 0.7, 0.95, 0.1], dtype=torch.float64)
    return LatentTree(
        level=torch.tensor([0, 0, 1, 1, 2, 2]),
        parent=torch.tensor([-1, -1, 0, 0, 3, -1]),
        score=number,
        frequency=number / 10,
        maximum=number + 1,
        threshold=0.6,
        tokens=100,
        starts=[0],
    )


def test_children_are_flat_lists():
    tree = small_tree()
    assert tree.children(0) == [(2, pytest.approx(0.9)), (3, pytest.approx(0.7))]
    assert tree.children(0, level=2) == [(4, pytest.approx(0.95))]
    assert tree.children(1) == [] and tree.children(4) == [] and tree.children(4, level=0) == []
    assert tree.roots() == [0, 1, 5]
    with pytest.raises(ValueError, match="latents 0 to 5, got 6"):
        tree.children(6)


def test_saved_trees_come_back(tmp_path):
    tree = small_tree()
    path = tree.save(tmp_path / "new" / "tree.json")
    assert json.loads(path.read_text()) == tree.to_json()
    again = LatentTree.load(path)
    assert again.to_json() == tree.to_json()
    assert again.to_json()["nodes"][3]["children"] == [4]
    (tmp_path / "other.json").write_text("[]")
    for name in ("other.json", "absent.json"):
        with pytest.raises(ValueError, match="no tree of latents"):
            LatentTree.load(tmp_path / name)


@pytest.mark.parametrize(
    "latent, change, message",
    [
        (2, {"parent": 9}, "parent 9; there are 6"),
        (2, {"parent": -1}, "parent -1"),
        (2, {"parent": 0.5}, "parent 0.5"),
        (2, {"parent": True}, "parent True"),
        (2, {"parent": 3}, "latent 2 is in level 1, its parent 3 in 1"),
        (2, {"candidate": 4}, "latent 2 is in level 1, its parent 4 in 2"),
        (0, {"parent": 3}, "latent 0 is in level 0"),  # a cycle: 3 is below 0
        (3, {"parent": 3}, "its parent 3 in 1"),
        (1, {"level": -1}, "level -1"),
        (1, {"level": "0"}, "level '0'"),
        (1, {"latent": 0}, "node 1 is of latent 0"),
    ],
)
def test_a_file_that_is_no_tree_is_refused(tmp_path, latent, change, message):
    found = small_tree().to_json()
    found["nodes"][latent] |= change
    (tmp_path / "tree.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"no tree of latents .*{message}"):
        LatentTree.load(tmp_path / "tree.json")


def test_a_tree_without_nodes_or_starts_is_refused(tmp_path):
    for change in ({"nodes": []}, {"nodes": {}}, {"starts": []}, {"starts": [1]}, {"starts": [0, 0]}, {"starts": 3}):
        (tmp_path / "tree.json").write_text(json.dumps(small_tree().to_json() | change))
        with pytest.raises(ValueError, match="no tree of latents"):
            LatentTree.load(tmp_path / "tree.json")


def test_another_threshold_joins_others(tmp_path):
    """The parent that a candidate would be is known below the threshold too, and survives saving."""
    sae, data = build(), states()
    strict = build_tree(sae, data, 0.5, show=False)
    loose = build_tree(sae, data, 0.2, show=False)
    again = LatentTree.load(strict.save(tmp_path / "tree.json"))
    for tree in (strict.at(0.2), again.at(0.2), loose.at(0.5).at(0.2)):
        assert tree.parent.tolist() == loose.parent.tolist() and tree.threshold == 0.2
    assert (strict.parent >= 0).sum() < (loose.parent >= 0).sum()
    with pytest.raises(ValueError, match="threshold"):
        strict.at(1.5)


def test_a_child_may_skip_a_level():
    acts = torch.zeros(60, 6)
    acts[:, 0] = torch.rand(60) + 1
    acts[:20, 2], acts[20:40, 3] = acts[:20, 0], torch.rand(20) + 1  # level 1: one of its own, one like the parent
    acts[30:40, 4] = acts[30:40, 0]  # level 2: does on its tokens what latent 0 does, and not what latent 3 does
    sums = EdgeSums(build(num_latents=6, prefix_widths=[2, 4, 6], d_in=6, k=6))
    sums.add(_pairs(acts))
    parent, _ = sums.parents()
    assert parent[4] == 0 and parent[2] == 0
    tree = LatentTree(sums.level, *sums.parents(), *torch.zeros(2, 6), 0.6, 60, [0])
    assert 4 in [latent for latent, _ in tree.children(0)] and tree.ancestors(4) == [0]
    assert [latent for latent, _ in tree.children(0, level=2)] == [4] and set(tree.descendants(0)) == {2, 3, 4}


def test_candidates_are_the_best_scores_in_order():
    sae, data = build(), states()
    sums = EdgeSums(sae)
    for rows in data:
        sums.add(sae.encode_pairs(rows))
    edges = list(zip(*(part.tolist() for part in sums.scores()), strict=True))
    found = list(zip(*(part.tolist() for part in sums.candidates(0.1, 3)), strict=True))
    by_hand = []
    for latent in range(40):
        own = [(latent, parent, score) for parent, child, score in edges if child == latent]
        by_hand += sorted((one for one in own if one[2] >= 0.1), key=lambda one: (-one[2], one[1]))[:3]
    assert found == by_hand and len(found) > 40


def test_what_is_no_tree_is_said():
    with pytest.raises(ValueError, match="two levels"):
        EdgeSums(build(prefix_widths=[40]))
    with pytest.raises(ValueError, match="threshold"):
        EdgeSums(build()).parents(0)
    with pytest.raises(ValueError, match="no hidden states"):
        build_tree(build(), [], show=False)
    with pytest.raises(ValueError, match="d_in 12"):
        build_tree(build(), states(), other=TopKSAE(TopKSAEConfig(d_in=8, num_latents=9, k=3)), show=False)
    sums = EdgeSums(build())
    with pytest.raises(ValueError, match="latents of 1 SAEs"):
        sums.add(*[build().encode_pairs(states()[0])] * 2)


def test_above_the_limit_the_weakest_pairs_are_dropped(caplog, monkeypatch):
    """Memory stays bounded, and planted parents are found all the same."""
    monkeypatch.setattr(tree_sums, "_PRODUCTS_AT_ONCE", 200)
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(800, 40, generator=generator) * (torch.rand(800, 40, generator=generator) < 0.1)
    for child in range(16, 28):
        acts[:, child] = acts[:, child % 6] * (torch.rand(800, generator=generator) < 0.5)
    whole, bounded = EdgeSums(build()), EdgeSums(build(), max_edges=300)
    for rows in acts.split(100):
        whole.add(_pairs(rows))
        bounded.add(_pairs(rows))
        assert bounded._kept <= 300 + 200
    assert len(whole.scores()[0]) > 400 and len(bounded.scores()[0]) <= 300
    assert caplog.text.count("More than 300 pairs") == 1
    for sums in (whole, bounded):
        best, score = sums.best()
        assert best[16:28].tolist() == [child % 6 for child in range(16, 28)] and score[16:28].min() > 0.9


def test_sums_go_on_from_a_state():
    sae, (first_rows, *others) = build(), states()
    whole, first, second = EdgeSums(sae), EdgeSums(sae), EdgeSums(sae)
    for rows in states():
        whole.add(sae.encode_pairs(rows))
    first.add(sae.encode_pairs(first_rows))
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for rows in others:
        second.add(sae.encode_pairs(rows))
    for one, other in zip(whole.parents(0.1), second.parents(0.1), strict=True):
        torch.testing.assert_close(one, other)
    assert EdgeSums(sae).state_dict()["keys"].shape == (0,)
