"""Parts of a card that are put together from facts: tables, names with their links, the run's YAML."""

import math
import re
from collections.abc import Sequence
from typing import Any

import yaml

from ..activations import DatasetConfig
from ..activations.language_model import EMBEDDED
from ..training import RunConfig, SAESpec
from ..training.run.provenance import without_secrets
from .card_data import RunFacts, SAEFacts
from .public import LOCAL_DATA, hub_id, public_fields, stand_ins


HUB = "https://huggingface.co"

_METRICS = (
    ("Width", "width", ",d"),
    ("L0", "l0", ".2f"),
    ("FVU", "fvu", ".4f"),
    ("Loss", "ce", ".4f"),
    ("Recaptured", "recaptured_zero", ".4f"),
    ("(mean)", "recaptured_mean", ".4f"),
    ("KL", "kl", ".4f"),
    ("RSA", "rsa", ".4f"),
    ("Dead", "dead", ".2%"),
)
_BASELINES = (("random", "random"), ("principal components", "PCA"))


# Words


def code(text: Any) -> str:
    """Text as inline code that survives in a table."""
    text = re.sub(r"\s+", " ", str(text)).replace("`", "'")
    return f"`{text}`".replace("|", "\\|")


def number(value: Any, form: str) -> str:
    """A number, or a dash where there is none."""
    value = value.get("spearman") if isinstance(value, dict) else value
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = ()) -> str:
    """A Markdown table; columns in which every row has a dash are left out.

    Args:
        titles (`Sequence[str]`), rows (`Sequence[Sequence[str]]`): Its cells.
        words (`Sequence[str]`, *optional*): Columns that hold no numbers, beside the first.
    """
    kept = [i for i in range(len(titles)) if any(row[i] != "–" for row in rows)]
    lines = [[titles[i] for i in kept], ["---:" if i and titles[i] not in words else "---" for i in kept]]
    lines += [[row[i] for i in kept] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def joined(parts: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    return " ".join(filter(None, [", ".join(parts[:-1]), last if len(parts) > 1 else "", *parts[-1:]]))


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


# The language model and the text


def language_model(run: RunFacts) -> tuple[str | None, str]:
    """The language model's Hub id, and the language model in words."""
    name = base_model(run)
    if name is None:
        return None, "a language model that the SAE does not name"
    if name == EMBEDDED:
        return None, "the small language model that ships with `hf_matryoshka_sae`"
    if hub_id(name, _here(run, "model")):
        return name, f"[{name}]({HUB}/{name})"
    return None, f"a language model that is not on the Hub{_size(run)}"


def language_model_details(run: RunFacts) -> str:
    """The language model with its revision and size."""
    id, words = language_model(run)
    revision = run.config.model_revision if run.config else None
    words += f", revision {code(revision)}" if revision else ""
    return words + (_size(run) if id or base_model(run) == EMBEDDED else "")


def _size(run: RunFacts) -> str:
    """Class and size of the language model in brackets; empty where they are unknown."""
    found = run.language_model
    if not found:
        return ""
    parts = [code(found["class"])]
    parts += [f"{found['layers']} layers"] if found.get("layers") else []
    parts += [f"hidden size {found['hidden_size']:,}"] if found.get("hidden_size") else []
    return f" ({', '.join(parts)}, {found['parameters']:,} parameters)"


def base_model(run: RunFacts) -> str | None:
    """As the run's YAML or the SAE's config names it."""
    return run.config.model if run.config else run.saes[0].config.base_model


def dataset(data: DatasetConfig, here: bool | None = None) -> tuple[str | None, str]:
    """A data set's Hub id, and the data set in words."""
    path = data.path
    if path == EMBEDDED:
        return None, f"the documentation that every Python carries, {code(EMBEDDED)}, split {code(data.split)}"
    if not hub_id(path, here):
        return None, f"{LOCAL_DATA}, column {code(data.column)}"
    name = f", configuration {code(data.name)}" if data.name else ""
    link = f"[{path}]({HUB}/datasets/{path})"
    return path, f"{link}{name}, split {code(data.split)}, column {code(data.column)}"


def text_words(path: str) -> str:
    """Held-out text that an evaluation names."""
    here = None if "/" in path else True  # a folder's own name looks like the id of a data set that nobody owns
    return dataset(DatasetConfig(path, split="heldout" if path == EMBEDDED else "train"), here)[1]


def texts(run: RunFacts) -> dict[str, tuple[str | None, str]]:
    """The text of the training (`train`) and of the evaluation (`heldout`): Hub ids and words."""
    if run.config is None or run.config.dataset is None:  # trained on hidden states that were handed to it
        return {}
    config = run.config
    train = dataset(config.dataset, _here(run, "dataset"))
    if config.eval_dataset is not None:
        return {"train": train, "heldout": dataset(config.eval_dataset, _here(run, "eval_dataset"))}
    if config.dataset.path == EMBEDDED:
        return {"train": train, "heldout": dataset(DatasetConfig(EMBEDDED, split="heldout"))}
    share = f"{config.eval_fraction:.1%} of the same documents, left out of training"
    return {"train": train, "heldout": (train[0], share)}


def places(run: RunFacts) -> dict[str, str]:
    """Places of this machine in the run's fields, and the words for them."""
    return {} if run.config is None else stand_ins(run.config, run.provenance.get("on_this_machine"))


def _here(run: RunFacts, name: str) -> bool | None:
    return name in run.provenance["on_this_machine"] if "on_this_machine" in run.provenance else None


# Tables


def overview(run: RunFacts) -> str:
    """A line for each SAE of the repository."""
    words = ("Hookpoint", "Family", "Widths")
    rows = []
    for sae in run.saes:
        row, config = sae.whole, sae.config
        link = f"[{code(sae.label)}]({sae.subfolder + '/' if sae.subfolder else ''}config.json)"
        told = not config.hookpoint or sae.label.endswith(config.hookpoint.replace(":", "-"))
        widths = ", ".join(f"{width:,}" for width in config.widths)
        measured = [number(row.get(key), form) for key, form in (("l0", ".2f"), ("fvu", ".4f"))]
        measured += [number(row.get("recaptured_zero"), ".4f"), "–" if sae.dead is None else f"{sae.dead:,}"]
        rows.append([link, "–" if told else code(config.hookpoint), sae.family, widths, *measured])
    return table(["SAE", *words, "L0", "FVU", "Recaptured", "Dead"], rows, words)


def metrics(sae: SAEFacts) -> str:
    """Every metric at every width."""
    rows = [[number(row.get(key), form) for _, key, form in _METRICS] for row in sae.rows]
    return table([title for title, _, _ in _METRICS], rows)


def baselines(sae: SAEFacts) -> str:
    """FVU and recaptured loss at every width beside the baselines'; empty where none were measured."""
    found = [(key, title) for key, title in _BASELINES if key in sae.baselines]
    if not found:
        return ""
    titles, rows = ["Width"], [[f"{row['width']:,}"] for row in sae.rows]
    for metric, name in (("fvu", "FVU"), ("recaptured_zero", "Recaptured")):
        titles += [name, *(f"{name}, {title}" for _, title in found)]
        for cells, row in zip(rows, sae.rows, strict=True):
            others = [sae.baselines[key].get(row["width"], {}) for key, _ in found]
            cells += [number(each.get(metric), ".4f") for each in (row, *others)]
    return table(titles, rows)


def interpretability(sae: SAEFacts) -> str:
    """Every metric of a full evaluation beside its baselines; empty where none was made."""
    if sae.suite is None or not sae.suite.sections:
        return ""
    titles, rows = sae.suite.rows()
    cells = [[title, label.replace("**", ""), *(cell or "–" for cell in values)] for title, label, *values in rows]
    return table(titles, cells, ("Of",))


def power_laws(sae: SAEFacts) -> str:
    """A line for each importance that was fitted; empty where none was."""
    rows = []
    for name, fit in sae.power_law.get("fits", {}).items():
        low, high = fit["rank_exponent_interval"]
        exponent = f"{number(fit['rank_exponent'], '.3f')} [{number(low, '.3f')}, {number(high, '.3f')}]"
        tail = f"{fit['tail']:,} of {fit['values'] - fit['zeros']:,}"
        rows.append([name, exponent, tail, number(fit["p_value"], ".2f"), fit["verdict"]])
    titles = ["Importance", "Rank exponent [95%]", "Values in the tail", "p", "Best fit"]
    return table(titles, rows, ("Best fit",)) if rows else ""


def folded(run: RunFacts) -> str:
    """Normalisation and thresholds in the saved weights; empty where nothing is known."""
    titles = ["SAE", "Input scaling", "Norm of the mean", "Scale", "Threshold"]
    titles += ["Solved for L0", "On tokens", "L0 held out"]
    rows = []
    for sae in run.saes:
        made, calibration = sae.made, sae.made.get("calibration", {})
        if run.config and sae.config.activation_name == "batch_topk":
            calibration = {"l0": sae.config.k} | calibration  # what a run's threshold is always solved for
        cells = [code(made["input_scaling"]) if "input_scaling" in made else "–"]
        cells += [number(made.get("mean_norm"), ".4g"), number(made.get("scale"), ".4g"), _threshold(sae)]
        cells += [number(calibration.get("l0"), "g"), number(calibration.get("tokens"), ",d")]
        rows.append([code(sae.label), *cells, number(sae.whole.get("l0"), ".2f")])
    return table(titles, rows, ("Input scaling",)) if any(cell != "–" for row in rows for cell in row[1:5]) else ""


def _threshold(sae: SAEFacts) -> str:
    if sae.thresholds is None:
        return "–"
    low, high = sae.thresholds
    return number(low, ".4g") if low == high else f"{number(low, '.4g')} to {number(high, '.4g')}"


# The run's YAML


def run_yaml(run: RunFacts) -> str:
    """The run's fields that are no default, with no place of the machine it ran on; empty where there is no run."""
    if run.config is None:
        return ""
    fields = public_fields(_without_defaults(run.config), places(run))
    text = yaml.safe_dump(fields, sort_keys=False, width=110, default_flow_style=None, allow_unicode=True)
    return without_secrets(text).strip()


def _without_defaults(config: RunConfig) -> dict[str, Any]:
    """The fields from which the same config is made."""
    given = {name: value for name, value in config.to_dict().items() if value != getattr(RunConfig, name, [])}
    for name in ("dataset", "eval_dataset"):
        if name in given:
            data = given[name].items()
            given[name] = {key: value for key, value in data if value != getattr(DatasetConfig, key, "")}
    return given | {"saes": [_spec(spec) for spec in given["saes"]]}


def _spec(full: dict[str, Any]) -> dict[str, Any]:
    """An entry of `saes` without what its family, its preset and those of its own fields decide."""
    deciding = ("type", "preset", "activation", "init_from", "grow_from", "num_latents", "level_weights")
    for count in (5, 6, 7):
        given = {name: full[name] for name in deciding[:count] if full[name] is not None}
        try:
            defaults = vars(SAESpec.from_dict(given, ""))
        except ValueError:  # what is given must fit together: a base grows to a size
            continue
        found = given | {name: value for name, value in full.items() if value != defaults[name]}
        if vars(SAESpec.from_dict(found, "")) == full:
            return found
    return full
