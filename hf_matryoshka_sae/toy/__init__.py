"""The tree-of-features toy model (Nabeshima 2024): a world whose features are known, and what SAEs make of it."""

from .matching import Match, match
from .model import ToyModel
from .training import toy_spec, train_toy
from .tree import FeatureTree, Node, load_tree, random_tree


__all__ = [
    "FeatureTree",
    "Match",
    "Node",
    "ToyModel",
    "load_tree",
    "match",
    "random_tree",
    "toy_spec",
    "train_toy",
]
