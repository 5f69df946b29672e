"""What a sweep's YAML may say, and which runs come of it."""

import json
import shutil

import pytest
import yaml

from hf_matryoshka_sae.studies.scaling import plan
from hf_matryoshka_sae.studies.scaling.config import Sweep, load_sweep
from hf_matryoshka_sae.studies.scaling.plan import cost, is_finished, own_cache, plan_runs
from hf_matryoshka_sae.studies.scaling.points import finished_points
from hf_matryoshka_sae.training import load_run_config


FIELDS = {
    "model": "embedded",
    "dataset": {"path": "embedded"},
    "hookpoints": ["model.layers.1"],
    "batch_size": 256,
}
GRID = {"num_latents": [64, 256, 128], "k": [8, 2, 4], "tokens": [2560, 5120]}


@pytest.fixture(autouse=True)
def _no_language_model(monkeypatch):
    """It would be opened for each plan, to see how wide its hidden states are."""
    monkeypatch.setattr(plan, "_hidden_size", lambda run: 128)


def sweep(folder="unused", grid=None, **fields):
    return Sweep.from_dict({**FIELDS, "output_dir": str(folder), "sweep": {**GRID, **(grid or {})}, **fields})


def names(run):
    return [spec.name for spec in run.saes]


@pytest.mark.parametrize(
    "grid, fields, message",
    [
        ({"num_latent": [3]}, {}, r"Unknown field `sweep.num_latent`. Did you mean 'num_latents'"),
        ({"k": 8}, {}, "`sweep.k` must be a list"),
        ({"k": []}, {}, r"`sweep.k` must list different numbers of at least 1, got \[\]"),
        ({"k": [4, 4]}, {}, "different numbers"),
        ({"tokens": [100]}, {}, "`tokens` .100. is less than one batch"),
        ({"k": [4, 65]}, {}, "`k` must lie between 1 and num_latents"),
        ({"sae": {"type": "topk", "lrr": 1}}, {}, "Unknown field `sweep.sae.lrr`. Did you mean 'lr'"),
        ({"sae": {"type": "relu"}}, {}, "`k` is no field of an SAE of `type: relu`"),
        ({"sae": {"type": "topk", "k": 3}}, {}, "`sweep.sae.k` differs between"),
        ({"sae": "topk"}, {}, r"`sweep.sae` must hold fields"),
        ({"hold_out": 1.5}, {}, r"`sweep.hold_out` must lie in \[0, 1\), got 1.5"),
        ({"hold_out": [[64, 3]]}, {}, r"must list \[num_latents, k\] of the grid, got \[64, 3\]"),
        ({"hold_out": "some"}, {}, "`sweep.hold_out` must be"),
        ({"saes_per_run": 0}, {}, "`sweep.saes_per_run` must be at least 1"),
        ({}, {"bach_size": 3}, "Unknown field `bach_size`. Did you mean 'batch_size'"),
        ({}, {"tokens": 3}, "A sweep makes `tokens` from its section"),
        ({}, {"resume": False}, "give another `output_dir`"),
        ({}, {"hookpoints": ["model.layers.*"]}, "one hookpoint without wildcards"),
    ],
)
def test_what_does_not_fit_is_said_at_once(grid, fields, message):
    with pytest.raises(ValueError, match=message):
        sweep(grid=grid, **fields)


def test_a_run_without_the_section_or_an_output_folder_is_no_sweep():
    with pytest.raises(ValueError, match="needs a section `sweep"):
        Sweep.from_dict({**FIELDS, "output_dir": "x"})
    with pytest.raises(ValueError, match="`output_dir`"):
        Sweep.from_dict({**FIELDS, "sweep": GRID})


def test_flags_reach_into_the_section(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**FIELDS, "output_dir": "a", "sweep": GRID}))
    found = load_sweep(path, ["--sweep.k", "[3]", "--batch_size", "128", "--sweep.hold_out=0"])
    assert (found.grid.k, found.fields["batch_size"], found.grid.held_out(0)) == ([3], 128, set())


@pytest.mark.parametrize("seed", range(5))
def test_held_out_points_come_from_every_k_alike(seed):
    drawn = sweep(grid={"hold_out": 0.34}).grid.held_out(seed)
    assert len(drawn) == 3 and {k for _, k in drawn} == {2, 4, 8}
    assert drawn == sweep(grid={"hold_out": 0.34}).grid.held_out(seed)
    assert sweep(grid={"hold_out": [[64, 2]]}).grid.held_out(seed) == {(64, 2)}


def test_other_seeds_hold_out_other_points():
    assert len({frozenset(sweep(grid={"hold_out": 0.34}).grid.held_out(seed)) for seed in range(8)}) > 3


def test_one_process_gives_a_run_for_each_budget_with_a_common_cache(tmp_path):
    runs = plan_runs(sweep(tmp_path))
    assert [run.tokens for run in runs] == [2560, 5120]
    assert all(len(run.saes) == 9 and names(run)[0] == "topk-64-k2" for run in runs)
    assert {own_cache(run) for run in runs} == {tmp_path / "activations-9216"}
    assert load_run_config(tmp_path / "tokens-2560" / "run.yaml") == runs[0]
    assert not any(is_finished(run) for run in runs)


