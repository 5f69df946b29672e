"""A tree of latents as a picture: prefixes nested in each other, as SVG with links, or drawn by matplotlib."""

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from .nesting import Block, Nesting, nesting


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .tree import LatentTree


_COLUMNS, _COLUMN, _ROW, _LEFT, _GAP, _LINE = 50, 24, 34, 56, 12, 22  # of a shelf; the others in pixels
_LETTER = 6.4  # pixels, about, in 11px text
_FEW = 3  # letters in one column

# Light and dark: a latent of the first prefix, one without a parent, five shades of scores, text on blocks
_COLOURS = {
    "first": ("#d6e4ff", "#24365c"),
    "lone": ("#e3e3e8", "#3a3a42"),
    "s0": ("#fdebd9", "#38291c"),
    "s1": ("#fbd3ad", "#55361a"),
    "s2": ("#f9bb7d", "#734515"),
    "s3": ("#f8a24f", "#914f0f"),
    "s4": ("#f58a26", "#ab5a0a"),
    "ink": ("#1a1a1a", "#ffffff"),
}
_SHADES = 5


def _style(alone: bool) -> str:
    """Return the style of the picture; `--nest-...` of a page around it win."""
    light, dark = (";".join(f"--own-{name}:{pair[n]}" for name, pair in _COLOURS.items()) for n in (0, 1))
    fills = "".join(
        f".nested .{name}{{fill:var(--nest-{name},var(--own-{name}))}}" for name in _COLOURS if name != "ink"
    )
    night = f"@media (prefers-color-scheme:dark){{.nested{{{dark};color:#ddd}}}}" if alone else ""
    return (
        f".nested{{{light};font:11px system-ui,sans-serif}}{night}.dark .nested{{{dark}}}{fills}"
        ".nested text{fill:var(--nest-ink,var(--own-ink))}.nested .quiet{fill:currentColor}"
        ".nested .block:focus-visible rect,.nested .block.open rect{stroke:currentColor;stroke-width:4}"
        ".nested .block{cursor:pointer}.nested .block.dim{opacity:.2}"
    )


def nested_picture(
    tree: "LatentTree",
    labels: Mapping[int, str],
    *,
    threshold: float | None = None,
    most: int = 1500,
    open_latent: int | None = None,
    alone: bool = False,
) -> str:
    """Return a tree as SVG: each row is a prefix, and each block lies under the latent that it refines.

    A block is as wide as what is below it; the darker it is, the higher is the score of its parent. It is a link
    `?latent=N` with `data-latent` and, below another, `data-parent`. The tabulator key goes from family to family;
    within one a script has to move the focus.

    Args:
        tree ([`LatentTree`]): The tree.
        labels (`Mapping[int, str]`): Text on blocks; it is escaped.
        threshold (`float`, *optional*): Least score of a parent; by default the tree's.
        most (`int`, *optional*, defaults to 1500): Number of latents that are drawn at most, of the largest families.
        open_latent (`int`, *optional*): Latent whose block has a frame.
        alone (`bool`, *optional*, defaults to `False`): Whether the picture is a file of its own, which follows the
            reader's choice of light or dark; in a page it follows the page.

    Raises:
        `ValueError`: if the threshold is out of range.
    """
    tree = tree if threshold is None else tree.at(threshold)
    layout = nesting(tree, most, _COLUMNS)
    parts, top = [], 0
    for shelf in layout.shelves:
        rows = shelf.rows
        above = top - rows.start * _ROW
        for row in rows:
            y = above + row * _ROW + 20
            parts.append(
                f'<text class="quiet" x="{_LEFT - 8}" y="{y}" text-anchor="end">{_row_name(tree, row)}</text>'
            )
        parts += [_block(tree, labels, block, above + block.row * _ROW, open_latent) for block in shelf.blocks]
        top += len(rows) * _ROW + _GAP
    parts.append(f'<text class="quiet" x="{_LEFT}" y="{top + 12}">{caption(tree, layout)}</text>')
    width, height = _LEFT + _COLUMNS * _COLUMN, top + _LINE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="nested" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="group" aria-label="Latents nested in the latents they refine">'
        f"<style>{_style(alone)}</style>{''.join(parts)}</svg>"
    )


def latent_name(tree: "LatentTree", latent: int) -> str:
    """Return the number of a latent; of several SAEs that of the SAE and its position there."""
    source = sum(start <= latent for start in tree.starts) - 1
    return f"{source}/{latent - tree.starts[source]}" if len(tree.starts) > 1 else str(latent)


