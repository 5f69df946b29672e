"""`matryoshka-sae synthetic`, a few steps long: what it writes, and that what is finished is not done again."""

import json

import pytest
from accelerate.state import AcceleratorState

from hf_matryoshka_sae.cli import main as cli
from hf_matryoshka_sae.studies.known_features import benchmark
from hf_matryoshka_sae.studies.known_features.benchmark import Benchmark, default_recipes
from hf_matryoshka_sae.studies.known_features.command import synthetic_main as main
from hf_matryoshka_sae.studies.known_features.synthetic import World


SMALL = "--features 24 --d_in 16 --trees 2 --p_min 0.02 --steps 20 --batch_size 32 --samples 200".split()


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)  # another test may have used another device


def test_the_command_trains_writes_and_prints(tmp_path, capsys):
    assert cli(["synthetic", *SMALL, "--seeds", "0", "1", "--output_dir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "synthetic.json").read_text())
    names = list(results["subjects"])
    assert len(names) == 6 and names[-2:] == ["random", "supervised"]
    for rows in results["subjects"].values():
        assert [row["width"] for row in rows] == [1, 2, 5, 11, 24]
        low, high = rows[-1]["mcc_interval"]
        assert low <= rows[-1]["mcc"] <= high
    assert results["subjects"]["supervised"][-1]["f1"] > results["subjects"]["random"][-1]["f1"]
    printed = capsys.readouterr().out
    assert "| supervised | 24 |" in printed and printed.startswith((tmp_path / "synthetic.md").read_text())
    assert (tmp_path / "synthetic.png").stat().st_size > 20_000


@pytest.mark.release
def test_what_is_finished_is_not_trained_again(tmp_path, monkeypatch):
    world = World(features=16, d_in=8, trees=1, p_min=0.05)
    trained = []
    real = benchmark.train_toy

    def counted(model, spec, accelerator, steps, seed, *rest):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((spec.type, seed))
        return real(model, spec, accelerator, steps, seed, *rest)

    def run(steps=3):
        return Benchmark(world, default_recipes(16, 2)[:2], tmp_path, steps, 16, samples=100).run([0, 1], show=False)

    monkeypatch.setattr(benchmark, "train_toy", counted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert trained == [("matryoshka", 0), ("topk", 0), ("matryoshka", 1)]
    assert not (tmp_path / "synthetic.json").exists() and len(list((tmp_path / "runs").iterdir())) == 3
    trained.clear()
    first = run()
    assert trained == [("topk", 1)]
    trained.clear()
    assert run() == first and not trained
    with pytest.raises(KeyboardInterrupt):
        run(steps=4)  # another recipe: nothing of it is finished
    assert len(trained) == 3


def test_recipes_of_a_file_are_trained(tmp_path):
    (tmp_path / "recipes.yaml").write_text("saes:\n- {type: jumprelu, num_latents: 12, target_l0: 2, name: mine}\n")
    arguments = [*SMALL, "--seeds", "0", "--recipes", str(tmp_path / "recipes.yaml"), "--widths", "4,12"]
    assert main([*arguments, "--output_dir", str(tmp_path)]) == 0
    subjects = json.loads((tmp_path / "synthetic.json").read_text())["subjects"]
    assert [row["width"] for row in subjects["mine"]] == [4, 12]
    assert [row["width"] for row in subjects["supervised"]] == [4, 12, 24]
    assert subjects["mine"][0]["mcc_interval"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "`steps` must be at least 1"),
        (["--seeds", "1", "1"], "`seeds` must be different numbers"),
        (["--recipes", "nowhere.yaml"], "The recipes nowhere.yaml cannot be read"),
        (["--p_max", "2"], "0 < `p_min` <= `p_max` < 1"),
    ],
)
def test_what_cannot_be_run_is_told(arguments, message, tmp_path, capsys):
    assert main([*SMALL, *arguments, "--output_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_recipes_of_one_name_are_refused(tmp_path):
    recipe = default_recipes(16, 2)[0]
    with pytest.raises(ValueError, match="Recipes need different names; 'matryoshka-batch_topk-16-k2' is taken"):
        Benchmark(World(features=16, d_in=8, trees=1), [recipe, recipe], tmp_path)
    with pytest.raises(ValueError, match="no recipe"):
        Benchmark(World(features=16, d_in=8, trees=1), [], tmp_path)
