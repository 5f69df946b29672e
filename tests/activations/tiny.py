"""Small random models and tokenizers, built here so that no file is needed."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)


WORDS = 200
SPECIAL = ["<s>", "</s>", "[CLS]", "[SEP]", "[MASK]", "<pad>", "<unk>"]
SIZES = {
    "vocab_size": WORDS + len(SPECIAL),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def tokenizer(kind: str = "bos", words: int = WORDS) -> PreTrainedTokenizerFast:
    """Words `w0` .. `w199`. Kinds: `bos`, `eos` (no BOS), `bare` (neither), `encoder` ([CLS] ... [SEP])."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(words))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>"}
    if kind == "bos":
        special |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    if kind == "eos":
        special |= {"eos_token": "</s>"}
    if kind == "encoder":
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "<pad>"}
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def texts(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    """Documents of 1 to `longest` random words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(WORDS, (n,), generator=generator).tolist()) for n in lengths]


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)).eval()


def gpt2():
    config = GPT2Config(vocab_size=SIZES["vocab_size"], n_positions=64, n_embd=16, n_layer=3, n_head=2)
    return GPT2LMHeadModel(config).eval()


def gpt_neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).eval()


def mixtral():
    config = MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM(config).eval()


def bert():
    return BertForMaskedLM(BertConfig(**SIZES)).eval()


# Model, path of its layers.
ARCHITECTURES = {
    "llama": (llama, "model.layers"),
    "gpt2": (gpt2, "transformer.h"),
    "gpt_neox": (gpt_neox, "gpt_neox.layers"),
    "mixtral": (mixtral, "model.layers"),
    "bert": (bert, "bert.encoder.layer"),
}
