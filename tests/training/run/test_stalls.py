"""When a run warns that it does not get on, and what it says of its processes."""

import threading
import time

from hf_matryoshka_sae.training.run.peers import Beat, Peer
from hf_matryoshka_sae.training.run.watchdog import Stalls, whereabouts


PEERS = {rank: Peer(rank, 3, 100 + rank, "elsewhere", "") for rank in (1, 2)}


def beats(step, doing="training", where=""):
    return {rank: Beat(step=step, doing=doing, where=where) for rank in range(3)}


def test_a_silent_process_is_named_after_a_while_and_then_ever_more_rarely():
    stalls, warned = Stalls(PEERS, 180), []
    for now in range(0, 2000, 10):
        warned += [(now, text) for text in stalls.of_silence(now, beats(3), {1: now, 2: 0})]
    assert [now for now, _ in warned] == [190, 370, 730, 1450]
    assert warned[0][1].startswith(
        "Process 2 of 3 (pid 102 on elsewhere) has not answered for 3 minutes: it is stopped"
    )
    assert stalls.of_silence(2000, beats(3), {1: 2000, 2: 1999}) == [
        "Process 2 of 3 (pid 102 on elsewhere) answers again."
    ]
    assert stalls.of_silence(2010, beats(3), {1: 2010, 2: 2009}) == []
    assert len(stalls.of_silence(2200, beats(3), {1: 2200, 2: 2009})) == 1


def test_no_step_in_training_is_told_with_the_place_of_each_process():
    stalls = Stalls(PEERS, 180)
    places = beats(7) | {1: Beat(step=7, doing="training", where="activations/text.py:9, in read")}
    for rank in (0, 2):
        places[rank].where = "training/trainer.py:5, in all_reduce"
    assert stalls.of_steps(0, beats(6)) == stalls.of_steps(2, places) == stalls.of_steps(181, places) == []
    (said,) = stalls.of_steps(183, places)
    assert said.startswith(
        "No step for 3 minutes; the last was step 7. The processes are at training/trainer.py:5, in all_reduce "
        "(process 0, 2); activations/text.py:9, in read (process 1)."
    )
    assert stalls.of_steps(361, places) == [] and len(stalls.of_steps(363, places)) == 1


def test_first_step_evaluation_and_saving_take_as_long_as_they_take():
    for doing in ("starting", "saving", "finishing"):
        stalls = Stalls(PEERS, 180)
        stalls.of_steps(0, beats(5))
        one_of_them = beats(5) | {2: Beat(step=5, doing=doing)}
        assert not any(stalls.of_steps(now, one_of_them) for now in range(0, 5000, 10)), doing
        assert stalls.of_steps(5000, beats(5)) == []  # training goes on


def test_a_run_of_slow_steps_is_not_suspected():
    stalls = Stalls(PEERS, 180)
    assert not any(
        stalls.of_steps(step * 150 + late, beats(step)) for step in range(1, 9) for late in range(0, 150, 10)
    )
    assert not any(stalls.of_steps(8 * 150 + late, beats(8)) for late in range(0, 700, 10))
    assert stalls.of_steps(8 * 150 + 800, beats(8))


def test_while_a_process_is_silent_steps_are_not_asked_for():
    stalls = Stalls(PEERS, 180)
    for now in range(0, 1000, 10):
        stalls.of_silence(now, beats(3), {1: now, 2: 0})
        assert stalls.of_steps(now, beats(3)) == []


def test_a_place_is_a_line_of_this_package():
    busy = threading.Thread(target=whereabouts_of_waiting, daemon=True)
    busy.start()
    time.sleep(0.1)
    assert whereabouts(busy.ident) == "an unknown place"  # nothing of this package runs there
    board = threading.Event()

    def wait_within():
        stalls = Stalls(PEERS, 1)
        stalls.of_silence(0, Waits(board), {1: 0, 2: 0})

    inside = threading.Thread(target=wait_within, daemon=True)
    inside.start()
    time.sleep(0.1)
    place = whereabouts(inside.ident)
    board.set()
    assert place.startswith("training/run/watchdog.py:") and place.endswith(", in wait")


def whereabouts_of_waiting():
    threading.Event().wait(5)


class Waits(dict):
    """Beats that are waited for."""

    def __init__(self, event):
        super().__init__(beats(0))
        self.event = event

    def __getitem__(self, rank):
        self.event.wait(5)
        return super().__getitem__(rank)
