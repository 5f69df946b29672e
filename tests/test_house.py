"""The order of the rooms, no circles between files, and files and folders of a size that one can see at once."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_matryoshka_sae"

ROOMS = (
    "models",
    "assets",
    "common",
    "convert",
    "activations",
    "evaluation",
    "progressive",
    "training",
    "features",
    "planning",
    "studies",
    "hub",
    "steering",
    "retrieval",
    "space",
    "metrics",
)
"""A room imports only from rooms above it; the ways in, from all."""

WAYS_IN = {"train", "cli", "demo", "studies.scaling.worker"}  # the last is the process of a run of a sweep


@cache
def modules() -> dict[str, Path]:
    """The files of the package by dotted name."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


def imports(name: str) -> Iterator[str]:
    """The modules of the package that one imports anywhere in its text, but for type checkers alone."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    unseen = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in unseen or not isinstance(node, ast.ImportFrom):
            continue
        source = node.module or ""
        if node.level:
            parts = package.split(".")
            source = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            if inner in modules():
                yield inner
            elif source in modules():
                yield source


def room(name: str) -> str:
    """The room of a module; empty for the ways in and the package's own `__init__`."""
    inner = name.partition(".")[2]
    return "" if inner in WAYS_IN else inner.partition(".")[0]


def test_a_room_imports_only_from_rooms_above_it():
    above = {name: ROOMS[:number] for number, name in enumerate(ROOMS)}
    wrong = [
        f"{name} imports {target}"
        for name in modules()
        if room(name)
        for target in imports(name)  # importing the package itself runs nothing
        if target != PACKAGE.name and room(target) not in (room(name), *above[room(name)])
    ]
    assert not wrong


def test_every_folder_of_the_package_is_a_room():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(ROOMS)


def test_no_files_import_each_other_in_a_circle():
    """Files, not packages: what a package's `__init__` hands on counts as imported from where it is written."""
    files = {name for name, path in modules().items() if path.name != "__init__.py"}
    graph = {name: files & set(imports(name)) for name in files}
    while True:
        ends = {name for name, targets in graph.items() if not targets}
        if not ends:
            break
        graph = {name: targets - ends for name, targets in graph.items() if name not in ends}
    assert not graph, f"These import each other in a circle, or what does: {sorted(graph)}"


def test_a_file_is_seen_as_a_whole():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules().values()}
    assert not {name: count for name, count in lines.items() if count > 400}


def test_a_folder_shows_at_most_fifteen_files():
    for folder in {path.parent for path in modules().values()}:
        if folder.relative_to(PACKAGE).as_posix() in ("models", "convert/formats"):
            continue
        files = [path for path in folder.iterdir() if path.is_file()]
        assert len(files) <= 15, f"{folder.relative_to(ROOT)} has {len(files)}"


def test_figures_are_made_without_a_backend():
    """It holds figures and chooses a backend, which is the notebook's to choose."""
    users = [
        name
        for name, path in modules().items()
        if "pyplot" in path.read_text() or "matplotlib.use" in path.read_text()
    ]
    assert not users
