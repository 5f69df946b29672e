"""How large the house is, and how many files its ways lead through.

    python benchmarks/structure.py            # sizes, repeated blocks, docstrings and annotations, in seconds
    python benchmarks/structure.py --ways     # also runs a small training, an evaluation and the page, about a minute

Code lines are those that are neither blank nor comment nor docstring. A way is traced: the files of the package of
which a function is called (what only importing runs does not count).
"""

import argparse
import ast
import io
import itertools
import json
import sys
import tempfile
import threading
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_matryoshka_sae"
_BLOCK = 6  # lines that make a repeated block
_NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(path: Path) -> dict[int, str]:
    """The lines of a file that hold code, by number, stripped."""
    text = path.read_text()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    numbers: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NOT_CODE:
            numbers |= set(range(token.start[0], token.end[0] + 1))
    lines = text.splitlines()
    return {number: lines[number - 1].strip() for number in sorted(numbers - docstrings)}


def repeated_blocks(files: list[Path]) -> int:
    """Pairs of places that share at least six lines of code in a row, imports and closing brackets not counted."""
    where: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for number, path in enumerate(files):
        lines = [line for line in code_lines(path).values() if len(line) > 3]
        lines = [line for line in lines if not line.startswith(("import", "from"))]
        for start in range(len(lines) - _BLOCK + 1):
            where[tuple(lines[start : start + _BLOCK])].append((number, start))
    pairs = {pair for places in where.values() for pair in itertools.combinations(places, 2)}
    # A longer block is one pair: count only where it begins.
    return sum(((a, i - 1), (b, j - 1)) not in pairs for (a, i), (b, j) in pairs)


def sizes() -> dict[str, object]:
    """Files, lines, the largest folder and repeated blocks of the package; lines of the tests."""
    files = sorted(PACKAGE.rglob("*.py"))
    tests = sorted((ROOT / "tests").rglob("*.py"))
    folders = defaultdict(int)
    for path in PACKAGE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            folders[path.parent.relative_to(ROOT).as_posix()] += 1
    largest = max(files, key=lambda path: len(path.read_text().splitlines()))
    return {
        "files of the package": len(files),
        "code lines of the package": sum(len(code_lines(path)) for path in files),
        "lines of the package": sum(len(path.read_text().splitlines()) for path in files),
        "lines of tests": sum(len(path.read_text().splitlines()) for path in tests),
        "fullest folders": dict(sorted(folders.items(), key=lambda item: -item[1])[:3]),
        "longest file": f"{largest.relative_to(ROOT)} ({len(largest.read_text().splitlines())} lines)",
        "pairs of repeated blocks": repeated_blocks(files),
    }


def words() -> dict[str, str]:
    """What the package says beside its code: docstrings, annotations and comments."""
    functions, arguments, comments, lines = [], [], 0, 0
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        inner = [
            node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        functions += inner
        for spec in (node.args for node in inner):
            every = (*spec.posonlyargs, *spec.args, spec.vararg, *spec.kwonlyargs, spec.kwarg)
            arguments += [argument for argument in every if argument and argument.arg not in ("self", "cls")]
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments += sum(token.type == tokenize.COMMENT and "noqa" not in token.string for token in tokens)
        lines += len(code_lines(path))
    public = [node for node in functions if not node.name.startswith("_")]
    return {
        "functions with docstring": _share([ast.get_docstring(node) for node in functions]),
        "  of public ones": _share([ast.get_docstring(node) for node in public]),
        "annotated arguments": _share([argument.annotation for argument in arguments]),
        "annotated returns": _share([node.returns for node in functions]),
        "comments per 100 code lines": f"{100 * comments / lines:.2f}",
    }


def _share(values: list[object]) -> str:
    has = sum(value is not None for value in values)
    return f"{has} of {len(values)} ({has / len(values):.1%})"


@contextmanager
def traced() -> Iterator[set[str]]:
    """The files of the package of which functions are called in this block, in any thread."""
    called: set[str] = set()
    home = str(PACKAGE) + "/"

    def look(frame, event, argument):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(home) and frame.f_code.co_name != "<module>":
            called.add(name.removeprefix(home))

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield called
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def ways() -> dict[str, list[str]]:
    """The files that a training step, a whole run, `evaluate` and the Prune tab pass through."""
    # All imported before anything is traced: what importing calls, such as decorators, is no way.
    from hf_matryoshka_sae import convert, hub, studies  # noqa: F401
    from hf_matryoshka_sae.cli import main
    from hf_matryoshka_sae.space import Library
    from hf_matryoshka_sae.space.page import Page
    from hf_matryoshka_sae.studies import evaluating  # noqa: F401
    from hf_matryoshka_sae.training import train

    trainer = train.__globals__["Trainer"]
    step_of_class, steps = trainer._step, []

    def traced_step(self, step: int) -> None:
        with_outer = sys.getprofile()
        with traced() as called:
            step_of_class(self, step)
        steps.append(called)
        sys.setprofile(with_outer)

    with tempfile.TemporaryDirectory() as scratch:
        fields = {
            "model": "embedded",
            "dataset": {"path": "embedded"},
            "hookpoints": ["model.layers.2"],
            "tokens": 8192,
            "batch_size": 512,
            "eval_tokens": 2000,
            "calibration_tokens": 2000,
            "saes": [{"type": "matryoshka", "num_latents": 256, "k": 8}],
            "output_dir": f"{scratch}/run",
        }
        arguments = ["train", *(f"--{name}={json.dumps(value)}" for name, value in fields.items())]
        run = _files_of(lambda: main(arguments))
        trainer._step = traced_step
        main([*arguments[:-1], f"--output_dir={scratch}/again"])
        trainer._step = step_of_class
        command = ["evaluate", "embedded", "--tokens", "2000", "--output_dir", f"{scratch}/evaluation"]
        evaluate = _files_of(lambda: main(command))
        prune = Page(Library(), "embedded").prune
        page = _files_of(lambda: prune.show_measured(("embedded", ""), "energy", 448, 16))
    return {"a training step": sorted(steps[-1]), "a whole run": run, "evaluate": evaluate, "the Prune tab": page}


def _files_of(job: Callable[[], object]) -> list[str]:
    with traced() as called:
        job()
    return sorted(called)


def main() -> int:
    """Print the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", action="store_true", help="also trace the four ways")
    asked = parser.parse_args()
    for name, value in (sizes() | words()).items():
        sys.stdout.write(f"{name:<28} {value}\n")
    if asked.ways:
        for name, files in ways().items():
            sys.stdout.write(f"\n{name}: {len(files)} files\n  " + "\n  ".join(files) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
