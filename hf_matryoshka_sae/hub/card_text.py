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
_MISSING = "–"


# Words


def code(text: Any) -> str:
    """Return text as inline code that is safe in a table cell."""
    text = re.sub(r"\s+", " ", str(text)).replace("`", "'")
    return f"`{text}`".replace("|", "\\|")


def number(value: Any, form: str) -> str:
    """Format a number, or return a dash where there is none."""
    value = value.get("spearman") if isinstance(value, dict) else value
    return _MISSING if value is None or not math.isfinite(value) else format(value, form)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = ()) -> str:
    """Return a Markdown table without the columns in which every row has a dash.

    Args:
        titles (`Sequence[str]`): Heads of the columns.
        rows (`Sequence[Sequence[str]]`): Cells of each row.
        words (`Sequence[str]`, *optional*): Titles of columns that hold text; the first column always does.
    """
    columns = [i for i in range(len(titles)) if any(row[i] != _MISSING for row in rows)]
    lines = [[titles[i] for i in columns], ["---:" if i and titles[i] not in words else "---" for i in columns]]
    lines += [[row[i] for i in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def joined(parts: Sequence[str], last: str = "and") -> str:
    """Join words as `a, b and c`."""
    return " ".join(filter(None, [", ".join(parts[:-1]), last if len(parts) > 1 else "", *parts[-1:]]))


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


# The language model and the text


def language_model(run: RunFacts) -> tuple[str | None, str]:
    """Return the language model's Hub id, `None` where it has none, and its description."""
    name = base_model(run)
    if name is None:
        return None, "a language model that the SAE does not name"
    if name == EMBEDDED:
        return None, "the small language model that ships with `hf_matryoshka_sae`"
    if hub_id(name, _here(run, "model")):
        return name, f"[{name}]({HUB}/{name})"
    return None, f"a language model that is not on the Hub{_size(run)}"


def language_model_details(run: RunFacts) -> str:
    """Return the language model's description with its revision and size."""
    id, words = language_model(run)
    revision = run.config.model_revision if run.config else None
    words += f", revision {code(revision)}" if revision else ""
    return words + (_size(run) if id or base_model(run) == EMBEDDED else "")


def _size(run: RunFacts) -> str:
    """Return class and size of the language model in brackets; empty where they are unknown."""
    model = run.language_model
    if not model:
        return ""
    parts = [code(model["class"])]
    parts += [f"{model['layers']} layers"] if model.get("layers") else []
    parts += [f"hidden size {model['hidden_size']:,}"] if model.get("hidden_size") else []
    return f" ({', '.join(parts)}, {model['parameters']:,} parameters)"


def base_model(run: RunFacts) -> str | None:
    """Return the language model's name in the run's YAML or in the SAE's config."""
    return run.config.model if run.config else run.saes[0].config.base_model


def dataset(data: DatasetConfig, here: bool | None = None) -> tuple[str | None, str]:
    """Return a data set's Hub id, `None` where it has none, and its description."""
    path = data.path
    if path == EMBEDDED:
        return None, f"the documentation that every Python carries, {code(EMBEDDED)}, split {code(data.split)}"
    if not hub_id(path, here):
        return None, f"{LOCAL_DATA}, column {code(data.column)}"
    name = f", configuration {code(data.name)}" if data.name else ""
    link = f"[{path}]({HUB}/datasets/{path})"
    return path, f"{link}{name}, split {code(data.split)}, column {code(data.column)}"


def text_words(path: str) -> str:
    """Return the description of the held-out text that an evaluation names."""
    here = None if "/" in path else True  # a folder's own name looks like the id of a data set that nobody owns
    return dataset(DatasetConfig(path, split="heldout" if path == EMBEDDED else "train"), here)[1]


def texts(run: RunFacts) -> dict[str, tuple[str | None, str]]:
    """Return Hub id and description of the training's text (`train`) and the evaluation's (`heldout`)."""
    if run.config is None or run.config.dataset is None:  # trained on hidden states, not on text
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
    """Return the paths of this machine in the run's fields, with the public words for each."""
    return {} if run.config is None else stand_ins(run.config, run.provenance.get("on_this_machine"))


def _here(run: RunFacts, name: str) -> bool | None:
    return name in run.provenance["on_this_machine"] if "on_this_machine" in run.provenance else None


# Tables


def overview(run: RunFacts) -> str:
    """Return a table with one row for each SAE of the repository."""
    words = ("Hookpoint", "Family", "Widths")
    rows = []
    for sae in run.saes:
        row, config = sae.whole, sae.config
        link = f"[{code(sae.label)}]({sae.subfolder + '/' if sae.subfolder else ''}config.json)"
        hookpoint_in_label = not config.hookpoint or sae.label.endswith(config.hookpoint.replace(":", "-"))
        widths = ", ".join(f"{width:,}" for width in config.widths)
        measured = [number(row.get(key), form) for key, form in (("l0", ".2f"), ("fvu", ".4f"))]
        measured += [number(row.get("recaptured_zero"), ".4f"), number(sae.dead, ",d")]
        hookpoint = _MISSING if hookpoint_in_label else code(config.hookpoint)
        rows.append([link, hookpoint, sae.family, widths, *measured])
    return table(["SAE", *words, "L0", "FVU", "Recaptured", "Dead"], rows, words)


def metrics(sae: SAEFacts) -> str:
    """Return a table of every metric at every width."""
    rows = [[number(row.get(key), form) for _, key, form in _METRICS] for row in sae.rows]
    return table([title for title, _, _ in _METRICS], rows)


def baselines(sae: SAEFacts) -> str:
    """Return a table of FVU and recaptured loss at every width beside the baselines'; empty where there are none."""
    columns = [(key, title) for key, title in _BASELINES if key in sae.baselines]
    if not columns:
        return ""
    titles, rows = ["Width"], [[f"{row['width']:,}"] for row in sae.rows]
    for metric, name in (("fvu", "FVU"), ("recaptured_zero", "Recaptured")):
        titles += [name, *(f"{name}, {title}" for _, title in columns)]
        for cells, row in zip(rows, sae.rows, strict=True):
            others = [sae.baselines[key].get(row["width"], {}) for key, _ in columns]
            cells += [number(each.get(metric), ".4f") for each in (row, *others)]
    return table(titles, rows)


def interpretability(sae: SAEFacts) -> str:
    """Return a table of a full evaluation's metrics beside their baselines; empty where there was no evaluation."""
    if sae.suite is None or not sae.suite.sections:
        return ""
    titles, rows = sae.suite.rows()
    cells = [
        [title, label.replace("**", ""), *(cell or _MISSING for cell in values)] for title, label, *values in rows
    ]
    return table(titles, cells, ("Of",))


def power_laws(sae: SAEFacts) -> str:
    """Return a table with one row for each fitted power law; empty where none was fitted."""
    rows = []
    for name, fit in sae.power_law.get("fits", {}).items():
        low, high = fit["rank_exponent_interval"]
        exponent = f"{number(fit['rank_exponent'], '.3f')} [{number(low, '.3f')}, {number(high, '.3f')}]"
        tail = f"{fit['tail']:,} of {fit['values'] - fit['zeros']:,}"
        rows.append([name, exponent, tail, number(fit["p_value"], ".2f"), fit["verdict"]])
    titles = ["Importance", "Rank exponent [95%]", "Values in the tail", "p", "Best fit"]
    return table(titles, rows, ("Best fit",)) if rows else ""


def folded(run: RunFacts) -> str:
    """Return a table of the normalisation and thresholds in the saved weights; empty where nothing is known."""
    titles = ["SAE", "Input scaling", "Norm of the mean", "Scale", "Threshold"]
    titles += ["Solved for L0", "On tokens", "L0 held out"]
    rows = []
    for sae in run.saes:
        training, calibration = sae.provenance, sae.provenance.get("calibration", {})
        if run.config and sae.config.activation_name == "batch_topk":
            calibration = {"l0": sae.config.k} | calibration  # a run always solves the threshold for k
        cells = [code(training["input_scaling"]) if "input_scaling" in training else _MISSING]
        cells += [number(training.get("mean_norm"), ".4g"), number(training.get("scale"), ".4g"), _threshold(sae)]
        cells += [number(calibration.get("l0"), "g"), number(calibration.get("tokens"), ",d")]
        rows.append([code(sae.label), *cells, number(sae.whole.get("l0"), ".2f")])
    known = any(cell != _MISSING for row in rows for cell in row[1:5])
    return table(titles, rows, ("Input scaling",)) if known else ""


def _threshold(sae: SAEFacts) -> str:
    if sae.thresholds is None:
        return _MISSING
    low, high = sae.thresholds
    return number(low, ".4g") if low == high else f"{number(low, '.4g')} to {number(high, '.4g')}"


# The run's YAML


def run_yaml(run: RunFacts) -> str:
    """Return the run's fields that differ from the defaults as YAML without local paths; empty without a run."""
    if run.config is None:
        return ""
    fields = public_fields(_without_defaults(run.config), places(run))
    text = yaml.safe_dump(fields, sort_keys=False, width=110, default_flow_style=None, allow_unicode=True)
    return without_secrets(text).strip()


def _without_defaults(config: RunConfig) -> dict[str, Any]:
    """Return the fields that differ from the defaults; they make the same config."""
    fields = {name: value for name, value in config.to_dict().items() if value != getattr(RunConfig, name, [])}
    for name in ("dataset", "eval_dataset"):
        if name in fields:
            data = fields[name].items()
            fields[name] = {key: value for key, value in data if value != getattr(DatasetConfig, key, "")}
    return fields | {"saes": [_spec(spec) for spec in fields["saes"]]}


def _spec(full: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of `saes` without the fields that its family, preset and other fields decide."""
    deciding = ("type", "preset", "activation", "init_from", "grow_from", "num_latents", "level_weights")
    for count in (5, 6, 7):
        deciding_fields = {name: full[name] for name in deciding[:count] if full[name] is not None}
        try:
            defaults = vars(SAESpec.from_dict(deciding_fields, ""))
        except ValueError:  # these fields are not valid alone: `grow_from` needs `num_latents`
            continue
        fields = deciding_fields | {name: value for name, value in full.items() if value != defaults[name]}
        if vars(SAESpec.from_dict(fields, "")) == full:
            return fields
    return full
