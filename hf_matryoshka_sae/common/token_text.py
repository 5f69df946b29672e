"""The text of tokens: what each adds where it stands in the middle of a text, leading space included.

Tokenizers mark the beginning of a word in different ways, and some drop a space where a text begins. So a token is
decoded behind an "a": what is added is what counts. Bytes that are no whole character are shown as U+FFFD.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ANCHOR = "a"
LOST = "\ufffd"
"""How a decoder shows bytes that are no whole character."""

Encode = Callable[[str], list[int]]
Decode = Callable[[list[list[int]]], list[str]]


def token_texts(tokenizer: "PreTrainedTokenizerBase", tokens: Iterable[int]) -> list[str]:
    """Return what each token by itself adds to a text."""
    encode, decode = coders(tokenizer)
    tokens, anchor = list(tokens), encode(ANCHOR)
    behind = decode([anchor])[0] if anchor else ""
    texts = decode([[*anchor, token] for token in tokens])
    alone = iter(decode([[token] for token, text in zip(tokens, texts, strict=True) if not text.startswith(behind)]))
    return [text[len(behind) :] if text.startswith(behind) else next(alone) for text in texts]


def texts_in_place(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int]) -> list[str]:
    """Return what each token adds to those before it; a character of several tokens stands at the last of them."""
    encode, decode = coders(tokenizer)
    anchor = encode(ANCHOR)
    texts = decode([[*anchor, *tokens[:size]] for size in range(len(tokens) + 1)])
    added, so_far = [], texts[0]
    for text in texts[1:]:
        whole = text.rstrip(LOST)
        goes_on = whole.startswith(so_far)
        added.append(whole[len(so_far) :] if goes_on else "")
        so_far = whole if goes_on else so_far
    return added


def coders(tokenizer: "PreTrainedTokenizerBase") -> tuple[Encode, Decode]:
    """Return two functions: from text to tokens without special ones, and from batches of tokens to texts."""
    if not tokenizer.is_fast:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return (
            lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            lambda rows: [tokenizer.decode(row, **options) for row in rows],
        )
    backend = tokenizer.backend_tokenizer
    return (
        # Truncation and padding set for a model must not touch a pattern.
        lambda text: tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)[
            "input_ids"
        ],
        lambda rows: backend.decode_batch(rows, skip_special_tokens=False),
    )
