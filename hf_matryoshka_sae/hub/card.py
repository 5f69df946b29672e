"""The model card of a repository of SAEs, filled by the run that trained them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open

from ..activations.language_model import EMBEDDED
from ..models import SAEModel
from ..models.checkpoint_files import weight_files
from ..models.pieces import WHOLE_TENSORS
from . import card_text
from .card_data import RunFacts, SAEFacts, facts_of, read_run
from .card_snippets import snippets, with_package, without_package
from .citations import citations
from .layout import SAEFolder, find_saes
from .measure import run_folder
from .public import public_command


__all__ = ["TEMPLATE", "card_assets", "run_card", "sae_card", "snippets"]

TEMPLATE = Path(__file__).with_name("card_template.md")

_OPEN = 2  # SAEs whose tables and plots are not folded away
_INDEXED = (
    ("fvu", "fvu", "FVU"),
    ("l0", "l0", "L0"),
    ("recaptured_zero", "recaptured_loss", "recaptured loss (zero ablation)"),
    ("rsa", "rsa", "RSA (Spearman)"),
)


def run_card(
    run_dir: str | Path,
    repo_id: str,
    saes: Sequence[SAEFolder] | None = None,
    license: str = "apache-2.0",
    notes: str = "",
) -> ModelCard:
    """Write the model card of a run's SAEs from the files in the run's folder.

    Nothing is measured here: call [`measure_run`] first for plots and baselines.

    Args:
        run_dir (`str` or `Path`): Folder of the run, or of one of its SAEs.
        repo_id (`str`): Repository id, as the code in the card names it.
        saes (`Sequence[SAEFolder]`, *optional*): SAEs in the repository; by default all of the run.
        license (`str`, *optional*, defaults to `"apache-2.0"`): Licence of the weights.
        notes (`str`, *optional*): Markdown that stands before the results.

    Returns:
        `ModelCard`: The card, with its metadata.

    Raises:
        `ValueError`: if there is no SAE, or its config or the run's YAML cannot be read.
    """
    return _render(_read(run_dir, saes), repo_id, license, notes)


def card_assets(run_dir: str | Path, saes: Sequence[SAEFolder] | None = None) -> dict[str, Path]:
    """Return the pictures that [`run_card`] shows: the path of each file by its path in the repository.

    Args:
        run_dir (`str` or `Path`): Folder of the run, or of one of its SAEs.
        saes (`Sequence[SAEFolder]`, *optional*): SAEs in the repository; by default all of the run.
    """
    return _read(run_dir, saes).assets


def _read(run_dir: str | Path, saes: Sequence[SAEFolder] | None) -> RunFacts:
    folder = Path(run_dir).expanduser()
    return read_run(run_folder(folder) or folder, find_saes(folder) if saes is None else saes)


def sae_card(
    sae: SAEModel, repo_id: str, folder: str | Path | None = None, license: str | None = None, notes: str = ""
) -> ModelCard:
    """Write the model card of a single SAE that is the whole repository.

    Args:
        sae ([`SAEModel`]): The SAE that is pushed.
        repo_id (`str`): Repository id, as the code in the card names it.
        folder (`str` or `Path`, *optional*): Folder the SAE was loaded from. If it lies in a run's folder and still
            holds the same weights, the card shows what the run knows, without pictures: those are pushed with runs.
        license (`str`, *optional*): Licence of the weights; by default "apache-2.0" for an SAE of a run, else left
            open, because the weights may belong to others.
        notes (`str`, *optional*): Markdown that stands before the results.
    """
    folder = None if folder is None else Path(folder).expanduser()
    if folder is None or not (folder / "config.json").is_file() or not _same(sae, folder):
        return _render(RunFacts([facts_of(sae)]), repo_id, license, notes)
    run = _read(folder, None)
    run.plots = {}
    for facts in run.saes:
        facts.plots = {}
    return _render(run, repo_id, license or "apache-2.0", notes)


def _same(sae: SAEModel, folder: Path) -> bool:
    """Return whether the folder holds this SAE's weights: it may have been pruned, sorted or trained on since."""
    state, compared = sae.state_dict(), set()
    try:
        for part in weight_files(folder, sae.config.num_latents):
            with safe_open(part.path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safe_open file cannot be iterated)
                    if name not in state:
                        return False
                    mine = state[name] if name in WHOLE_TENSORS else state[name][part.start : part.stop]
                    there = file.get_tensor(name)
                    if mine.shape != there.shape or not bool((mine.cpu() == there.to(mine.dtype)).all()):
                        return False
                    compared.add(name)
    except (OSError, ValueError, SafetensorError):
        return False
    return compared == state.keys()


