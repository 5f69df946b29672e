"""What a card knows: everything read from a run's folder, nothing made up.

Each file is optional. What is missing, damaged or of other weights than those in the folder is left out of the card.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from ..models import SAEConfig, SAEModel
from ..models.checkpoint_files import weight_files
from ..models.digests import folder_digest
from ..training import RunConfig, load_run_config
from ..training.run.provenance import read_provenance
from .layout import SAEFolder
from .measure import CURVE, EVALUATION, MEASURED_FILE, NESTED, POWER_LAW, evaluations, name_in_run, read_json
from .suite_facts import SuiteFacts, read_suite


_PLOTS = "plots"
_FAMILIES = {
    "relu": "ReLU",
    "topk": "TopK",
    "batch_topk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
}


@dataclass
class SAEFacts:
    """One SAE as its card shows it.

    Args:
        name (`str`): Name of the SAE in its run; `""` where the run has only one.
        subfolder (`str`): Folder in the repository; `""` is the root.
        config ([`SAEConfig`]): The SAE's config.
        thresholds (`tuple[float, float]`, *optional*): Smallest and largest threshold of the saved weights.
        rows (`list[dict]`): Metrics on held-out text, one row for each width.
        measured (`dict`): Facts common to all rows: `tokens`, `selection`, losses of the clean and the ablated model.
        baselines (`dict[str, dict[int, dict]]`): Metrics of `random`, `principal components` and `identity`, by width.
        curve (`dict`): Content of `progressive_curve.json`.
        power_law (`dict`): Content of `power_law.json`.
        provenance (`dict`): The SAE's entry in the run's `provenance.json`.
        suite ([`SuiteFacts`], *optional*): Results of a full evaluation.
        plots (`dict[str, Path]`): Picture files, by their path in the repository.
    """

    name: str
    subfolder: str
    config: SAEConfig
    thresholds: tuple[float, float] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    curve: dict[str, Any] = field(default_factory=dict)
    power_law: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    suite: SuiteFacts | None = None
    plots: dict[str, Path] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """Name of the SAE's family, such as `Matryoshka (BatchTopK)`."""
        kind = self.config.activation_name
        kind = _FAMILIES.get(kind, kind)
        return f"Matryoshka ({kind})" if self.is_matryoshka else kind

    @property
    def is_matryoshka(self) -> bool:
        """Whether its prefixes were trained to be SAEs of their own."""
        return self.config.model_type == "matryoshka_sae"

    @property
    def label(self) -> str:
        """Name that tells the SAE from the others of the card."""
        return self.subfolder or self.config.hookpoint or "SAE"  # a folder that is an SAE has a name of this machine

    @property
    def whole(self) -> dict[str, Any]:
        """Metrics at full width; empty where none were measured."""
        return self.rows[-1] if self.rows else {}

    @property
    def dead(self) -> int | None:
        """Number of latents that never fired on the held-out tokens."""
        share = self.whole.get("dead")
        return None if share is None else round(share * self.whole["width"])


@dataclass
class RunFacts:
    """A run as its card shows it.

    Args:
        saes (`list[SAEFacts]`): The SAEs of the repository.
        config ([`RunConfig`], *optional*): The run's fields.
        provenance (`dict`): Content of the run's `provenance.json`.
        language_model (`dict`): Class and size of the language model.
        plots (`dict[str, Path]`): Picture files of the whole run, by their path in the repository.
    """

    saes: list[SAEFacts]
    config: RunConfig | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    language_model: dict[str, Any] = field(default_factory=dict)
    plots: dict[str, Path] = field(default_factory=dict)

    @property
    def hookpoints(self) -> list[str]:
        """Hookpoints of the SAEs, each once, in the order of the SAEs."""
        return list(dict.fromkeys(sae.config.hookpoint for sae in self.saes if sae.config.hookpoint))

    @property
    def assets(self) -> dict[str, Path]:
        """Every picture file that the card shows, by its path in the repository."""
        pictures = dict(self.plots)
        for sae in self.saes:
            pictures |= sae.plots
        return pictures


