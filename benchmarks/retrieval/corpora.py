"""Corpora for retrieval that need no hub: Python's documentation and WordNet, both packages of Debian.

    apt-get download python3.11-doc wordnet-base && for file in *.deb; do dpkg -x "$file" corpora; done

A query is the first sentence of an entry of Python's documentation, its document the rest; or an example of a WordNet
sense, its document the words and their definition. Entries are dealt by the digest of their text into two halves: one
is searched, the other is what dictionaries learn from, so that no text is in both; senses without an example are
learnt from too.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


_DIRECTIVE = re.compile(r"^( *)\.\. (?:function|method|class|attribute|data|exception|decorator|c:function)::(.*)$")
_MARKUP = re.compile(r":[\w:]+:`[~!]?([^`<]*?)(?: <[^>]*>)?`|``([^`]*)``|\*\*?([^*]+)\*\*?")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_LEAST_WORDS = 6


@dataclass
class Corpus:
    """Queries with one right document each, and other texts of the same kind to learn from.

    Args:
        queries (`list[str]`), documents (`list[str]`): The i-th document answers the i-th query.
        pairs (`list[tuple[str, str]]`): Queries and documents of entries that are not searched.
        others (`list[str]`): Documents without a query, which are not searched either.
    """

    queries: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def load(name: str, folder: Path) -> Corpus:
    """Return one of the corpora below `folder`, whichever way the packages were unpacked there.

    Raises:
        `ValueError`: if it is not there.
    """
    readers = {"python": _python_entries, "wordnet": _wordnet_entries}
    corpus, seen = Corpus(), set()
    for query, document in readers[name](folder):
        if {query, document} & seen:
            continue
        seen |= {query, document}
        if not query:
            corpus.others.append(document)
            seen.discard(query)
        elif hashlib.sha256(document.encode()).digest()[0] % 2:
            corpus.pairs.append((query, document))
        else:
            corpus.queries.append(query)
            corpus.documents.append(document)
    if not corpus.queries:
        raise ValueError(f"There is no corpus {name!r} below {folder}: unpack its package there, see corpora.py.")
    return corpus


def _python_entries(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("_sources/**/*.rst.txt")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines):
            if not (match := _DIRECTIVE.match(line)):
                continue
            indent, body = len(match[1]), []
            for following in lines[number + 1 :]:
                if following.strip() and len(following) - len(following.lstrip()) <= indent:
                    break
                if _DIRECTIVE.match(following):
                    break
                body.append(following.strip())
            text = _plain(" ".join(part for part in body if part and not part.startswith((":", "..", ">>>", "|"))))
            first, *rest = _SENTENCE.split(text)
            document = " ".join(rest)
            if len(first.split()) >= _LEAST_WORDS and len(document.split()) >= _LEAST_WORDS:
                yield first, document


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", _MARKUP.sub(lambda match: next(part for part in match.groups() if part), text)).strip()


def _wordnet_entries(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("wordnet/data.*")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(" ") or " | " not in line:
                continue
            head, gloss = line.split(" | ", 1)
            examples = re.findall(r'"([^"]+)"', gloss)
            definition = gloss.split('; "')[0].strip()
            fields = head.split()
            words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
            usable = bool(examples) and len(examples[0].split()) >= _LEAST_WORDS
            if len(definition.split()) >= _LEAST_WORDS // 2:
                yield examples[0] if usable else "", f"{', '.join(words)}: {definition}"
