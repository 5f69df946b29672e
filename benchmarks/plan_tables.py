"""Write the planner's figures into docs/scale.md.

    python benchmarks/plan_tables.py            # writes
    python benchmarks/plan_tables.py --check    # ends with status 1 where the document is out of date

Between `<!-- plan: NAME -->` and `<!-- end -->` stands what `TABLES[NAME]` gives.
"""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hf_matryoshka_sae.common.files import write_text
from hf_matryoshka_sae.planning import Mesh, Plan, find_device, make_plan, read_workload
from hf_matryoshka_sae.planning.plan import LayoutPlan, plan_layout, what_would_fit
from hf_matryoshka_sae.planning.report import duration, layout_table, memory_table, step_table, table
from hf_matryoshka_sae.planning.workload import Workload
from hf_matryoshka_sae.training import load_run_config


ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "scale.md"
H200 = find_device("h200")
WIDTHS = (4096, 8192, 12288, 16384)


def workload(d_in: int = 12288, *flags: str) -> Workload:
    """The run of examples/plan_16m.yaml on hidden states of a width, with some fields changed."""
    config = load_run_config(ROOT / "examples" / "plan_16m.yaml", list(flags))
    return read_workload(config, d_in, 0)


def plan(devices: int, d_in: int = 12288, *flags: str) -> Plan:
    """Its plan on H200s."""
    return make_plan(workload(d_in, *flags), devices, H200)


def one(devices: int, d_in: int = 12288, *flags: str) -> LayoutPlan:
    """The layout of it that shards over all devices."""
    return plan_layout(workload(d_in, *flags), Mesh(1, devices), H200)


TYPES = {
    "float32": (),
    "moments bfloat16": ("--saes.0.optimizer_dtype=bfloat16",),
    "moments int8": ("--saes.0.optimizer_dtype=int8",),
    "moments int8, weights bfloat16": ("--saes.0.optimizer_dtype=int8", "--saes.0.weights_dtype=bfloat16"),
}


def state() -> str:
    """Weights, gradients and moments of the whole dictionary by width and types, in TB."""
    rows = []
    for name, flags in TYPES.items():
        cells = [name]
        for d_in in WIDTHS:
            (shape,) = workload(d_in, "--saes.0.optimizer_dtype=float32", *flags).dictionaries
            each = 2 * shape.weight_bytes + 2 * shape.moment_bytes
            cells.append(f"{2 * shape.num_latents * d_in * each / 1e12:.2f}")
        rows.append(cells)
    return table(["TB of weights, gradients, moments", *(f"d_in {d_in:,}" for d_in in WIDTHS)], rows, markdown=True)


def layouts() -> str:
    """Every layout on 64 devices."""
    return layout_table(plan(64), markdown=True)


def held() -> str:
    """Memory of the one that fits."""
    return memory_table(_best(64), markdown=True)


def step() -> str:
    """Its step."""
    return step_table(_best(64), markdown=True)


def _best(devices: int, *flags: str) -> LayoutPlan:
    best = plan(devices, 12288, *flags).best
    assert best is not None
    return best


def eight_step() -> str:
    """A step on eight devices, at a width that they hold."""
    return step_table(one(8, 2048, *TYPES["moments int8"]), markdown=True)


def eight() -> str:
    """One machine, by width: what fits, or what would."""
    rows = []
    for d_in in (1536, 2048, *WIDTHS):
        cells = [f"{d_in:,}"]
        for flags in TYPES.values():
            shown = plan(8, d_in, "--saes.0.optimizer_dtype=float32", *flags)
            best = shown.best
            least = min(shown.layouts, key=lambda layout: layout.memory.peak)
            cells.append(f"no ({least.memory.peak / 1e9:.0f})" if best is None else f"{best.memory.peak / 1e9:.0f}")
        rows.append(cells)
    return table(["GB at d_in", *TYPES], rows, markdown=True)


