"""The embedded text: deterministic, split without leaks, read without importing what it reads."""

import hashlib
import json
import subprocess
import sys

import pytest

from hf_matryoshka_sae.assets import embedded_text, text


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """Let a test change the installation that is read; the cached real text comes back afterwards."""
    monkeypatch.setattr(text, "_documents", text._documents.__wrapped__)
    return monkeypatch


def digest(documents: list[str]) -> str:
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()


@pytest.mark.slow
def test_another_interpreter_reads_the_same_text_and_imports_nothing_it_reads():
    """`text.py` runs there alone, so that nothing but it can import a module."""
    code = (
        "import hashlib, json, runpy, sys\n"
        f"read = runpy.run_path({text.__file__!r})['embedded_text']\n"
        "before = set(sys.modules)\n"
        "digest = hashlib.sha256('\\0'.join(read()).encode()).hexdigest()\n"
        "print(json.dumps([digest, sorted(set(sys.modules) - before)]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    other_digest, imported = json.loads(run.stdout)
    assert other_digest == digest(embedded_text())
    tables = ("pydoc_data", "_sysconfigdata", "encodings")  # data, not code
    assert [name for name in imported if not name.startswith(tables)] == []


def test_there_is_enough_text_of_each_kind():
    documents = embedded_text()
    assert sum(map(len, documents)) > 1_000_000
    headings = {document.split("\n", 1)[0] for document in documents + embedded_text("heldout")}
    assert {"difflib", "textwrap.dedent(text)", "class textwrap.TextWrapper", "map"} <= headings
    assert any('The "while" statement' in document for document in documents + embedded_text("heldout"))


def test_heldout_is_about_a_twentieth_and_shares_no_paragraph_with_train():
    train, heldout = embedded_text("train"), embedded_text("heldout")
    assert 0.03 < len(heldout) / (len(train) + len(heldout)) < 0.08
    assert not long_paragraphs(train) & long_paragraphs(heldout)


def long_paragraphs(documents: list[str]) -> set[str]:
    paragraphs = (" ".join(paragraph.split()) for document in documents for paragraph in document.split("\n\n"))
    return {paragraph for paragraph in paragraphs if len(paragraph) >= 60}


def test_documents_are_clean_and_long_enough():
    assert all(len(document) >= 80 and document == document.strip() for document in embedded_text())


def test_a_caller_may_change_the_list_it_got():
    embedded_text().clear()
    assert embedded_text()


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match='"train" or "heldout", got \'test\''):
        embedded_text("test")


def test_python_without_its_reference_topics_still_has_docstrings(fresh):
    fresh.setitem(sys.modules, "pydoc_data.topics", None)
    fresh.setattr(text, "_stdlib_documents", lambda root: iter([("module", "x" * 100)]))
    assert "x" * 100 in embedded_text("train") + embedded_text("heldout")


def test_stripped_sources_leave_topics_and_builtins(fresh, tmp_path):
    fresh.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    assert sum(map(len, embedded_text())) > 200_000


def test_no_documentation_at_all_says_what_was_looked_for(fresh, tmp_path):
    fresh.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    fresh.setitem(sys.modules, "pydoc_data.topics", None)
    fresh.setattr(text, "_builtin_documents", lambda: [])
    with pytest.raises(RuntimeError, match="pydoc_data.topics"):
        embedded_text()


def test_tests_installed_packages_and_broken_files_are_skipped(tmp_path):
    docstring = f'"""{"A documented module. " * 10}"""'
    for name in ("good.py", "test/test_good.py", "site-packages/other.py", "package/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(docstring)
    (tmp_path / "broken.py").write_text("def {{ template }}")
    assert [name for name, _ in text._stdlib_documents(tmp_path)] == ["good", "package"]


def test_a_class_is_one_document_with_its_documented_methods(tmp_path):
    methods = '  def f(self, x=1):\n   """Method."""\n  def g(self): pass\n'
    (tmp_path / "m.py").write_text(f'try:\n class A:\n  """Doc."""\n{methods}except E: pass')
    assert list(text._stdlib_documents(tmp_path)) == [("m.A", "class m.A\n\nDoc.\n\nA.f(self, x=1)\n\nMethod.")]
