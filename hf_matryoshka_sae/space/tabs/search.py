"""Search: one box for words and token patterns; latents that fire there, under the latents that they refine."""

import re
from html import escape
from typing import Any

import gradio as gr

from ..endpoints import Endpoints
from ..limits import UNREACHABLE
from ..looks.chips import bar, chip, percent, problem
from ..looks.messages import shows_errors
from .drawer import Drawer
from .inputs import BARS, BROWSER, HEAVY, LIGHT, Shown, area


EXAMPLES = (
    ("numbers", r"[re `\s?\d+`]"),
    ("the token after “the”", "[re ` ?the`] ."),
    ("quotation marks", r"[re `\s?[\"'“‘]`]"),
    ("a token that came before", "[v=.] .* [v]"),
    ("words: return, returns", "return, returns"),
)
HELP = """**Words**, with commas between them, are looked for whole and in any case. **Patterns** are regular
expressions over tokens: `` `text` `` (a leading space counts), `.` any token, `(a | b)`, repeats `+ * ? {2,3}`,
look-arounds `(?<=...)`, `[v=.] ... [v]` for what comes again, and ``[re `\\d+`]`` for what one token says. A latent's
cosine is that of its activations with 1 at the last token of every match."""
KINDS = {"whichever it looks like": "", "words": "words", "a pattern": "pattern"}

_READ_AS = {"words": "words:", "pattern": "the pattern"}
_QUICK = "1"
_FINDING: dict[str, Any] = {**HEAVY, "trigger_mode": "always_last"}
_SIGNS = re.compile(r"[\[\](){}|*+?`\\#^$]|^\s*\.|\.\s*$|\s\.\s")


def kind_of(query: str) -> str:
    """Whether a query is a `"pattern"` or `"words"`: a pattern has signs that words have not."""
    return "pattern" if _SIGNS.search(query.strip()) else "words"


class SearchTab:
    """The tab's components and what they do.

    Args:
        endpoints ([`Endpoints`]): Answers.
        shown ([`Shown`]): What is open.
    """

    def __init__(self, endpoints: Endpoints, shown: Shown) -> None:
        self.endpoints, self.shown = endpoints, shown
        with gr.Row(elem_classes="ask-row"):
            self.query = gr.Textbox(
                label="Words or a pattern", placeholder="return, returns", max_lines=6, scale=4, min_width=240
            )
            self.kind = gr.Dropdown(list(KINDS.items()), value="", label="Read it as", scale=1, min_width=150)
            self.search = gr.Button("Search", variant="primary", scale=0, min_width=110)
        with gr.Row(elem_classes="examples-row"):
            self.examples = [gr.Button(title, size="sm", min_width=90) for title, _ in EXAMPLES]
        self.hits = area("hits")
        with gr.Accordion("How to write a pattern", open=False):
            gr.Markdown(HELP)
        self._wire()

    def _wire(self) -> None:
        asked = [self.shown.current, self.query, self.kind, self.shown.width]
        self._searches(gr.on([self.search.click, self.query.submit], self.find, asked, self.hits, **_FINDING))
        for button, (_, query) in zip(self.examples, EXAMPLES, strict=True):
            chosen = button.click(
                lambda query=query: (query, "", ""), None, [self.query, self.kind, self.hits], **LIGHT
            )
            self._searches(chosen.then(self.find, asked, self.hits, **_FINDING))
        self.shown.width.release(self.again, [*asked, self.hits], self.hits, **_FINDING)
        self.shown.opened.change(
            self.refresh, [self.shown.current, self.shown.opened], [self.query, self.kind, self.hits], **LIGHT
        ).then(self.find_linked, [*asked, self.hits], self.hits, **_FINDING)

    def _searches(self, found: Any) -> None:
        """What follows a search: it goes into the link, and is dropped where something else is asked for by now."""
        asked = [self.query, self.kind, self.hits]
        step = "(q, kind, hits) => { nested.show({q, kind}); return nested.fitting(hits, q + kind); }"
        found.then(None, asked, self.hits, js=step, **BROWSER)

    def connect(self, drawer: Drawer) -> None:
        """Let the drawer ask for latents like the one it shows."""
        asked = [self.shown.current, self.query, self.kind, self.shown.width]
        outputs = [self.query, self.kind, self.hits, self.shown.tabs]
        like = drawer.like.click(shows_errors(self.like), [self.shown.current, self.shown.latent], outputs, **LIGHT)
        self._searches(like.success(self.find, asked, self.hits, **_FINDING))
        # What was found belongs to what was asked: a change clears it.
        for changed in (self.query.input, self.kind.input):
            changed(None, None, self.hits, js="() => ''", **BROWSER)

    def refresh(self, current: tuple[str, str], view: dict[str, Any]) -> tuple[str, str, str]:
        """What the tab shows of an SAE that was just opened: the query of the link, else an example from its index."""
        query = view.get("q") or ""
        return query, view.get("kind") if query else "", "" if query else self.first(current)

    def find_linked(self, current: tuple[str, str], query: str, kind: str, width: float, hits: str) -> Any:
        """What a link searches for."""
        return self.find(current, query, kind, width) if query and not hits else gr.skip()

    def first(self, current: tuple[str, str]) -> str:
        """An example that asks the index alone."""
        try:
            if self.endpoints.describe(*current)["index_tokens"] is None:
                return ""
            rows = self.endpoints.latents(*current, "energy", contains=_QUICK, count=8)
        except (ValueError, *UNREACHABLE):
            return ""  # an index of very many latents
        chips = " ".join(chip(current, row["latent"], row["label"]) for row in rows)
        return (
            f'<p class="chips"><span>From the index: latents that fire most on “{_QUICK}”</span> {chips}</p>'
            '<p class="quiet">A search runs over held-out text and says how exactly each latent fires there.</p>'
        )

    def again(self, current: tuple[str, str], query: str, kind: str, width: float, hits: str) -> Any:
        """The same at another width, where something was found."""
        return self.find(current, query, kind, width) if hits and query else gr.skip()

    def like(self, current: tuple[str, str], latent: float | None) -> tuple[Any, ...]:
        """The pattern of the tokens on which a latent fires most."""
        feature = self.endpoints.feature(int(latent or 0), *current)
        peaks = dict.fromkeys(row["tokens"][row["peak"]] for row in feature["contexts"])
        texts = [text for text in peaks if text and "`" not in text and "�" not in text][:8]
        pattern = " | ".join(f"[re `{re.escape(text)}`]".replace("\n", "\\n") for text in texts)
        return f"({pattern})" if texts else "", "", "", gr.update(selected="search")

    def find(
        self,
        current: tuple[str, str],
        query: str,
        kind: str,
        width: float,
        progress: Any = BARS,  # noqa: ARG002 (gradio draws its bars there)
    ) -> str:
        """The latents that fire where the query says, as HTML; or what is wrong with it."""
        of = f'<div data-of="{escape((query or "") + kind, quote=True)}">'
        query, kind = (query or "").strip("\n"), kind or kind_of(query or "")
        try:
            about = self.endpoints.describe(*current)
            width = min(int(width), about["num_latents"])  # the slider may have that of another SAE
            hits = self.endpoints.search(query, kind, *current, width)
            above = {hit["latent"]: self._above(current, about, hit["latent"]) for hit in hits}
        except (ValueError, *UNREACHABLE) as error:
            return f"{of}{problem(error)}</div>"
        hits_shown = hits_html(hits, above, current, f"Read as {_READ_AS[kind]} {query}", about["tokens"], width)
        return f"{of}{hits_shown}</div>"

    def _above(self, current: tuple[str, str], about: dict[str, Any], latent: int) -> list[int]:
        if about["index_tokens"] is None:
            return []
        return [one["latent"] for one in self.endpoints.feature(latent, *current)["family"]["ancestors"]]


