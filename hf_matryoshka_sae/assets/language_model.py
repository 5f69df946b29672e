"""The language model that ships here; `examples/train_embedded_lm.py` trained it, `lm/README.md` describes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def embedded_lm_path() -> Path:
    """Return the folder of the embedded language model, in transformers' format, for `from_pretrained`.

    Its tensors are stored in float16 to stay small; its config asks for float32, and that is what
    `AutoModelForCausalLM.from_pretrained` returns.

    Returns:
        `Path`: The folder with the config, the weights and the tokenizer.

    Raises:
        `FileNotFoundError`: If the installation lacks the weights.
    """
    folder = Path(__file__).parent / "lm"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"Expected the embedded language model in {folder}, found no model.safetensors there. Reinstall the "
            "package, or train the model again from a checkout with `python examples/train_embedded_lm.py`."
        )
    return folder


def load_embedded_lm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the embedded language model and its tokenizer, with no network.

    The model was trained on windows of 256 tokens that each begin with the tokenizer's `bos_token`, which also
    separates documents. The tokenizer does not add it: put it first, as in the example.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: The model in float32 and evaluation mode, the tokenizer.

    Example:
    ```python
    >>> from hf_matryoshka_sae.assets import load_embedded_lm

    >>> model, tokenizer = load_embedded_lm()
    >>> inputs = tokenizer(tokenizer.bos_token + "Return a new list", return_tensors="pt")
    >>> hidden_states = model(**inputs, output_hidden_states=True).hidden_states
    ```
    """
    # Importing the package must not import transformers' model code.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_lm_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
