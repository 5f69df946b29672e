"""What a run needs and lacks, as far as it can be seen before torch is imported and anything is loaded."""

from pathlib import Path

from ...common.data_source import EMBEDDED, local_files
from .run import RunConfig
from .trackers import check_installed


def check_ready(config: RunConfig) -> None:
    """Look for the files and packages that a run names.

    Raises:
        `ValueError`: for fields, a data file, a folder of a model or a tracker's package that are not there.
    """
    config.check_text()
    check_installed(config.trackers)
    if config.lm_processes is not None:
        return  # processes that only hold SAEs may be where neither the text nor the language model is
    for dataset in (config.dataset, config.eval_dataset):
        if dataset is not None and dataset.path != EMBEDDED:
            local_files(dataset)
    path = Path(config.model).expanduser()
    if (path.is_absolute() or config.model.startswith((".", "~"))) and not path.is_dir():
        raise ValueError(f"The language model's folder {config.model!r} does not exist. Check `model`.")
