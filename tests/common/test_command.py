"""How a command ends: its status and what it says."""

import pytest

from hf_matryoshka_sae.common.command import Interrupted, exit_status


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("`k` is wrong"), 2, "\nerror: `k` is wrong\n"),
        (PermissionError(13, "Permission denied", "a/file"), 2, "\nerror: [Errno 13] Permission denied: 'a/file'\n"),
        (KeyboardInterrupt(), 130, "\nWhat was done is kept.\n"),
        (Interrupted("Stopped after step 3."), 130, "\nStopped after step 3.\n"),
    ],
    ids=["value", "file", "ctrl-c", "asked"],
)
def test_what_users_can_mend_is_a_line_and_a_status(capsys, monkeypatch, error, status, said):
    assert exit_status(raising(error), "What was done is kept.") == status
    assert capsys.readouterr().err == said
    monkeypatch.setenv("RANK", "1")  # of several processes the first has said it
    assert exit_status(raising(error), "What was done is kept.") == status
    assert capsys.readouterr().err == ""


def test_work_gives_its_own_status_and_bugs_are_raised():
    assert (exit_status(lambda: None), exit_status(lambda: 1)) == (0, 1)
    with pytest.raises(TypeError):
        exit_status(raising(TypeError("a bug")))
