"""The whole of it: planted latents with judges whose answers are known, breaks, and N2G in a judge's place."""

import json
import re
import threading
import time

import numpy as np
import pytest

from hf_matryoshka_sae.evaluation import HeldOut
from hf_matryoshka_sae.models import SAEModel
from hf_matryoshka_sae.studies.explanations.autointerp import interpretability as module
from hf_matryoshka_sae.studies.explanations.autointerp.answers import Reply
from hf_matryoshka_sae.studies.explanations.autointerp.endpoint import EndpointJudge
from hf_matryoshka_sae.studies.explanations.autointerp.examination import PassageCounts
from hf_matryoshka_sae.studies.explanations.autointerp.interpretability import automated_interpretability
from hf_matryoshka_sae.studies.explanations.autointerp.judges import ChatModelJudge

from ....evaluation.planted import frequent, planted
from .test_judges import tiny_chat_model


def words(data: HeldOut, count: int) -> list[int]:
    """Frequent tokens that are a space and a word, so that their text tells where they are."""
    found = [t for t in frequent(data, 200) if re.fullmatch(" [a-z]{2,}", data.tokenizer.decode([t]))]
    return found[:count]


@pytest.fixture(scope="module")
def sae(text) -> SAEModel:
    return planted(text[0], words(text[0], 3))


def oracle(question: str) -> str:
    """Reads from the marks what a latent fires on and tells exactly where that is."""
    if "Answer with the word yes" in question:
        return "yes"
    if "What do the marked tokens" in question:
        passages = [line for line in question.splitlines() if line.startswith("- ")]
        (word,) = set(re.findall("«(.*?)»", "".join(passages)))
        return f"the word{word}"
    word = re.search("the word( [a-z]+)", question)[1]
    whole = rf"{word}(?![a-z])"
    lines = re.findall(r"^(\d+): (.*)$", question, re.MULTILINE)
    if "from 0 (not at all)" in question:
        return json.dumps([10 if text == word else 0 for _, text in lines])
    if "marks right" in question:
        return json.dumps([int(number) for number, text in lines if f"«{word}»" in text])
    return json.dumps([int(number) for number, text in lines if re.search(whole, text)])


class Called:
    """A judge that is a function."""

    def __init__(self, answer, name: str = "called"):
        self.answer, self.name, self.settings, self.asked, self.lock = answer, name, {}, [], threading.Lock()

    def ask(self, messages):
        (message,) = messages
        with self.lock:
            self.asked.append(message["content"])
        return Reply(self.answer(message["content"]), 100, 10, 0.1)


def run(sae, text, judge, **options):
    options = {"per_group": 3, "baselines": False, "show": False} | options
    return automated_interpretability({"planted": sae}, *text, judge, **options)


def test_an_oracle_is_perfect(sae, text):
    judge = Called(oracle)
    found = run(sae, text, judge, price=(2.0, 10.0))
    (row,) = found.subject("planted")
    for score in ("detection", "detection_f1", "detection_accuracy", "fuzzing", "simulation"):
        assert row[score] == pytest.approx(1.0) and row[f"{score}_interval"] is None  # over three latents
    assert row["detection_all_no"] == pytest.approx(10 / 14)
    assert row["latents"] == 3 and row["questions"] == 3 * 17 == len(judge.asked) - 1  # and whether it is there
    assert row["refusals"] == row["malformed"] == row["constant"] == row["crowded"] == 0
    tokens = [text[0].tokenizer.decode([token]) for token in words(text[0], 3)]
    assert [one.explanation for one in found.latents["planted"]] == [f"the word{token}" for token in tokens]
    assert found.about["cost"]["asked"] == 52 and found.about["cost"]["money"] == pytest.approx(52 * 300 / 1e6)
    assert "judge: called" in str(found) and not found.about["stand_in"] and "5,200 tokens read" in str(found)