def caption(tree: "LatentTree", layout: Nesting) -> str:
    """Return how many latents refine others, and what of them is not in the picture."""
    text = f"{layout.joined:,} of {len(tree):,} latents refine another (score at least {tree.threshold:g})"
    if layout.drawn == layout.joined:
        return f"{text}, in {layout.families:,} families."
    families = layout.families - layout.drawn_families
    rest = f" and {families:,} of {layout.families:,} families" if families else ""
    return f"{text}; not drawn: {layout.joined - layout.drawn:,} of them{rest}."


def _row_name(tree: "LatentTree", row: int) -> str:
    return f"SAE {row}" if len(tree.starts) > 1 else f"{int((tree.level <= row).sum()):,}"


def _shade(tree: "LatentTree", block: Block) -> str:
    if block.parent is None:
        return "lone" if block.row else "first"
    share = (float(tree.score[block.latent]) - tree.threshold) / max(1 - tree.threshold, 1e-9)
    return f"s{min(int(share * _SHADES), _SHADES - 1)}"


def _label(labels: Mapping[int, str], latent: int) -> str:
    try:
        return str(labels[latent])
    except KeyError:
        return ""


def _texts(tree: "LatentTree", labels: Mapping[int, str], block: Block) -> tuple[str, str]:
    """Return the two lines on a block."""
    letters = int((block.columns * _COLUMN - 5) / _LETTER)
    name = latent_name(tree, block.latent)
    label = _label(labels, block.latent)
    if block.columns == 1:
        label = label.partition(" · ")[0][:_FEW]
    return (label if len(label) <= max(letters, _FEW) else f"{label[: letters - 1]}…"), name if len(
        name
    ) <= letters else ""


def _block(tree: "LatentTree", labels: Mapping[int, str], block: Block, y: int, open_latent: int | None) -> str:
    x, width, height = _LEFT + block.column * _COLUMN, block.columns * _COLUMN - 1, _ROW - 1
    name = latent_name(tree, block.latent)
    if block.more:
        return f'<text class="quiet" x="{x + 4}" y="{y + 20}">…<title>{block.more:,} more below {name}</title></text>'
    label = _label(labels, block.latent)
    title = f"{name}: {label}" if label else name
    about = "" if block.parent is None else f", refines {latent_name(tree, block.parent)}"
    score = "" if block.parent is None else f", score {float(tree.score[block.latent]):.2f}"
    first, second = (escape(text) for text in _texts(tree, labels, block))
    lines = f'<text x="4" y="14">{first}</text>' * bool(first) + f'<text x="4" y="28">{second}</text>' * bool(second)
    state = " open" if block.latent == open_latent else ""
    link = "" if block.parent is None else f' data-parent="{block.parent}" tabindex="-1"'
    return (
        f'<a class="block{state}" data-latent="{block.latent}"{link} href="?latent={block.latent}" '
        f'aria-label="Latent {escape(title + about)}"><title>{escape(title + about)}{score}</title>'
        f'<svg x="{x}" y="{y}" width="{width}" height="{height}"><rect class="{_shade(tree, block)}" width="100%" '
        f'height="100%"/>{lines}</svg></a>'
    )


def nested_figure(tree: "LatentTree", labels: Mapping[int, str], most: int = 400) -> "Figure":
    """Draw the same picture, in light colours, as a matplotlib figure.

    Args:
        tree ([`LatentTree`]): The tree.
        labels (`Mapping[int, str]`): Text on blocks.
        most (`int`, *optional*, defaults to 400): Number of latents that are drawn at most.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layout = nesting(tree, most, _COLUMNS)
    width = _LEFT + _COLUMNS * _COLUMN
    height = sum(len(shelf.rows) * _ROW + _GAP for shelf in layout.shelves) + _LINE
    figure = Figure(figsize=(width / 100, height / 100), dpi=150)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    words = {"fontsize": 7.5, "va": "center", "parse_math": False}
    top = 0
    for shelf in layout.shelves:
        rows = shelf.rows
        for row in rows:
            y = top + (row - rows.start + 0.5) * _ROW
            axis.text(_LEFT - 8, y, _row_name(tree, row), ha="right", color="#555555", **words)
        for block in shelf.blocks:
            x, y = _LEFT + block.column * _COLUMN, top + (block.row - rows.start) * _ROW
            if block.more:
                axis.text(x + 4, y + _ROW / 2, "…", **words)
                continue
            patch = Rectangle((x, y), block.columns * _COLUMN - 1, _ROW - 1, fc=_COLOURS[_shade(tree, block)][0], lw=0)
            axis.add_patch(patch)
            for line, text in enumerate(_texts(tree, labels, block)):
                axis.text(x + 4, y + 10 + 14 * line, text, clip_on=True, **words).set_clip_path(patch)
        top += len(rows) * _ROW + _GAP
    axis.text(_LEFT, top + 8, caption(tree, layout), color="#555555", **words)
    return figure
