"""Names of places in a language model, and of language models, from one library's vocabulary into another's.

Ours are those of transformers: the path of a module, which means its output, or that path with `:input`. The layouts
below say where each site of TransformerLens lies in a family of architectures. Nothing is guessed: where the family is
not known, or a site has no module of its own there, the answer is `None`, and [`kept_with_warning`] keeps the name.
"""

import logging
import re
from dataclasses import dataclass


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Where the sites of a layer are in one family of transformers models.

    Args:
        base (`str`): Path of the base model, with its dot.
        layers (`str`): Path of the list of layers in the base model.
        embedding (`str`): Path of the token embedding in the base model.
        sites (`dict[str, str]`): Path in the layer by TransformerLens's name in the block; `""` is the layer itself.
    """

    base: str
    layers: str
    embedding: str
    sites: dict[str, str]

    def layer(self, index: str | int) -> str:
        """Return the path of a layer."""
        return f"{self.base}{self.layers}.{index}"


_LLAMA_SITES = {
    "hook_resid_post": "",
    "hook_resid_pre": ":input",
    "attn.hook_z": "self_attn.o_proj:input",
    "hook_attn_out": "self_attn.o_proj",
    "hook_resid_mid": "post_attention_layernorm:input",
    "ln2.hook_normalized": "post_attention_layernorm",
    "hook_mlp_in": "post_attention_layernorm",
    "mlp.hook_post": "mlp.down_proj:input",
    "hook_mlp_out": "mlp",
}

# Gemma 2 and 3 normalise the outputs of attention and MLP before they are added to the residual stream.
_GEMMA2_SITES = _LLAMA_SITES | {
    "hook_attn_out": "post_attention_layernorm",
    "hook_resid_mid": "pre_feedforward_layernorm:input",
    "ln2.hook_normalized": "pre_feedforward_layernorm",
    "hook_mlp_in": "pre_feedforward_layernorm",
    "hook_mlp_out": "post_feedforward_layernorm",
}

_GPT2_SITES = {
    "hook_resid_post": "",
    "hook_resid_pre": ":input",
    "attn.hook_z": "attn.c_proj:input",
    "hook_attn_out": "attn",
    "hook_resid_mid": "ln_2:input",
    "ln2.hook_normalized": "ln_2",
    "hook_mlp_in": "ln_2",
    "mlp.hook_post": "mlp.c_proj:input",
    "hook_mlp_out": "mlp",
}

# Attention and MLP read the same residual stream: there is no middle of it.
_NEOX_SITES = {
    "hook_resid_post": "",
    "hook_resid_pre": ":input",
    "attn.hook_z": "attention.dense:input",
    "hook_attn_out": "attention",
    "ln2.hook_normalized": "post_attention_layernorm",
    "hook_mlp_in": "post_attention_layernorm",
    "mlp.hook_post": "mlp.dense_4h_to_h:input",
    "hook_mlp_out": "mlp",
}

LAYOUTS = {
    "llama": Layout("model.", "layers", "embed_tokens", _LLAMA_SITES),
    "gemma2": Layout("model.", "layers", "embed_tokens", _GEMMA2_SITES),
    "gpt2": Layout("transformer.", "h", "wte", _GPT2_SITES),
    "gpt_neox": Layout("gpt_neox.", "layers", "embed_in", _NEOX_SITES),
}

# The first that is found in the model's name, in small letters.
_FAMILIES = (
    (r"gpt-?2", "gpt2"),
    (r"pythia|gpt-?neox|polyglot", "gpt_neox"),
    (r"gemma-?[23](-|$)", "gemma2"),
    (r"gemma|llama|qwen|mistral|smollm|deepseek-r1-distill", "llama"),
)

# Owners of models that TransformerLens names without them.
_OWNERS = (
    (r"gpt2(-medium|-large|-xl)?", "openai-community"),
    (r"distilgpt2", "distilbert"),
    (r"pythia-.+|gpt-neox-20b|gpt-neo-.+B|gpt-neo-125M|gpt-j-6B", "EleutherAI"),
    (r"gemma-.+", "google"),
)

# Models that it names only with their owners; others leave them out all the same.
_MORE_OWNERS = (
    (r"(Meta-)?Llama-3.+", "meta-llama"),
    (r"Qwen\d.*", "Qwen"),
    (r"DeepSeek-R1.*", "deepseek-ai"),
)

_RENAMED = {
    "gpt2-small": "openai-community/gpt2",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    **{f"Llama-2-{size}": f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "7b-chat", "13b-chat")},
}


def hf_model_id(name: str | None) -> str | None:
    """Return the Hub id of a model that another library names.

    Args:
        name (`str`, *optional*): Such as `"gpt2-small"`, `"pythia-70m-deduped"` or `"gemma-2-2b"` in TransformerLens;
            Hub ids and unknown names stay as they are, the latter with a warning.

    Returns:
        `str`, or `None` where no name is given.
    """
    if name is not None and not isinstance(name, str):
        raise ValueError(f"The name of the language model should be a text, is a {type(name).__name__}.")
    if not name or "/" in name or name == "embedded":
        return name or None
    if name in _RENAMED:
        return _RENAMED[name]
    for pattern, owner in (*_OWNERS, *_MORE_OWNERS):
        if re.fullmatch(pattern, name):
            return f"{owner}/{name}"
    qwen = re.fullmatch(r"qwen([\d.]*-[\d.]+)b(-\w+)?", name)
    if qwen is not None:
        return f"Qwen/Qwen{qwen[1]}B{(qwen[2] or '').title()}"
    logger.warning("The language model %r is kept as it is: its Hub id is not known. Pass `base_model`.", name)
    return name


def transformer_lens_model(name: str | None) -> str | None:
    """Return TransformerLens's name of a model: without its owner where it has such a name, else the Hub id."""
    if name is None:
        return None
    for short, long in _RENAMED.items():
        if long == name:
            return short
    owner, _, short = name.rpartition("/")
    known = any(own == owner and re.fullmatch(pattern, short) for pattern, own in _OWNERS)
    return short if known else name