def read_run(run_dir: Path, saes: Sequence[SAEFolder]) -> RunFacts:
    """Read what a run's folder knows about some of its SAEs.

    Args:
        run_dir (`Path`): The run's folder.
        saes (`Sequence[SAEFolder]`): SAEs that the card is about.

    Raises:
        `ValueError`: if the config of an SAE or `run.yaml` cannot be read.
    """
    config = load_run_config(run_dir / "run.yaml") if (run_dir / "run.yaml").is_file() else None
    provenance = read_provenance(run_dir)
    places = {_place(sae.folder, run_dir): sae for sae in saes}
    weights = {place: folder_digest(sae.folder) for place, sae in places.items()}
    compared = {result["hookpoint"]: result for result in evaluations(run_dir, weights)}
    closing = {result["hookpoint"]: result for result in read_json(run_dir / "results.json").get("results", [])}
    sae_facts = []
    for place, sae in places.items():
        facts = _read_sae(sae, weights[place])
        facts.provenance = provenance.get("saes", {}).get(place, {})
        if facts.provenance.get("weights", weights[place]) != weights[place]:
            facts.provenance = {}  # the folder now holds other weights than the run left there
        else:
            _add_results(facts, name_in_run(sae, run_dir), closing.get(sae.hookpoint), compared.get(sae.hookpoint))
        _add_suite(facts, read_suite([run_dir, sae.folder], weights[place]))
        sae_facts.append(facts)
    sae_facts.sort(key=lambda facts: not facts.is_matryoshka)
    plots = {}
    sources = [name for name, results in ((EVALUATION, compared), ("results", closing)) if results]
    for name in sources[:1]:
        if (run_dir / f"{name}.png").is_file() and any(facts.rows for facts in sae_facts):
            plots[f"{_PLOTS}/{name}.png"] = run_dir / f"{name}.png"
    model = provenance.get("language_model") or read_json(run_dir / MEASURED_FILE).get("language_model", {})
    return RunFacts(sae_facts, config, provenance, model, plots)


def facts_of(sae: SAEModel, name: str = "") -> SAEFacts:
    """Return what an SAE in memory knows about itself."""
    return SAEFacts(name, "", sae.config, _range(getattr(sae, "threshold", None)))


def _place(folder: Path, run_dir: Path) -> str:
    folder, run_dir = folder.resolve(), run_dir.resolve()
    return folder.relative_to(run_dir).as_posix() if run_dir in (folder, *folder.parents) else folder.as_posix()


def _read_sae(sae: SAEFolder, weights: str | None) -> SAEFacts:
    try:
        config = AutoConfig.from_pretrained(sae.folder)
    except OSError as error:
        raise ValueError(f"The config of the SAE in '{sae.folder}' cannot be read: {error}") from error
    facts = SAEFacts(sae.name, sae.subfolder, config, _range(_thresholds(sae.folder, config.num_latents)))
    measured = read_json(sae.folder / MEASURED_FILE)
    for name in (CURVE, NESTED, POWER_LAW):
        if measured.get(name) != weights:
            continue
        if name != NESTED:
            setattr(facts, {CURVE: "curve", POWER_LAW: "power_law"}[name], read_json(sae.folder / f"{name}.json"))
        if (sae.folder / f"{name}.png").is_file():
            facts.plots["/".join(filter(None, (_PLOTS, sae.subfolder, f"{name}.png")))] = sae.folder / f"{name}.png"
    return facts


def _thresholds(folder: Path, num_latents: int) -> torch.Tensor | None:
    parts = []
    try:
        files = weight_files(folder, num_latents)
    except OSError:  # no weights
        return None
    for part in files:
        with safe_open(part.path, framework="pt") as file:
            if "threshold" in file.keys():  # noqa: SIM118 (a safe_open file has no `in`)
                parts.append(file.get_tensor("threshold"))
    return torch.cat(parts) if parts else None


def _range(thresholds: torch.Tensor | None) -> tuple[float, float] | None:
    return None if thresholds is None else (thresholds.min().item(), thresholds.max().item())


def _add_results(
    facts: SAEFacts, name: str, closing: Mapping[str, Any] | None, compared: Mapping[str, Any] | None
) -> None:
    """Add the rows of the evaluation with baselines, or else of the run's own report."""
    for result in (compared, closing):
        if result is None or name not in result["saes"]:
            continue
        facts.rows = result["saes"][name]
        # The closing report's few baselines are on fewer tokens, and stay in its own table.
        facts.measured = {key: value for key, value in result.items() if key not in ("saes", "baselines", "weights")}
        others = {"random": f"random ({name})", "principal components": "principal components", "identity": "identity"}
        for title, key in others.items():
            if key in result["saes"]:
                facts.baselines[title] = {row["width"]: row for row in result["saes"][key]}
        return


def _add_suite(facts: SAEFacts, suite: SuiteFacts | None) -> None:
    """Add the full evaluation, and its reconstruction metrics where nothing else measured them."""
    if suite is None:
        return
    facts.suite = suite
    for name, path in suite.plots().items():
        facts.plots["/".join(filter(None, (_PLOTS, facts.subfolder, f"suite-{name}.png")))] = path
    if not facts.rows and suite.fidelity is not None:
        facts.rows = suite.fidelity["rows"][suite.name]
        facts.measured = {**suite.fidelity["facts"], "dataset": suite.place["dataset"]}
        facts.baselines = suite.baselines()
