"""Worlds whose features are known, and what SAEs make of them: a small tree (Nabeshima 2024), and a large world."""

from typing import TYPE_CHECKING

from ...common.lazy import imports_on_use


if TYPE_CHECKING:
    from .feature_recovery import recovery, supervised_sae
    from .matching import Match, match
    from .model import ToyModel
    from .synthetic import SyntheticModel, World
    from .training import toy_spec, train_toy
    from .tree import FeatureTree, Node, load_tree, random_tree


__all__ = [
    "FeatureTree",
    "Match",
    "Node",
    "SyntheticModel",
    "ToyModel",
    "World",
    "load_tree",
    "match",
    "random_tree",
    "recovery",
    "supervised_sae",
    "toy_spec",
    "train_toy",
]

__getattr__, __dir__ = imports_on_use(__name__)
