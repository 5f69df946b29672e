"""The card of a steering: what is changed, by which SAE, for which model, and what it was measured to do."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..common.report import markdown_table
from ..hub.public import hub_id


if TYPE_CHECKING:
    from .artefact import Steering


PICTURE = "dose.png"


def card_of(steering: "Steering") -> str:
    """Return the README of a steering's repository."""
    base = next((hub_id(part.base_model) for part in steering.parts if hub_id(part.base_model)), None)
    head = ["---", "library_name: hf_matryoshka_sae", "tags: [steering, sparse-autoencoder]"]
    head += [f"base_model: {base}", "---"] if base else ["---"]
    titles = ["latent", "value", "mode", "hookpoint", "positions", "SAE", "revision"]
    rows = [
        [
            str(latent),
            "-" if part.mode in ("remove", "erase") else f"{value:g}",
            part.mode,
            f"`{part.hookpoint}`" if part.mode != "erase" else "all writers of the residual stream",
            part.positions if not part.from_position else f"{part.positions}, from {part.from_position}",
            hub_id(part.sae_name) or "a local SAE",
            (part.revision or "-")[:12],
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
        "activations.",
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


def picture_of(steering: "Steering", folder: Path) -> None:
    """Draw the dose report into a folder, where there is one."""
    if steering.dose is not None:
        from .report import DoseReport

        DoseReport.from_dict(steering.dose).plot(folder / PICTURE)
