r"""The first-letter task: hidden states of words, labelled with the letter each word begins with.

The words are those of the tokenizer: three or more letters that one token spells behind a space. The hidden state is
taken at the word's last token, which is identified by the characters it covers. With the published prompt,

    " tiger has the first letter: T\n stone has the first letter: S\n ... apple has the first letter:"
                                                                        ^ read here

A causal model has not read past the word there, so only the examples before tell it that letters matter. With
`prompt="{word}"` and `shots=0` the bare word is read instead, which suits models too small to learn from examples.

The task is that of Chanin et al. (2024, arXiv 2409.14507) as SAEBench has it (arXiv 2503.09532).
Shapes: N words, D width of the hidden states, S tokens of a prompt.
"""

import re
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from ...activations import harvest, resolve_hookpoints
from ...common.distributed import processes
from ...common.logs import progress


LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPT = "{word} has the first letter:"
_WORD = re.compile(r"[A-Za-z]{3,}")
_TEXTS_AT_ONCE = 4096


class NotDefined(ValueError):
    """Raised where a measure is not defined on this language model or tokenizer; the message says why."""


@dataclass
class FirstLetterTask:
    """Hidden states of words, and the letters the words begin with.

    Args:
        states (`Tensor` of shape `(N, D)`): Hidden state at each word's last token; float32, on the CPU.
        letters (`Tensor` of shape `(N,)`): First letter of each word, 0 for a to 25 for z.
        words (`list[str]`): The N words.
        heldout (`Tensor` of shape `(N,)`): bool; words to which nothing is fitted. Spellings that differ in capitals
            alone are on the same side.
        source (`dict[str, Any]`): Language model, hookpoint, position, prompt, shots and seed, for the report.
    """

    states: Tensor
    letters: Tensor
    words: list[str]
    heldout: Tensor
    source: dict[str, Any]


def first_letter_task(
    model: nn.Module,
    tokenizer: Any,
    hookpoint: str,
    *,
    prompt: str = PROMPT,
    shots: int = 10,
    max_words: int = 10_000,
    min_words: int = 10,
    heldout: float = 0.2,
    batch_size: int = 64,
    seed: int = 0,
) -> FirstLetterTask:
    """Read the words of a tokenizer's vocabulary with a language model; return their hidden states and letters.

    Args:
        model (`nn.Module`): A transformers model in `eval` mode.
        tokenizer: The language model's tokenizer; a fast one, which knows the characters each token covers.
        hookpoint (`str`): Module whose hidden states are read.
        prompt (`str`, *optional*): Text with `{word}` in it; `"{word}"` reads the bare word.
        shots (`int`, *optional*, defaults to `10`): Number of solved prompts of other words before the one that is
            read.
        max_words (`int`, *optional*, defaults to `10_000`): Largest number of words, sampled where there are more.
        min_words (`int`, *optional*, defaults to `10`): Number of words below which a letter is left out.
        heldout (`float`, *optional*, defaults to `0.2`): Share of each letter's words that nothing is fitted to.
        batch_size (`int`, *optional*, defaults to `64`): Prompts in a forward pass.
        seed (`int`, *optional*, defaults to `0`): Seed of the choice of words, their split and the examples.

    Raises:
        [`NotDefined`]: if the vocabulary has too few words.
        `ValueError`: if an option is out of range, or a prompt is longer than the model can read.
    """
    if prompt.count("{word}") != 1:
        raise ValueError(f"`prompt` must have '{{word}}' in it once, got {prompt!r}.")
    if shots < 0 or max_words < 1 or min_words < 2 or not 0 < heldout < 1:
        raise ValueError(
            "Expected shots >= 0, max_words >= 1, min_words >= 2 and heldout between 0 and 1, got "
            f"{shots}, {max_words}, {min_words} and {heldout}."
        )
    (hookpoint,) = resolve_hookpoints(model, [hookpoint])
    random = Random(seed)
    words = vocabulary_words(tokenizer)
    words = random.sample(words, min(max_words, len(words)))
    words = _frequent_letters(words, min_words, tokenizer)
    is_heldout = _split(words, heldout, random)
    texts, spans = _prompts(words, prompt, shots, random)
    source = {
        "model": model.config.name_or_path or type(model).__name__,
        "hookpoint": hookpoint,
        "position": "last token of the word",
        "prompt": prompt,
        "shots": shots,
        "seed": seed,
    }
    states = _read(model, tokenizer, hookpoint, texts, spans, batch_size)
    letters = torch.tensor([LETTERS.index(word[0].lower()) for word in words])
    return FirstLetterTask(states, letters, words, is_heldout, source)


