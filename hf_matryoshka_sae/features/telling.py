"""What a latent is, in words: text of its contexts and tokens, and a sentence on what it fires on.

An index holds token ids; the tokenizer of its language model gives them their text. Where that cannot be loaded,
tokens are shown as `#id`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ..activations.language_model import load_tokenizer
from ..common.token_text import token_texts


if TYPE_CHECKING:
    from .bands import Band
    from .index.layout import Context, Feature


Spell = Callable[[Iterable[int]], list[str]]
"""Takes token ids and returns the text of each."""

_SHOWN_TOKENS, _SHOWN_CONTEXTS = 8, 10
_MOST, _SOME = 0.75, 0.4
_OFTEN, _SELDOM = 0.1, 1e-4
_WIDE = 100  # characters of a context
_FEW = 3  # tokens that are named


def speller(model: str | None, tokenizer: Any = None) -> Spell:
    """Return a function from token ids to texts; its first call loads the tokenizer.

    Args:
        model (`str`, *optional*): Language model whose tokenizer is loaded.
        tokenizer: One that is at hand, in its place.
    """
    loaded: list[Any] = [tokenizer]

    def spell(tokens: Iterable[int]) -> list[str]:
        tokens = [int(token) for token in tokens]
        if loaded[0] is None:
            try:
                loaded[0] = load_tokenizer(model) if model else False
            except ValueError:
                loaded[0] = False  # numbers are better than nothing, and better than asking the network each time
        return token_texts(loaded[0], tokens) if loaded[0] and tokens else [f"#{token}" for token in tokens]

    return spell


def verdict(feature: "Feature", spell: Spell) -> str:
    """Return in words how often a latent fires and on what, and whether its strong and weak firings are about that."""
    if not feature.count:
        return "Never fires on the text of the index."
    often = "often: " if feature.frequency > _OFTEN else "seldom: " if feature.frequency < _SELDOM else ""
    sentence = f"Fires {often}on {feature.frequency:.3%} of tokens"
    if feature.first_position_share > _MOST:
        return f"{sentence}, nearly always the first of a window."
    about = band_verdict(feature, spell)
    return f"{sentence}. {about}" if about else f"{sentence}{_peaks(feature, spell)}."


def _peaks(feature: "Feature", spell: Spell) -> str:
    """Return which tokens lie under the strongest contexts."""
    peaks = Counter(int(context.token_ids[context.peak]) for context in feature.top_contexts)
    if not peaks:
        return ""
    total, common = sum(peaks.values()), peaks.most_common(3)
    texts = [repr(text) for text in spell(token for token, _ in common)]
    share = common[0][1] / total
    if share >= _MOST:
        return f", mostly {texts[0]} ({common[0][1]} of its {total} strongest contexts)"
    if sum(count for _, count in common) >= _SOME * total:
        return f", often {', '.join(texts)}"
    return f", many different ones ({len(peaks)} in its {total} strongest contexts)"


def band_verdict(feature: "Feature", spell: Spell) -> str:
    """Return in words whether a latent's strong and weak firings are about the same tokens; empty where unknown.

    Strong is above 60% of its largest activation, weak below 40%. Precision is measured on half of the text, own
    tokens are those under the strongest firings in the other half; see `bands`.
    """
    weak, strong = (_precision(feature.bands, *bounds) for bounds in ((0, 0.4), (0.6, 1)))
    if strong is None:
        return ""
    kind, base = kind_of(spell(feature.own_tokens)), feature.bands[0].base
    random = f"a random latent {base:.0%}"
    if strong < _SOME:
        return (
            f"Even its strong firings are seldom on {kind} ({strong:.0%}; {random}): no few tokens tell when it fires."
        )
    if weak is None:
        return f"Its firings are on {kind} ({strong:.0%}; {random})."
    share = sum(band.firings for band in feature.bands if band.high <= 0.4) / max(1, feature.count)
    if weak >= _SOME:
        return f"Strong firings are on {kind} ({strong:.0%}; {random}), and so are weak ones ({weak:.0%})."
    return (
        f"Strong firings are on {kind} ({strong:.0%}; {random}); weak ones, {share:.0%} of all, are not ({weak:.0%})."
    )


def _precision(bands: Sequence["Band"], low: float, high: float) -> float | None:
    """Return the precision of the bands between two bounds."""
    inside = [band for band in bands if band.low >= low and band.high <= high and band.precision is not None]
    firings = sum(band.firings for band in inside)
    return sum(band.firings * (band.precision or 0.0) for band in inside) / firings if firings else None


def kind_of(texts: Sequence[str]) -> str:
    """Return in words what tokens are: digits, punctuation, capitalised or spaces, or the first of them."""
    kinds: dict[str, Callable[[str], bool]] = {
        "digits": lambda text: text.strip().isdigit(),
        "white space": lambda text: not text.strip(),
        "punctuation": lambda text: bool(text.strip()) and not any(char.isalnum() for char in text),
        "capitalised words": lambda text: text.strip()[:1].isupper(),
    }
    if len(texts) > _FEW:
        for kind, fits in kinds.items():
            if all(map(fits, texts)):
                return kind
    shown = ", ".join(repr(text) for text in texts[:_FEW])
    return f"tokens such as {shown}" if len(texts) > _FEW else shown


def context_line(context: "Context", spell: Spell) -> str:
    """Return a context as a line: its activation, and its text with the token it is around in «marks»."""
    texts = [text.replace("\n", "⏎") for text in spell(context.token_ids)]
    peak = int(context.peak)
    before, after = "".join(texts[:peak])[-_WIDE // 2 :], "".join(texts[peak + 1 :])[: _WIDE // 2]
    return f"{context.value:8.3f}  {before}«{texts[peak]}»{after}"


def feature_text(feature: "Feature") -> str:
    """Return all that a reader wants to know of a latent: name, verdict, tokens, relatives and contexts."""
    spell = feature.spell or speller(None)
    return "\n".join([*_head(feature, spell), *contexts_text(feature.contexts, spell)])


def _head(feature: "Feature", spell: Spell) -> list[str]:
    name = f"latent {feature.latent}" + (f" (id {feature.latent_id})" if feature.latent_id != feature.latent else "")
    lines = [f"{name}: {feature.label}" if feature.label else name, verdict(feature, spell)]
    for title, pairs in (("promotes", feature.promoted), ("suppresses", feature.suppressed)):
        if pairs:
            texts = spell(token for token, _ in pairs[:_SHOWN_TOKENS])
            shown = (f"{text!r} {value:+.2f}" for text, (_, value) in zip(texts, pairs, strict=False))
            lines.append(f"{title} {', '.join(shown)}")
    for title, pairs in (("like it", feature.neighbours), ("fires with it", feature.cofiring)):
        if pairs:
            lines.append(f"{title}: {', '.join(f'{other} ({value:.2f})' for other, value in pairs[:5])}")
    return [*lines, f"refines latent {feature.parent}"] if feature.parent is not None else lines


def contexts_text(contexts: Sequence["Context"], spell: Spell) -> list[str]:
    """Return a line for each of the first contexts, and one that says how many more there are."""
    lines = [context_line(context, spell) for context in contexts[:_SHOWN_CONTEXTS]]
    more = len(contexts) - len(lines)
    return [*lines, f"          and {more} more"] if more > 0 else lines


def feature_html(feature: "Feature") -> str:
    """Return the same for notebooks: tokens are the darker, the stronger the latent fires on them."""
    spell = feature.spell or speller(None)
    head = "".join(f"<p>{escape(line)}</p>" for line in _head(feature, spell))
    return head + contexts_html(feature.contexts, spell)


def contexts_html(contexts: Sequence["Context"], spell: Spell) -> str:
    """Return contexts as a table in HTML."""
    rows = []
    for context in contexts[:_SHOWN_CONTEXTS]:
        most = max(float(context.activations.max()), 1e-12)
        spans = "".join(
            f'<span style="background:rgba(255,140,0,{max(0.0, float(value)) / most:.2f})">{escape(text)}</span>'
            for text, value in zip(spell(context.token_ids), context.activations, strict=True)
        )
        rows.append(f"<tr><td>{context.value:.3f}</td><td style='text-align:left'>{spans}</td></tr>")
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


class Contexts(list):
    """The contexts of a latent: a list, which prints as text."""

    def __init__(self, contexts: Iterable["Context"], spell: Spell) -> None:
        super().__init__(contexts)
        self._spell = spell

    def __repr__(self) -> str:
        return "\n".join(contexts_text(self, self._spell)) or "no contexts"

    def _repr_html_(self) -> str:
        return contexts_html(self, self._spell)
