"""What visitors have open: SAEs by repository or folder, each with its language model; opened once, shared by all.

Opening waits for nobody but those who open the same: files are fetched and loaded outside the lanes in which language
models run, and what is too large for the page is refused by the sizes that the Hub names, before anything is fetched.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ...activations import DatasetConfig, hookpoint_widths, resolve_hookpoints
from ...activations.language_model import EMBEDDED
from ...assets import embedded_lm_path, embedded_sae_path
from ...convert.places import SAEPlace, saes_in
from ...evaluation import HeldOut
from ...evaluation.data import as_config
from ...features.showcase import TOKENS, source_of
from ...models import SAEModel
from ..limits import UNREACHABLE
from .hub import Hub, Repository
from .lanes import LANES, Keyed, Lane
from .opened import Opened
from .prunings import SELECTION
from .reader import EXCLUDED, Reader


ROOT = "(the root)"
"""What the page calls the SAE at the root of a repository."""

MOST_GIGABYTES = 4.0
"""Of an SAE and of its language model each, where strangers open them."""

_OPENING, _PATIENCE = 8, 20.0  # SAEs that are opened at once; seconds to wait until there are fewer


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
        most_gigabytes (`float`, *optional*): Of 10^9 bytes of files on the Hub that an SAE may have, and its language
            model; by default 4 where strangers visit, else any number. Language models of twice that are kept open.
    """

    def __init__(
        self,
        dataset: str | DatasetConfig | None = None,
        tokens: int = TOKENS,
        context_length: int = 128,
        model: str | None = None,
        keep: int = 4,
        revision: str | None = None,
        public: bool = False,
        shown: Sequence[str] = (),
        most_gigabytes: float | None = None,
    ) -> None:
        if tokens < 1 or context_length < 2 or keep < 1:
            raise ValueError(
                f"`tokens`, `context_length` and `keep` must be at least 1, 2 and 1; got {tokens}, {context_length} "
                f"and {keep}."
            )
        if most_gigabytes is not None and not most_gigabytes > 0:
            raise ValueError(f"`most_gigabytes` must be more than 0, got {most_gigabytes}.")
        self.dataset = DatasetConfig(dataset) if isinstance(dataset, str) else dataset
        self.tokens, self.context_length, self.model, self.keep = tokens, context_length, model, keep
        self.revision, self.public, self.shown = revision, public, frozenset(shown)
        self.most_gigabytes = (
            (MOST_GIGABYTES if public else float("inf")) if most_gigabytes is None else most_gigabytes
        )
        # A GPU that is lent by the call is not there while an SAE is opened.
        self.device = "cpu" if os.environ.get("SPACES_ZERO_GPU") or not torch.cuda.is_available() else "cuda"
        self.hub = Hub()
        self._opened: OrderedDict[tuple[str, str], Opened] = OrderedDict()
        self._readers: dict[str, Reader] = {}
        self.renew_locks()

    def renew_locks(self) -> None:
        """Take new locks, none of them held: in a process that was forked while somebody held one."""
        self.lanes = {name: Lane(name) for name in LANES}
        self._opening = Keyed()  # by source and by model
        self._opening_at_once = threading.BoundedSemaphore(_OPENING)
        # Held while transformers builds something, which is not made for threads. Files are fetched before.
        self._loading = threading.RLock()
        self._guard = threading.Lock()  # of what is open
        for opened in self._opened.values():
            opened.renew_lock()
        for reader in self._readers.values():
            reader.renew_locks(self._loading)

    def saes(self, source: str) -> dict[str, SAEPlace]:
        """The SAEs of a repository or folder, by what the page calls their places.

        Args:
            source (`str`): Repository id, folder, or `"embedded"`.

        Raises:
            `ValueError`: if it cannot be read or holds none; the message says what to do.
        """
        return self._listed((source or "").strip())[1]

    def _listed(self, source: str) -> tuple[Repository | None, dict[str, SAEPlace]]:
        """The repository, if it is one, and its SAEs."""
        if not source:
            raise ValueError(f"Name a repository on the Hub (user/name), a folder, or '{EMBEDDED}'.")
        try:
            folder = str(embedded_sae_path()) if source == EMBEDDED else self._folder(source)
            repository = None if folder else self._repository(source)
            if repository is not None and repository.folder is None:
                saes = saes_in(source, revision=repository.commit)
            else:
                saes = saes_in(folder or str(repository.folder))
        except (ValueError, *UNREACHABLE) as error:
            raise ValueError(
                f"'{source[:80]}' cannot be opened: {_first_line(error)} Check the name, or open '{EMBEDDED}'."
            ) from error
        return repository, {place or ROOT: sae for place, sae in saes.items()}

    def _folder(self, source: str, ours: bool = False) -> str | None:
        """A folder of this machine by this name, if there is one and it may be opened.

        Strangers learn nothing of others: these are not even looked for.
        """
        if self.public and not ours and source not in self.shown:
            return None
        local = _here(source)
        return None if local is None else str(local)

    def _repository(self, source: str) -> Repository:
        """What the Hub says of a repository."""
        repository = self.hub.repository(source, self.revision)
        if self.public and _here(source) is not None:  # the libraries below would open the folder
            raise ValueError("there is no such repository on the Hub, or it is private.")
        return repository

    def open(self, source: str, place: str = "") -> Opened:
        """An SAE with its language model and held-out text.

        Args:
            source (`str`): Repository id, folder, or `"embedded"`.
            place (`str`, *optional*): Which of its SAEs; the first where none is named.

        Raises:
            `ValueError`: if something is missing or does not fit together; the message says what to do.
        """
        opened = self.look(source, place)
        opened.load()
        return opened

    def look(self, source: str, place: str = "") -> Opened:
        """The same, whose language model is loaded when something runs it: what is stored can be looked at before.

        Raises:
            `ValueError`: as [`open`], but for what the language model's weights would show.
        """
        key = (source or "").strip(), place or ""
        opened = self._known(key)
        if opened is None:
            with self._opening.held(key[0]):  # another visitor may have opened it while this one waited
                opened = self._known(key) or self._open_in_turn(*key)
                self._keep(key, opened)
        return opened

    def _open_in_turn(self, source: str, place: str) -> Opened:
        if not self._opening_at_once.acquire(timeout=_PATIENCE):
            raise ValueError("Others are opening SAEs at the moment. Try again in a minute.")
        try:
            return self._open(source, place)
        finally:
            self._opening_at_once.release()

    def to(self, device: str) -> None:
        """Move all that is open to a device, and open on it from now on."""
        self.device = device
        with self._guard:
            everything = list(self._opened.values())
        for opened in everything:
            opened.to(device)

    def _known(self, key: tuple[str, str]) -> Opened | None:
        with self._guard:
            if key in self._opened:
                self._opened.move_to_end(key)
            return self._opened.get(key)

    def _keep(self, key: tuple[str, str], opened: Opened) -> None:
        with self._guard:
            self._opened[key] = self._opened[key[0], opened.place] = opened
            while self._too_many() and set(map(id, self._opened.values())) != {id(opened)}:
                self._opened.popitem(last=False)
            # A model stays as long as an SAE of it is open.
            used = {id(one.reader) for one in self._opened.values()}
            self._readers = {name: reader for name, reader in self._readers.items() if id(reader) in used}

    def _too_many(self) -> bool:
        """Whether more SAEs are open than are kept, or more of their models than fit in memory."""
        opened = {id(one): one for one in self._opened.values()}
        readers = {id(one.reader): one.reader for one in opened.values()}
        gigabytes = sum(reader.gigabytes for reader in readers.values())
        return len(opened) > self.keep or gigabytes > 2 * self.most_gigabytes

    def _open(self, source: str, place: str) -> Opened:
        repository, saes = self._listed(source)
        place = place or next(iter(saes))
        if place not in saes:
            raise ValueError(f"'{source}' holds no SAE at '{place}'. It holds: {', '.join(saes)}.")
        known = self._known((source, place))
        if known is not None:
            return known
        sae = self._sae(source, repository, saes[place])
        model, hookpoint = self.model or sae.config.base_model, sae.config.hookpoint
        if model is None or hookpoint is None:
            raise ValueError(
                f"The config of '{source}' does not say which language model and hookpoint it is of, so nothing can "
                "be measured. Convert it with `--base_model` and `--hookpoint`, or start the page with `--model`."
            )
        reader = self._reader(model, ours=self.model is not None or source in self.shown)
        if self.model is not None:
            sae.config.base_model = self.model
        revision, there = None if repository is None else repository.commit, saes[place]
        return Opened(source, place, there.source, there.subfolder, sae, reader, self, list(saes), revision)

    def _sae(self, source: str, repository: Repository | None, place: SAEPlace) -> SAEModel:
        """Load an SAE, whose files are fetched first."""
        try:
            if repository is not None:
                files = repository.files_of_sae(place.subfolder)
                self._check_size(repository, files, f"'{source}'")
                repository.fetch(files)
            with self._loading:
                return place.load()
        except (*UNREACHABLE, StrictDataclassError) as error:
            raise ValueError(f"'{source}' cannot be loaded: {_first_line(error)}") from error

    def _check_size(self, repository: Repository, files: Sequence[str], what: str) -> None:
        gigabytes = repository.bytes_of(files) / 1e9
        if gigabytes > self.most_gigabytes:
            raise ValueError(
                f"{what} has {gigabytes:.1f} GB of weights; this page opens up to {self.most_gigabytes:g} GB. Start a "
                "page of your own for it: `matryoshka-sae space`."
            )

    def _reader(self, name: str, ours: bool) -> Reader:
        """A language model, so far without its weights."""
        with self._opening.held(("model", name)):
            reader = self._readers.get(name)
            if reader is None:
                try:
                    reader = self._read(name, ours)
                except (ValueError, *UNREACHABLE) as error:
                    raise ValueError(
                        f"The language model '{name[:80]}' cannot be loaded: {_first_line(error)}"
                    ) from error
                with self._guard:
                    self._readers[name] = reader
            return reader

    def _read(self, name: str, ours: bool) -> Reader:
        folder = str(embedded_lm_path()) if name == EMBEDDED else self._folder(name, ours)
        if folder is not None:
            return Reader(name, self._loading, folder)
        repository = self.hub.repository(name)
        if not ours:
            self._check_size(repository, repository.files_of_model(), f"The language model '{name}'")
        return Reader(name, self._loading, str(repository.fetch(repository.files_of_model(weights=False))), repository)

    def measures_like(self, stored: dict[str, Any], activation: str) -> bool:
        """Whether what the page measures of an SAE is of the text, tokens and selection of its stored curve."""
        text = source_of(as_config(self.dataset), self.context_length, EXCLUDED)
        same = stored.get("source") is not None and stored["source"] == text and stored["tokens"] == self.tokens
        return same and (activation != "topk" or stored["selection"] == SELECTION)  # else the two select alike

    def heldout(self, opened: Opened) -> HeldOut:
        """Load the language model of an SAE, and the text in its tokens, at the SAE's hookpoint.

        Raises:
            `ValueError`: if that cannot be, or the SAE is of another model.
        """
        name = opened.reader.name
        try:
            data = opened.reader.text(self.dataset, self.tokens, self.context_length, self.device)
        except UNREACHABLE as error:
            raise ValueError(f"The language model '{name[:80]}' cannot be loaded: {_first_line(error)}") from error
        hookpoint, d_in = opened.sae.config.hookpoint, opened.sae.config.d_in
        (place,) = resolve_hookpoints(data.model, [hookpoint])
        width = hookpoint_widths(data.model, [place])[place]
        if width != d_in:
            raise ValueError(
                f"This SAE reads hidden states of width {d_in}, but '{hookpoint}' of '{name}' gives {width}: it is "
                "the SAE of another model. Start the page with the right `--model`."
            )
        return replace(data, hookpoint=place)


def _here(source: str) -> Path | None:
    """A file or folder of this machine by a name that may be anything."""
    try:
        local = Path(source).expanduser()
        return local if local.exists() else None
    except (RuntimeError, OSError, ValueError):  # nobody's home, or no name of a file
        return None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
