"""`Steering`: changes of latents as an artefact that is saved, pushed, loaded and applied to a language model."""

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..assets import embedded_lm_path
from ..common.data_source import EMBEDDED
from ..common.files import staged, write_json, write_text
from ..convert.places import check_repository_id, only_sae, saes_in
from ..hub.public import hub_id
from ..models import SAEModel
from .applying import applied, check_width
from .card import card_of, picture_of
from .change import Change
from .parts import Part, digest_of, part_of
from .passes import unwrapped


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from peft import PeftModel

    from ..evaluation.data import HeldOut


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CONFIG, VECTORS = "steering.json", "vectors.safetensors"


@dataclass(frozen=True)
class Steering:
    """Latents that change what a language model does, and by how much.

    Args:
        parts (`tuple[Part, ...]`): The change at each hookpoint and of each SAE.
        dose (`dict`, *optional*): What [`dose_report`] found, JSON-able.

    Example:
    ```python
    steering = Steering.from_latents(sae, {1203: 4.0})
    with steering.applied(model):
        model.generate(**inputs)
    ```
    """

    parts: tuple[Part, ...]
    dose: dict[str, Any] | None = None

    @classmethod
    def from_latents(
        cls,
        sae: SAEModel | str | Path,
        values: Mapping[int, float] | Iterable[int],
        mode: str = "add",
        sae_name: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        dose: str | None = None,
        data: "HeldOut | None" = None,
        max_cost: float = 0.1,
        **options: Any,
    ) -> "Steering":
        """Make the steering of some latents of one SAE. Add others', or other hookpoints', with `+`.

        Args:
            sae ([`SAEModel`], `str` or `Path`): The SAE; or its Hub id or folder, which is then its name.
            values (`dict[int, float]`): Value of each latent, in units of its activation (what `encode` gives). For
                `"remove"` and `"erase"` the latents suffice.
            mode (`str`, *optional*, defaults to `"add"`): `"add"`, `"clamp"`, `"remove"` or `"erase"`, see [`Change`].
            sae_name (`str`, *optional*): Hub id or folder of the SAE; by default that which it was loaded from.
            revision (`str`, *optional*): Commit, tag or branch of that repository.
            subfolder (`str`, *optional*): Folder of the SAE in there.
            dose (`str`, *optional*): `"auto"` multiplies all values by the largest factor that costs at most
                `max_cost` on `data`, see [`auto_dose`].
            data ([`HeldOut`], *optional*): Language model and text for `dose="auto"`.
            max_cost (`float`, *optional*, defaults to 0.1): Largest rise of the cross-entropy on `data`, in nats.
            **options: Options of [`Change`]: `hookpoint`, `width`, `positions`, `from_position`, `condition`.

        Raises:
            `ValueError`: if there is no such latent, a value is not finite, or an option means nothing here.
        """
        change = Change(mode, **options)
        if not isinstance(sae, SAEModel):
            sae_name = sae_name or str(sae)
            place = only_sae(saes_in(sae, subfolder, revision=revision))
            subfolder, sae = place.subfolder, place.load()
        part = part_of(
            sae,
            values,
            change,
            sae_name=sae_name or sae.config.name_or_path or None,
            subfolder=subfolder or "",
            revision=revision or getattr(sae.config, "_commit_hash", None),
        )
        steering = cls((part,))
        if dose is None:
            return steering
        if dose != "auto" or data is None:
            raise ValueError(f"`dose` may be 'auto', and then needs `data`, got {dose!r} and data {data!r:.40}.")
        from .measuring import auto_dose

        return steering.scaled(auto_dose(steering, data, max_cost))

    def __add__(self, other: "Steering") -> "Steering":
        return Steering(self.parts + other.parts)

    def scaled(self, factor: float) -> "Steering":
        """Return the steering with all values times `factor`, and without the dose report of the old ones."""
        return Steering(tuple(part.scaled(factor) for part in self.parts))

    def with_sae(self, *saes: SAEModel) -> "Steering":
        """Return the steering with SAEs at hand, for parts that encode; they may be sorted or pruned.

        Raises:
            `ValueError`: if a latent is in none of them, or has other weights.
        """
        return replace(self, parts=tuple(_with_sae(part, saes) if part.needs_sae else part for part in self.parts))

    # In place

    @contextmanager
    def applied(self, model: nn.Module, strict: bool = False, quiet: bool = False) -> Iterator[None]:
        """Steer every forward pass and `generate` of a model in this thread while the block runs.

        Args:
            model (`nn.Module`): A transformers model.
            strict (`bool`, *optional*, defaults to `False`): Whether another base model than the named one is an
                error, not a warning.
            quiet (`bool`, *optional*, defaults to `False`): Whether to say nothing of a change that is too large.

        Raises:
            `ValueError`: if the model has no such hookpoint or hidden states of another width there, or a part needs
                its SAE and that cannot be loaded.
        """
        self.check(model, strict)
        with applied(model, self.ready().parts, quiet):
            yield

    def check(self, model: nn.Module, strict: bool = False) -> None:
        """Raise `ValueError` if the steering does not fit a model; arguments are those of [`applied`]."""
        inner = unwrapped(model)[-1]
        for part in self.parts:
            check_width(inner, part)
            made_for, name = part.base_model, getattr(inner, "name_or_path", "")
            path = str(embedded_lm_path()) if made_for == EMBEDDED else made_for or ""
            if path and name and Path(path).name != Path(name).name:  # a repository may lie in a folder of its name
                message = f"The SAE of latents {list(part.latents)} was made for {made_for}, and this model is {name}."
                if strict:
                    raise ValueError(f"{message} Load the other one, or pass `strict=False`.")
                logger.warning("%s Its latents may mean something else there.", message)

    def ready(self, encoding: bool = False) -> "Steering":
        """Return the steering with its SAEs loaded from where they are named.

        Args:
            encoding (`bool`, *optional*, defaults to `False`): Load also those of additions, which can do without;
                where they are not named, they are left away.

        Raises:
            `ValueError`: if an SAE is needed and not named, or has other weights there.
        """
        loaded = (_loaded(part) if part.needs_sae or (encoding and part.sae_name) else part for part in self.parts)
        return replace(self, parts=tuple(loaded))

    # For other tools

    def to_peft(self, model: nn.Module, adapter_name: str = "default") -> "PeftModel":
        """Make an adapter of the steering; see [`adapters.to_peft`]."""
        from .adapters import to_peft

        return to_peft(self, model, adapter_name)

    def export(self, folder: str | Path, format: str, model: nn.Module | None = None) -> Path:
        """Write the steering for another tool; see [`exporting.export`]."""
        from .exporting import export

        return export(self, Path(folder), format, model)

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `steering.json`, `vectors.safetensors`, a card, and a plot where there is a dose report."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with staged(folder / VECTORS) as path:
            save_file({f"{n}.vectors": part.vectors.contiguous() for n, part in enumerate(self.parts)}, path)
        parts = [part.facts() for part in self.parts]
        write_json(folder / CONFIG, {"format_version": FORMAT_VERSION, "parts": parts, "dose": self.dose})
        picture_of(self, folder)
        write_text(folder / "README.md", card_of(self))

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Push a steering",
    ) -> "CommitInfo":
        """Push the steering's files to a repository, in one commit.

        Args:
            repo_id (`str`): Repository id; created if it does not exist.
            private (`bool`, *optional*): Whether a repository that is created here is private.
            token (`str` or `bool`, *optional*): Token of the Hub; by default the one huggingface_hub knows.
            revision (`str`, *optional*): Branch.
            commit_message (`str`, *optional*): Message of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="hf_matryoshka_sae")
        with tempfile.TemporaryDirectory() as folder:
            parts = (replace(p, sae_name=hub_id(p.sae_name), base_model=hub_id(p.base_model)) for p in self.parts)
            replace(self, parts=tuple(parts)).save_pretrained(folder)  # paths of this machine are nobody's business
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )

    @classmethod
    def from_pretrained(
        cls, repo_or_dir: str | Path, revision: str | None = None, token: str | bool | None = None
    ) -> "Steering":
        """Load a steering; SAEs that it needs are loaded when it is applied.

        Args:
            repo_or_dir (`str` or `Path`): Folder, or repository id.
            revision (`str`, *optional*): Branch, tag or commit.
            token (`str` or `bool`, *optional*): Token of the Hub.

        Raises:
            `ValueError`: if there is no such folder or steering, or a file is damaged or of a newer format.
            `OSError`: if the files cannot be fetched.
        """
        folder = Path(repo_or_dir).expanduser()
        if folder.is_dir():
            config, vectors = folder / CONFIG, folder / VECTORS
            if not config.is_file():
                raise ValueError(f"{repo_or_dir} holds no steering: there is no {CONFIG} in it.")
        else:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import LocalEntryNotFoundError

            check_repository_id(str(repo_or_dir))
            try:
                config, vectors = (
                    Path(hf_hub_download(str(repo_or_dir), name, revision=revision, token=token))
                    for name in (CONFIG, VECTORS)
                )
            except LocalEntryNotFoundError as error:
                raise OSError(f"There is no folder '{repo_or_dir}' here, and the Hub cannot be reached.") from error
        try:
            data = json.loads(config.read_text(encoding="utf-8"))
            if data["format_version"] > FORMAT_VERSION:
                raise ValueError(f"it is of format {data['format_version']}: update hf_matryoshka_sae")
            tensors = load_file(vectors)
            parts = tuple(_part(facts, tensors[f"{n}.vectors"]) for n, facts in enumerate(data["parts"]))
            return cls(parts, data.get("dose"))
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"The steering in {repo_or_dir} cannot be read: {error!r}. Save it again.") from error


@contextmanager
def steered(
    model: nn.Module, sae: SAEModel, values: Mapping[int, float] | Iterable[int], mode: str = "add", **options: Any
) -> Iterator[None]:
    """Steer every forward pass and `generate` of a model in this thread while the block runs.

    Differences of nested blocks add up. The SAE's error stays in the hidden states. Nothing is left behind, whatever
    ends the block.

    Args:
        model (`nn.Module`): A transformers model of any architecture, in any type, on any devices.
        sae ([`SAEModel`]): The SAE.
        values (`dict[int, float]`): Value of each latent, in units of its activation; for `"remove"` and `"erase"` the
            latents suffice.
        mode (`str`, *optional*, defaults to `"add"`): `"add"`, `"clamp"`, `"remove"` or `"erase"`, see [`Change`].
        **options: Options of [`Change`]: `hookpoint`, `width`, `positions`, `from_position`, `condition`.

    Raises:
        `ValueError`: if there is no such latent, a value is not finite, or the SAE does not fit the model.

    Example:
    ```python
    with steered(model, sae, {1203: 4.0, 7: -2.0}):
        model.generate(**inputs, num_beams=4)
    ```
    """
    with applied(model, [part_of(sae, values, Change(mode, **options))]):
        yield


def _part(facts: dict[str, Any], vectors: Any) -> Part:
    names = {each.name for each in fields(Part)} - {"vectors", "sae"}
    listed = {name: tuple(facts[name]) for name in ("latents", "latent_ids", "values")}
    return Part(**{name: facts[name] for name in names & set(facts)} | listed, vectors=vectors)


def _loaded(part: Part) -> Part:
    if part.sae is not None:
        return part
    if part.sae_name is None:
        raise ValueError(
            f"Mode {part.mode!r} encodes with an SAE, and the steering does not say which: pass it to `with_sae`."
        )
    sae = only_sae(saes_in(part.sae_name, part.subfolder, revision=part.revision)).load()
    return _with_sae(part, [sae])


def _with_sae(part: Part, saes: Iterable[SAEModel]) -> Part:
    """Return a part with the SAE that has its latents, found by their ids, at its width."""
    for sae in saes:
        sae = sae if part.width is None or part.width >= sae.config.num_latents else sae.truncate(part.width)
        places = {latent: place for place, latent in enumerate(sae.latent_ids.tolist())}
        if not set(part.latent_ids) <= set(places):
            continue
        latents = [places[latent] for latent in part.latent_ids]
        if digest_of(sae, latents) == part.digest:
            return replace(part, sae=sae, latents=tuple(latents))
    raise ValueError(
        f"No SAE here has the latents {list(part.latent_ids)} with the weights the steering was made of (digest "
        f"{part.digest[:12]}). It was made with {part.sae_name or 'an unnamed SAE'}"
        f"{'' if part.revision is None else f' at {part.revision}'}."
    )
