"""A page that draws a progressive curve: upload or paste reconstructions at several widths, or sums over tokens."""

from pathlib import Path
from typing import Any

import evaluate
import gradio as gr

from hf_matryoshka_sae.metrics.uploads import read_array, read_arrays, read_numbers, read_statistics
from hf_matryoshka_sae.space import launch
from hf_matryoshka_sae.space.looks.charts import Axis, line_chart
from hf_matryoshka_sae.space.looks.messages import shows_errors
from hf_matryoshka_sae.space.tabs.inputs import area


MODULE = str(Path(__file__).with_name("progressive_curve.py"))

COLUMNS = (
    "width",
    "l0",
    "fvu",
    "explained_variance",
    "mse",
    "cossim",
    "l2_ratio",
    "relative_reconstruction_bias",
    "dead",
)

EXAMPLE = (
    "1, 0\n0, 1\n-1, 0\n0, -1",
    "0.4, 0.2\n0, 0.5\n-0.4, 0\n0.1, -0.5\n\n0.7, 0.1\n0, 0.8\n-0.7, 0\n0, -0.8\n\n0.9, 0\n0, 0.9\n-0.9, 0\n0, -0.9",
    "8, 32, 128",
)

ABOUT = """# Progressive curve
How well do the first n latents of a Matryoshka sparse autoencoder reconstruct hidden states, for each width n? The
numbers are those of `hf_matryoshka_sae.evaluation`.
"""


@shows_errors
def measure_arrays(
    states_file: str | None,
    states_text: str,
    reconstruction_files: list[str] | None,
    reconstructions_text: str,
    widths: str,
    fvu_targets: str,
) -> tuple[str, dict[str, Any], str]:
    """Compute the curve of reconstructions at several widths."""
    states = read_array(states_file, states_text, "hidden states")
    reconstructions = read_arrays(reconstruction_files, reconstructions_text, "reconstructions")
    if reconstructions.shape[1:] != states.shape:
        raise ValueError(
            f"Hidden states of shape {states.shape} need reconstructions of that shape at each width, got "
            f"{reconstructions.shape[1:]}."
        )
    return _outcome(reconstructions.swapaxes(0, 1), states, widths, fvu_targets)


@shows_errors
def measure_statistics(file: str | None, text: str, widths: str, fvu_targets: str) -> tuple[str, dict[str, Any], str]:
    """Compute the curve from sums over tokens: `ReconstructionSums.to_dict()` as JSON."""
    sums = read_statistics(file, text)
    return _outcome(sums, sums, widths, fvu_targets)


def _outcome(predictions: Any, references: Any, widths: str, fvu_targets: str) -> tuple[str, dict[str, Any], str]:
    numbers = read_numbers(widths, "widths")
    if any(number != int(number) for number in numbers):
        raise ValueError(f"Widths are whole numbers, got {widths}.")
    curve = evaluate.load(MODULE, keep_in_memory=True).compute(
        predictions=predictions,
        references=references,
        widths=[int(number) for number in numbers],
        fvu_targets=read_numbers(fvu_targets, "wanted FVUs"),
    )
    return _summary(curve), _table(curve), _plot(curve)


def _summary(curve: dict[str, Any]) -> str:
    lines = [f"**{curve['tokens']:,} tokens.** Mean FVU over log width: **{curve['area_fvu']:.4g}**."]
    for target, width in zip(curve["fvu_targets"], curve["width_for_fvu"], strict=True):
        at_most = "at most " if width == curve["width"][0] else ""
        reached = "is not reached" if width is None else f"takes {at_most}**{width:.4g}** latents"
        lines.append(f"- An FVU of {target:g} {reached}.")
    return "\n".join(lines)


def _table(curve: dict[str, Any]) -> dict[str, Any]:
    columns = [name for name in COLUMNS if name in curve]
    rows = zip(*(curve[name] for name in columns), strict=True)
    return {"headers": columns, "data": [[float(f"{value:.5g}") for value in row] for row in rows]}


def _plot(curve: dict[str, Any]) -> str:
    """Draw FVU and cosine against width."""
    metrics = (("fvu", "fraction of variance unexplained"), ("cossim", "cosine with the hidden state"))
    charts = []
    for key, label in metrics:
        values = curve[key]
        axis = Axis(label, low=min(0.0, *values), high=max(1.0, *values))
        points = list(zip(curve["width"], values, strict=True))
        charts.append(line_chart({label: points}, Axis("width (latents)", log=True), axis))
    return f'<div class="wide">{"".join(charts)}</div>'


def build_demo() -> gr.Blocks:
    """Build the page."""
    with gr.Blocks(title="Progressive curve") as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            widths = gr.Textbox(label="Widths", placeholder="64, 192, 448, 960, 2048")
            targets = gr.Textbox(label="FVUs to find the width for", value="0.5, 0.2, 0.1")
        with gr.Tab("Arrays"):
            with gr.Row():
                with gr.Column():
                    states = (
                        gr.File(label="Hidden states: .npy or .csv", file_types=[".npy", ".csv"], height=140),
                        gr.Textbox(label="or paste hidden states: a token per line", lines=4, max_lines=8),
                    )
                with gr.Column():
                    reconstructions = (
                        gr.File(
                            label="Reconstructions: .npy (widths, tokens, d_in), or a file per width",
                            file_types=[".npy", ".csv"],
                            file_count="multiple",
                            height=140,
                        ),
                        gr.Textbox(label="or paste them: a blank line between widths", lines=4, max_lines=8),
                    )
            with gr.Row():
                of_arrays = gr.Button("Measure", variant="primary", scale=4)
                example = gr.Button("Fill in an example")
        with gr.Tab("Statistics"):
            gr.Markdown(
                "For arrays too large to upload: sums over tokens, `json.dumps(ReconstructionSums.to_dict())`."
            )
            file = gr.File(label="JSON file", file_types=[".json"], height=140)
            text = gr.Textbox(label="or paste it", lines=4, max_lines=8)
            of_statistics = gr.Button("Measure", variant="primary")
        summary = gr.Markdown()
        plot = area("curve")
        table = gr.Dataframe(label="Every width", interactive=False)
        outcome = [summary, table, plot]
        example.click(lambda: EXAMPLE, None, [states[1], reconstructions[1], widths], api_visibility="private")
        of_arrays.click(measure_arrays, [*states, *reconstructions, widths, targets], outcome)
        of_statistics.click(measure_statistics, [file, text, widths, targets], outcome)
    return page


demo = build_demo()

if __name__ == "__main__":
    launch(demo)