def hits_html(
    hits: list[dict[str, Any]],
    above: dict[int, list[int]],
    current: tuple[str, str],
    read_as: str,
    tokens: int,
    width: int,
) -> str:
    """Hits best first, each under the nearest of its ancestors that was hit too.

    Args:
        hits (`list[dict]`): Of `Endpoints.search`.
        above (`dict[int, list[int]]`): Ancestors of each hit, nearest first.
        current (`tuple[str, str]`): Source and place of the SAE.
        read_as (`str`): What the query was taken for.
        tokens (`int`): Number of held-out tokens that were searched.
        width (`int`): Number of latents that were encoded.
    """
    if not hits:
        return f'<p class="note">{escape(read_as)}: the text holds it, but none of {width:,} latents fires there.</p>'
    by_latent = {hit["latent"]: hit for hit in hits}
    below: dict[int | None, list[int]] = {}
    for latent in by_latent:
        below.setdefault(next((one for one in above.get(latent, []) if one in by_latent), None), []).append(latent)

    def rows(parent: int | None, depth: int) -> str:
        parts = []
        for latent in below.get(parent, []):
            hit = by_latent[latent]
            parts.append(
                f'<tr><td style="--depth:{depth}">{chip(current, latent, hit["label"])}</td>'
                f"<td class=number>{hit['cosine']:.3f}</td><td>{bar(hit['precision'])}</td>"
                f"<td>{bar(hit['recall'])}</td></tr>{rows(latent, depth + 1)}"
            )
        return "".join(parts)

    matched = hits[0]["tokens_matched"]
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Hits"><table class="hits"><caption>'
        f"{escape(read_as)}: {matched:,} of {tokens:,} held-out tokens ({percent(matched / tokens)}), "
        f"with {width:,} latents. Precision: share of a latent's firings that match; recall: share of matches on "
        "which it fires. A latent stands under the one that it refines.</caption><thead><tr><th scope=col>latent</th>"
        "<th scope=col class=number>cosine</th><th scope=col>precision</th><th scope=col>recall</th></tr></thead>"
        f"<tbody>{rows(None, 0)}</tbody></table></div>"
    )
