"""The card of a steering: what is changed, by which SAE, for which model, and what it was measured to do."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..common.data_source import EMBEDDED
from ..common.report import markdown_table
from ..hub.public import LOCAL_MODEL, LOCAL_SAE, hub_id


if TYPE_CHECKING:
    from .artefact import Steering


PICTURE = "dose.png"


def card_of(steering: "Steering") -> str:
    """Return the README of a steering's repository."""
    base = next((hub_id(part.base_model) for part in steering.parts if hub_id(part.base_model)), None)
    head = ["---", "library_name: hf_matryoshka_sae", "tags: [steering, sparse-autoencoder]"]
    head += [f"base_model: {base}", "---"] if base else ["---"]
    titles = ["latent", "value", "mode", "hookpoint", "positions", "SAE", "revision", "digest", "base model"]
    rows = [
        [
            str(latent),
            "-" if part.mode in ("remove", "erase") else f"{value:g}",
            part.mode,
            f"`{part.hookpoint}`" if part.mode != "erase" else "all writers of the residual stream",
            part.positions if not part.from_position else f"{part.positions}, from {part.from_position}",
            _public(part.sae_name, LOCAL_SAE),
            (part.revision or "-")[:12],
            part.digest[:12],
            _public(part.base_model, LOCAL_MODEL if part.base_model else "not named"),
        ]
        for part in steering.parts
        for latent, value in zip(part.latent_ids, part.values, strict=True)
    ]
    text = [
        *head,
        "",
        "# Steering",
        "",
        "Latents of sparse autoencoders that change what a language model does. Values are in units of the latents' "
        "activations. The digest is that of the latents' weights: an SAE with another one has other latents there. In "
        "another model than the base model they may mean something else.",
        "",
        markdown_table(titles, rows),
        "",
        "```python",
        "from hf_matryoshka_sae.steering import Steering",
        "",
        'steering = Steering.from_pretrained("this repository")',
        "with steering.applied(model):",
        "    model.generate(**inputs)",
        "```",
    ]
    if steering.dose is not None:
        from .report import DoseReport

        text += ["", "## Dose", "", DoseReport.from_dict(steering.dose).markdown(), f"![Dose report]({PICTURE})"]
    return "\n".join(text) + "\n"


def _public(name: str | None, stand_in: str) -> str:
    return EMBEDDED if name == EMBEDDED else hub_id(name) or stand_in


def picture_of(steering: "Steering", folder: Path) -> None:
    """Draw the dose report into a folder, where there is one."""
    if steering.dose is not None:
        from .report import DoseReport

        DoseReport.from_dict(steering.dose).plot(folder / PICTURE)
