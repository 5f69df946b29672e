"""A judge behind a loopback endpoint: answers, troubles, and what is never told."""

import logging
import socket
import time

import pytest
from huggingface_hub import constants

from hf_matryoshka_sae.studies.explanations.autointerp.endpoint import EndpointJudge
from hf_matryoshka_sae.studies.explanations.autointerp.judges import open_judge


MESSAGES = [{"role": "user", "content": "two words"}]
SECRET = "sk-very-secret"


def judge(chat, **options) -> EndpointJudge:
    return EndpointJudge("a-model", chat.url, **({"wait": 0.0, "timeout": 5} | options))


def test_an_answer_and_its_cost(chat):
    reply = judge(chat, max_tokens=7, extra_body={"reasoning_effort": "low"}).ask(MESSAGES)
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens, reply.refused) == ("yes", 2, 1, False)
    assert reply.seconds > 0
    (request,) = chat.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["body"] == {
        "model": "a-model",
        "messages": MESSAGES,
        "max_tokens": 7,
        "temperature": 0.0,
        "reasoning_effort": "low",
        "stream": False,
    }


def test_tokens_may_not_be_told(chat):
    chat.usage = False
    reply = judge(chat).ask(MESSAGES)
    assert reply.text == "yes" and reply.prompt_tokens is None and reply.completion_tokens is None


@pytest.mark.parametrize("how", ["field", "finish", "400"])
def test_what_is_withheld_is_a_refusal(chat, how):
    if how == "field":
        chat.message = {"content": None, "refusal": "I cannot."}
    elif how == "finish":
        chat.finish = "content_filter"
    else:
        chat.failures, chat.trouble = {1: 400}, "stopped by the content_filter"
    assert judge(chat).ask(MESSAGES).refused and len(chat.requests) == 1


@pytest.mark.parametrize("failure", [429, 500, 503, 408, "drop", "hang"])
def test_what_passes_is_tried_again(chat, failure):
    chat.failures = {1: failure}
    assert judge(chat, timeout=0.4).ask(MESSAGES).text == "yes" and len(chat.requests) == 2


def test_it_waits_longer_each_time_and_as_long_as_it_is_asked_to(chat, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    chat.failures = dict.fromkeys(range(1, 4), 500)
    judge(chat, wait=1).ask(MESSAGES)
    assert waits == [1, 2, 4]
    waits.clear()
    chat.failures, chat.headers = dict.fromkeys((5, 6), 429), {"Retry-After": "9"}
    judge(chat, wait=1).ask(MESSAGES)
    assert waits == [9, 9]


def test_what_lasts_is_said(chat):
    chat.failures, chat.trouble = dict.fromkeys(range(1, 99), 500), f"the key {SECRET} is fine, I am not"
    with pytest.raises(ValueError, match=r"judge at http://.*/v1 fails 3 times, .* status 500 .*I am not") as error:
        judge(chat, retries=2, token=SECRET).ask(MESSAGES)
    assert len(chat.requests) == 3 and SECRET not in str(error.value)


@pytest.mark.parametrize(("status", "message"), [(401, "refuses the token"), (403, "refuses the token")])
def test_a_refused_token_is_said_at_once(chat, status, message, caplog):
    chat.failures, chat.trouble = {1: status}, f"wrong key {SECRET}"
    with caplog.at_level(logging.DEBUG), pytest.raises(ValueError, match=message) as error:
        judge(chat, token=SECRET).ask(MESSAGES)
    assert len(chat.requests) == 1 and chat.requests[0]["headers"]["authorization"] == f"Bearer {SECRET}"
    assert SECRET not in str(error.value) + caplog.text and error.value.__suppress_context__


def test_a_request_that_is_wrong_is_said_at_once(chat):
    chat.failures, chat.trouble = {1: 404}, "no model `dummy` here"
    with pytest.raises(ValueError, match="refuses the request: status 404 .*no model `dummy` here.* name of a model"):
        EndpointJudge(base_url=chat.url).ask(MESSAGES)
    assert len(chat.requests) == 1


@pytest.mark.parametrize("body", [b"<html>welcome</html>", b"[]", b"{}", b'{"choices": []}', b"\xff"])
def test_what_is_no_chat_is_said(chat, body):
    chat.body = body
    with pytest.raises(ValueError, match="gives no chat completion"):
        judge(chat).ask(MESSAGES)


def test_nobody_there_is_said():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        EndpointJudge(base_url=url).ask(MESSAGES)


def test_nobody_there_is_said_when_online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://me:{SECRET}@127.0.0.1:{free.getsockname()[1]}/v1?key={SECRET}"
    with pytest.raises(ValueError, match=r"judge at http://127.0.0.1:\d+/v1 cannot be reached") as error:
        EndpointJudge(base_url=url).ask(MESSAGES)
    assert SECRET not in str(error.value)


def test_the_hubs_token_goes_to_the_hub_alone(chat, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    judge(chat).ask(MESSAGES)
    assert "hf_mine" not in str(chat.requests)
    hosts = ["https://router.huggingface.co/v1", "https://a.us-east-1.aws.endpoints.huggingface.cloud"]
    assert [EndpointJudge(base_url=host)._token for host in hosts] == [None, None]
    others = ["http://router.huggingface.co/v1", "https://huggingface.co.example.com", "https://nothuggingface.co"]
    assert [EndpointJudge(base_url=host)._token for host in others] == ["none"] * 3


def test_names_tell_no_secrets():
    named = EndpointJudge("a-model", f"https://me:{SECRET}@host:81/v1?key={SECRET}")
    assert named.name == "a-model" and SECRET not in str(named.settings)
    assert EndpointJudge(base_url=f"https://me:{SECRET}@host:81/v1?key={SECRET}").name == "https://host:81/v1"


def test_judges_are_opened_by_what_they_are_called(chat, monkeypatch):
    assert open_judge(None) is None
    monkeypatch.setenv("JUDGE_TOKEN", SECRET)
    found = open_judge(f"{chat.url}#some/model")
    assert found.name == "some/model" and found.ask(MESSAGES).text == "yes"
    assert chat.requests[0]["body"]["model"] == "some/model"
    assert chat.requests[0]["headers"]["authorization"] == f"Bearer {SECRET}"
    assert open_judge(chat.url).name == chat.url
    assert open_judge("endpoint:some/model").name == "some/model"
    with pytest.raises(ValueError, match="The judge './no such folder' cannot be loaded"):
        open_judge("./no such folder")
    with pytest.raises(ValueError, match="Name the judge"):
        open_judge("endpoint:")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Name the judge"),
        ({"base_url": "localhost:8000"}, "`base_url` is the address"),
        ({"base_url": "http://"}, "`base_url` is the address"),
        ({"model": "a", "timeout": 0}, "`timeout` > 0"),
        ({"model": "a", "retries": -1}, "`retries` and `wait` >= 0"),
    ],
)
def test_wrong_options_are_said(options, message):
    with pytest.raises(ValueError, match=message):
        EndpointJudge(**options)