def hints() -> str:
    """What would fit the dictionary as float32, from one machine on."""
    work = workload(12288, "--saes.0.optimizer_dtype=float32")
    return "\n".join(f"- {hint}" for hint in what_would_fit(work, 8, H200))


def micro_batches() -> str:
    """What micro-batches cost and save."""
    rows = []
    for parts in (1, 2, 4, 8, 16, 32):
        found = one(64, 12288, f"--gradient_accumulation_steps={parts}")
        rows.append(
            [
                str(parts),
                f"{131072 // parts:,}",
                f"{found.memory.peak / 1e9:.1f}",
                "yes" if found.fits else "no",
                f"{found.step_seconds:.2f}",
            ]
        )
    return table(["micro-batches", "tokens in each", "GB", "fits", "step s"], rows, markdown=True)


def prefixes() -> str:
    """What nesting adds to the traffic, beside a plain TopK SAE."""
    kinds = {
        "TopK, k 32": (
            "--saes.0.type=topk",
            "--saes.0.activation=null",
            "--saes.0.prefix_fractions=null",
            "--saes.0.k=32",
        ),
        "TopK, k 64": ("--saes.0.type=topk", "--saes.0.activation=null", "--saes.0.prefix_fractions=null"),
        "Matryoshka of 5 prefixes, k 32": ("--saes.0.k=32",),
        "Matryoshka of 5 prefixes, k 64": (),
    }
    rows = []
    for name, flags in kinds.items():
        found = one(64, 12288, *flags)
        sent = sum(move.sent for move in found.traffic)
        rows.append(
            [
                name,
                f"{sent / 1e9:.1f}",
                f"{found.traffic_seconds:.3f}",
                f"{found.step_seconds:.2f}",
                f"{found.traffic_seconds / found.step_seconds:.0%}",
                duration(found.run_seconds),
            ]
        )
    return table(["", "GB sent per device", "s", "step s", "share", "run"], rows, markdown=True)


def bandwidths() -> str:
    """How the step depends on what is assumed of the network."""
    rows = []
    for link, network in ((450e9, 50e9), (370e9, 45e9), (370e9, 22e9), (370e9, 10e9), (370e9, 1.5e9)):
        found = plan_layout(workload(), Mesh(1, 64), replace(H200, link=link, network=network))
        rows.append(
            [
                f"{link / 1e9:.0f}",
                f"{network / 1e9:g}",
                f"{found.traffic_seconds:.2f}",
                f"{found.step_seconds:.2f}",
                duration(found.run_seconds),
            ]
        )
    return table(["GB/s inside", "GB/s per port", "traffic s", "step s", "run"], rows, markdown=True)


def widths() -> str:
    """The same run on hidden states of other widths."""
    rows = []
    for d_in in WIDTHS:
        found = one(64, d_in)
        rows.append(
            [
                f"{d_in:,}",
                f"{found.memory.peak / 1e9:.1f}",
                "yes" if found.fits else "no",
                f"{found.step_seconds:.2f}",
                f"{found.traffic_seconds:.2f}",
                duration(found.run_seconds),
            ]
        )
    return table(["d_in", "GB", "fits", "step s", "of which traffic", "run"], rows, markdown=True)


TABLES: dict[str, Callable[[], str]] = {
    part.__name__: part
    for part in (state, layouts, held, step, eight, eight_step, hints, micro_batches, prefixes, bandwidths, widths)
}


def filled(text: str) -> str:
    """The document with the planner's figures of today.

    Raises:
        `ValueError`: if it asks for a table that is not there.
    """

    def fill(found: re.Match) -> str:
        if found[1] not in TABLES:
            raise ValueError(f"There is no table {found[1]!r}: take {', '.join(TABLES)}.")
        return f"<!-- plan: {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- plan: (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    """Write or check the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parsed = parser.parse_args()
    before = DOCUMENT.read_text()
    after = filled(before)
    if parsed.check:
        return int(before != after)
    write_text(DOCUMENT, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
