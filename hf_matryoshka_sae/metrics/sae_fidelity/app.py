"""A page that measures reconstructions: users upload or paste two arrays, or sums over tokens, and get a table."""

from pathlib import Path
from typing import Any

import evaluate
import gradio as gr

from hf_matryoshka_sae.metrics.uploads import read_array, read_statistics
from hf_matryoshka_sae.space import launch
from hf_matryoshka_sae.space.looks.messages import shows_errors


MODULE = str(Path(__file__).with_name("sae_fidelity.py"))

MEANINGS = {
    "fvu": "squared error over the variance about the mean; 0 is perfect, 1 no better than the mean",
    "explained_variance": "1 - fvu",
    "explained_variance_saebench": "as SAEBench 0.6 computes it; not an R²",
    "explained_variance_legacy": "mean over tokens of a ratio per token; not an R²",
    "explained_variance_dl": "as dictionary_learning computes it; blind to a constant error",
    "mse": "squared error per token and dimension",
    "cossim": "mean cosine of a hidden state and its reconstruction",
    "l2_norm_in": "mean length of the hidden states",
    "l2_norm_out": "mean length of the reconstructions",
    "l2_ratio": "mean ratio of the lengths; below 1 is shrinkage",
    "relative_reconstruction_bias": "1 is unbiased, below 1 is shrinkage",
    "mean_residual_fvu": "part of fvu that another bias of the decoder would remove",
    "l0": "mean number of latents that fire on a token",
    "l1": "mean sum of the latents on a token",
    "dead": "share of latents that never fire",
    "tokens": "number of rows measured",
}

EXAMPLE = ("1, 0\n0, 1\n-1, 0\n0, -1", "0.9, 0.1\n0, 0.8\n-0.9, 0\n0.1, -0.8")

ABOUT = """# SAE fidelity
How well does a sparse autoencoder reconstruct hidden states? The numbers are those of `hf_matryoshka_sae.evaluation`.
"""


@shows_errors
def measure_arrays(
    states_file: str | None, states_text: str, reconstructions_file: str | None, reconstructions_text: str
) -> list[list[Any]]:
    """Measure reconstructions against hidden states, two arrays of shape (tokens, d_in)."""
    states = read_array(states_file, states_text, "hidden states")
    reconstructions = read_array(reconstructions_file, reconstructions_text, "reconstructions")
    return _table(predictions=reconstructions, references=states)


@shows_errors
def measure_statistics(file: str | None, text: str) -> list[list[Any]]:
    """Compute the fidelity from sums over tokens: `ReconstructionSums.to_dict()` as JSON."""
    sums = read_statistics(file, text)
    return _table(predictions=sums, references=sums)


def _table(**columns: Any) -> list[list[Any]]:
    metrics = evaluate.load(MODULE, keep_in_memory=True).compute(**columns)
    return [[name, float(f"{metrics[name]:.6g}"), about] for name, about in MEANINGS.items() if name in metrics]


def build_demo() -> gr.Blocks:
    """Build the page."""
    with gr.Blocks(title="SAE fidelity") as page:
        gr.Markdown(ABOUT)
        with gr.Tab("Arrays"):
            with gr.Row():
                states = _array_inputs("Hidden states")
                reconstructions = _array_inputs("Reconstructions")
            with gr.Row():
                of_arrays = gr.Button("Measure", variant="primary", scale=4)
                example = gr.Button("Fill in an example")
        with gr.Tab("Statistics"):
            gr.Markdown(
                "For arrays too large to upload: sums over tokens, `json.dumps(ReconstructionSums.to_dict())`."
            )
            file = gr.File(label="JSON file", file_types=[".json"], type="filepath", height=140)
            text = gr.Textbox(label="or paste it", lines=4, max_lines=8)
            of_statistics = gr.Button("Measure", variant="primary")
        table = gr.Dataframe(
            headers=["metric", "value", "meaning"],
            datatype=["str", "number", "str"],
            label="Fidelity",
            interactive=False,
            column_widths=["30%", "15%", "55%"],
            wrap=True,
            max_height=900,
        )
        example.click(lambda: EXAMPLE, None, [states[1], reconstructions[1]], api_visibility="private")
        of_arrays.click(measure_arrays, [*states, *reconstructions], table)
        of_statistics.click(measure_statistics, [file, text], table)
    return page


def _array_inputs(label: str) -> tuple[gr.File, gr.Textbox]:
    with gr.Column():
        file = gr.File(label=f"{label}: .npy or .csv", file_types=[".npy", ".csv"], type="filepath", height=140)
        text = gr.Textbox(label=f"or paste {label.lower()}: a token per line", lines=4, max_lines=8)
    return file, text


demo = build_demo()

if __name__ == "__main__":
    launch(demo)
