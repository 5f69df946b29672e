"""Answers on disk: asked once, whatever happens in between."""

import json
import threading
import time

import pytest

from hf_matryoshka_sae.studies.explanations.autointerp.answers import AnswerCache, Cost, Reply, answer_key


class Counting:
    """Answers with the number of the question."""

    name = "counting"
    settings = {"max_tokens": 3}

    def __init__(self, seconds: float = 0.0):
        self.asked, self.seconds = [], seconds

    def ask(self, messages):
        self.asked.append(messages)
        time.sleep(self.seconds)
        return Reply(f"answer {len(self.asked)}\u2028", 10, 2, 0.5)


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_question_is_asked_once(tmp_path):
    judge, cache = Counting(), AnswerCache(tmp_path / "new" / "answers.jsonl")
    first = cache.ask(judge, question("a"))
    assert cache.ask(judge, question("a")) == first and cache.ask(judge, question("b")) != first
    again = AnswerCache(tmp_path / "new" / "answers.jsonl")
    assert again.ask(judge, question("a")) == first and len(judge.asked) == 2 and len(again) == 2
    # A resumed run costs as much as one without a break.
    again.ask(judge, question("b"))
    assert cache.cost == Cost(2, 0, 20, 4, 1.0) and again.cost == Cost(0, 2, 20, 4, 1.0)
    assert cache.cost.money((3.0, 5.0)) == pytest.approx(20 * 3e-6 + 4 * 5e-6)


def test_judge_settings_and_messages_are_told_apart(tmp_path):
    one, other, longer = Counting(), Counting(), Counting()
    other.name, longer.settings = "other", {"max_tokens": 4}
    keys = {answer_key(judge, question(text)) for judge in (one, other, longer) for text in "ab"}
    assert len(keys) == 6


def test_threads_with_the_same_question_wait_for_one_answer(tmp_path):
    judge, cache = Counting(seconds=0.1), AnswerCache(tmp_path / "answers.jsonl")
    found = []
    threads = [threading.Thread(target=lambda: found.append(cache.ask(judge, question("a")))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(judge.asked) == 1 and len(found) == 8 and len(set(found)) == 1
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


def test_a_torn_last_line_is_dropped_and_asked_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    judge, cache = Counting(), AnswerCache(path)
    for text in "abc":
        cache.ask(judge, question(text))
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    again = AnswerCache(path)
    assert len(again) == 2
    again.ask(judge, question("c"))
    assert len(judge.asked) == 4 and len(AnswerCache(path)) == 3
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_what_is_no_cache_is_said(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "a", "reply": {"text": "b"}}\n{"other": 1}\n')
    with pytest.raises(ValueError, match="Line 2 of .*answers.jsonl' is no answer"):
        AnswerCache(path)
    assert path.read_text().endswith('{"other": 1}\n')
    with pytest.raises(ValueError, match="is a folder"):
        AnswerCache(tmp_path)


def test_an_error_is_not_kept_and_ends_the_run(tmp_path):
    path, judge = tmp_path / "answers.jsonl", Counting()

    class Broken(Counting):
        def ask(self, messages):
            raise ValueError("gone")

    cache = AnswerCache(path)
    for asked in (Broken(), judge):
        with pytest.raises(ValueError, match="gone"):
            cache.ask(asked, question("a"))
    assert not judge.asked and not path.exists()
    assert AnswerCache(path).ask(judge, question("a")).text.startswith("answer 1")


def test_answers_without_tokens_are_counted():
    cache = AnswerCache()

    class Silent(Counting):
        def ask(self, messages):
            return Reply("yes")

    cache.ask(Silent(), question("a"))
    assert cache.cost == Cost(asked=1, uncounted=1)
