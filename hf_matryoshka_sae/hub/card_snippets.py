"""Code for a card that runs as printed: with the package, and with transformers alone."""

import re

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..activations.hookpoints import split_hookpoint
from ..activations.language_model import EMBEDDED
from ..activations.sentences import SENTENCE_EMBEDDING
from .card_data import RunFacts, SAEFacts
from .card_text import base_model, language_model


_ROOM = 88  # characters in a line of code
_TEXT = '"A dictionary in which every prefix is a dictionary."'


def snippets(text: str) -> list[str]:
    """Return the Python code blocks of a card.

    Args:
        text (`str`): The card's Markdown.
    """
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def with_package(run: RunFacts, sae: SAEFacts, repo_id: str) -> str:
    """Return code that loads an SAE with `hf_matryoshka_sae`, all of it and its first latents only."""
    id, _ = language_model(run)
    model = id or (EMBEDDED if base_model(run) == EMBEDDED else None)
    hookpoint, where = sae.config.hookpoint, _where(repo_id, sae)
    known = model is not None and bool(hookpoint)
    of_texts = known and hookpoint == SENTENCE_EMBEDDING
    imports = ["import hf_matryoshka_sae  # registers the classes: no remote code is run"]
    if of_texts:
        imports += ["from hf_matryoshka_sae.activations.sentences import load_sentence_transformer"]
    elif known:
        imports += ["from hf_matryoshka_sae.activations import harvest, load_language_model"]
    lines = ["import torch"] * (not known) + ["from transformers import AutoModel", "", *imports, ""]
    revision = run.config.model_revision if run.config else None
    revision = f', revision="{revision}"' if revision else ""
    if of_texts:
        lines += _embedded_texts(f'load_sentence_transformer("{model}"{revision})')
    elif known:
        lines += [
            f'model, tokenizer = load_language_model("{model}"{revision})',
            f'tokens = tokenizer({_TEXT}, return_tensors="pt")',
            f'hidden_states = harvest(model, tokens.input_ids, None, ["{hookpoint}"])["{hookpoint}"]',
        ]
    else:
        lines += _random_states(sae)
    lines += [
        "",
        _load("sae", where),
        "latents = sae.encode(hidden_states.float())  # .values and .indices of the latents that fire",
        "reconstruction = sae.decode(latents)",
    ]
    widths = sae.config.widths
    if len(widths) > 1:
        width = widths[(len(widths) - 1) // 2]
        lines += [
            "every_prefix = sae.decode_prefixes(latents)  # one reconstruction for each of sae.prefix_widths",
            "",
            f"# Only the first {width:,} latents: the others are not fetched.",
            _load("small", where, f"width={width}"),
            "coarse = small.decode(small.encode(hidden_states.float()))",
        ]
    return "\n".join(lines)


def without_package(run: RunFacts, sae: SAEFacts, repo_id: str) -> str:
    """Return code that loads an SAE with transformers alone, with hidden states of a Hub model or random ones."""
    id, _ = language_model(run)
    where, hookpoint = _where(repo_id, sae), sae.config.hookpoint
    if id is None or not hookpoint:
        lines = ["import torch", "from transformers import AutoModel", "", *_random_states(sae)]
    elif hookpoint == SENTENCE_EMBEDDING:
        lines = ["from sentence_transformers import SentenceTransformer", "from transformers import AutoModel", ""]
        lines += _embedded_texts(f'SentenceTransformer("{id}")')
    else:
        lines = _hooked(run, id, hookpoint)
    return "\n".join(
        [
            *lines,
            "",
            _load("sae", where, "trust_remote_code=True"),
            "latents = sae.encode(hidden_states.float())",
            "reconstruction = sae.decode(latents)",
        ]
    )


def _where(repo_id: str, sae: SAEFacts) -> str:
    return f'"{repo_id}"' + (f', subfolder="{sae.subfolder}"' if sae.subfolder else "")


def _load(name: str, *arguments: str) -> str:
    """Return a call of `from_pretrained`, in two lines where one would be too long for a card."""
    call = f"{name} = AutoModel.from_pretrained({', '.join(arguments)})"
    return call if len(call) <= _ROOM else f"{name} = AutoModel.from_pretrained(\n    {', '.join(arguments)}\n)"


def _embedded_texts(model: str) -> list[str]:
    """Return code that embeds a text; the copy is no inference tensor, which autograd would refuse."""
    return [f"model = {model}", f"hidden_states = model.encode([{_TEXT}], convert_to_tensor=True).clone()"]


def _random_states(sae: SAEFacts) -> list[str]:
    return [f"hidden_states = torch.randn(4, 10, {sae.config.d_in})  # random: put the language model's here"]


def _hooked(run: RunFacts, id: str, hookpoint: str) -> list[str]:
    """Return code that takes the hidden states of a Hub model with a forward hook."""
    module, side = split_hookpoint(hookpoint)
    loader, revision = _loader(run), run.config.model_revision if run.config else None
    revision = f', revision="{revision}"' if revision else ""
    if side == "input":
        hook = [
            "def keep(module, inputs, named):",
            '    caught["states"] = inputs[0] if inputs else named["hidden_states"]',
        ]
        register = "register_forward_pre_hook(keep, with_kwargs=True)"
    else:
        hook = [
            "def keep(module, inputs, output):",
            '    caught["states"] = output[0] if isinstance(output, tuple) else output',
        ]
        register = "register_forward_hook(keep)"
    imports = ", ".join(sorted({"AutoModel", loader, "AutoTokenizer"}))
    return [
        "import torch",
        f"from transformers import {imports}",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{id}"{revision})',
        f'model = {loader}.from_pretrained("{id}"{revision})',
        "caught = {}",
        "",
        "",
        *hook,
        "",
        "",
        f'handle = model.get_submodule("{module}").{register}',
        "with torch.no_grad():",
        f'    model(tokenizer({_TEXT}, return_tensors="pt").input_ids)',
        "handle.remove()",
        'hidden_states = caught["states"]',
    ]


def _loader(run: RunFacts) -> str:
    """Return the auto class whose models name their modules as the hookpoint does."""
    name = run.language_model.get("class")
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "AutoModelForMaskedLM"
    return "AutoModel" if name and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else "AutoModelForCausalLM"
