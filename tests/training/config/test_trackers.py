"""Trackers: what is missing is told first, runs can be compared, curves have lasting names."""

import importlib.util
import json
import sys
import types

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, register_tracker_class

from hf_matryoshka_sae.training import train
from hf_matryoshka_sae.training.config import trackers
from hf_matryoshka_sae.training.config.trackers import (
    TrackedRun,
    check_access,
    check_installed,
    check_names,
    lasting_id,
)

from ..run.test_trainer import config


class Recorder(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "recorder"
    requires_logging_directory = False
    opened = []

    def __init__(self, project, **arguments):
        super().__init__()
        self.project, self.logged, self.fields = project, [], None
        Recorder.opened.append(self)

    @property
    def tracker(self):
        return self

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.fields = values

    def log(self, values, step=None, **arguments):
        self.logged.append((step, values))


@pytest.fixture
def recorder():
    register_tracker_class(Recorder)
    Recorder.opened.clear()
    yield Recorder.opened
    del LOGGER_TYPE_TO_CLASS["recorder"]


def test_curves_are_called_by_prefix_widths_and_held_out_results_follow(tmp_path, recorder):
    (result,) = train(config(tmp_path, trackers=["recorder"], project="llamas", log_every=10))
    (run,) = recorder
    assert run.project == "llamas" and run.fields["saes/0/num_latents"] == 128
    widths = [row["width"] for row in result["saes"]["nested"]]
    assert [step for step, _ in run.logged] == [10, 20, 20]
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["saes"]["nested"]
    _, last = run.logged[1]
    assert {key: value for key, value in last.items() if "/fvu/" in key} == {
        f"nested/fvu/{width}": fvu for width, fvu in zip(widths, line["fvu"], strict=True)
    }
    assert line["widths"] == widths
    _, held_out = run.logged[2]
    curves = {"fvu": "fvu", "l0": "l0", "ce": "ce", "recaptured": "recaptured_zero", "dead": "dead"}
    assert held_out == {
        f"nested/heldout_{curve}/{row['width']}": row[key]
        for row in result["saes"]["nested"]
        for curve, key in curves.items()
    }


@pytest.mark.release
def test_curves_of_several_hookpoints_are_kept_apart_and_random_prefixes_make_one(tmp_path, recorder):
    saes = [{"type": "matryoshka", "name": "drawn", "num_latents": 64, "k": 4, "random_prefixes": 3}]
    hookpoints = ["model.layers.0", "model.layers.1"]
    train(config(tmp_path, trackers=["recorder"], hookpoints=hookpoints, saes=saes, tokens=512, log_every=1))
    logged = recorder[0].logged
    places = [f"drawn/{hookpoint}" for hookpoint in hookpoints]
    assert {name for name in logged[0][1] if "/fvu/" in name} == {f"{place}/fvu/whole" for place in places}
    names = {name for _, values in logged for name in values}
    assert {f"{place}/{curve}" for place in places for curve in ("l0", "heldout_fvu/64")} <= names


def test_a_misspelt_tracker_is_told_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="Unknown tracker in `trackers`: 'tensorbord'. Did you mean 'tensorboard'?"):
        config(tmp_path, trackers=["tensorbord"])
    check_names(["all", "wandb", "trackio", "mlflow"])


def test_every_tracker_of_accelerate_is_known():
    check_names(list(map(str, LOGGER_TYPE_TO_CLASS)))
    assert set(trackers._ARGUMENTS) <= set(trackers._MODULES) <= {str(name) for name in LOGGER_TYPE_TO_CLASS}


def test_a_missing_package_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"names comet_ml, trackio, which are not .* `pip install comet-ml trackio`"):
        check_installed(["comet_ml", "trackio"])
    with pytest.raises(ValueError, match="`pip install tensorboard`"):
        train(config(tmp_path / "run", trackers=["tensorboard"], model="no/such-model"))
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_key_is_told_at_once(tmp_path, monkeypatch):
    def login(verify):
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(login=login))
    with pytest.raises(ValueError, match="wandb cannot be used: No API key configured.*WANDB_MODE=offline"):
        check_access(["wandb"])
    check_access(["tensorboard"])


def test_a_run_keeps_its_name_and_id_where_it_goes_on(tmp_path):
    first = lasting_id(tmp_path, 0)
    assert lasting_id(tmp_path, 5) == first != lasting_id(tmp_path, 0)
    arguments: dict = {}
    for start in (0, 7):
        run = TrackedRun("llamas", tmp_path / "x", {"a": 1}, start, "id")
        arguments[start] = {name: arguments_of(run) for name, arguments_of in trackers._ARGUMENTS.items()}
    assert arguments[0]["wandb"] == {"name": "x", "id": "id", "config": {"a": 1}}
    assert arguments[7]["wandb"]["resume"] == arguments[7]["trackio"]["resume"] == "allow"
    assert arguments[0]["trackio"]["resume"] == "never"
    assert arguments[7]["tensorboard"]["purge_step"] == 8


def test_a_tracker_that_does_not_start_is_named(tmp_path, recorder, monkeypatch):
    def start(self):
        raise OSError("no route to host")

    monkeypatch.setattr(Recorder, "start", start)
    with pytest.raises(ValueError, match="recorder cannot be started: no route to host"):
        trackers.open_trackers(Accelerator(), ["recorder"], TrackedRun("llamas", tmp_path, {}, 0, "id"))


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_curves_of_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the optional package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from hf_matryoshka_sae.training import Interrupted
    from hf_matryoshka_sae.training.run.trainer import Trainer

    fields = {"trackers": ["tensorboard"], "log_every": 1, "checkpoint_every": 5}
    run = config(tmp_path / "x", **fields)
    first = Trainer(run)
    whole_step = first._step

    def step_or_stop(step):
        if step == 7:  # steps 6 and 7 are logged and will be done again
            raise Interrupted("killed")
        whole_step(step)

    first._step = step_or_stop
    with pytest.raises(Interrupted):
        first.run()
    train(run)
    events = list((tmp_path / "x").rglob("events.out.tfevents*"))
    assert {path.parent for path in events} == {tmp_path / "x" / "tensorboard"} and len(events) == 2
    curves = EventAccumulator(str(tmp_path / "x" / "tensorboard")).Reload()
    tags = curves.Tags()["scalars"]
    assert "nested/fvu/128" in tags and "nested/heldout_recaptured/128" in tags
    assert [event.step for event in curves.Scalars("nested/fvu/128")] == list(range(1, 21))
    text = curves.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "saes/0/num_latents: 128" in text


@pytest.mark.slow
def test_trackio_gets_the_run_by_its_name(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="needs the optional package trackio")
    import trackio
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    for module in (utils, sys.modules["trackio.sqlite_storage"]):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    run = config(tmp_path / "x", trackers=["trackio"], project="llamas")
    train(run)
    logs = SQLiteStorage.get_logs("llamas", "x")
    assert trackio is not None and any("nested/fvu/128" in line for line in logs)
    assert any("nested/heldout_recaptured/128" in line for line in logs)
