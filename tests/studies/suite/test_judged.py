"""`evaluate --suite full --judge`: a judge behind a loopback endpoint, and what a second run asks it."""

import json

import pytest
from huggingface_hub import constants
from transformers import AutoModel

from hf_matryoshka_sae.assets import embedded_sae_path
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
    AutoModel.from_pretrained(embedded_sae_path(), width=64).save_pretrained(tmp_path / "it")
    flags = [str(tmp_path / "it"), "--suite", "full", "--judge", server.url, "--tokens", "3000", "--widths", "16,64"]
    flags += ["--output_dir", str(tmp_path)]
    assert command.main(flags) == 0
    asked = len(server.requests)
    assert asked > 4
    folder = tmp_path / "evaluation_suite"
    text = "".join((folder / name).read_text() for name in ("report.md", "details.md"))
    assert server.url in text and "## embedded" in text
    result = json.loads((folder / "model.layers.2/autointerp.json").read_text())
    for row in result["rows"]["it"]:
        assert row["detection"] == 0.5 and row["simulation"] == 0  # nothing was learnt
        assert row["refusals"] + row["malformed"] > 0
    (folder / "model.layers.2/autointerp.json").unlink()
    assert command.main(flags) == 0
    assert len(server.requests) == asked


@pytest.mark.parametrize(("judge", "named"), [("nowhere/none", "none"), ("http://127.0.0.1:9/v1", "127.0.0.1:9")])
def test_a_judge_that_is_not_there_is_told_before_the_long_work(judge, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not judge.startswith("http"))
    monkeypatch.setattr(evaluating, "run_sections", lambda *_, **__: pytest.fail("the long work began"))
    monkeypatch.chdir(tmp_path)
    assert command.main(["embedded", "--suite", "full", "--judge", judge]) == 2
    assert named in capsys.readouterr().err
