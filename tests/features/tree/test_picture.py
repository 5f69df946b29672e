"""The picture of nested prefixes: where blocks lie, what is left out, and that it is readable."""

import itertools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from hf_matryoshka_sae.features.tree import picture as module
from hf_matryoshka_sae.features.tree.nesting import nesting
from hf_matryoshka_sae.features.tree.picture import nested_figure, nested_picture
from hf_matryoshka_sae.features.tree.tree import LatentTree


SVG = "{http://www.w3.org/2000/svg}"


def random_tree(latents: int = 400, seed: int = 0, joined: float = 0.7) -> LatentTree:
    """Four levels; parents are any narrower latents."""
    generator = np.random.default_rng(seed)
    ends = [latents // 16, latents // 8, latents // 3, latents]
    level = np.searchsorted(ends, np.arange(latents), side="right")
    begin = np.array([0, *ends])[level]
    parent = np.where(
        (level > 0) & (generator.random(latents) < joined), (generator.random(latents) ** 3 * begin).astype(int), -1
    )
    score = np.where(parent >= 0, generator.uniform(0.6, 1, latents), 0)
    numbers = (torch.tensor(column) for column in (score, generator.random(latents), generator.random(latents)))
    return LatentTree(torch.tensor(level), torch.tensor(parent), *numbers, 0.6, 100, [0])


@pytest.mark.parametrize("most, columns", [(10_000, 500), (10_000, 20), (150, 30), (10_000, 3)])
def test_blocks_lie_under_the_latents_they_refine(most, columns):
    tree = random_tree()
    layout = nesting(tree, most, columns)
    drawn = [block for shelf in layout.shelves for block in shelf.blocks if not block.more]
    assert len({block.latent for block in drawn}) == len(drawn) <= most
    for shelf in layout.shelves:
        spans = {block.latent: block for block in shelf.blocks if not block.more}
        taken = set()
        for block in shelf.blocks:
            places = {(block.row, block.column + n) for n in range(block.columns)}
            assert not places & taken and block.column + block.columns <= columns
            taken |= places
            if block.parent is not None:
                above = spans[block.parent]
                assert above.row < block.row and above.column <= block.column
                assert block.column + block.columns <= above.column + above.columns
            if not block.more:
                assert block.parent == (int(tree.parent[block.latent]) if block.parent is not None else None)
                assert block.row == int(tree.level[block.latent])
    assert layout.drawn == sum(block.parent is not None for block in drawn)
    assert layout.joined == int((tree.parent >= 0).sum())
    if most > len(tree) and columns == 500:  # all fits
        assert layout.drawn == layout.joined and layout.drawn_families == layout.families
    for shelf in layout.shelves:
        for block in shelf.blocks:
            if block.more:  # what it stands for is what is below its latent and not drawn
                below = {other.latent for other in drawn}
                missing = [n for n in tree.descendants(block.latent) if n not in below]
                assert 0 < block.more <= len(missing)


def test_the_picture_is_svg_with_links_and_text_as_text():
    tree = random_tree(60)
    labels = dict.fromkeys(range(60), "<script>alert(1)</script> & 'x'")
    root = ElementTree.fromstring(nested_picture(tree, labels, open_latent=3))
    links = root.findall(f"{SVG}a")
    latents = [int(link.get("data-latent")) for link in links]
    assert len(latents) == len(set(latents)) > 30 and not root.findall(f".//{SVG}script")
    for link in links:
        latent = int(link.get("data-latent"))
        assert link.get("href") == f"?latent={latent}" and f"Latent {latent}: <script>" in link.get("aria-label")
        assert link.find(f"{SVG}title").text.startswith(f"{latent}: <script>")
        parent = int(tree.parent[latent])
        assert link.get("data-parent") == (None if parent < 0 else str(parent))
        assert link.get("tabindex") == (None if parent < 0 else "-1")
    assert [int(link.get("data-latent")) for link in links if "open" in link.get("class")] == [3]
    assert "refine another (score at least 0.6), in" in "".join(root.itertext())


def test_another_threshold_and_a_limit_are_told():
    tree = random_tree()
    few = nested_picture(tree, {}, threshold=0.9)
    assert few.count("data-parent") == int((tree.score >= 0.9).sum())
    assert re.search(r"not drawn: \d+ of them and \d+ of \d+ families", nested_picture(tree, {}, most=50))
    assert "…<title>" in nested_picture(random_tree(3000, joined=1.0), {}, most=3000)
    with pytest.raises(ValueError, match="threshold"):
        nested_picture(tree, {}, threshold=0)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_text_on_blocks_can_be_read_in_light_and_dark():
    """WCAG's contrast of 4.5."""
    for mode, (name, colours) in itertools.product((0, 1), module._COLOURS.items()):
        low, high = sorted(luminance(pair[mode]) for pair in (colours, module._COLOURS["ink"]))
        assert name == "ink" or (high + 0.05) / (low + 0.05) >= 4.5, (name, mode)


class _Balanced(HTMLParser):
    """That every element is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_the_picture_and_loads_nothing(tmp_path):
    tree = random_tree(60)
    path = tree.page(tmp_path / "tree.html", labels={2: "<script>alert(1)</script>", 5: "a & b"})
    html = path.read_text(encoding="utf-8")
    parser = _Balanced()
    parser.feed(html)
    assert parser.open == [] and parser.seen.count("script") == 1
    assert "&lt;script&gt;alert(1)" in html and "a &amp; b" in html
    assert parser.seen.count("a") == html.count("data-latent") > 30
    assert not re.search(r"https?://(?!www.w3.org/2000/svg)|src=|@import", html)
    assert "prefers-color-scheme:dark" in html and "width=device-width" in html


def test_the_figure_has_the_same_blocks():
    tree = random_tree(60)
    (axis,) = nested_figure(tree, dict.fromkeys(range(60), "$x^2$")).axes
    assert len(axis.patches) == nested_picture(tree, {}).count("data-latent")
    assert any(text.get_text() == "$x^2$" for text in axis.texts)
