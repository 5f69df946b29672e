"""A judge behind an OpenAI-compatible endpoint, or at the Hub's inference providers."""

import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx

from .answers import Message, Reply


_AGAIN = {408, 429, 500, 502, 503, 504}
_REFUSED_TOKEN = {401, 403}
_HUB = (".huggingface.co", ".huggingface.cloud", ".hf.space")
_DROPPED = (InferenceTimeoutError, httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
_FILTERS = ("content_filter", "content_policy")
_LONGEST_WAIT = 60.0
_SHOWN = 300


class EndpointJudge:
    """A chat model that answers over HTTP, through [`~huggingface_hub.InferenceClient`].

    Args:
        model (`str`, *optional*): Its name there; with no `base_url` a model id at the Hub's inference providers.
        base_url (`str`, *optional*): Where it answers, such as `http://localhost:8000/v1`.
        token (`str`, *optional*): For the endpoint. By default the saved Hub token goes to Hugging Face's own hosts,
            and none to others.
        timeout (`float`, *optional*, defaults to 120): Seconds to wait for an answer.
        retries (`int`, *optional*, defaults to 4): After time-outs, dropped connections and the statuses 408, 429, 500
            and 502 to 504.
        wait (`float`, *optional*, defaults to 1): Seconds before the first of them, twice as long before each other;
            longer where the endpoint asks for it, at most 60.
        max_tokens (`int`, *optional*, defaults to 1024): Of an answer; `None` leaves it to the endpoint.
        temperature (`float`, *optional*, defaults to 0): `None` leaves it to the endpoint.
        extra_body (`Mapping`, *optional*): More fields of the request, such as `{"reasoning_effort": "low"}`.

    Raises:
        `ValueError`: with neither model nor URL, or numbers out of range.
    """

    def __init__(
        self,
        model: str | None = None,
        base_url: str | None = None,
        token: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        wait: float = 1.0,
        max_tokens: int | None = 1024,
        temperature: float | None = 0.0,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if not model and not base_url:
            raise ValueError("Name the judge: `model`, a model id at the Hub's providers, or `base_url`, an endpoint.")
        if base_url and not (urlsplit(base_url).scheme in ("http", "https") and urlsplit(base_url).hostname):
            raise ValueError("`base_url` is the address of an endpoint, such as http://localhost:8000/v1.")
        if timeout <= 0 or retries < 0 or wait < 0:
            raise ValueError(
                f"Expected `timeout` > 0, `retries` and `wait` >= 0, got {timeout}, {retries} and {wait}."
            )
        self._address = _address(base_url)
        self.name = model or self._address
        self.settings = {"max_tokens": max_tokens, "temperature": temperature} | dict(extra_body or {})
        self._options = {"max_tokens": max_tokens, "temperature": temperature, "extra_body": dict(extra_body or {})}
        self._model, self._retries, self._wait = model, retries, wait
        # The client would send the saved Hub token to any host.
        self._token = token or (None if base_url is None or _is_hub(base_url) else "none")
        where = {"model": model} if base_url is None else {"base_url": base_url}
        self._client = InferenceClient(**where, token=self._token, timeout=timeout)

    def ask(self, messages: Sequence[Message]) -> Reply:  # noqa: C901 (one case for each kind of failure)
        """Answer a conversation.

        Raises:
            `ValueError`: where the endpoint cannot be reached, refuses the token or the request, goes on failing, or
                is none.
        """
        started = time.monotonic()
        for attempt in range(self._retries + 1):
            try:
                completion = self._client.chat_completion(
                    [dict(m) for m in messages], model=self._model, **self._options
                )
                return self._reply(completion, time.monotonic() - started)
            except HfHubHTTPError as error:
                status, trouble = error.response.status_code, self._told(error)
                if status in _REFUSED_TOKEN:
                    raise self._failure(f"refuses the token (status {status}); check it and what it may do") from None
                if status == 400 and any(word in error.response.text for word in _FILTERS):
                    return Reply("", seconds=time.monotonic() - started, refused=True)
                if status not in _AGAIN:
                    raise self._failure(f"refuses the request: {trouble}{self._hint()}") from None
                pause = _asked_for(error.response.headers.get("retry-after"))
            except OfflineModeIsEnabled:
                raise self._failure("is not asked: HF_HUB_OFFLINE is set, which holds for every host") from None
            except _DROPPED as error:
                if isinstance(error, httpx.ConnectError):
                    raise self._failure("cannot be reached; is it running, and is the address right?") from None
                trouble, pause = type(error).__name__, 0.0
            except httpx.HTTPError as error:
                raise self._failure(f"cannot be reached ({type(error).__name__})") from None
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise self._failure(f"gives no chat completion: {type(error).__name__} {error}") from None
            if attempt < self._retries:
                time.sleep(min(_LONGEST_WAIT, max(pause, self._wait * 2**attempt)))
        raise self._failure(f"fails {self._retries + 1} times, the last time with {trouble}")

    def _reply(self, completion: Any, seconds: float) -> Reply:
        choice = completion.choices[0]
        refusal = choice.message.get("refusal") or choice.finish_reason == "content_filter"
        usage = completion.usage
        return Reply(
            choice.message.content or "",
            usage.prompt_tokens if usage else None,
            usage.completion_tokens if usage else None,
            seconds,
            refused=bool(refusal),
        )

    def _told(self, error: HfHubHTTPError) -> str:
        text = " ".join(error.response.text.split())
        if self._token:
            text = text.replace(self._token, "***")
        return f"status {error.response.status_code} {text[:_SHOWN]}".strip()

    def _hint(self) -> str:
        return "" if self._model else " Some endpoints need the name of a model."

    def _failure(self, what: str) -> ValueError:
        return ValueError(f"The judge at {self._address} {what}.")


def _address(base_url: str | None) -> str:
    """An address without what may be secret in it: user, password and query."""
    if base_url is None:
        return "the Hub's inference providers"
    parts = urlsplit(base_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _is_hub(base_url: str) -> bool:
    parts = urlsplit(base_url)
    return parts.scheme == "https" and f".{parts.hostname}".endswith(_HUB)


def _asked_for(header: str | None) -> float:
    """Seconds that an endpoint asks to wait."""
    return float(header) if header and header.isdigit() else 0.0
