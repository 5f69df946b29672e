"""Words, positions and splits with tokenizers of three conventions."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_matryoshka_sae.studies.concepts.first_letter import LETTERS, NotDefined, first_letter_task, vocabulary_words


WORDS = [first + rest for first in "abc" for rest in ("rat", "lot", "ump", "ent", "orn", "old", "ight", "ast")]
PROMPT_TOKENS = ["has", "the", "first", "letter", ":", *"ABC"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's convention: a space belongs to the word behind it; BOS exists but is not added."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    merges, vocabulary = [], ["<s>", *sorted(alphabet)]
    for word in ["has", "the", "first", "letter", *WORDS]:
        marked = f"Ġ{word}"
        for end in range(2, len(marked) + 1):
            merge = (marked[: end - 1], marked[end - 1])
            if merge not in merges:
                merges.append(merge)
                vocabulary.append(marked[:end])
    merges += [("x", "y"), ("xy", "z")]  # a piece that no word begins with
    vocabulary += ["xy", "xyz"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def metaspace() -> PreTrainedTokenizerFast:
    """Llama's convention: spaces become a visible mark, one is put before the text, BOS is added."""
    vocabulary = ["<unk>", "<s>", "▁", "\n", *(f"▁{word}" for word in PROMPT_TOKENS + WORDS), ":", "xyz"]
    vocabulary = {token: i for i, token in enumerate(vocabulary)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace()]
    )
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's convention: pieces inside a word are marked; [CLS] and [SEP] around the text."""
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", *PROMPT_TOKENS, *WORDS, "##rat", "##xyz"]
    vocabulary = {token: i for i, token in enumerate(vocabulary)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def llama(tokenizer, **sizes):
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer), **sizes)).eval()


def bert(tokenizer):
    return BertModel(BertConfig(**SIZES, vocab_size=len(tokenizer))).eval()


CONVENTIONS = pytest.mark.parametrize(
    ("make_tokenizer", "make_model", "hookpoint"),
    [
        (byte_level, llama, "model.layers.0"),
        (metaspace, llama, "model.layers.0"),
        (word_piece, bert, "encoder.layer.0"),
    ],
)


@CONVENTIONS
def test_words_are_found_whatever_marks_their_beginning(make_tokenizer, make_model, hookpoint):
    found = vocabulary_words(make_tokenizer())
    prompt_words = {"has", "the", "first", "letter"}
    assert set(WORDS) <= set(found) and not [word for word in found if len(word) < 3]
    if make_tokenizer is not byte_level:  # there, beginnings of words are tokens too
        assert set(found) <= set(WORDS) | prompt_words
    assert "xyz" not in found


@CONVENTIONS
@pytest.mark.parametrize(
    "options",
    [{"shots": 20}, {"shots": 0}, {"prompt": "{word}", "shots": 0}, {"prompt": "has the {word} :", "shots": 1}],
)
def test_states_are_those_of_the_words_own_token(make_tokenizer, make_model, hookpoint, options):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    read, ids = [], []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: ids.append(args[0][0].tolist()))
    model.get_submodule(hookpoint).register_forward_hook(
        lambda module, args, output: read.append((output[0] if isinstance(output, tuple) else output)[0])
    )
    # Words of the prompt itself begin with letters that have fewer than five.
    task = first_letter_task(model, tokenizer, hookpoint, min_words=5, batch_size=1, **options)
    for word, state, states, row in zip(task.words, task.states, read, ids, strict=True):
        # The word is not among its own examples.
        (position,) = [at for at, token in enumerate(row) if tokenizer.decode([token]).strip() == word]
        torch.testing.assert_close(states[position], state)
        assert make_tokenizer is word_piece or [at for at, i in enumerate(row) if i == tokenizer.bos_token_id] == [0]
    together = first_letter_task(model, tokenizer, hookpoint, min_words=5, batch_size=7, **options)
    torch.testing.assert_close(together.states, task.states)  # padding and company do not matter


def test_a_causal_model_sees_nothing_behind_the_word_and_everything_before():
    tokenizer = byte_level()
    model = llama(tokenizer)
    bare = first_letter_task(model, tokenizer, "model.layers.1", prompt="{word}", shots=0)
    asked = first_letter_task(model, tokenizer, "model.layers.1", shots=0)
    shown = first_letter_task(model, tokenizer, "model.layers.1", shots=3)
    torch.testing.assert_close(asked.states, bare.states)
    assert not torch.allclose(shown.states, bare.states, atol=1e-3)


def test_split_is_by_word_for_each_letter():
    tokenizer = metaspace()
    tokenizer.add_tokens([f"▁{word.upper()}" for word in WORDS])
    task = first_letter_task(llama(tokenizer), tokenizer, "model.layers.0", shots=0, min_words=4, heldout=0.25, seed=3)
    assert task.letters.tolist() == [LETTERS.index(word[0].lower()) for word in task.words]
    sides = {}
    for word, heldout in zip(task.words, task.heldout.tolist(), strict=True):
        sides.setdefault(word.lower(), set()).add(heldout)
    assert all(len(side) == 1 for side in sides.values())
    for letter in task.letters.unique():
        of_letter = {w.lower() for w in task.words if w[0].lower() == LETTERS[letter]}
        assert sum(sides[word] == {True} for word in of_letter) == round(0.25 * len(of_letter))
    other = first_letter_task(llama(tokenizer), tokenizer, "model.layers.0", shots=0, min_words=4, seed=4)
    assert other.words != task.words


def test_letters_with_few_words_are_left_out():
    tokenizer = metaspace()
    task = first_letter_task(llama(tokenizer), tokenizer, "model.layers.0", shots=0, min_words=5)
    assert {word[0] for word in task.words} == set("abc")
    with pytest.raises(NotDefined, match="Fewer than two letters begin 30"):
        first_letter_task(llama(tokenizer), tokenizer, "model.layers.0", min_words=30)


def test_max_words_is_a_seeded_choice():
    tokenizer = metaspace()
    tasks = [
        first_letter_task(llama(tokenizer), tokenizer, "model.layers.0", shots=0, max_words=12, min_words=2, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert len(tasks[0].words) <= 12
    assert tasks[0].words == tasks[1].words != tasks[2].words


def test_a_tokenizer_without_words_is_named():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "42": 3, "страна": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    with pytest.raises(NotDefined, match="no token that is a word"):
        first_letter_task(llama(tokenizer), tokenizer, "model.layers.0")


def test_a_tokenizer_that_does_not_know_characters_is_named():
    with pytest.raises(NotDefined, match="Load a fast tokenizer"):
        vocabulary_words(SimpleNamespace(is_fast=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "no word"}, "'{word}' in it once"),
        ({"shots": -1}, "shots >= 0"),
        ({"heldout": 1.0}, "heldout between"),
        ({"shots": 10}, "Use fewer `shots`"),
    ],
)
def test_bad_options_are_named(options, message):
    tokenizer = metaspace()
    model = llama(tokenizer, max_position_embeddings=32)
    with pytest.raises(ValueError, match=message):
        first_letter_task(model, tokenizer, "model.layers.0", min_words=2, **options)


def test_states_that_are_not_finite_are_named():
    tokenizer = metaspace()
    model = llama(tokenizer)
    model.model.embed_tokens.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        first_letter_task(model, tokenizer, "model.layers.0", shots=0, min_words=2)
