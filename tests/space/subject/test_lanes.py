"""Who waits for whom, with threads."""

import threading
import time

import pytest

from hf_matryoshka_sae.space.subject.lanes import Keyed, Lane, NoLongerWantedError, Remembered


class Visitor(threading.Thread):
    """Takes a lane, says so, and holds it until it is told to leave."""

    def __init__(self, lane: Lane, came: list, name: str, wanted=lambda: True):
        super().__init__(daemon=True)
        self.lane, self.came, self.visitor, self.wanted = lane, came, name, wanted
        self.leave, self.inside, self.error = threading.Event(), threading.Event(), None

    def run(self):
        try:
            with self.lane.turn(self.wanted):
                self.came.append(self.visitor)
                self.inside.set()
                self.leave.wait(10)
        except ValueError as error:
            self.error = error


def waiting(lane: Lane, count: int) -> None:
    until = time.monotonic() + 5
    while len(lane._waiting) < count and time.monotonic() < until:
        time.sleep(0.001)
    assert len(lane._waiting) == count


def test_a_lane_is_given_in_the_order_in_which_it_was_asked_for():
    lane, came, visitors = Lane("text"), [], []
    for number in range(5):
        visitors.append(Visitor(lane, came, number))
        visitors[-1].start()
        assert visitors[0].inside.wait(5)
        waiting(lane, number)
    for number, visitor in enumerate(visitors):
        assert visitor.inside.wait(5) and came == list(range(number + 1))
        visitor.leave.set()


def test_who_holds_a_lane_may_take_it_again():
    lane = Lane("measure")
    with lane.turn(), lane.turn():
        pass
    with lane.turn():
        pass


def test_a_lane_is_free_after_an_error():
    lane = Lane("measure")
    with pytest.raises(KeyError), lane.turn():
        raise KeyError
    with lane.turn():
        pass


def test_more_than_can_wait_are_told_to_come_back():
    lane, came = Lane("measure", most=1), []
    first, second, third = (Visitor(lane, came, number) for number in range(3))
    first.start()
    assert first.inside.wait(5)
    second.start()
    waiting(lane, 1)
    third.start()
    third.join(5)
    assert "1 others wait for this already. Try again" in str(third.error)
    first.leave.set()
    assert second.inside.wait(5)
    second.leave.set()


def test_who_has_gone_keeps_nobody_waiting():
    lane, came, here = Lane("measure"), [], threading.Event()
    first, gone, third = (
        Visitor(lane, came, 0),
        Visitor(lane, came, 1, lambda: not here.is_set()),
        Visitor(lane, came, 2),
    )
    for number, visitor in enumerate((first, gone, third)):
        visitor.start()
        assert first.inside.wait(5)
        waiting(lane, number)
    here.set()
    gone.join(5)
    assert isinstance(gone.error, NoLongerWantedError)
    first.leave.set()
    assert third.inside.wait(5) and came == [0, 2]
    third.leave.set()


def test_names_lock_each_by_itself_and_none_is_kept():
    locks, inside = Keyed(), threading.Event()

    def other():
        with locks.held("b"):
            inside.set()

    with locks.held("a"), locks.held("a"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(5)
        thread.join()
    assert not locks._locks


def test_what_is_remembered_is_forgotten():
    known = Remembered(0.05)
    assert known.get() is None
    known.set("silence")
    assert known.get() == "silence"
    time.sleep(0.06)
    assert known.get() is None