def layout_of(base_model: str | None) -> Layout | None:
    """Return the layout of a language model, from its name; `None` where its family is not known."""
    for pattern, family in _FAMILIES:
        if base_model and re.search(pattern, base_model.lower()):
            return LAYOUTS[family]
    return None


def from_transformer_lens(name: str, base_model: str | None) -> str | None:
    """Return our hookpoint for a hook of TransformerLens.

    Args:
        name (`str`): Such as `"blocks.3.hook_resid_pre"` or `"hook_embed"`.
        base_model (`str`, *optional*): The language model, whose family decides the paths.

    Returns:
        `str` such as `"model.layers.3:input"`; `None` where it cannot be translated.
    """
    layout = layout_of(base_model)
    if layout is None:
        return None
    if name == "hook_embed":
        return layout.base + layout.embedding
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None or match[2] not in layout.sites:
        return None
    return _join(layout.layer(match[1]), layout.sites[match[2]])


def to_transformer_lens(hookpoint: str, base_model: str | None = None) -> str | None:
    """Return TransformerLens's hook for one of our hookpoints, the inverse of [`from_transformer_lens`].

    Args:
        hookpoint (`str`): Such as `"gpt_neox.layers.3:input"`.
        base_model (`str`, *optional*): The language model; without it the path's beginning decides, which leaves
            sites open that lie elsewhere in Gemma 2 and 3 than in Llama.

    Returns:
        `str`, or `None` where it cannot be translated.
    """
    known = layout_of(base_model)
    hooks = set()
    for layout in [known] if known else LAYOUTS.values():
        if hookpoint == layout.base + layout.embedding:
            hooks.add("hook_embed")
        match = re.fullmatch(re.escape(f"{layout.base}{layout.layers}.") + r"(\d+)(.*)", hookpoint)
        if match is None:
            continue
        # Reversed, so that of two names for one place the first wins.
        names = {path: site for site, path in reversed(layout.sites.items())}
        site = names.get(match[2].removeprefix("."))
        hooks.add(f"blocks.{match[1]}.{site}" if site else None)
    return hooks.pop() if len(hooks) == 1 else None


def _join(layer: str, path: str) -> str:
    return layer + path if path.startswith(":") or not path else f"{layer}.{path}"


def from_module_path(name: str) -> str:
    """Return our hookpoint for a module path that may end in `.output` or `.input`, as Gemma Scope 2 writes them."""
    if name.endswith(".input"):
        return name.removesuffix(".input") + ":input"
    return name.removesuffix(".output")


def to_module_path(hookpoint: str) -> str:
    """Return the inverse of [`from_module_path`]."""
    path, _, side = hookpoint.partition(":")
    return f"{path}.{side or 'output'}"


def from_sparsify(name: str, base_model: str | None) -> str | None:
    """Return our hookpoint for one of sparsify's, a path that begins at the base model (`"layers.10"`)."""
    layout = layout_of(base_model)
    if layout is None and re.match(r"(h\.\d+|wte)\b", name):  # no other family has these
        layout = LAYOUTS["gpt2"]
    if layout is None or not re.match(rf"({layout.layers}\.\d+|{layout.embedding})(\.|$)", name):
        return None
    return layout.base + name


def to_sparsify(hookpoint: str) -> str | None:
    """Return sparsify's name of one of our hookpoints; `None` for inputs, which it does not know, and other paths."""
    for layout in LAYOUTS.values():
        if hookpoint.startswith(layout.base) and ":" not in hookpoint:
            return hookpoint.removeprefix(layout.base)
    return None


def kept_with_warning(name: str | None, translated: str | None, base_model: str | None) -> str | None:
    """Return `translated`, or where that is `None` the name as it is, with a warning that says what to do."""
    if name and translated is None:
        logger.warning(
            "The hookpoint %r of %s is kept as it is: where that lies among the modules of transformers is not known. "
            "Pass `hookpoint` (and `base_model`).",
            name,
            base_model or "an unnamed model",
        )
    return translated if translated is not None else (name or None)
