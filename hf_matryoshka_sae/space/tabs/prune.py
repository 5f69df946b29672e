"""Prune: how much of an SAE is kept, what that is worth, and taking it along."""

import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ...models import SAEModel
from ..endpoints import Endpoints
from ..looks import html
from ..looks.charts import Axis, Mark, line_chart
from ..looks.messages import told
from ..subject.answers import measured_row
from ..subject.opened import RANKINGS, Opened, Pruning
from .inputs import BAR, BARS, Shown, area, on_a_space


SAMPLE = "The module defines a function that returns the number of items in the list."
_KEPT_SECONDS = 3600
_ROWS = (
    ("latents", "width", ",.0f"),
    ("FVU: fraction of variance unexplained", "fvu", ".4f"),
    ("recaptured loss (zero ablation)", "recaptured_zero", ".4f"),
    ("recaptured loss (mean ablation)", "recaptured_mean", ".4f"),
    ("cross-entropy, nats per token", "ce", ".4f"),
    ("KL to the plain model, nats", "kl", ".4f"),
    ("L0: latents that fire per token", "l0", ".2f"),
    ("RSA (Spearman)", "rsa", ".4f"),
    ("latents that never fire", "dead", ".2%"),
    ("size in MB", "size_mb", ".2f"),
)


class PruneTab:
    """The tab's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown):
        self.endpoints, self.shown = endpoints, shown
        self.scratch = tempfile.TemporaryDirectory(prefix="hf_matryoshka_sae-")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.width = gr.Slider(1, 2048, 2048, step=1, label="Width: latents that are kept")
                self.k = gr.Slider(1, 64, 16, step=1, label="k: latents per token", visible=False)
                self.ranking = gr.Radio(
                    list(RANKINGS),
                    value="trained",
                    label="Ranking: which latents come first",
                    info="A Matryoshka SAE is sorted within its prefixes.",
                )
                self.measure = gr.Button("Measure this width", variant="primary")
                self.whole_curve = gr.Button("Measure the loss along the curve")
            with gr.Column(scale=3, min_width=280):
                self.chart = area("chart")
        self.figures = area("figures")
        gr.Markdown("### The same text, at this width")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.text = gr.Textbox(SAMPLE, label="Text", lines=3, max_lines=8)
                self.read = gr.Button("Reconstruct and continue")
            with gr.Column(scale=3, min_width=280):
                self.reconstructed = area("reconstructed")
        gr.Markdown("### Take it along")
        with gr.Row():
            with gr.Column(min_width=280):
                self.export = gr.Button("Make a download of this pruning")
                self.file = gr.File(label="The pruned SAE, for AutoModel.from_pretrained", interactive=False)
            with gr.Column(min_width=280):
                self.repo = gr.Textbox(label="or push it to your repository", placeholder="your-name/pruned-sae")
                if on_a_space():
                    gr.LoginButton()
                    self.token = gr.State("")
                else:
                    self.token = gr.Textbox(
                        label="Token with write access (empty: the one this machine is logged in with)",
                        type="password",
                    )
                self.private = gr.Checkbox(True, label="private")
                self.push = gr.Button("Push to the Hub")
                self.pushed = gr.Markdown()
        self._wire()

    def _wire(self) -> None:
        pruning = [self.shown.current, self.ranking, self.width, self.k]
        outcome = [self.chart, self.figures]
        quick = {"show_progress": "hidden", "api_visibility": "private"}
        slow = {"api_visibility": "private", "concurrency_id": "model", "concurrency_limit": 1}
        # By hand alone: while another SAE is being opened, a slider has the value of the one before.
        for moved in (self.width.input, self.k.input):
            moved(told(self.show), pruning, outcome, trigger_mode="always_last", **quick)
        for chosen in (self.width.release, self.k.release, self.ranking.input, self.measure.click):
            chosen(told(self.show_measured), pruning, outcome, trigger_mode="always_last", **slow)
        self.whole_curve.click(told(self.measure_curve), pruning, outcome, **slow)
        self.width.input(None, self.width, None, js="width => showInLink({width})")
        self.k.input(None, self.k, None, js="k => showInLink({k})")
        self.ranking.input(None, self.ranking, None, js="ranking => showInLink({ranking})")
        gr.on(
            [self.read.click, self.text.submit],
            told(self.reconstruct),
            [*pruning, self.text],
            self.reconstructed,
            **slow,
        )
        self.export.click(told(self.make_download), pruning, self.file, **slow)
        pushing = self.push_logged_in if on_a_space() else self.push_with_token
        self.push.click(told(pushing), [*pruning, self.repo, self.token, self.private], self.pushed, **slow)

    # What is measured

    def _pruning(self, current: tuple[str, str], ranking: str, width: int, k: int) -> tuple[Opened, Pruning]:
        opened = self.endpoints.library.open(*current)
        # A slider may still have the width of the SAE that was open before.
        return opened, opened.check(Pruning(ranking, min(int(width), opened.num_latents), int(k) or None))

    def show(self, current: tuple[str, str], ranking: str, width: int, k: int) -> tuple[str, str]:
        """The curve with a marker, and the figures where they are known."""
        opened, pruning = self._pruning(current, ranking, width, k)
        return curve_chart(opened, pruning), figures_table(opened, pruning)

    def show_measured(
        self, current: tuple[str, str], ranking: str, width: int, k: int, progress: Any = BARS
    ) -> tuple[str, str]:
        """The same, measured."""
        opened, pruning = self._pruning(current, ranking, width, k)
        opened.measured(pruning)
        opened.measured(Pruning(width=opened.num_latents))
        return curve_chart(opened, pruning), figures_table(opened, pruning)

    def measure_curve(
        self, current: tuple[str, str], ranking: str, width: int, k: int, progress: Any = BAR
    ) -> Iterator[tuple[str, str]]:
        """Measure every width of the curve, showing each as it comes."""
        opened, pruning = self._pruning(current, ranking, width, k)
        widths = [row["width"] for row in opened.curve(pruning.ranking, pruning.k)]
        for number, one in enumerate(widths):
            progress((number, len(widths)), desc=f"width {one}")
            opened.measured(opened.check(Pruning(pruning.ranking, one, pruning.k)))
            yield curve_chart(opened, pruning), figures_table(opened, pruning)

    def reconstruct(self, current: tuple[str, str], ranking: str, width: int, k: int, text: str) -> str:
        """A text as this pruning leaves it."""
        opened, pruning = self._pruning(current, ranking, width, k)
        found = self.endpoints.reconstruct(
            text, *current, ranking=pruning.ranking, width=pruning.width, k=pruning.k or 0
        )
        return reconstructed_text(found, pruning, opened)

    # Taking it along

    def make_download(self, current: tuple[str, str], ranking: str, width: int, k: int) -> str:
        """A zip file with the pruned SAE."""
        opened, pruning = self._pruning(current, ranking, width, k)
        return str(export(opened.pruned(pruning), Path(self.scratch.name), _name(opened, pruning)))

    def push_with_token(
        self, current: tuple[str, str], ranking: str, width: int, k: int, repo: str, token: str, private: bool
    ) -> str:
        """Push the pruned SAE to a repository."""
        token = (token or "").strip()
        if self.endpoints.library.public and not token:
            raise ValueError("Give a token with write access to your repositories: this page pushes with no other.")
        opened, pruning = self._pruning(current, ranking, width, k)
        return _push(opened.pruned(pruning), repo, token or None, private)

    def push_logged_in(
        self,
        current: tuple[str, str],
        ranking: str,
        width: int,
        k: int,
        repo: str,
        token: str,
        private: bool,
        visitor: gr.OAuthToken | None = None,
    ) -> str:
        """Push the pruned SAE to a repository of the visitor who is logged in."""
        if visitor is None:
            raise ValueError("Log in with Hugging Face first: the button is above.")
        opened, pruning = self._pruning(current, ranking, width, k)
        return _push(opened.pruned(pruning), repo, visitor.token, private)


def curve_chart(opened: Opened, pruning: Pruning) -> str:
    """FVU, and recaptured loss where it was measured, against width, with a marker at the pruning."""
    rows = opened.curve(pruning.ranking, pruning.k)
    known = opened.measured(pruning) if opened.is_measured(pruning) else None
    panels = (_panel(rows, known, pruning, key) for key in ("fvu", "recaptured_zero"))
    return f'<div class="wide">{"".join(panels)}</div>'


def _panel(rows: list[dict[str, Any]], known: dict[str, Any] | None, pruning: Pruning, key: str) -> str:
    """One curve; the place of a width that was not measured is read off it."""
    axis = {
        "fvu": Axis("fraction of variance unexplained", low=0.0),
        "recaptured_zero": Axis("recaptured loss (zero ablation)", high=1.0),
    }[key]
    points = [(row["width"], row[key]) for row in rows if row.get(key) is not None]
    marks = []
    if known is not None and known.get(key) is not None:
        marks = [Mark("", pruning.width, known[key], f"{pruning.width:,}: {known[key]:.4f}")]
        points = sorted({*points, (pruning.width, known[key])})
    elif len(points) > 1 and key == "fvu":
        value = _between(points, pruning.width)
        marks = [Mark("", pruning.width, value, f"{pruning.width:,}: about {value:.2f}")]
    low = min((value for _, value in points), default=0.0)
    if key == "recaptured_zero":
        axis = Axis(axis.label, low=min(0.9, low), high=1.0)
    widths = Axis("width (latents)", log=True, low=rows[0]["width"], high=rows[-1]["width"])
    return line_chart({"": points}, widths, axis, marks)


def _between(points: list[tuple[int, float]], width: int) -> float:
    points = sorted(points)
    for (left, start), (right, end) in zip(points[:-1], points[1:], strict=True):
        if left <= width <= right:
            return start + (end - start) * (width - left) / (right - left)
    return points[0][1] if width < points[0][0] else points[-1][1]


def figures_table(opened: Opened, pruning: Pruning) -> str:
    """The figures of a pruning beside those of the whole SAE."""
    whole = Pruning(width=opened.num_latents)
    if not opened.is_measured(pruning):
        return '<p class="quiet">Let the slider go, or press “Measure this width”, to see what it is worth.</p>'
    here = measured_row(opened, pruning)
    full = measured_row(opened, whole) if opened.is_measured(whole) else {}
    rows = [
        [title, html.number(here.get(key), form), html.number(full.get(key), form), _share(here, full, key)]
        for title, key, form in _ROWS
    ]
    about = f"{pruning.ranking} ranking" + (f", k = {pruning.k}" if pruning.k else "")
    command = f"matryoshka-sae evaluate {opened.source} --widths {pruning.width} --tokens {opened.library.tokens}"
    same = ""
    if pruning.ranking == "trained" and pruning.k is None and opened.library.dataset is None:
        same = f"<p class=quiet>The same from the shell: <code>{escape(command)} --selection restrict</code></p>"
    measured_on = f"On {here['tokens']:,} held-out tokens at <code>{escape(opened.data.hookpoint)}</code>."
    head = ["", f"{pruning.width:,} latents, {about}", "all latents", "share"]
    return f'{html.table(head, rows, numbers=(1, 2, 3))}<p class="quiet">{measured_on}</p>{same}'


def _share(here: dict[str, Any], full: dict[str, Any], key: str) -> str:
    if key not in ("width", "recaptured_zero", "recaptured_mean", "l0", "rsa", "size_mb") or not full.get(key):
        return ""
    return html.number(here[key] / full[key], ".1%") if here.get(key) is not None else ""


def reconstructed_text(found: dict[str, Any], pruning: Pruning, opened: Opened) -> str:
    """A text shaded by what each token lost, and both continuations."""
    lost = [float("nan") if value is None else value for value in found["lost"]]
    finite = [abs(value) for value in lost if value == value]
    shaded = html.tokens(found["tokens"], lost, max([1.0, *finite]))
    facts = (
        f"<ul class=facts><li>loss <b>{html.number(found['ce'], '.3f')}</b> → "
        f"<b>{html.number(found['spliced_ce'], '.3f')}</b> nats per token</li>"
        f"<li>FVU of this text <b>{html.number(found['fvu'], '.3f')}</b></li>"
        f"<li>L0 <b>{found['l0']:.1f}</b></li></ul>"
    )
    cut = f"<p class=note>{found['left_out']} tokens at the end were left out.</p>" if found["left_out"] else ""
    rows = [
        ["the model goes on", f"<span class=tokens>{escape(found['plain'])}</span>"],
        [f"with {pruning.width:,} latents", f"<span class=tokens>{escape(found['spliced'])}</span>"],
    ]
    return (
        f"<p>{shaded}</p><p class=quiet>Shaded: tokens that became harder to predict (orange) or easier (blue).</p>"
        f"{facts}{cut}{html.table(['', 'continuation'], rows)}"
    )


def _name(opened: Opened, pruning: Pruning) -> str:
    source = Path(opened.source).name or "sae"
    place = "" if opened.subfolder == "" else "-" + opened.subfolder.replace("/", "-")
    return f"{source}{place}-{pruning.ranking}-{pruning.width}" + (f"-k{pruning.k}" if pruning.k else "")


def export(sae: SAEModel, folder: Path, name: str) -> Path:
    """A zip file that holds what `AutoModel.from_pretrained` reads, in a folder called `name`.

    Older ones in the folder are removed.
    """
    for old in folder.glob("*/*.zip"):
        if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(old.parent, ignore_errors=True)
    target = Path(tempfile.mkdtemp(dir=folder)) / f"{name}.zip"
    with tempfile.TemporaryDirectory(dir=folder) as saved:
        sae.save_pretrained(saved)
        with zipfile.ZipFile(target, "w") as file:  # weights do not get smaller by packing
            for path in sorted(Path(saved).iterdir()):
                file.write(path, f"{name}/{path.name}")
            file.writestr(f"{name}/README.md", _readme(name, sae))
    return target


def _readme(name: str, sae: SAEModel) -> str:
    return (
        f"# {name}\n\n{sae.config.num_latents} latents of an SAE on `{sae.config.hookpoint}` of "
        f"`{sae.config.base_model}`, pruned. `latent_ids` says which they were.\n\n"
        "```python\nimport hf_matryoshka_sae  # registers the classes\nfrom transformers import AutoModel\n\n"
        f'sae = AutoModel.from_pretrained("{name}")\n```\n'
    )


def _push(sae: SAEModel, repo: str, token: str | None, private: bool) -> str:
    repo = repo.strip()
    if repo.count("/") != 1:
        raise ValueError("Name the repository as your-name/its-name.")
    commit = sae.push_to_hub(repo, token=token, private=private)
    return f"Pushed: [{commit.repo_url.repo_id}]({commit.repo_url})"
