# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_matryoshka_sae"]
#
# [tool.uv.sources]
# hf_matryoshka_sae = {path = "..", editable = true}
# ///
"""Draw what nesting buys, on the embedded language model: `docs/nesting.png`, about five minutes on two cores.

    python examples/nesting_picture.py --output docs/nesting.png

A Matryoshka and a TopK SAE of one size are trained on the same hidden states. Then both are cut to many widths, the
TopK SAE as it is and sorted by energy, and their error on held-out text is drawn against the width, and against the
numbers that a token is described by. In the second picture principal components stand beside them.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from transformers import AutoModel

from hf_matryoshka_sae.common.figures import save_figure
from hf_matryoshka_sae.demo import DEMO
from hf_matryoshka_sae.evaluation import Dictionary, PrincipalComponents, evaluate_fidelity, open_heldout
from hf_matryoshka_sae.progressive import default_widths, latent_statistics, sort_latents
from hf_matryoshka_sae.training import RunConfig, train


HOOKPOINT = DEMO["hookpoints"][0]
TEXT = {"path": "embedded", "split": "train"}  # to rank latents on, and to fit components to
NAMES = ("matryoshka", "topk")
SAES = [{"type": name, "name": name, "num_latents": 2048, "k": 16} for name in NAMES]


def curves(run: Path, tokens: int) -> dict[str, list[tuple[int, float, float]]]:
    """Width, numbers per token and FVU on held-out text at many widths, by what was cut."""
    seen, heldout = (open_heldout("embedded", HOOKPOINT, text, tokens) for text in (TEXT, DEMO["eval_dataset"]))
    nested, plain = (AutoModel.from_pretrained(run / name / HOOKPOINT) for name in NAMES)
    ranked = sort_latents(plain, statistics=latent_statistics(plain, seen))
    widths, counts = default_widths(nested), [1, 2, 4, 8, 16, 32]
    subjects = {
        "Matryoshka": Dictionary(nested, widths, "mask"),
        "TopK, sorted by energy": Dictionary(ranked, widths, "mask"),
        "TopK, as trained": Dictionary(plain, widths, "mask"),
        "principal components": PrincipalComponents.fit(seen.activations(), counts),
    }
    rows = evaluate_fidelity(heldout, subjects, language_model=False, similarity_tokens=0)["subjects"]
    lines = {}
    for name, found in rows.items():  # components have no latents that fire: all m numbers are there
        lines[name] = [(row["width"], row.get("l0", row["width"]), row["fvu"]) for row in found]
    return lines


def draw(lines: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """Two pictures side by side: the error against the width, and against the numbers per token."""
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=160)
    by_width, by_numbers = figure.subplots(1, 2, sharey=True)
    for (name, points), look in zip(lines.items(), ("C0o-", "C1s-", "C1^:", "C3x--"), strict=True):
        widths, numbers, errors = zip(*points, strict=True)
        if name != "principal components":  # whose width is another thing
            by_width.plot(widths, errors, look, markersize=4, label=name)
        if name != "TopK, as trained":
            by_numbers.plot(numbers, errors, look, markersize=4, label=name)
    ticks = [32, 64, 128, 256, 512, 1024, 2048]
    by_width.set(xscale="log", ylim=(0, 1.2), xlabel="latents kept", ylabel="fraction of variance unexplained")
    by_width.set_xticks(ticks, ticks)
    by_numbers.set(xlabel="numbers that describe a token (L0)")
    for axis in (by_width, by_numbers):
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/nesting"), help="of the run (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="to train on (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("nesting.png"), help="the picture (default: %(default)s)")
    parsed = parser.parse_args()
    train(RunConfig.from_dict({**DEMO, "saes": SAES, "tokens": parsed.tokens, "output_dir": str(parsed.run)}))
    draw(curves(parsed.run, tokens=30_000), parsed.output)


if __name__ == "__main__":
    main()
