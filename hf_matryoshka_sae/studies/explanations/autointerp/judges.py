"""Judges: a chat model that runs here, and any judge by what it is called."""

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ....common.checks import check_at_least
from .answers import Judge, Message, Reply
from .endpoint import EndpointJudge


TOKEN_VARIABLE = "JUDGE_TOKEN"


class ChatModelJudge:
    """A chat model of transformers, read greedily.

    Args:
        model (`str`): Hub id or folder; its tokenizer has a chat template.
        device (`str` or `torch.device`, *optional*): By default a GPU where there is one.
        dtype (`str`, *optional*): By default the checkpoint's.
        max_tokens (`int`, *optional*, defaults to 1024): Of an answer.

    Raises:
        `ValueError`: if there is no such model, or it has no chat template.
    """

    def __init__(
        self,
        model: str,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        max_tokens: int = 1024,
    ) -> None:
        check_at_least(1, max_tokens=max_tokens)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            if not self._tokenizer.chat_template:
                raise ValueError(
                    f"The tokenizer of {model!r} has no chat template, so it is no chat model. Name one that is "
                    "trained to answer, often called Instruct or Chat."
                )
            self._model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype or "auto")
        except OSError as error:
            raise ValueError(
                f"The judge {model!r} cannot be loaded: {error} Give the id or folder of a chat model, or the "
                "address of an endpoint that begins with http:// or https://."
            ) from error
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model.eval().requires_grad_(False).to(device)
        self._max_tokens, self._lock = max_tokens, threading.Lock()
        self.name = Path(model).resolve().name if Path(model).is_dir() else model
        self.settings = {"max_tokens": max_tokens, "temperature": 0, "weights": _fingerprint(self._model)}

    def ask(self, messages: Sequence[Message]) -> Reply:
        """Answer a conversation; one at a time.

        Raises:
            `ValueError`: if it is longer than the model reads.
        """
        with self._lock:
            started = time.monotonic()
            inputs = self._tokenizer.apply_chat_template(
                [dict(one) for one in messages], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            ).to(self._model.device)
            length = inputs["input_ids"].shape[1]
            longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
            if longest is not None and length >= longest:
                raise ValueError(
                    f"A question of {length} tokens is too long for `{self.name}`, which reads {longest}."
                )
            pad = self._tokenizer.pad_token_id
            written = self._model.generate(
                **inputs,
                do_sample=False,
                temperature=None,  # what checkpoints set for sampling would only be warned about
                top_p=None,
                top_k=None,
                max_new_tokens=self._max_tokens if longest is None else min(self._max_tokens, longest - length),
                pad_token_id=self._tokenizer.eos_token_id if pad is None else pad,
            )[0, length:]
            text = self._tokenizer.decode(written, skip_special_tokens=True)
            return Reply(text, length, len(written), time.monotonic() - started)


def _fingerprint(model: torch.nn.Module) -> str:
    """Tells one checkpoint from another of the same name, by a few numbers of each tensor."""
    digest = hashlib.sha256()
    for name, values in model.state_dict().items():
        digest.update(f"{name} {tuple(values.shape)} {values.flatten()[:8].float().tolist()}".encode())
    return digest.hexdigest()[:16]


def open_judge(text: str | None) -> Judge | None:
    """The judge that a text names.

    Args:
        text (`str`, *optional*): `http://...` or `https://...`, an endpoint, with `#` before the name of a model
            there; `endpoint:MODEL`, a model at the Hub's inference providers; else the Hub id or folder of a chat
            model, which runs here. An endpoint's token is read from the environment variable `JUDGE_TOKEN`.

    Returns:
        [`Judge`], or `None` for none: then N2G's patterns stand in.

    Raises:
        `ValueError`: if it cannot be opened.
    """
    if text is None:
        return None
    token = os.environ.get(TOKEN_VARIABLE)
    if text.startswith(("http://", "https://")):
        address, _, model = text.partition("#")
        return EndpointJudge(model or None, address, token)
    if text.startswith("endpoint:"):
        return EndpointJudge(text.removeprefix("endpoint:"), token=token)
    return ChatModelJudge(text)
