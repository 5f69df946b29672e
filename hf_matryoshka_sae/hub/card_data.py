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
from .measure import CURVE, EVALUATION, MEASURED_FILE, POWER_LAW, evaluations, name_in_run, read_json
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
        name (`str`): In its run; `""` where there is but one.
        subfolder (`str`): Its place in the repository; `""` is the root.
        config ([`SAEConfig`]): Its config.
        thresholds (`tuple[float, float]`, *optional*): Smallest and largest, of the saved weights.
        rows (`list[dict]`): Metrics at each width on held-out text.
        measured (`dict`): What goes for all rows: `tokens`, `selection` and the losses of clean and ablated model.
        baselines (`dict[str, dict[int, dict]]`): By name (`random`, `principal components`, `identity`) and width.
        curve (`dict`), power_law (`dict`): The files of these names.
        made (`dict`): What the run's `provenance.json` says of it.
        suite ([`SuiteFacts`], *optional*): What a full evaluation found.
        plots (`dict[str, Path]`): Pictures by their place in the repository.
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
    made: dict[str, Any] = field(default_factory=dict)
    suite: SuiteFacts | None = None
    plots: dict[str, Path] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """Name of the family."""
        kind = self.config.activation_name
        kind = _FAMILIES.get(kind, kind)
        return f"Matryoshka ({kind})" if self.is_matryoshka else kind

    @property
    def is_matryoshka(self) -> bool:
        """Whether its prefixes were trained to be SAEs of their own."""
        return self.config.model_type == "matryoshka_sae"

    @property
    def label(self) -> str:
        """What to call it among the others."""
        return self.subfolder or self.config.hookpoint or "SAE"  # a folder that is an SAE has a name of this machine

    @property
    def whole(self) -> dict[str, Any]:
        """The metrics of the full width; empty where none were measured."""
        return self.rows[-1] if self.rows else {}

    @property
    def dead(self) -> int | None:
        """Latents that never fired on the held-out tokens."""
        share = self.whole.get("dead")
        return None if share is None else round(share * self.whole["width"])


@dataclass
class RunFacts:
    """A run as its card shows it.

    Args:
        saes (`list[SAEFacts]`): The SAEs of the repository.
        config ([`RunConfig`], *optional*): The run's fields.
        provenance (`dict`): Its `provenance.json`.
        language_model (`dict`): Class and size of the language model.
        plots (`dict[str, Path]`): Pictures of the run by their place in the repository.
    """

    saes: list[SAEFacts]
    config: RunConfig | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    language_model: dict[str, Any] = field(default_factory=dict)
    plots: dict[str, Path] = field(default_factory=dict)

    @property
    def hookpoints(self) -> list[str]:
        """Where the SAEs read, in order."""
        return list(dict.fromkeys(sae.config.hookpoint for sae in self.saes if sae.config.hookpoint))

    @property
    def assets(self) -> dict[str, Path]:
        """Every picture that the card shows, by its place in the repository."""
        found = dict(self.plots)
        for sae in self.saes:
            found |= sae.plots
        return found


def read_run(run_dir: Path, saes: Sequence[SAEFolder]) -> RunFacts:
    """Read what a run's folder knows about some of its SAEs.

    Raises:
        `ValueError`: if an SAE has no config that can be read, or `run.yaml` is none.
    """
    config = load_run_config(run_dir / "run.yaml") if (run_dir / "run.yaml").is_file() else None
    provenance = read_provenance(run_dir)
    places = {_place(sae.folder, run_dir): sae for sae in saes}
    weights = {place: folder_digest(sae.folder) for place, sae in places.items()}
    compared = {result["hookpoint"]: result for result in evaluations(run_dir, weights)}
    closing = {result["hookpoint"]: result for result in read_json(run_dir / "results.json").get("results", [])}
    found = []
    for place, sae in places.items():
        facts = _read_sae(sae, weights[place])
        facts.made = provenance.get("saes", {}).get(place, {})
        if facts.made.get("weights", weights[place]) != weights[place]:
            facts.made = {}  # the folder now holds other weights than the run left there
        else:
            _add_results(facts, name_in_run(sae, run_dir), closing.get(sae.hookpoint), compared.get(sae.hookpoint))
        _add_suite(facts, read_suite([run_dir, sae.folder], weights[place]))
        found.append(facts)
    found.sort(key=lambda facts: not facts.is_matryoshka)
    plots = {}
    shown = [name for name, results in ((EVALUATION, compared), ("results", closing)) if results]
    for name in shown[:1]:
        if (run_dir / f"{name}.png").is_file() and any(facts.rows for facts in found):
            plots[f"{_PLOTS}/{name}.png"] = run_dir / f"{name}.png"
    model = provenance.get("language_model") or read_json(run_dir / MEASURED_FILE).get("language_model", {})
    return RunFacts(found, config, provenance, model, plots)


def facts_of(sae: SAEModel, name: str = "") -> SAEFacts:
    """What an SAE in memory knows about itself."""
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
    for name in (CURVE, POWER_LAW):
        if measured.get(name) != weights:
            continue
        setattr(facts, {CURVE: "curve", POWER_LAW: "power_law"}[name], read_json(sae.folder / f"{name}.json"))
        if (sae.folder / f"{name}.png").is_file():
            facts.plots["/".join(filter(None, (_PLOTS, sae.subfolder, f"{name}.png")))] = sae.folder / f"{name}.png"
    return facts


def _thresholds(folder: Path, num_latents: int) -> torch.Tensor | None:
    found = []
    try:
        files = weight_files(folder, num_latents)
    except OSError:  # no weights
        return None
    for part in files:
        with safe_open(part.path, framework="pt") as file:
            if "threshold" in file.keys():
                found.append(file.get_tensor("threshold"))
    return torch.cat(found) if found else None


def _range(thresholds: torch.Tensor | None) -> tuple[float, float] | None:
    return None if thresholds is None else (thresholds.min().item(), thresholds.max().item())


def _add_results(
    facts: SAEFacts, name: str, closing: Mapping[str, Any] | None, compared: Mapping[str, Any] | None
) -> None:
    """The rows of the run's own report, or of the evaluation with baselines where there is one."""
    for result in (compared, closing):
        if result is None or name not in result["saes"]:
            continue
        facts.rows = result["saes"][name]
        facts.measured = {key: value for key, value in result.items() if key not in ("saes", "weights")}
        others = {"random": f"random ({name})", "principal components": "principal components", "identity": "identity"}
        for title, key in others.items():
            if key in result["saes"]:
                facts.baselines[title] = {row["width"]: row for row in result["saes"][key]}
        return


def _add_suite(facts: SAEFacts, suite: SuiteFacts | None) -> None:
    """The full evaluation; its reconstruction where there is no other."""
    if suite is None:
        return
    facts.suite = suite
    for name, path in suite.plots().items():
        facts.plots["/".join(filter(None, (_PLOTS, facts.subfolder, f"suite-{name}.png")))] = path
    if not facts.rows and suite.fidelity is not None:
        facts.rows = suite.fidelity["rows"][suite.name]
        facts.measured = {**suite.fidelity["facts"], "dataset": suite.place["dataset"]}
        facts.baselines = suite.baselines()