def test_no_cache_for_one_run_a_full_disk_or_where_one_is_given(tmp_path, monkeypatch):
    assert own_cache(plan_runs(sweep(tmp_path / "one", {"tokens": [2560]}))[0]) is None
    (run, _) = plan_runs(sweep(tmp_path / "given", activation_cache=str(tmp_path / "there")))
    assert run.activation_cache == str(tmp_path / "there") and own_cache(run) is None
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert {run.activation_cache for run in plan_runs(sweep(tmp_path / "full"))} == {None}


def test_parts_are_balanced_and_hold_everything_once(tmp_path):
    runs = plan_runs(sweep(tmp_path, {"tokens": [2560]}), processes=3)
    assert sorted(name for run in runs for name in names(run)) == sorted(names(sweep().run(2560, sweep().grid.pairs)))
    assert [cost(run) for run in runs] == [2560 * 448] * 3
    few = plan_runs(sweep(tmp_path / "few", {"tokens": [2560], "saes_per_run": 2}))
    assert max(len(run.saes) for run in few) == 2 and len(few) == 5


def test_runs_that_are_there_stay_whatever_the_processes(tmp_path):
    before = plan_runs(sweep(tmp_path), processes=2)
    assert plan_runs(sweep(tmp_path), processes=5) == sorted(before, key=lambda run: run.output_dir)


def test_a_larger_grid_adds_what_is_missing(tmp_path):
    before = plan_runs(sweep(tmp_path))
    larger = plan_runs(sweep(tmp_path, {"num_latents": [64, 128, 256, 512], "tokens": [2560, 7680]}))
    assert larger[0] == before[0]  # of the old 5,120 tokens nothing is wanted any more
    assert [(run.tokens, len(run.saes), run.output_dir) for run in larger[1:]] == [
        (2560, 3, str(tmp_path / "tokens-2560-2")),
        (7680, 12, str(tmp_path / "tokens-7680")),
    ]
    assert own_cache(larger[2]) == tmp_path / "activations-11776"


def test_a_sweep_whose_runs_state_their_sizes_goes_on(tmp_path):
    """As an earlier version planned them."""
    earlier = {"normalization_tokens": 65_536, "calibration_tokens": 200_000, "shuffle_tokens": 131_072}
    earlier |= {"eval_tokens": 60_000, "window_pool_tokens": 4_000_000}
    before = plan_runs(sweep(tmp_path, **earlier))
    assert plan_runs(sweep(tmp_path)) == before
    with pytest.raises(ValueError, match="differs in calibration_tokens"):
        plan_runs(sweep(tmp_path, calibration_tokens=1000))


def test_an_sae_without_a_figure_is_no_point(tmp_path, caplog):
    grid = {"num_latents": [64], "k": [2, 4], "tokens": [2560]}
    (run,) = plan_runs(sweep(tmp_path, grid))
    row = {"l0": 2.0, "ce": 3.0, "recaptured_zero": 0.9, "dead": 0.0}
    saes = {"topk-64-k2": [{**row, "fvu": 0.3}], "topk-64-k4": [{**row, "fvu": None}]}
    results = [{"hookpoint": "model.layers.1", "saes": saes}]
    folder = tmp_path / "tokens-2560"
    (folder / "results.json").write_text(json.dumps({"results": results}))
    for name in saes:
        (folder / name / "model.layers.1").mkdir(parents=True)
        (folder / name / "model.layers.1" / "config.json").write_text('{"d_in": 128}')
    assert [(point.k, point.loss) for point in finished_points(sweep(tmp_path, grid), [run])] == [(2, 0.3)]
    assert "topk-64-k4 has no FVU" in caplog.text


def test_a_moved_sweep_goes_on_where_it_is(tmp_path):
    plan_runs(sweep(tmp_path / "here"))
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert [run.output_dir for run in plan_runs(sweep(tmp_path / "there"))] == [
        str(tmp_path / "there" / f"tokens-{tokens}") for tokens in (2560, 5120)
    ]


@pytest.mark.parametrize(
    "grid, fields, message",
    [
        ({}, {"batch_size": 128}, "differs in batch_size"),
        ({"sae": {"type": "topk", "lr": 1e-3}}, {}, r"differs in sweep.sae \(topk-64-k2\)"),
    ],
)
def test_another_sweep_in_the_folder_is_refused(tmp_path, grid, fields, message):
    plan_runs(sweep(tmp_path))
    with pytest.raises(ValueError, match=message):
        plan_runs(sweep(tmp_path, grid, **fields))


def test_a_grid_too_small_for_any_law_is_told_before_training():
    sweep().check_laws()
    sweep(grid={"num_latents": [64, 128, 256, 512], "k": [4], "tokens": [2560], "hold_out": 0.0}).check_laws()
    for grid in (
        {"num_latents": [64, 128], "tokens": [2560]},
        {"num_latents": [64, 128, 256, 512], "k": [4], "tokens": [2560], "hold_out": 0.25},
    ):
        with pytest.raises(ValueError, match="too few for any law. L.F. needs more than 3 sizes"):
            sweep(grid=grid).check_laws()