# Rendering


def _render(run: RunFacts, repo_id: str, license: str | None, notes: str) -> ModelCard:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    data = _metadata(run, repo_id, license)
    text = template.render(card_data=data.to_yaml(), **_variables(run, repo_id, license, notes))
    return ModelCard(_tidy(text))


def _tidy(text: str) -> str:
    """Leave one blank line between paragraphs, but code blocks, which may hold two, as they are."""
    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    tidy = (part if part.startswith("```") else re.sub(r"\n{3,}", "\n\n", part) for part in parts)
    return "".join(tidy).rstrip() + "\n"


def _variables(run: RunFacts, repo_id: str, license: str | None, notes: str) -> dict[str, Any]:
    main_sae = _main(run)
    progressive = any(sae.curve or sae.power_law for sae in run.saes)
    return {
        "run": run,
        "saes": run.saes,
        "open": _OPEN,
        "text": card_text,
        "title": repo_id.rsplit("/", 1)[-1],
        "repo_id": repo_id,
        "license": license,
        "notes": notes.strip(),
        "language_model": card_text.language_model(run)[1],
        "texts": {name: words for name, (_, words) in card_text.texts(run).items()},
        "with_package": with_package(run, main_sae, repo_id),
        "without_package": without_package(run, main_sae, repo_id),
        "compute": compute(run),
        "yaml": card_text.run_yaml(run),
        "citations": citations([sae.config for sae in run.saes], progressive),
    }


def _main(run: RunFacts) -> SAEFacts:
    """Return the SAE that the card's code loads: the first Matryoshka SAE, or the first."""
    return next((sae for sae in run.saes if len(sae.config.widths) > 1), run.saes[0])


def compute(run: RunFacts) -> dict[str, Any]:
    """Return hardware, versions and commands of a run, and its time where that is on record from the first step."""
    sessions = run.provenance.get("sessions", [])
    if not sessions:
        return {}
    whole = sessions[0]["from_step"] == 0
    commands, places = [each["command"] for each in sessions if each["command"]], card_text.places(run)
    return {
        "commands": list(dict.fromkeys(public_command(each, places) for each in commands)),
        "sessions": len(sessions),
        "seconds": sum(each["seconds"] for each in sessions) if whole else None,
        "hardware": sessions[-1]["hardware"],
        "versions": sessions[-1]["versions"],
    }


def _metadata(run: RunFacts, repo_id: str, license: str | None) -> ModelCardData:
    model, _ = card_text.language_model(run)
    texts = card_text.texts(run)
    datasets = list(dict.fromkeys(id for id, _ in texts.values() if id))
    results = _eval_results(run, texts)
    nested = any(sae.is_matryoshka for sae in run.saes)
    tags = ["hf_matryoshka_sae", "sparse-autoencoder", *["matryoshka"] * nested, "mechanistic-interpretability"]
    return ModelCardData(
        library_name="transformers",
        license=license,
        base_model=model,
        datasets=datasets or None,
        tags=tags,
        model_name=repo_id.rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )


def _eval_results(run: RunFacts, texts: dict[str, tuple[str | None, str]]) -> list[EvalResult]:
    """List the results at every prefix width, grouped by hookpoint: its name is the `dataset_config`."""
    data = None if run.config is None else run.config.eval_dataset or run.config.dataset
    id = texts.get("heldout", (None, ""))[0]
    name = id or (EMBEDDED if data is not None and data.path == EMBEDDED else "text")
    results = []
    for sae in run.saes:
        which = f"{sae.name}, " if len(run.saes) > len(run.hookpoints) else ""
        for row in sae.rows:
            for key, kind, title in _INDEXED:
                value = row.get(key)
                value = value.get("spearman") if isinstance(value, dict) else value
                if value is None or value != value:
                    continue
                results.append(
                    EvalResult(
                        task_type="other",  # no pipeline of transformers does it
                        task_name="Reconstruction of hidden states",
                        dataset_type=name,
                        dataset_name=f"{name} (held out)",
                        dataset_config=sae.config.hookpoint,
                        metric_type=kind,
                        metric_name=f"{title} ({which}width {row['width']})",
                        metric_value=round(value, 6),
                    )
                )
    return results
