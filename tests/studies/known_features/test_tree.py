"""Trees of features: numbering, probabilities, sampling against a plain recursive sampler, files."""

import json
import random

import pytest
import torch

from hf_matryoshka_sae.studies.known_features.tree import TREE_FILE, FeatureTree, Node, load_tree, random_tree


def leaf(p, **fields):
    return {"active_prob": p, **fields}


NESTED = {
    "active_prob": 0.9,
    "children": [
        # Silent structure between two features, and exclusive children whose probabilities do not add up to 1.
        leaf(0.5, is_read_out=False, children=[leaf(0.7, id="deep"), leaf(0.2)]),
        leaf(0.6, mutually_exclusive_children=True, children=[leaf(0.3), leaf(0.1, children=[leaf(0.5)]), leaf(0.0)]),
    ],
}


def sampled_slowly(node, drawn, on=True, forced=None):
    """Features of one sample, depth first."""
    chance = drawn.random() < node["active_prob"]
    on = on and (chance if forced is None else forced)
    children = node.get("children", [])
    chosen = None
    if node.get("mutually_exclusive_children"):
        (chosen,) = drawn.choices(range(len(children)), [child["active_prob"] for child in children])
    features = [float(on)] if node.get("is_read_out", True) else []
    for i, child in enumerate(children):
        features += sampled_slowly(child, drawn, on, None if chosen is None else i == chosen)
    return features


def tree_from(data, tmp_path):
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(data))
    return load_tree(path)


def test_the_published_tree():
    tree = load_tree()
    assert tree.num_features == 20
    assert [i for i, parent in enumerate(tree.parents) if parent < 0] == [0, 4, 8, *range(12, 20)]
    assert [tree.children(parent) for parent in (0, 4, 8)] == [[1, 2, 3], [5, 6, 7], [9, 10, 11]]
    assert tree.blocks == [(0, 4), (4, 8), (8, 12)]
    assert tree.names == [*"1 1.1 1.2 1.3 2 2.1 2.2 2.3 3 3.1 3.2 3.3 4 5 6 7 8 9 10 11".split()]
    assert tree.probabilities == pytest.approx([0.15, 0.03, 0.03, 0.03] * 3 + [0.05] * 8)
    assert tree.expected_l0 == pytest.approx(1.12)


@pytest.mark.parametrize("published", [True, False], ids=["published", "nested"])
def test_samples_agree_with_a_recursive_sampler(published, tmp_path):
    data = json.loads(TREE_FILE.read_text()) if published else NESTED
    tree, drawn, count = tree_from(data, tmp_path), random.Random(0), 20_000
    slow = torch.tensor([sampled_slowly(data, drawn) for _ in range(count)])
    fast = tree.sample(count, torch.Generator().manual_seed(0))
    # How often two features are on together, within five standard errors of a difference.
    assert torch.allclose(slow.T @ slow / count, fast.T @ fast / count, atol=5 * (2 * 0.25 / count) ** 0.5)
    assert slow.mean(0).tolist() == pytest.approx(tree.probabilities, abs=0.02)


def test_a_feature_below_silent_structure_belongs_to_the_feature_above_it(tmp_path):
    tree = tree_from(NESTED, tmp_path)
    assert tree.names == ["1", "deep", "1.2", "1.3", "1.3.1", "1.3.2", "1.3.2.1", "1.3.3"]
    assert tree.parents == [-1, 0, 0, 0, 3, 3, 5, 3]
    assert tree.probabilities == pytest.approx([0.9, 0.315, 0.09, 0.54, 0.405, 0.135, 0.0675, 0])


def test_a_seed_gives_the_same_samples_and_trees():
    tree = load_tree()
    draws = [tree.sample(64, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert random_tree(3).root == random_tree(3).root != random_tree(4).root


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("exclusivity", [0.0, 1.0])
def test_random_trees_are_as_asked_for(seed, exclusivity, tmp_path):
    tree = random_tree(seed, num_top=5, depth=2, branching=4, exclusivity=exclusivity, top_probability=(0.4, 0.6))
    tops = [i for i, parent in enumerate(tree.parents) if parent < 0]
    assert len(tops) == 5
    assert all(0.4 <= tree.probabilities[top] <= 0.6 for top in tops)
    families = [tree.children(top) for top in tops]
    assert families[0] and all(2 <= len(family) <= 4 for family in families if family)
    assert tree.num_features == 5 + sum(map(len, families))
    features = tree.sample(5000)
    together = [features[:, family].sum(1).max() > 1 for family in families if family]
    assert any(together) == (exclusivity == 0)

    tree.save(tmp_path / "new" / "tree.json")
    again = load_tree(tmp_path / "new" / "tree.json")
    assert again.root == tree.root
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tree.json"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "must hold fields"),
        ({}, "Missing field: `active_prob`"),
        (leaf(1.2), "between 0 and 1, got 1.2"),
        (leaf("often"), "must be of type float"),
        (leaf(0.5, is_readout=True), "Did you mean 'is_read_out'"),
        (leaf(0.5, children=[leaf(0.5, children=[leaf(None)])]), "`children.0.children.0.active_prob`"),
        (leaf(0.5, children=[leaf(0.2)], mutually_exclusive_children=True), "needs at least two, got 1"),
        (leaf(0.5, children=[leaf(0), leaf(0)], mutually_exclusive_children=True), "above 0"),
        (leaf(0.5, is_read_out=False), "No node of the tree is read out"),
        (leaf(0.5, children=[leaf(0.5, id="a"), leaf(0.5, id="a")]), "different names"),
    ],
)
def test_what_is_no_tree_is_said(data, message, tmp_path):
    with pytest.raises(ValueError, match="is no tree of features") as caught:
        tree_from(data, tmp_path)
    assert message in str(caught.value)


def test_files_that_are_none_are_said(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_tree(tmp_path / "none.json")
    (tmp_path / "tree.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        load_tree(tmp_path / "tree.json")


@pytest.mark.parametrize(
    "fields",
    [{"num_top": 0}, {"branching": 1}, {"exclusivity": 1.5}, {"child_probability": (0.5, 0.1)}],
    ids=str,
)
def test_numbers_that_make_no_tree_are_said(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        random_tree(0, **fields)


def test_a_tree_is_one_feature_at_least():
    tree = FeatureTree(Node(0.5))
    assert tree.names == ["1"]
    assert tree.blocks == []
