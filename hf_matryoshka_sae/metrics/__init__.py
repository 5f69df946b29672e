"""`evaluate` modules: thin adapters over `evaluation`.

evaluate.load(hf_matryoshka_sae.metrics.path("sae_fidelity"))
"""

from pathlib import Path


_FOLDER = Path(__file__).resolve().parent


def path(name: str) -> str:
    """Return the folder of a metric in this installation, for `evaluate.load`.

    Args:
        name (`str`): Name of the metric, such as `"sae_fidelity"`.

    Raises:
        `ValueError`: if there is no metric of this name; the message lists the metrics.
    """
    names = sorted(folder.name for folder in _FOLDER.iterdir() if (folder / f"{folder.name}.py").is_file())
    if name not in names:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(names)}.")
    return str(_FOLDER / name)


__all__ = ["path"]
