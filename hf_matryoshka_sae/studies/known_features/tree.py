"""Trees of binary features: a feature can be on only where its parent is.

A tree is JSON: every node has an `active_prob`, given its parent is on; `is_read_out` says whether it is a feature or
only structure; of the children of a node with `mutually_exclusive_children` exactly one is on whenever the node is,
with probabilities proportional to theirs. Features are numbered depth first (format of noanabeshima/matryoshka-saes).

`tree.json` is that repository's tree: three parents, each with three mutually exclusive children and a silent fourth
branch, and eight independent features.

Shapes: N samples, V nodes, F features (the nodes that are read out).
"""

import dataclasses
import json
import random
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ...common.files import write_json
from ...training.config.fields import from_dict


TREE_FILE = Path(__file__).with_name("tree.json")


@dataclass
class Node:
    """A node of a tree, as in its JSON file."""

    active_prob: float
    """Probability of being on, given that the parent is."""
    is_read_out: bool = True
    """Whether the node is a feature."""
    mutually_exclusive_children: bool = False
    children: list["Node"] = field(default_factory=list)
    id: str | None = None
    """Name in tables and plots; by default the node's place, such as `2.1`."""

    def __post_init__(self) -> None:
        if not 0 <= self.active_prob <= 1:
            raise ValueError(f"`active_prob` must lie between 0 and 1, got {self.active_prob}.")
        if not self.mutually_exclusive_children:
            return
        if len(self.children) < 2:
            raise ValueError(f"`mutually_exclusive_children` needs at least two, got {len(self.children)}.")
        if not any(child.active_prob for child in self.children):
            raise ValueError("Of mutually exclusive children one must have an `active_prob` above 0.")


class FeatureTree:
    """A tree of features, ready to be sampled.

    Args:
        root ([`Node`]): The tree.

    Attributes:
        num_features (`int`): Number of features F.
        names (`list[str]`): Names of the features; `2.1` is the first child of the second feature on top.
        parents (`list[int]`): Parent of each feature, -1 on top.
        probabilities (`list[float]`): Probability that each feature is on.

    Raises:
        `ValueError`: if no node is read out, or two features have one name.
    """

    def __init__(self, root: Node) -> None:
        self.root = root
        self.names: list[str] = []
        self.parents: list[int] = []
        self.probabilities: list[float] = []
        self._children: dict[int, int] = {}  # number of children of each feature so far
        self._features: list[int] = []  # the node of each feature
        self._above: list[int] = []  # the parent of each node, -1 for the root
        # A node is chosen where low <= u[column] < high, for one uniform number u per node.
        self._column: list[int] = []
        self._low: list[float] = []
        self._high: list[float] = []
        self._add(root, -1, -1, 1.0, (0, 0.0, root.active_prob))
        if not self.names:
            raise ValueError("No node of the tree is read out: set `is_read_out` of at least one.")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"Features need different names, got {self.names}.")

    @property
    def num_features(self) -> int:
        """Number of features F."""
        return len(self.names)

    @property
    def expected_l0(self) -> float:
        """Mean number of features that are on in a sample."""
        return sum(self.probabilities)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First and last + 1 of the features below each top feature that has children, itself included."""
        tops = [i for i, parent in enumerate(self.parents) if parent < 0] + [self.num_features]
        return [(a, b) for a, b in pairwise(tops) if b - a > 1]

    def children(self, feature: int) -> list[int]:
        """Return the children of a feature."""
        return [i for i, parent in enumerate(self.parents) if parent == feature]

    def _add(self, node: Node, above: int, feature: int, reached: float, draw: tuple[int, float, float]) -> None:
        """Number a node and all below it; `feature` is the nearest above, `reached` the probability of its parent."""
        place = len(self._above)
        self._above.append(above)
        column, low, high = draw
        self._column.append(column)
        self._low.append(low)
        self._high.append(high)
        reached *= high - low
        if node.is_read_out:
            number = self._children[feature] = self._children.get(feature, 0) + 1
            inherited = f"{self.names[feature]}." if feature >= 0 else ""
            self.names.append(node.id or f"{inherited}{number}")
            self.parents.append(feature)
            self.probabilities.append(reached)
            self._features.append(place)
            feature = len(self._features) - 1
        total = sum(child.active_prob for child in node.children)
        shared, start = len(self._above), 0.0
        for i, child in enumerate(node.children):
            draw = (len(self._above), 0.0, child.active_prob)
            if node.mutually_exclusive_children:
                last = i == len(node.children) - 1
                draw = (shared, start, 1.0 if last else start + child.active_prob / total)
                start = draw[2]
            self._add(child, place, feature, reached, draw)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Sample features.

        Args:
            num_samples (`int`): Number N of samples.
            generator (`torch.Generator`, *optional*): Generator that makes the samples repeatable.

        Returns:
            `Tensor` of shape `(N, F)`: 1 where a feature is on and 0 elsewhere.
        """
        uniform = torch.rand(
            len(self._above), num_samples, generator=generator
        )  # nodes first: each is one run of memory
        low, high = torch.tensor(self._low), torch.tensor(self._high)
        uniform = uniform[self._column]
        on = (uniform >= low[:, None]) & (uniform < high[:, None])
        for node, above in enumerate(self._above):
            if above >= 0:
                on[node] &= on[above]
        return on[self._features].T.float().contiguous()

    def save(self, path: str | Path) -> None:
        """Write the tree as JSON, complete before it takes its name."""
        write_json(Path(path), dataclasses.asdict(self.root))


