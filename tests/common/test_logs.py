"""Of several processes the first says what all know."""

import logging

import pytest
from transformers.utils import logging as transformers_logging

from hf_matryoshka_sae import train as command
from hf_matryoshka_sae.common.logs import OutOfTime, progress, within
from hf_matryoshka_sae.training.run import trainer

from ..training.run.test_trainer import RUN


@pytest.mark.parametrize(("rank", "said"), [("0", ["known to all", "of its own"]), ("3", ["of its own"])])
def test_only_the_first_process_logs_what_all_know(rank, said, monkeypatch, tmp_path):
    package, heard = logging.getLogger("hf_matryoshka_sae"), []
    monkeypatch.setenv("RANK", rank)
    verbosity = transformers_logging.get_verbosity()

    def work(config):
        logger = logging.getLogger("hf_matryoshka_sae.somewhere")
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())
        logger.addHandler(handler)
        logger.info("known to all")
        logger.warning("of its own")
        logger.removeHandler(handler)

    monkeypatch.setattr(trainer, "train", work)
    flags = [f"--{name}={value!r}" for name, value in RUN.items()]
    try:
        assert command.main([*flags, f"--output_dir={tmp_path}"]) == 0
    finally:
        transformers_logging.set_verbosity(verbosity)
        package.setLevel(logging.NOTSET)
    assert heard == said


def test_a_bar_ends_at_the_deadline_shown_or_not(capsys):
    with within(None):
        assert list(progress(range(3), disable=True)) == [0, 1, 2]
    for disable in (True, False):
        with within(-1.0):
            with pytest.raises(OutOfTime):
                list(progress(range(3), disable=disable))
            with pytest.raises(OutOfTime), progress(total=3, disable=disable) as bar:
                bar.update()
    assert list(progress(range(3), disable=True)) == [0, 1, 2]
