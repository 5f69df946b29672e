"""A language model of SAEs that are open: its tokenizer and config at once, its weights when something runs it."""

import os
import re
import threading
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from ...activations import DatasetConfig, heldout_batches
from ...activations.language_model import model_class
from ...activations.sentences import load_sentence_transformer
from ...evaluation import HeldOut
from ...evaluation.data import as_config
from .hub import Repository


EXCLUDED = "special"
"""Positions that are left out of the text, as in `matryoshka-sae evaluate`."""

_OF_MODULE = re.compile(r"\d+_\w+/[^/]+\.(json|safetensors)")  # of sentence-transformers, in folders such as 1_Pooling
_WINDOWS = 32  # of text in a batch, as in `matryoshka-sae evaluate`
_KEPT_STATES = 25_000_000  # numbers of the hidden states of the held-out text that are kept


class Reader:
    """A language model with the held-out text, tokenised for it.

    Args:
        name (`str`): As SAEs name it.
        loading (`Lock`): Held while transformers builds a model, which is not made for threads.
        folder (`str`): Where its config and tokenizer are.
        repository ([`Repository`], *optional*): From which its weights are fetched; by default they are in the folder.

    Raises:
        `ValueError`, `OSError`: if its config or tokenizer cannot be read.
    """

    def __init__(self, name: str, loading: Any, folder: str, repository: Repository | None = None) -> None:
        self.name, self._folder, self._repository = name, folder, repository
        files = [] if repository is None else repository.files_of_model()
        self.gigabytes = 0.0 if repository is None else repository.bytes_of(files) / 1e9
        self.renew_locks(loading)
        with loading:
            self._config = AutoConfig.from_pretrained(folder)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.name_or_path = name
        kind = model_class(self._config)
        self.generates, self.has_loss = kind is AutoModelForCausalLM, kind is not AutoModel
        self._text: HeldOut | None = None
        self._encoder: Any = None

    def encoder(self) -> Any:
        """Return the model as sentence-transformers opens it, which pools; loaded by the first who asks.

        Raises:
            `ValueError`, `OSError`, `httpx.HTTPError`: if it cannot be fetched or loaded.
        """
        with self._lock:
            if self._encoder is None:
                if self._repository is not None:
                    modules = [file for file in self._repository.sizes if _OF_MODULE.fullmatch(file)]
                    self._repository.fetch([*self._repository.files_of_model(), *modules])
                with self._loading:
                    self._encoder = load_sentence_transformer(self._folder)
            return self._encoder

    def renew_locks(self, loading: Any) -> None:
        """Take new locks that nobody holds."""
        self._loading, self._lock = loading, threading.Lock()

    def text(self, dataset: DatasetConfig | None, tokens: int, context_length: int, device: str) -> HeldOut:
        """Return the model with the text, loaded and tokenised by the first who asks; at no hookpoint yet.

        Raises:
            `ValueError`, `OSError`, `httpx.HTTPError`: if it cannot be fetched or loaded.
        """
        with self._lock:
            if self._text is None:
                if self._repository is not None:
                    self._repository.fetch(self._repository.files_of_model())
                model = self._model(device)
                batches = heldout_batches(
                    as_config(dataset), self.tokenizer, context_length, tokens, _WINDOWS, exclude=EXCLUDED
                )
                batches = [batch.to(torch.device(device)) for batch in batches]
                width = model.get_input_embeddings().weight.shape[1]
                keeps = tokens * width <= _KEPT_STATES and not os.environ.get("SPACES_ZERO_GPU")
                mask = self.tokenizer.mask_token_id
                self._text = HeldOut(model, batches, "", mask, self.tokenizer, {} if keeps else None)
            return self._text

    def _model(self, device: str) -> Any:
        """Load the model in the type of its checkpoint.

        transformers builds a model of another type than float32 by changing torch's default type, which is that of
        all threads: computations that run meanwhile would change. So it is built in float32, its parameters rounded.
        """
        with self._loading:
            model = model_class(self._config).from_pretrained(self._folder, dtype=torch.float32)
        kind = getattr(self._config, "dtype", None)
        if isinstance(kind, torch.dtype) and kind != torch.float32:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(kind)
        model.name_or_path = model.config._name_or_path = self.name  # noqa: SLF001 (what is built of it names it)
        return model.eval().requires_grad_(False).to(device)
