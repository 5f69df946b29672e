"""A plan as text: tables for a terminal or as Markdown, and options to set."""

from typing import Any

from ..activations.sentences import SENTENCE_EMBEDDING
from ..training.config.run import RunConfig
from .plan import LayoutPlan, Plan, what_would_fit, yaml_lines


SMALL = 0.005
"""Parts below this share of the peak are one line of the table."""


def report(plan: Plan, config: RunConfig, markdown: bool = False) -> str:
    """Return the planner's report: the run, all layouts, the best of them in detail, and options to set."""
    devices = plan.layouts[0].mesh.devices + (plan.work.lm_processes or 0)
    sections = [_heading(plan, devices), layout_table(plan, markdown)]
    if plan.skipped:
        sections.append(f"Left out, the batch or the latents cannot be divided: {', '.join(plan.skipped)}.")
    layout = plan.best or min(plan.layouts, key=lambda layout: layout.memory.peak)
    sections += [
        f"Memory of a device at {layout.mesh}, at its peak ({layout.memory.peak_phase}):",
        memory_table(layout, markdown),
    ]
    if layout.reader_bytes:
        sections.append(f"Processes that only run the language model hold {layout.reader_bytes / 1e9:.1f} GB.")
    sections += [f"A step on a device at {layout.mesh} (nothing overlaps):", step_table(layout, markdown)]
    sections.append(_advice(plan, layout, config, devices))
    return "\n\n".join(sections) + "\n"


def _heading(plan: Plan, devices: int) -> str:
    work, device = plan.work, plan.device
    lines = [
        f"{shape.name}: d_in {shape.d_in:,}, {shape.num_latents:,} latents, {shape.parameters:,} parameters, "
        f"k {shape.k:g}, {shape.prefixes} prefix{'es' * (shape.prefixes > 1)}."
        for shape in work.dictionaries
    ]
    of_texts = SENTENCE_EMBEDDING in work.lm.widths
    lines.append(
        f"{work.tokens:,} {'embeddings' if of_texts else 'tokens'} in {work.steps:,} steps of {work.batch_size:,}"
        + (f" ({work.accumulation} micro-batches)" if work.accumulation > 1 else "")
        + f", {work.product} products; "
        + (
            "each process embeds all texts once before the first step, which is not counted."
            if of_texts
            else f"language model: {work.lm.parameters:,} parameters."
        )
    )
    lines.append(
        f"{devices} x {device.name}: {device.memory / 1e9:.1f} GB, of which {device.usable / 1e9:.1f} may be used."
    )
    return "\n".join(lines)


def layout_table(plan: Plan, markdown: bool = False) -> str:
    """Return a table of layouts: whether each fits, its peak, its traffic and its time."""
    head = ["replicas x shards", "fits", "GB", "at", "traffic GB", "traffic s", "step s", "run"]
    rows = [
        [
            str(layout.mesh),
            "yes" if layout.fits else "no",
            f"{layout.memory.peak / 1e9:.1f}",
            layout.memory.peak_phase,
            f"{sum(move.sent for move in layout.traffic) / 1e9:.3g}",
            f"{layout.traffic_seconds:.3g}",
            f"{layout.step_seconds:.3g}",
            duration(layout.run_seconds),
        ]
        for layout in plan.layouts
    ]
    return table(head, rows, markdown)


def memory_table(layout: LayoutPlan, markdown: bool = False) -> str:
    """Return a table of the memory of a device at its peak, part by part."""
    peak = layout.memory.peak
    large = {name: size for name, size in layout.memory.parts.items() if size >= SMALL * peak}
    rows = [[name, f"{size / 1e9:.2f}"] for name, size in sorted(large.items(), key=lambda item: -item[1])]
    rest = peak - sum(large.values())
    rows += [["the rest", f"{rest / 1e9:.2f}"]] * (rest > 0) + [["all", f"{peak / 1e9:.2f}"]]
    return table(["part", "GB"], rows, markdown)


def step_table(layout: LayoutPlan, markdown: bool = False) -> str:
    """Return a table of the cost of a step to a device, part by part."""
    rows = [
        [part.name, f"{part.flops / 1e12:.4g}", f"{part.moved / 1e9:.4g}", f"{part.seconds(layout.device):.3g}"]
        for part in layout.compute
    ]
    rows += [
        [f"send: {move.name}", "", f"{move.sent / 1e9:.4g}", f"{move.seconds:.3g}"]
        for move in layout.traffic
        if move.sent
    ]
    if layout.reader_seconds:
        rows.append(["meanwhile: language model", "", "", f"{layout.reader_seconds:.3g}"])
    rows.append(["all", "", "", f"{layout.step_seconds:.3g}"])
    return table(["part", "TFLOP", "GB", "seconds"], rows, markdown)


def _advice(plan: Plan, layout: LayoutPlan, config: RunConfig, devices: int) -> str:
    if plan.best is None:
        hints = "\n".join(f"- {hint}" for hint in what_would_fit(plan.work, devices, plan.device))
        return f"Nothing fits; the smallest layout is {layout.mesh}. What would fit:\n{hints}"
    lines = "\n".join(f"    {line}" for line in yaml_lines(config, layout))
    return (
        f"Fastest that fits: {layout.mesh}, {duration(layout.run_seconds)} for the run. "
        f"Processes to start: {devices}. "
        f"Fields to set:\n\n{lines}"
    )


def duration(seconds: float) -> str:
    """Return a length of time in the unit that suits it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def table(head: list[str], rows: list[list[str]], markdown: bool = False) -> str:
    """Return a table of text, its first column flush left, in Markdown or aligned for a terminal."""
    if markdown:
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  "
        + "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    )


def to_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan for a JSON file: bytes and seconds."""
    device = plan.device
    return {
        "device": {
            "name": device.name,
            "memory": device.memory,
            "usable": device.usable,
            "flops": device.flops,
            "matmul_share": device.matmul_share,
            "bandwidth": device.bandwidth,
            "memory_share": device.memory_share,
            "link": device.link,
            "network": device.network,
            "per_machine": device.per_machine,
        },
        "steps": plan.work.steps,
        "recommended": None if plan.best is None else str(plan.best.mesh),
        "layouts": [layout.to_dict() for layout in plan.layouts],
        "skipped": list(plan.skipped),
    }
