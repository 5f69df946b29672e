"""Which layout is recommended, what is said where none fits, and the command."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hf_matryoshka_sae.cli import main
from hf_matryoshka_sae.planning import find_device, make_plan
from hf_matryoshka_sae.planning.plan import what_would_fit
from hf_matryoshka_sae.planning.report import duration, table

from .workloads import DEVICE, FIELDS, workload


ROOT = Path(__file__).parents[2]
LARGE = {"type": "topk", "num_latents": 2**20, "k": 8}  # 16 bytes x 2 x 2^20 x 128: 4.3 GB and more


def test_the_fastest_that_fits_is_recommended():
    plan = make_plan(workload(LARGE), 8, replace(DEVICE, memory=4e9))
    fitting = [layout for layout in plan.layouts if layout.fits]
    assert {str(layout.mesh) for layout in plan.layouts} == {"8 x 1", "4 x 2", "2 x 4", "1 x 8"}
    assert 0 < len(fitting) < 4
    assert plan.best.step_seconds == min(layout.step_seconds for layout in fitting)
    peaks = [layout.memory.peak for layout in plan.layouts]
    assert peaks == sorted(peaks, reverse=True)


def test_headroom_stays_free():
    layout = make_plan(workload(), 1, DEVICE).layouts[0]
    peak = layout.memory.peak
    assert not replace(layout, device=replace(DEVICE, memory=1.05 * peak)).fits
    assert replace(layout, device=replace(DEVICE, memory=1.1 * peak)).fits


def test_a_hint_fits_where_the_run_does_not():
    device = replace(DEVICE, memory=2e9)
    work = workload(LARGE)
    assert make_plan(work, 2, device).best is None
    hints = what_would_fit(work, 2, device)
    counts = [int(hint.split()[0]) for hint in hints]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == len(counts)
    assert make_plan(work, counts[0], device).best is not None or "gradient_accumulation_steps" in hints[0]
    smallest = LARGE | {"optimizer_dtype": "int8", "weights_dtype": "bfloat16"}
    if "weights_dtype" in hints[-1]:
        parts = int(hints[-1].split("gradient_accumulation_steps: ")[1].split(",")[0]) if "grad" in hints[-1] else 1
        fields = {"gradient_accumulation_steps": parts}
        assert make_plan(workload(smallest, **fields), counts[-1], device).best is not None


def test_nothing_helps():
    assert "smaller dictionary" in what_would_fit(workload(LARGE), 1, replace(DEVICE, memory=1e6))[0]


def test_layouts_that_do_not_divide():
    plan = make_plan(workload({"type": "topk", "num_latents": 4, "k": 2}), 8, DEVICE)
    assert plan.skipped == ("1 x 8",)
    with pytest.raises(ValueError, match="processes that run the language model x"):
        make_plan(workload(), 3, DEVICE)
    with pytest.raises(ValueError, match="at least 1"):
        make_plan(workload(), 0, DEVICE)


def test_readers_of_their_own():
    work = replace(workload(LARGE), lm_processes=2)
    plan = make_plan(work, 4, replace(DEVICE, memory=20e9))
    assert {str(layout.mesh) for layout in plan.layouts} == {"2 x 1", "1 x 2"}
    layout = plan.layouts[0]
    assert "language model" not in {part.name for part in layout.compute} and layout.reader_bytes > 0
    assert layout.memory.phases["step"]["language model"] == 0 < layout.memory.phases["evaluation"]["language model"]
    slow = replace(layout, reader_seconds=1e6)
    assert slow.step_seconds == 1e6  # the dictionaries wait for hidden states
    with pytest.raises(ValueError, match="leaves none"):
        make_plan(work, 2, DEVICE)


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("h200", 141), ("H100", 80), ("a100-40", 40), ("48GB", 48), ("24 GiB", 25.769803776)]
)
def test_devices(name, gigabytes):
    assert find_device(name).memory == gigabytes * 1e9


def test_unknown_device():
    with pytest.raises(ValueError, match="Unknown device 'h20'.*h200"):
        find_device("h20")


def test_this_machine_is_measured():
    device = find_device("cpu", 2)
    assert 1e9 < device.rate("float32") < 1e14 and 1e8 < device.stream < 1e13
    assert device.memory == pytest.approx(find_device("cpu").memory / 2)


def test_durations():
    assert [duration(s) for s in (5, 90, 5400, 2 * 86400)] == ["5.0 s", "1.5 min", "1.5 h", "2.0 d"]


def test_tables():
    assert table(["a", "b"], [["x", "1"]], markdown=True) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert table(["a", "b"], [["x", "10"]]) == "  a   b\n  x  10"


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**FIELDS, "saes": [LARGE]}))
    return path


def test_command(run_file, tmp_path, capsys):
    files = {name: tmp_path / f"plan.{name}" for name in ("json", "markdown", "plot")}
    files["plot"] = tmp_path / "plan.png"
    flags = [f"--{name}={path}" for name, path in files.items()]
    assert main(["plan", "--config", str(run_file), "--devices", "4", "--device", "h100", *flags]) == 0
    said = capsys.readouterr().out
    data = json.loads(files["json"].read_text())
    assert data["recommended"].replace(" ", "") in said.replace(" ", "")
    assert f"latent_shards: {data['recommended'].split(' x ')[1]}" in said
    for layout in data["layouts"]:
        assert layout["peak_bytes"] == pytest.approx(sum(layout["memory"][layout["peak_phase"]].values()))
        assert layout["run_seconds"] == pytest.approx(100 * layout["step_seconds"])
    assert "| replicas x shards |" in files["markdown"].read_text()
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_flags_override_fields(run_file, capsys):
    arguments = ["plan", "--config", str(run_file), "--device", "1GB", "--saes.0.num_latents", "512"]
    main(arguments)
    assert "512 latents" in capsys.readouterr().out


def test_status_where_nothing_fits(run_file, capsys):
    assert main(["plan", "--config", str(run_file), "--device", "3GB"]) == 1
    assert "Nothing fits" in capsys.readouterr().out


def test_errors_are_told(run_file, capsys):
    assert main(["plan", "--config", str(run_file), "--device", "abacus"]) == 2
    assert "Unknown device" in capsys.readouterr().err
    assert main(["plan", "--config", str(run_file), "--no_such_field", "1"]) == 2
    assert "no_such_field" in capsys.readouterr().err


def test_the_document_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    plan_tables = pytest.importorskip("plan_tables")
    text = plan_tables.DOCUMENT.read_text()
    assert text.count("<!-- plan: ") == len(plan_tables.TABLES)
    assert plan_tables.filled(text) == text, "run python benchmarks/plan_tables.py"
    sys.modules.pop("plan_tables")


@pytest.mark.release
def test_peak_memory_of_a_real_run(tmp_path, monkeypatch):
    """Within 15% of what a training of 131,072 latents takes, from its start to its report."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    benchmark = pytest.importorskip("planner")
    monkeypatch.setattr(benchmark, "SHAPES", [("", {"type": "topk", "num_latents": 131_072, "k": 16}, 512, 0.0)])
    row = benchmark.measure(0)
    sys.modules.pop("planner")
    assert row["planned_bytes"] == pytest.approx(row["bytes"], rel=0.15)
