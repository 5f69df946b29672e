"""Answers on disk: a question is asked once, whatever ends the run in between, and what it cost is counted."""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol


Message = Mapping[str, str]


@dataclass(frozen=True)
class Reply:
    """An answer of a judge.

    Args:
        text (`str`): What it says.
        prompt_tokens (`int`, *optional*), completion_tokens (`int`, *optional*): What was read and written, where the
            judge tells.
        seconds (`float`, *optional*, defaults to 0): It took.
        refused (`bool`, *optional*, defaults to `False`): It was withheld, by a filter or by the model itself.
    """

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float = 0.0
    refused: bool = False


class Judge(Protocol):
    """What answers questions.

    Attributes:
        name (`str`): Shown in reports, and part of what an answer is stored under; without secrets and paths.
        settings (`Mapping[str, Any]`): What else its answers depend on, JSON-able.
    """

    name: str
    settings: Mapping[str, Any]

    def ask(self, messages: Sequence[Message]) -> Reply:
        """Answer a conversation, `{"role": ..., "content": ...}` for each message; may be called from threads."""
        ...


@dataclass
class Cost:
    """What a run's answers cost, whether asked now or before: a resumed run costs what one without a break does.

    Args:
        asked (`int`), cached (`int`): Answers that came from the judge, and from the cache.
        prompt_tokens (`int`), completion_tokens (`int`): Of all answers.
        seconds (`float`): The judge took for them.
        uncounted (`int`): Answers of which the judge told no tokens.
    """

    asked: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    uncounted: int = 0

    def add(self, reply: Reply) -> None:
        """Count an answer's tokens and seconds."""
        self.prompt_tokens += reply.prompt_tokens or 0
        self.completion_tokens += reply.completion_tokens or 0
        self.seconds += reply.seconds
        self.uncounted += reply.prompt_tokens is None or reply.completion_tokens is None

    def money(self, price: tuple[float, float]) -> float:
        """What the tokens cost at a price per million, of prompt and completion."""
        return (self.prompt_tokens * price[0] + self.completion_tokens * price[1]) / 1e6


class AnswerCache:
    """A judge's answers, one a line of a JSONL file that only grows; for several threads.

    An answer is stored under the SHA-256 of the judge's name and settings and the messages. A last line that a killed
    process left unfinished is cut off.

    Args:
        path (`str` or `Path`, *optional*): The file; made when there is something to write. In memory by default.

    Raises:
        `ValueError`: if the file holds something else.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.cost = Cost()
        self._replies: dict[str, Reply] = {}
        self._waiting: dict[str, Future[Reply]] = {}
        self._used: set[str] = set()
        self._lock = threading.Lock()
        self._end: BaseException | None = None
        if self.path is not None and self.path.exists():
            self._read()

    def _read(self) -> None:
        if self.path.is_dir():
            raise ValueError(f"The cache of answers is a file, such as answers.jsonl; '{self.path}' is a folder.")
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._replies[entry["key"]] = Reply(**entry["reply"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"Line {number} of '{self.path}' is no answer of a judge. Give a file of answers, or a new name."
                ) from error
        if len(whole) < len(data):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))

    def __len__(self) -> int:
        return len(self._replies)

    def ask(self, judge: Judge, messages: Sequence[Message]) -> Reply:
        """The judge's answer, from the file where it is there; threads with the same question wait for one answer.

        An error of the judge ends the run: whoever asks from then on gets it too.
        """
        key = answer_key(judge, messages)
        with self._lock:
            if key in self._replies:
                return self._count(key, cached=True)
            waiting = self._waiting.get(key)
            if self._end is not None:
                raise self._end
            mine = waiting is None
            if mine:
                waiting = self._waiting[key] = Future()
        if not mine:
            return waiting.result()
        try:
            reply = judge.ask(messages)
            with self._lock:
                self._store(key, reply)
                self._count(key, cached=False)
        except BaseException as error:
            self.end(error)
            waiting.set_exception(error)
            raise
        else:
            waiting.set_result(reply)
        finally:
            with self._lock:
                del self._waiting[key]
        return reply

    def end(self, reason: BaseException) -> None:
        """Let nothing more be asked: threads end at their next question, with the first reason given."""
        with self._lock:
            self._end = self._end or reason

    def _count(self, key: str, cached: bool) -> Reply:
        if key not in self._used:  # the same question twice in a run costs once
            self._used.add(key)
            self.cost.asked += not cached
            self.cost.cached += cached
            self.cost.add(self._replies[key])
        return self._replies[key]

    def _store(self, key: str, reply: Reply) -> None:
        self._replies[key] = reply
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:  # one write, so that a line is there or, at worst, torn
            file.write(json.dumps({"key": key, "reply": asdict(reply)}).encode() + b"\n")


def answer_key(judge: Judge, messages: Sequence[Message]) -> str:
    """What an answer is stored under."""
    asked = {"judge": judge.name, "settings": dict(judge.settings), "messages": [dict(one) for one in messages]}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
