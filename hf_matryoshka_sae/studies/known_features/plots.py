"""Heat maps of features against the latents matched with them."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ...common.figures import save_figure
from .matching import Match
from .tree import FeatureTree


def plot_activations(matches: dict[str, Match], tree: FeatureTree, path: Path, title: str) -> None:
    """Draw the mean activation of each latent where each feature is on, beside that of the features themselves.

    Args:
        matches (`dict[str, Match]`): Matched latents, by family.
        tree ([`FeatureTree`]): Tree with the names and blocks of features.
        path (`Path`): The PNG to write.
        title (`str`): Title above all panels.
    """
    panels = {"features": next(iter(matches.values())).together}
    panels |= {family: matched.similarity for family, matched in matches.items()}
    label = "mean activation where the feature is on (share of the largest)"
    _draw(panels, tree, path, title, label, "viridis", (0, 1))


def plot_cosines(matches: dict[str, Match], tree: FeatureTree, path: Path, title: str) -> None:
    """Draw the cosines of features' directions and decoder rows.

    Args:
        matches (`dict[str, Match]`): Matched latents, by family.
        tree ([`FeatureTree`]): Tree with the names and blocks of features.
        path (`Path`): The PNG to write.
        title (`str`): Title above all panels.
    """
    panels = {family: matched.cosine for family, matched in matches.items()}
    _draw(panels, tree, path, title, "cosine of direction and decoder row", "RdBu_r", (-1, 1))


def _draw(
    panels: dict[str, Tensor],
    tree: FeatureTree,
    path: Path,
    title: str,
    label: str,
    colours: str,
    limits: tuple[float, float],
) -> None:
    from matplotlib.figure import Figure

    count, size = tree.num_features, max(4.0, 0.22 * tree.num_features)
    figure = Figure(figsize=(size * len(panels) + 1.2, size + 0.7), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for i, (axis, (name, values)) in enumerate(zip(axes[0], panels.items(), strict=True)):
        image = axis.imshow(values.numpy(), cmap=colours, vmin=limits[0], vmax=limits[1], aspect="equal")
        axis.set_title(name)
        axis.set_xlabel("feature" if name == "features" else "latent matched with feature")
        axis.set_xticks(range(count), tree.names, rotation=90, fontsize=7)
        axis.set_yticks(range(count), tree.names if i == 0 else [], fontsize=7)
        axis.tick_params(length=0)
        _mark_blocks(axis, tree)
    axes[0, 0].set_ylabel("feature")
    figure.colorbar(image, ax=axes[0].tolist(), label=label, shrink=0.85, pad=0.015)
    figure.suptitle(title)
    save_figure(figure, path)


def _mark_blocks(axis: Any, tree: FeatureTree) -> None:
    """Outline each parent with all features below it, and set its name in bold."""
    from matplotlib.patches import Rectangle

    for first, last in tree.blocks:
        corner, side = first - 0.5, last - first
        axis.add_patch(Rectangle((corner, corner), side, side, fill=False, edgecolor="tab:orange", linewidth=1.6))
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        for feature, text in enumerate(labels):
            if tree.children(feature):
                text.set_fontweight("bold")
