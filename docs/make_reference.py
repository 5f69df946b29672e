"""Write docs/reference/configuration.md from the fields' own docstrings.

python docs/make_reference.py
"""

from pathlib import Path

from hf_matryoshka_sae.studies.scaling.config import Grid
from hf_matryoshka_sae.training.config.describe import described, markdown, run_fields


PAGE = Path(__file__).parent / "reference" / "configuration.md"


def page() -> str:
    """The page as text."""
    return f"""# Fields of a run

Made by `python docs/make_reference.py` from the fields' own docstrings; `matryoshka-sae train --help` shows the same.
Every field stands in a run's YAML and is a flag too: `--batch_size 4096`, `--dataset.column body`, `--saes.0.k 64` (of
the first entry of `saes`; the next is `saes.1`). A field of `saes` that is left out takes the value of its `preset`,
or that of its family.

{markdown(run_fields())}
# Fields of a sweep

The section `sweep` of the file that `matryoshka-sae sweep --config` reads; its other fields are those of a run,
without `saes` and `tokens`.

{markdown(described(Grid, "sweep."))}"""


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
