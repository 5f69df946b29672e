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
    from .index.layout import Context, Feature


Spell = Callable[[Iterable[int]], list[str]]
"""Takes token ids and returns the text of each."""

_SHOWN_TOKENS, _SHOWN_CONTEXTS = 8, 10
_MOST, _SOME = 0.75, 0.4
_OFTEN, _SELDOM = 0.1, 1e-4
_WIDE = 100  # characters of a context


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
    """Return a sentence on how often a latent fires and on what, from its strongest contexts."""
    if not feature.count:
        return "Never fires on the text of the index."
    often = "often: " if feature.frequency > _OFTEN else "seldom: " if feature.frequency < _SELDOM else ""
    told = f"Fires {often}on {feature.frequency:.3%} of tokens"
    if feature.first_position_share > _MOST:
        return f"{told}, nearly always the first of a window."
    peaks = Counter(int(context.token_ids[context.peak]) for context in feature.top_contexts)
    if not peaks:
        return f"{told}."
    total, common = sum(peaks.values()), peaks.most_common(3)
    texts = [repr(text) for text in spell(token for token, _ in common)]
    share = common[0][1] / total
    if share >= _MOST:
        return f"{told}, mostly {texts[0]} ({common[0][1]} of its {total} strongest contexts)."
    if sum(count for _, count in common) >= _SOME * total:
        return f"{told}, often {', '.join(texts)}."
    return f"{told}, many different ones ({len(peaks)} in its {total} strongest contexts)."


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
