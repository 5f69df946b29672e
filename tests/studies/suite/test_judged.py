"""`evaluate --suite full --judge`: a judge behind a loopback endpoint, and what a second run asks it."""

import json

import pytest
from huggingface_hub import constants

from hf_matryoshka_sae.studies import command, evaluating
from hf_matryoshka_sae.studies.suite import SECTIONS, Section

from ..explanations.autointerp.chat_server import ChatServer


@pytest.fixture
def server():
    server = ChatServer(lambda question: "I would rather not say.")
    yield server
    server.close()


@pytest.mark.slow
def test_a_judge_is_asked_once_and_its_silence_is_counted(server, tmp_path, monkeypatch):
    (judged,) = (Section(**{**vars(each), "full": 1}) for each in SECTIONS if each.name == "autointerp")
    monkeypatch.setattr(evaluating, "SECTIONS", [judged])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    flags = ["embedded", "--suite", "full", "--judge", server.url, "--tokens", "12000", "--output_dir", str(tmp_path)]
    assert command.main([*flags, "--widths", "64,192"]) == 0
    asked = len(server.requests)
    assert asked > 4
    folder = tmp_path / "evaluation_suite"
    text = (folder / "report.md").read_text()
    assert server.url in text and "## embedded" in text
    result = json.loads((folder / "model.layers.2/autointerp.json").read_text())
    for row in result["rows"]["embedded"]:
        assert row["detection"] == 0.5 and row["simulation"] == 0  # nothing was learnt
        assert row["refusals"] + row["malformed"] > 0
    (folder / "model.layers.2/autointerp.json").unlink()
    assert command.main([*flags, "--widths", "64,192"]) == 0
    assert len(server.requests) == asked


def test_a_judge_that_is_not_there_is_told_before_the_long_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluating, "SECTIONS", [each for each in SECTIONS if each.name == "autointerp"])
    status = command.main(
        ["embedded", "--suite", "full", "--judge", str(tmp_path / "none"), "--output_dir", str(tmp_path)]
    )
    assert status == 2
    assert "none" in capsys.readouterr().err


def test_a_judge_that_nobody_answers_for_is_told_before_the_long_work_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(evaluating, "run_sections", lambda *_, **__: pytest.fail("the long work began"))
    flags = ["embedded", "--suite", "full", "--judge", "http://127.0.0.1:9/v1", "--output_dir", str(tmp_path)]
    assert command.main(flags) == 2
    assert "127.0.0.1:9" in capsys.readouterr().err
