"""What visitors have open: SAEs by repository or folder, each with its language model; opened once, shared by all."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ...activations import DatasetConfig, hookpoint_widths, resolve_hookpoints
from ...activations.language_model import EMBEDDED
from ...assets import embedded_sae_path
from ...convert.places import SAEPlace, saes_in
from ...evaluation import HeldOut, open_heldout
from ..limits import UNREACHABLE
from .opened import Opened


ROOT = "(the root)"
"""What the page calls the SAE at the root of a repository."""


class Library:
    """Opens SAEs for the page and keeps the last few.

    Args:
        dataset (`str` or [`DatasetConfig`], *optional*): Held-out text, on which everything is measured; by default
            the embedded text.
        tokens (`int`, *optional*, defaults to 10,000), context_length (`int`, *optional*, defaults to 128): How much.
        model (`str`, *optional*): The language model of all SAEs; by default what each names.
        keep (`int`, *optional*, defaults to 4): SAEs kept open.
        revision (`str`, *optional*): Of repositories on the Hub.
        public (`bool`, *optional*, defaults to `False`): Whether strangers visit. Then no folder of this machine is
            opened but those of `shown`, and nobody pushes with the token of this machine; see also
            [`forget_own_token`].
        shown (`Sequence[str]`, *optional*): Folders that strangers may open all the same.
    """

    def __init__(
        self,
        dataset: str | DatasetConfig | None = None,
        tokens: int = 10_000,
        context_length: int = 128,
        model: str | None = None,
        keep: int = 4,
        revision: str | None = None,
        public: bool = False,
        shown: Sequence[str] = (),
    ) -> None:
        if tokens < 1 or context_length < 2 or keep < 1:
            raise ValueError(
                f"`tokens`, `context_length` and `keep` must be at least 1, 2 and 1; got {tokens}, {context_length} "
                f"and {keep}."
            )
        self.dataset = DatasetConfig(dataset) if isinstance(dataset, str) else dataset
        self.tokens, self.context_length, self.model, self.keep = tokens, context_length, model, keep
        self.revision, self.public, self.shown = revision, public, frozenset(shown)
        # A GPU that is lent by the call is not there while an SAE is opened.
        self.device = "cpu" if os.environ.get("SPACES_ZERO_GPU") else None
        # Held by whatever loads or runs a language model: two runs at once are no faster, and transformers'
        # `from_pretrained` is not made for threads. What only reads an index does not wait for it.
        self.lock = threading.RLock()
        self._opened: OrderedDict[tuple[str, str], Opened] = OrderedDict()
        self._guard = threading.Lock()  # of the line above
        self._texts: dict[str, HeldOut] = {}

    def saes(self, source: str) -> dict[str, SAEPlace]:
        """The SAEs of a repository or folder, by what the page calls their places.

        Args:
            source (`str`): Repository id, folder, or `"embedded"`.

        Raises:
            `ValueError`: if it cannot be read or holds none; the message says what to do.
        """
        source = (source or "").strip()
        if not source:
            raise ValueError(f"Name a repository on the Hub (user/name), a folder, or '{EMBEDDED}'.")
        where = self._resolved(source)
        try:
            saes = saes_in(where, **self._revision(where))
        except (ValueError, *UNREACHABLE) as error:
            raise ValueError(
                f"'{source[:80]}' cannot be opened: {_first_line(error)} Check the name, or open '{EMBEDDED}'."
            ) from error
        return {place or ROOT: sae for place, sae in saes.items()}

    def open(self, source: str, place: str = "") -> Opened:
        """An SAE with its language model and held-out text.

        Args:
            source (`str`): Repository id, folder, or `"embedded"`.
            place (`str`, *optional*): Which of its SAEs; the first where none is named.

        Raises:
            `ValueError`: if something is missing or does not fit together; the message says what to do.
        """
        key = (source or "").strip(), place or ""
        opened = self._known(key)
        if opened is None:
            self.saes(key[0])  # what is not there is said without waiting for others, and nobody waits for the Hub
            with self.lock:  # another visitor may have opened it while this one waited, or by its place
                opened = self._known(key) or self._known(self._named(key)) or self._open(*key)
                self._keep(key, opened)
        return opened

    def to(self, device: str) -> None:
        """Move all that is open to a device."""
        with self._guard:
            everything = list(self._opened.values())
        for opened in everything:
            opened.to(device)

    def _named(self, key: tuple[str, str]) -> tuple[str, str]:
        """The same with the place that an empty one stands for, if one of the source is open."""
        source, place = key
        if place or not any(other == source for other, _ in self._opened):
            return key
        return source, next(iter(self.saes(source)))

    def _known(self, key: tuple[str, str]) -> Opened | None:
        with self._guard:
            if key in self._opened:
                self._opened.move_to_end(key)
            return self._opened.get(key)

    def _keep(self, key: tuple[str, str], opened: Opened) -> None:
        with self._guard:
            self._opened[key] = self._opened[key[0], opened.place] = opened
            while len({id(one) for one in self._opened.values()}) > self.keep:
                self._opened.popitem(last=False)

    def _open(self, source: str, place: str) -> Opened:
        saes = self.saes(source)
        place = place or next(iter(saes))
        if place not in saes:
            raise ValueError(f"'{source}' holds no SAE at '{place}'. It holds: {', '.join(saes)}.")
        where = self._resolved(source)
        try:
            sae = saes[place].load()
        except (*UNREACHABLE, StrictDataclassError) as error:
            raise ValueError(f"'{source}' cannot be loaded: {_first_line(error)}") from error
        model, hookpoint = self.model or sae.config.base_model, sae.config.hookpoint
        if model is None or hookpoint is None:
            raise ValueError(
                f"The config of '{source}' does not say which language model and hookpoint it is of, so nothing can "
                "be measured. Convert it with `--base_model` and `--hookpoint`, or start the page with `--model`."
            )
        ours = self.model is not None or source in self.shown
        if self.public and not ours and model != EMBEDDED and Path(model).expanduser().exists():
            raise ValueError(
                f"The config of '{source}' names '{model}' as its language model, a folder of some machine. Push it "
                "with the model's id on the Hub."
            )
        data = self._heldout(model, hookpoint)
        width = hookpoint_widths(data.model, [data.hookpoint])[data.hookpoint]
        if width != sae.config.d_in:
            raise ValueError(
                f"This SAE reads hidden states of width {sae.config.d_in}, but '{hookpoint}' of '{model}' gives "
                f"{width}: it is the SAE of another model. Start the page with the right `--model`."
            )
        if self.model is not None:
            sae.config.base_model = self.model
        return Opened(source, place, where, saes[place].subfolder, sae.to(data.device), data, self, list(saes))

    def _heldout(self, model: str, hookpoint: str) -> HeldOut:
        """The text, tokenised once for each model, at a hookpoint."""
        if model not in self._texts:
            self._texts.clear()  # a model stays as long as an SAE of it is open
            self._texts[model] = open_heldout(
                model, hookpoint, self.dataset, self.tokens, self.context_length, device=self.device
            )
        data = self._texts[model]
        (place,) = resolve_hookpoints(data.model, [hookpoint])
        return replace(data, hookpoint=place)

    def _resolved(self, source: str) -> str:
        """The folder, or the id on the Hub."""
        if source == EMBEDDED:
            return str(embedded_sae_path())
        try:
            local = Path(source).expanduser()
            is_here = local.exists()
        except (RuntimeError, OSError) as error:  # nobody's home, or a name that is too long
            raise ValueError(
                f"'{source[:80]}' is neither a folder nor a repository on the Hub. Check the name, or open "
                f"'{EMBEDDED}'."
            ) from error
        if is_here and self.public and source not in self.shown:
            raise ValueError(
                f"'{source}' cannot be opened: this page opens repositories on the Hub (user/name) and '{EMBEDDED}', "
                "no folders of its machine."
            )
        return str(local) if is_here else source

    def _revision(self, where: str) -> dict[str, Any]:
        return {} if self.revision is None or Path(where).exists() else {"revision": self.revision}


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
