"""Sections, their budget and what a kill leaves: with sections that only say how long they would take."""

import json
import time

import pytest

from hf_matryoshka_sae.common.logs import progress
from hf_matryoshka_sae.studies.suite import Outcome, Section, budget, run_sections


class Clock:
    """A clock that only sections move."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    return clock


def section(
    clock: Clock,
    name: str,
    seconds: float,
    least: int = 1,
    full: int = 100,
    share: float = 1.0,
    calls=None,
    cost: float = 1.0,
):
    """A section that takes `seconds` for each unit of its size."""

    def run(bench, size):
        if calls is not None:
            calls.append((name, size))
        clock.now += seconds * size
        return Outcome({"it": [{"width": 4, "score": size}]}, f"{name} at {size}", {"size": size}, draw)

    def draw(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")

    return Section(name, "?", name.title(), "", (("score", "score", ".1f"),), run, "units", least, full, share, cost)


def test_without_a_budget_everything_is_full(clock, tmp_path):
    calls = []
    sections = [section(clock, name, 5.0, calls=calls) for name in "ab"]
    found = run_sections(None, tmp_path, sections, {}, show=False)
    assert calls == [("a", 100), ("b", 100)]
    assert [each["size"] for each in found] == [100, 100]
    assert [each["seconds"] for each in found] == [500, 500]


def test_least_sizes_come_first_and_what_is_left_is_shared_out(clock, tmp_path):
    calls = []
    sections = [
        section(clock, "cheap", 0.1, calls=calls),
        section(clock, "dear", 1.0, calls=calls),
        section(clock, "last", 1.0, share=2, calls=calls),
    ]
    found = run_sections(None, tmp_path, sections, {}, minutes=1, show=False)
    # Of the 57.9 s after the least sizes a quarter for cheap, which takes 10; dear a third of what is left then. What
    # is aimed at is four fifths of that.
    assert [each["size"] for each in found] == [100, 12, 28]
    least = [("cheap", 1), ("dear", 1), ("last", 1)]
    assert calls == [*least, ("cheap", 100), ("dear", 12), ("last", 28)]
    assert clock.now <= 60


def test_after_the_first_cheap_sections_run_before_dear_ones_and_are_reported_in_their_order(clock, tmp_path):
    calls = []
    sections = [
        section(clock, "first", 1.0, calls=calls, cost=60),
        section(clock, "dear", 50.0, calls=calls, cost=50),
        section(clock, "dearest", 70.0, calls=calls, cost=70),
        section(clock, "cheap", 1.0, calls=calls, cost=1),
    ]
    found = run_sections(None, tmp_path, sections, {}, minutes=1, show=False)
    assert [name for name, _ in calls[:4]] == ["first", "cheap", "dear", "dearest"]
    assert [each["name"] for each in found] == ["first", "dear", "dearest", "cheap"]
    assert not any(each.get("left_out") for each in found)


def test_what_is_not_defined_costs_nothing_and_leaves_its_time_to_others(clock, tmp_path):
    def undefined(bench, size):
        raise ValueError("There are no digits.")

    first = section(clock, "a", 1.0)
    second = Section(**{**vars(section(clock, "b", 1.0)), "run": undefined})
    done, left = run_sections(None, tmp_path, [first, second], {}, minutes=1, show=False)
    assert done["size"] == 47 and left["left_out"] == "There are no digits." and left["seconds"] == 0


def test_a_first_run_that_takes_too_long_stands_and_the_rest_is_left_out(clock, tmp_path):
    calls = []
    sections = [section(clock, "slow", 100.0, calls=calls), section(clock, "late", 1.0, calls=calls)]
    slow, late = run_sections(None, tmp_path, sections, {}, minutes=1, show=False)
    assert calls == [("slow", 1)]
    assert (slow["size"], late["size"], late["left_out"]) == (1, 0, "no time was left")
    assert not (tmp_path / "late.json").exists()


def test_what_is_done_is_not_done_again(clock, tmp_path):
    calls = []
    sections = [section(clock, name, 1.0, calls=calls) for name in "abc"]

    def killed(bench, size):
        raise KeyboardInterrupt

    stopped = [sections[0], Section(**{**vars(sections[1]), "run": killed}), sections[2]]
    with pytest.raises(KeyboardInterrupt):
        run_sections(None, tmp_path, stopped, {"sae": "x"}, show=False)
    assert calls == [("a", 100)]
    first = run_sections(None, tmp_path, sections, {"sae": "x"}, show=False)
    assert calls == [("a", 100), ("b", 100), ("c", 100)]
    again = run_sections(None, tmp_path, sections, {"sae": "x"}, show=False)
    assert len(calls) == 3
    assert json.loads(json.dumps(first)) == again
    run_sections(None, tmp_path, sections, {"sae": "y"}, show=False)
    assert len(calls) == 6


@pytest.mark.parametrize("damage", ["half", "no plot", "other size"])
def test_what_is_not_whole_is_done_again(clock, tmp_path, damage):
    calls = []
    one = section(clock, "a", 1.0, calls=calls)
    run_sections(None, tmp_path, [one], {}, show=False)
    if damage == "half":
        (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text()[:50])
    if damage == "no plot":
        (tmp_path / "a.png").unlink()
    if damage == "other size":
        one = Section(**{**vars(one), "full": 50})
    run_sections(None, tmp_path, [one], {}, show=False)
    assert len(calls) == 2


def test_time_spent_before_a_kill_counts(clock, tmp_path):
    first, second = (section(clock, name, 1.0) for name in "ab")
    (done,) = run_sections(None, tmp_path, [first], {}, minutes=0.5, show=False)
    assert done["seconds"] == 24
    _, left = run_sections(None, tmp_path, [first, second], {}, minutes=0.4, show=False)
    assert left["left_out"] == "no time was left"


def test_a_budget_of_nothing_is_refused(clock, tmp_path):
    with pytest.raises(ValueError, match="`minutes` must be above 0, got 0"):
        run_sections(None, tmp_path, [section(clock, "a", 1.0)], {}, minutes=0, show=False)


def test_what_a_later_section_refuses_is_left_out_and_tried_again(clock, tmp_path):
    def refuses(bench, size):
        raise ValueError("There are no capitals in this text.")

    first = section(clock, "a", 1.0)
    second = Section(**{**vars(section(clock, "b", 1.0)), "run": refuses})
    _, left = run_sections(None, tmp_path, [first, second], {}, show=False)
    assert left["left_out"] == "There are no capitals in this text." and left["rows"] == {}
    _, done = run_sections(None, tmp_path, [first, section(clock, "b", 1.0)], {}, show=False)
    assert done["size"] == 100
    with pytest.raises(ValueError, match="no capitals"):
        run_sections(None, tmp_path / "anew", [second], {}, show=False)


def test_a_section_ends_when_the_time_does(tmp_path):
    steps = []

    def endless(bench, size):
        steps.append(size)
        for _ in progress(iter(int, 1), disable=True):
            pass
        raise AssertionError("the bar moved on past the deadline")

    def small(bench, size):
        return endless(bench, size) if size > 1 else Outcome({"it": [{"width": 4, "score": 1}]}, "", {})

    def make(name, run, cost):
        return Section(name, "?", name, "", (("score", "score", ".1f"),), run, "units", 1, 100, 1.0, cost)

    sections = [make("grows", small, 1.0), make("endless", endless, 2.0), make("late", small, 3.0)]
    began = time.monotonic()
    grows, cut, late = run_sections(None, tmp_path, sections, {}, minutes=0.01, show=False)
    assert time.monotonic() - began < 2
    assert set(steps) == {1} and "not done in the 1 s that were left" in cut["left_out"]
    assert late["left_out"] == "no time was left" and grows["size"] == 1
    # Alone it grows, is given up, and what was found at its least size stands.
    (kept,) = run_sections(None, tmp_path / "alone", sections[:1], {}, minutes=0.005, show=False)
    assert steps[-1] == 100 and (kept["size"], kept["rows"]["it"][0]["score"]) == (1, 1)
