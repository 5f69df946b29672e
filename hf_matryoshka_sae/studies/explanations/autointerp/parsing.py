"""Answers read strictly: what was asked for, a refusal, or malformed.

Read is a JSON list, which may be the last line of more, or else numbered lines; what a model thinks aloud between
<think> and </think> and the fence of a code block are left out first.
"""

import json
import re


_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"^\s*```\w*\s*$", re.MULTILINE)
_NUMBERED = re.compile(r"\s*[#(\[]?(\d{1,6})[.:)\]]*\s*[:.=-]?\s+(.+?)\s*")
_REFUSAL = re.compile(
    r"\W*(i('| a)m (very |so )?(sorry|unable|not able)|sorry\b|i (can('|no)?t|won't|will not|must decline)|"
    r"as an ai\b|unfortunately,? i\b|i apologi[sz]e)",
    re.IGNORECASE,
)
_WORDS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
_LONGEST = 500
STRONGEST = 10


def said(text: str) -> str:
    """An answer without thoughts, fences and the space around it."""
    text = text.replace("\u2019", "'")
    if "</think>" in text:  # the chat template may have opened it
        text = text[text.rindex("</think>") + len("</think>") :]
    return _FENCE.sub("", _THOUGHTS.sub("", text)).strip()


def refuses(text: str) -> bool:
    """Whether an answer begins as refusals do."""
    return _REFUSAL.match(said(text)) is not None


def sentence(text: str) -> str | None:
    """An explanation, in one line, or None."""
    words = " ".join(said(text).split())
    words = re.sub(r"^\**(explanation|answer)\**:\**\s*", "", words, flags=re.IGNORECASE).strip('"* ')
    return words[:_LONGEST] if any(letter.isalnum() for letter in words) else None


def choices(text: str, count: int) -> list[bool] | None:
    """Which of the things numbered 1 to `count` an answer names, or None.

    Args:
        text (`str`): `[2, 5]`, or for every number a line such as `2: yes`.
        count (`int`): How many there are.
    """
    listed = _listed(text)
    if listed is not None:
        if not all(type(number) is int and 1 <= number <= count for number in listed):
            return None
        return [number in listed for number in range(1, count + 1)]
    lines = _numbered(text, count)
    words = None if lines is None else [line.strip(".*").lower() for line in lines]
    return None if words is None or not set(words) <= set(_WORDS) else [_WORDS[word] for word in words]


def strengths(text: str, count: int) -> list[float] | None:
    """A number from 0 to 10 for each of `count` tokens, or None.

    Args:
        text (`str`): A JSON list of `count` numbers, or for every token a line such as `2: 7`.
        count (`int`): How many there are.
    """
    listed = _listed(text)
    if listed is None:
        try:
            listed = [float(line) for line in _numbered(text, count) or []]
        except ValueError:
            return None
    right = [number for number in listed if type(number) in (int, float) and 0 <= number <= STRONGEST]  # NaN is not
    return [float(number) for number in right] if len(right) == len(listed) == count else None


def _listed(text: str) -> list | None:
    """The JSON list that is all of an answer, or all of its last line."""
    text = said(text)
    for part in (text, text.rsplit("\n", 1)[-1]):
        try:
            values = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, list):
            return values
    return None


def _numbered(text: str, count: int) -> list[str] | None:
    """What stands behind the numbers 1 to `count`, each on a line of its own, in order."""
    lines = [_NUMBERED.fullmatch(line) for line in said(text).splitlines() if line.strip()]
    if len(lines) != count or not all(lines):
        return None
    return [line[2] for line in lines] if [int(line[1]) for line in lines] == list(range(1, count + 1)) else None