def load_tree(path: str | Path = TREE_FILE) -> FeatureTree:
    """Read a tree of features from a JSON file.

    Args:
        path (`str` or `Path`, *optional*): The file; by default the published tree.

    Raises:
        `ValueError`: if there is no such file, or it is no JSON, or no tree.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The tree {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    try:
        return FeatureTree(from_dict(Node, data))
    except ValueError as error:
        raise ValueError(f"{path} is no tree of features: {error}") from error


def random_tree(
    seed: int,
    num_top: int = 8,
    depth: int = 3,
    branching: int = 3,
    exclusivity: float = 0.5,
    top_probability: tuple[float, float] = (0.05, 0.2),
    child_probability: tuple[float, float] = (0.15, 0.3),
) -> FeatureTree:
    """Draw a random tree, in which half of the nodes above the last level, and the first on top, have children.

    Args:
        seed (`int`): Seed of the tree.
        num_top (`int`, *optional*, defaults to 8): Number of features on top.
        depth (`int`, *optional*, defaults to 3): Number of levels.
        branching (`int`, *optional*, defaults to 3): Largest number of children of a feature; the smallest is 2.
        exclusivity (`float`, *optional*, defaults to 0.5): Share of the parents whose children exclude one another.
        top_probability (`tuple[float, float]`, *optional*): Bounds of the probabilities of features on top.
        child_probability (`tuple[float, float]`, *optional*): Bounds of the probabilities of children, given their
            parent is on. Exclusive children get a silent sibling whose probability brings their sum to 1.

    Raises:
        `ValueError`: for numbers that make no tree.
    """
    if num_top < 1 or depth < 1 or branching < 2:
        raise ValueError(
            f"A tree needs `num_top` and `depth` of at least 1 and `branching` of at least 2, got {num_top}, {depth}, "
            f"{branching}."
        )
    if not 0 <= exclusivity <= 1:
        raise ValueError(f"`exclusivity` must lie between 0 and 1, got {exclusivity}.")
    for name, (low, high) in {"top_probability": top_probability, "child_probability": child_probability}.items():
        if not 0 < low <= high <= 1:
            raise ValueError(f"`{name}` must be two increasing numbers above 0 and at most 1, got {(low, high)}.")
    generator = random.Random(seed)

    def grow(level: int, limits: tuple[float, float], parent: bool) -> Node:
        node = Node(generator.uniform(*limits))
        if level == depth or not parent:
            return node
        count = generator.randint(2, branching)
        node.children = [grow(level + 1, child_probability, generator.random() < 0.5) for _ in range(count)]
        if generator.random() < exclusivity:
            node.mutually_exclusive_children = True
            remainder = 1 - sum(child.active_prob for child in node.children)
            if remainder > 0:
                node.children.append(Node(remainder, is_read_out=False))
        return node

    tops = [grow(1, top_probability, i == 0 or generator.random() < 0.5) for i in range(num_top)]
    return FeatureTree(Node(1.0, is_read_out=False, children=tops))