def vocabulary_words(tokenizer: Any) -> list[str]:
    """Return the words that are one token each behind a space, in the order of the vocabulary.

    How a tokenizer marks the beginning of a word does not matter: a token's text is put behind "a ", and it is a word
    if one token, spelled like it, covers its letters and the space. (BERT's cover no space at all.)

    Args:
        tokenizer: A fast tokenizer of transformers.

    Raises:
        [`NotDefined`]: if there is no such word, or the tokenizer does not tell which characters a token covers.
    """
    if not tokenizer.is_fast:
        raise NotDefined(
            f"The first-letter task needs to know which characters a token covers, which {type(tokenizer).__name__} "
            "does not tell. Load a fast tokenizer."
        )
    special = set(tokenizer.all_special_ids)
    tokens = [token for token in range(len(tokenizer)) if token not in special]
    spelled = [text.strip() for text in tokenizer.batch_decode([[token] for token in tokens])]
    spelling = dict(zip(tokens, spelled, strict=True))
    words = [word for word in dict.fromkeys(spelled) if _WORD.fullmatch(word)]
    single_tokens = []
    for start in range(0, len(words), _TEXTS_AT_ONCE):
        some = words[start : start + _TEXTS_AT_ONCE]
        rows, covering = _tokenise(tokenizer, [f"a {word}" for word in some], [(1, 2 + len(word)) for word in some])
        for word, row, positions in zip(some, rows, covering, strict=True):
            # An unknown token covers letters too, but does not spell them.
            if [spelling.get(row[at]) for at in positions] == [word]:
                single_tokens.append(word)
    if not single_tokens:
        raise NotDefined(
            f"{type(tokenizer).__name__} has no token that is a word of three or more letters from a to z, so there "
            "are no words whose first letter could be asked for. It may work on characters, bytes or another script."
        )
    return single_tokens


def _frequent_letters(words: list[str], min_words: int, tokenizer: Any) -> list[str]:
    by_letter = _by_letter(words)
    frequent = [word for word in words if len({w.lower() for w in by_letter[word[0].lower()]}) >= min_words]
    if len(_by_letter(frequent)) < 2:
        raise NotDefined(
            f"Fewer than two letters begin {min_words} or more of the {len(words)} words for which "
            f"{type(tokenizer).__name__} has a token, so there is nothing to tell apart."
        )
    return frequent


def _split(words: list[str], share: float, random: Random) -> Tensor:
    """Return which words are held out: a share of each letter's, at least one."""
    heldout = set()
    for some in _by_letter([word.lower() for word in words]).values():
        spellings = list(dict.fromkeys(some))
        heldout.update(random.sample(spellings, max(1, min(len(spellings) - 1, round(share * len(spellings))))))
    return torch.tensor([word.lower() in heldout for word in words])


def _by_letter(words: list[str]) -> dict[str, list[str]]:
    by_letter = {}
    for word in words:
        by_letter.setdefault(word[0].lower(), []).append(word)
    return by_letter


def _line(prompt: str, word: str) -> tuple[str, int]:
    """Return the prompt with a word behind a space, and the character at which the word starts."""
    before, after = prompt.split("{word}")
    before = before if before[-1:].isspace() else before + " "
    return before + word + after, len(before)


def _prompts(words: list[str], prompt: str, shots: int, random: Random) -> tuple[list[str], list[tuple[int, int]]]:
    """Return each word's text, examples first, and the characters of the text that are the word."""
    texts, spans = [], []
    for word in words:
        # One more than `shots`, in case the word itself is among them.
        sampled = random.sample(words, min(shots + 1, len(words)))
        examples = [other for other in sampled if other != word][:shots]
        before = "".join(f"{_line(prompt, other)[0]} {other[0].upper()}\n" for other in examples)
        line, start = _line(prompt, word)
        texts.append(before + line)
        spans.append((len(before) + start, len(before) + start + len(word)))
    return texts, spans


def _tokenise(
    tokenizer: Any, texts: list[str], spans: list[tuple[int, int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of each text, and the positions of the tokens that cover some of its span of characters."""
    encoded = tokenizer(texts, return_offsets_mapping=True, verbose=False)
    bos, rows, covering = tokenizer.bos_token_id, [], []
    for ids, offsets, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
        positions = [at for at, (begin, stop) in enumerate(offsets) if begin < end and stop > max(begin, start)]
        # GPT-2 and others have a BOS token which their tokenizers do not add by themselves.
        added = bos is not None and ids[:1] != [bos]
        rows.append([bos, *ids] if added else ids)
        covering.append([at + added for at in positions])
    return rows, covering


def _read(
    model: nn.Module,
    tokenizer: Any,
    hookpoint: str,
    texts: list[str],
    spans: list[tuple[int, int]],
    batch_size: int,
) -> Tensor:
    """Return the hidden state at each word's last token, `(N, D)` in float32 on the CPU."""
    device = next(model.parameters()).device
    limit = getattr(model.config, "max_position_embeddings", None)
    states = []
    batches = range(0, len(texts), batch_size)
    for begin in progress(batches, desc="first-letter task", leave=False, disable=processes()[0] != 0):
        some = slice(begin, begin + batch_size)
        rows, covering = _tokenise(tokenizer, texts[some], spans[some])
        length = max(map(len, rows))
        if limit and length > limit:
            raise ValueError(f"A prompt has {length} tokens, the model reads {limit}. Use fewer `shots`.")
        pad = tokenizer.pad_token_id or 0  # any id will do: the mask hides it
        input_ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
        last = torch.tensor([tokens[-1] for tokens in covering], device=device)
        hidden = harvest(model, input_ids, mask, [hookpoint])[hookpoint]
        states.append(hidden[torch.arange(len(last), device=device), last].float().cpu())
    states = torch.cat(states)
    if not states.isfinite().all():
        raise ValueError(f"Hidden states at '{hookpoint}' are not finite. Load the model in bfloat16 or float32.")
    return states