def test_what_is_shown_is_as_many_passages_as_said(sae, text):
    judge = Called(oracle)
    found = run(sae, text, judge, passages=PassageCounts(4, 3, 1, 2, 5, 6), per_group=1, workers=1)
    _, explain, detection, fuzzing, *simulation = judge.asked
    token = words(text[0], 3)[found.latents["planted"][0].latent]
    fired = sum(int((batch.input_ids[batch.keep] == token).sum()) for batch in text[0].batches)
    # Four around the strongest, three over the whole range and one more for every fifty firings.
    assert len(re.findall("^- .*«", explain, re.MULTILINE)) == 4 + min(15, 3 + fired // 50) and len(simulation) == 8
    for question, count in ((detection, 8), (fuzzing, 6)):
        assert (
            f"Below are {count} passages" in question and len(re.findall(r"^\d+: ", question, re.MULTILINE)) == count
        )
    assert len(json.loads(oracle(detection))) == 3 and len(json.loads(oracle(fuzzing))) == 3
    for question in simulation:  # ten tokens on either side at most
        count = int(re.search(r"passage of (\d+) tokens", question)[1])
        assert 11 <= count <= 21 and len(re.findall(r"^\d+: ", question, re.MULTILINE)) == count


def test_explanations_and_questions_are_from_different_texts(sae, text):
    judge = Called(oracle)
    run(sae, text, judge, workers=1)
    examples, test = (_lines(data) for data in text)
    for question in judge.asked:
        if "What do the marked tokens" in question:
            for passage in re.findall("^- (.*)$", question, re.MULTILINE):
                assert passage.replace("«", "").replace("»", "") in examples
        elif "passages of text" in question:
            for passage in re.findall(r"^\d+: (.*)$", question, re.MULTILINE):
                assert passage.replace("«", "").replace("»", "") in test


def _lines(data: HeldOut) -> str:
    rows = [row for batch in data.batches for row in data.tokenizer.batch_decode(batch.input_ids)]
    return "|".join(rows).replace("\n", "⏎")


def test_a_judge_that_always_says_no_scores_as_chance(sae, text):
    def no(question: str) -> str:
        if "What do the marked" in question:
            return "nothing in particular"
        zeros = [0] * len(re.findall(r"^\d+: ", question, re.M))
        return str(zeros) if "0 (not at all)" in question else "[]"

    (row,) = run(sae, text, Called(no)).subject("planted")
    assert row["detection"] == row["fuzzing"] == 0.5 and row["simulation"] == row["detection_f1"] == 0
    assert row["detection_accuracy"] == row["detection_all_no"] == pytest.approx(10 / 14)
    assert row["constant"] == 3 and row["malformed"] == row["refusals"] == 0


@pytest.mark.parametrize(("answer", "kind"), [("Well, 3?", "malformed"), ("I'm sorry, but I can't.", "refusals")])
def test_what_says_nothing_is_counted_not_dropped(sae, text, answer, kind):
    def answering(question: str) -> str:
        return "words" if "What do the marked" in question else answer

    (row,) = run(sae, text, Called(answering)).subject("planted")
    other = {"malformed": "refusals", "refusals": "malformed"}[kind]
    assert row[kind] == 3 * 16 and row[other] == 0 and row["latents"] == 3
    assert (row["detection"], row["fuzzing"], row["simulation"]) == (0.5, 0.5, 0.0)


def test_a_malformed_simulation_counts_as_silence(sae, text):
    def answering(question: str) -> str:
        answer = oracle(question)
        return "nowhere" if "0 (not at all)" in question and "10" not in answer else answer

    (row,) = run(sae, text, Called(answering)).subject("planted")
    assert row["malformed"] == 3 * 10 and row["simulation"] == pytest.approx(1.0)


def test_without_an_explanation_nothing_more_is_asked(sae, text):
    judge = Called(lambda question: "I cannot say.")
    found = run(sae, text, judge)
    (row,) = found.subject("planted")
    assert row["refusals"] == row["questions"] == 3 and len(judge.asked) == 4 and row["detection"] == 0.5
    assert all(one.explanation == "" for one in found.latents["planted"])


def test_one_bad_answer_costs_one_latent(sae, text):
    def answering(question: str) -> str:
        first = f"the word{text[0].tokenizer.decode(words(text[0], 1))}"
        return "?" if first in question and "Below is a passage" not in question else oracle(question)

    (row,) = run(sae, text, Called(answering)).subject("planted")
    assert row["malformed"] == 2 and row["simulation"] == pytest.approx(1)
    assert row["detection"] == pytest.approx((0.5 + 1 + 1) / 3) == row["fuzzing"]


def test_results_do_not_depend_on_workers_nor_on_other_scores(sae, text):
    one, many = (run(sae, text, Called(oracle), workers=workers).to_dict() for workers in (1, 7))
    assert one == many
    judge = Called(oracle)
    alone = run(sae, text, judge, scores=["fuzzing"])
    assert alone.latents["planted"][0].scores == {"fuzzing": 1.0} and len(judge.asked) == 1 + 3 * 2
    assert set(judge.asked) <= set(_asked(sae, text))


def _asked(sae, text) -> list[str]:
    judge = Called(oracle)
    run(sae, text, judge)
    return judge.asked


def test_after_a_break_only_the_rest_is_asked(sae, text, chat, tmp_path):
    chat.answer = oracle
    cache = tmp_path / "answers.jsonl"
    judge = EndpointJudge("m", chat.url, retries=0, timeout=5)
    whole = run(sae, text, judge, cache=tmp_path / "whole.jsonl")
    total = len(chat.requests)
    assert total == 52
    chat.failures = {total + 21: 500}
    with pytest.raises(ValueError, match="fails 1 times, the last time with status 500"):
        run(sae, text, judge, cache=cache, workers=1)
    assert len(chat.requests) == total + 21 and len(cache.read_text().splitlines()) == 20
    cache.write_bytes(cache.read_bytes()[:-5])  # killed while it wrote
    resumed = run(sae, text, judge, cache=cache)
    assert len(chat.requests) == total + 21 + (52 - 19)
    assert resumed.records == whole.records and resumed.latents == whole.latents
    assert resumed.about["cost"]["cached"] == 19 and resumed.about["cost"]["asked"] == 33
    same = ("prompt_tokens", "completion_tokens", "uncounted")
    assert [resumed.about["cost"][key] for key in same] == [whole.about["cost"][key] for key in same]
    chat.close()
    assert run(sae, text, judge, cache=cache).records == whole.records


def test_an_error_ends_all_threads_soon(sae, text):
    def failing(question: str) -> str:
        if len(judge.asked) > 10:
            raise ValueError("the judge is gone")
        return oracle(question)

    judge = Called(failing)
    with pytest.raises(ValueError, match="the judge is gone"):
        run(sae, text, judge, workers=3)
    assert len(judge.asked) <= 10 + 3  # what was on its way


def test_an_interruption_ends_all_threads_soon(sae, text, monkeypatch):
    class Interrupted(module.progress):
        def update(self, n=1):
            raise KeyboardInterrupt

    def slow(question: str) -> str:
        time.sleep(0.01)
        return oracle(question)

    judge = Called(slow)
    monkeypatch.setattr(module, "progress", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(sae, text, judge, workers=1)
    assert 18 <= len(judge.asked) <= 30  # of 52; the next latent had begun


def test_a_judge_that_is_not_there_is_known_before_the_work(sae, text, chat, monkeypatch):
    chat.failures = {1: 401}
    monkeypatch.setattr(module, "with_baselines", lambda *values: pytest.fail("it went on"))
    with pytest.raises(ValueError, match="refuses the token"):
        run(sae, text, chat.url)


def test_only_the_main_process_asks(sae, text, monkeypatch):
    monkeypatch.setattr(module, "processes", lambda: (1, 2))
    judge = Called(oracle)
    assert run(sae, text, judge) is None and not judge.asked


def test_a_users_own_prompts_are_asked(sae, text, tmp_path):
    (tmp_path / "explain.md").write_text("Mine. What do the marked tokens mean?\n$passages")
    judge = Called(oracle)
    run(sae, text, judge, prompts=tmp_path, scores=["detection"], per_group=1)
    assert judge.asked[1].startswith("Mine.")


def test_a_model_that_nobody_trained_is_counted(sae, text, tmp_path):
    judge = ChatModelJudge(str(tiny_chat_model(tmp_path / "chat")), device="cpu", max_tokens=8)
    found = run(sae, text, judge, per_group=1, scores=["detection", "fuzzing"])
    (row,) = found.subject("planted")
    assert row["questions"] == 3 and row["malformed"] >= 2 and row["detection"] == row["fuzzing"] == 0.5
    assert found.about["judge"] == "chat" and found.about["cost"]["completion_tokens"] > 0


def test_patterns_stand_in_and_say_so(sae, text, tmp_path):
    found = run(sae, text, None)
    (row,) = found.subject("planted")
    for score in ("detection", "fuzzing", "simulation"):
        assert row[score] == pytest.approx(1.0)
    said = "no judge: N2G patterns stand in"
    assert said in str(found) and found.to_dict()["judge"] == said and found.to_dict()["stand_in"] is True
    assert said in found.title and found.about["cost"]["asked"] == 0
    token = text[0].tokenizer.decode(words(text[0], 1))
    assert found.latents["planted"][0].explanation == f"patterns '{token}'"
    found.save(tmp_path)
    assert json.loads((tmp_path / "autointerp.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    assert (tmp_path / "autointerp.png").stat().st_size > 10_000


def test_baselines_stand_beside_and_are_worse(text):
    sae = planted(text[0], words(text[0], 12))
    found = run(sae, text, None, widths=[6, 12], baselines=True, per_group=4)
    assert list(found.subjects()) == ["planted", "random (planted)", "neurons"]
    assert [row["width"] for row in found.subject("random (planted)")] == [6, 12]
    for score in ("detection", "simulation"):
        last = {name: rows[-1][score] for name, rows in found.subjects().items()}
        assert last["planted"] == pytest.approx(1.0) and max(last["neurons"], last["random (planted)"]) < 0.95


@pytest.mark.release
def test_a_trained_sae_is_interpreted_better_than_random_directions_and_neurons(trained):
    demo, *texts = trained
    found = automated_interpretability({"demo": demo}, *texts, widths=[64, 448], per_group=8, show=False)
    for score in ("detection", "simulation"):
        last = {name: rows[-1][score] for name, rows in found.subjects().items()}
        assert last["demo"] > last["random (demo)"] and last["demo"] > last["neurons"]
    for rows in found.subjects().values():
        for row in rows:
            assert row["detection_interval"][0] <= row["detection"] <= row["detection_interval"][1]
            assert all(np.isfinite(row[score]) for score in ("detection", "fuzzing", "simulation"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": ["detect"]}, "`scores` takes any of detection, fuzzing, simulation, got detect"),
        ({"scores": []}, "got none"),
        ({"workers": 0}, "`workers` must be at least 1"),
        ({"least": 10**6}, "No latent of `planted` fires on at least 1000000"),
        ({"widths": [99]}, "99"),
    ],
)
def test_wrong_options_are_said(sae, text, options, message):
    with pytest.raises(ValueError, match=message):
        run(sae, text, None, **options)


def test_wrong_counts_and_no_sae_are_said(text):
    with pytest.raises(ValueError, match="at least one SAE"):
        automated_interpretability({}, *text)
    with pytest.raises(ValueError, match="Passages must number at least 1"):
        PassageCounts(silent=0)
    with pytest.raises(ValueError, match="`fuzzed` at least 2"):
        PassageCounts(fuzzed=1)
