"""The workload of a run: its dictionaries, batches and language model, read without loading any weights.

The language model is built from its config alone, in fake tensors that have shapes and no memory; its forward pass up
to the last hookpoint is counted by torch's own counter of operations.
"""

import fnmatch
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from ..activations import harvest, resolve_hookpoints
from ..activations.hookpoints import hookpoint_widths
from ..activations.language_model import EMBEDDED, model_class
from ..activations.sentences import SENTENCE_EMBEDDING
from ..assets import embedded_lm_path
from ..training.config.fields import errors_named
from ..training.config.run import RunConfig, shuffle_tokens, window_pool_tokens
from ..training.config.spec import SAESpec


logger = logging.getLogger(__name__)

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class LanguageModel:
    """The language model of a run.

    Args:
        parameters (`int`): Number of all parameters, as the model is loaded whole.
        bytes_each (`int`): Bytes of a parameter and of a number in a hidden state.
        flops_per_token (`float`): Operations per token of a forward pass that stops at the last hookpoint.
        widths (`dict[str, int]`): Width of the hidden states at each hookpoint.
        hidden (`int`): Numbers per token that are alive at once in the forward pass.
        vocabulary (`int`): Logits per token, for the closing evaluation.
    """

    parameters: int
    bytes_each: int
    flops_per_token: float
    widths: dict[str, int]
    hidden: int
    vocabulary: int


@dataclass(frozen=True)
class DictionaryShape:
    """The properties of a dictionary that decide its cost.

    Args:
        name (`str`): Name of its folder, with the hookpoint.
        d_in (`int`): Width D of the hidden states.
        num_latents (`int`): Number F of latents.
        activation (`str`): `relu`, `topk`, `batch_topk`, `jumprelu` or `gated`.
        k (`float`): Latents that fire per token; of families without a `k` at the start of training, F / 2.
        prefixes (`int`): Number P of prefixes.
        weight_bytes (`int`): Bytes of a weight.
        moment_bytes (`int`): Bytes of an entry of an optimizer moment.
        averaged (`bool`): Whether an average of the weights is kept.
        sort_every (`int`): Steps between sortings by energy (0: never).
        auxk (`int`): Dead latents that fit a token's residual; 0 without AuxK.
        unit_norm (`bool`): Whether rows of the decoder are projected at each step.
        decodes (`int`): Number of sums over pairs in a step: 1, or 2 with `multi_topk` or a gate.
    """

    name: str
    d_in: int
    num_latents: int
    activation: str
    k: float
    prefixes: int
    weight_bytes: int = 4
    moment_bytes: int = 4
    averaged: bool = False
    sort_every: int = 0
    auxk: int = 0
    unit_norm: bool = True
    decodes: int = 1

    @property
    def dense(self) -> bool:
        """Return whether so many latents fire at the start that the sums are matmuls."""
        return self.k > self.num_latents / 8

    @property
    def parameters(self) -> int:
        """Return the number of trained parameters: both matrices, the biases, the thresholds."""
        vectors = {"jumprelu": 2, "gated": 3}.get(self.activation, 1)
        return 2 * self.num_latents * self.d_in + vectors * self.num_latents + self.d_in


@dataclass(frozen=True)
class Workload:
    """The properties of a run that decide its cost; see [`read_workload`].

    Args:
        dictionaries (`tuple` of [`DictionaryShape`]): Dictionaries, one for each SAE and hookpoint.
        lm ([`LanguageModel`]): The language model whose hidden states are read.
        tokens (`int`): Tokens of the run.
        batch_size (`int`): Tokens of a step.
        accumulation (`int`): Micro-batches of a step.
        product (`str`): Type of the matmuls, `"float32"` or `"bfloat16"`.
        buffer_tokens (`int`): Hidden states that a process asks its shuffle buffer to hold; all of texts.
        window_tokens (`int`): Tokens of one forward pass of the language model.
        pool_tokens (`int`): Tokens of the pool of windows.
        overlap (`bool`, *optional*): The run's option `overlap`.
        capacity_factor (`float`): The run's option `capacity_factor`.
        lm_processes (`int`, *optional*): Processes that run the language model and hold no dictionaries.
        dead_share (`float`): Share of the latents that AuxK finds dead.
        baselines (`bool`): The run's option `eval_baselines`.
    """

    dictionaries: tuple[DictionaryShape, ...]
    lm: LanguageModel
    tokens: int
    batch_size: int
    accumulation: int
    product: str
    buffer_tokens: int
    window_tokens: int
    pool_tokens: int
    overlap: bool | None
    capacity_factor: float
    dead_share: float
    lm_processes: int | None = None
    baselines: bool = True

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps."""
        return self.tokens // self.batch_size


def read_workload(
    config: RunConfig, d_in: int | None = None, lm_parameters: int | None = None, dead_share: float = 0.1
) -> Workload:
    """Return the workload of a run's config; no weights are loaded.

    Args:
        config ([`RunConfig`]): The run.
        d_in (`int`, *optional*): Width of the hidden states, where the language model's config cannot be read.
        lm_parameters (`int`, *optional*): Number of the language model's parameters; to be given with `d_in`.
        dead_share (`float`, *optional*, defaults to 0.1): Share of the latents that AuxK finds dead.

    Raises:
        `ValueError`: if the model's config cannot be read, has no such hookpoint, or a dictionary does not fit.
    """
    if (d_in is None) != (lm_parameters is None):
        raise ValueError("--d_in and --lm_parameters stand in for the model's config together: give both.")
    if not 0 <= dead_share <= 1:
        raise ValueError(f"The share of dead latents must lie between 0 and 1, got {dead_share}.")
    of_texts = SENTENCE_EMBEDDING in config.hookpoints
    lm = _given(config, d_in, lm_parameters) if d_in is not None else look_up(config)
    dictionaries = []
    for number, spec in enumerate(config.saes):
        for hookpoint in lm.widths:
            if spec.hookpoints is None or any(fnmatch.fnmatchcase(hookpoint, pattern) for pattern in spec.hookpoints):
                with errors_named(f"saes.{number}"):
                    whole = spec.sae_config(lm.widths[hookpoint], config.model, hookpoint)
                dictionaries.append(_shape(spec, whole, hookpoint))
    if not dictionaries:
        raise ValueError(f"No dictionary is trained at any of the run's hookpoints: {', '.join(lm.widths)}.")
    return Workload(
        tuple(dictionaries),
        lm,
        config.tokens,
        config.batch_size,
        config.gradient_accumulation_steps,
        "bfloat16" if config.mixed_precision == "bf16" else "float32",
        config.tokens
        if of_texts
        else shuffle_tokens(config),  # of texts all rows are held, from before the first step
        1 if of_texts else config.lm_batch_size * config.context_length,
        window_pool_tokens(config) if config.shuffle and config.pack and not of_texts else 0,
        config.overlap,
        config.capacity_factor,
        dead_share,
        getattr(config, "lm_processes", None),
        config.eval_baselines,
    )


def _shape(spec: SAESpec, config: Any, hookpoint: str) -> DictionaryShape:
    activation, num_latents = config.activation_name, config.num_latents
    decodes = 1 + bool(spec.multi_topk or activation == "gated")
    return DictionaryShape(
        name=f"{spec.folder(config)} at {hookpoint}",
        d_in=config.d_in,
        num_latents=num_latents,
        activation=activation,
        k=getattr(config, "k", num_latents / 2) * (4 if spec.multi_topk else 1),
        prefixes=spec.random_prefixes or len(config.widths),
        weight_bytes=BYTES[spec.weights_dtype],
        moment_bytes=BYTES[spec.optimizer_dtype],
        averaged=spec.ema_decay is not None,
        sort_every=spec.sort_every,
        auxk=(spec.auxk_k or max(1, config.d_in // 2)) if spec.auxk_coefficient else 0,
        unit_norm=spec.unit_norm_decoder,
        decodes=decodes,
    )


def _given(config: RunConfig, d_in: int, parameters: int) -> LanguageModel:
    """Return a model of which only the size is known; each parameter counts 2 operations per token."""
    patterns = [name for name in config.hookpoints if any(sign in name for sign in "*?[")]
    if patterns:
        raise ValueError(f"Without the model's config hookpoints must be names, not globs; got {', '.join(patterns)}.")
    widths = dict.fromkeys(config.hookpoints, d_in)
    bytes_each = BYTES[_named_dtype(config) or "bfloat16"]
    return LanguageModel(parameters, bytes_each, 2.0 * parameters, widths, 12 * d_in if parameters else 0, 0)


def _named_dtype(config: RunConfig) -> str | None:
    """Return the type that the config names; auto is bfloat16 on the devices that are planned for."""
    return "bfloat16" if config.model_dtype == "auto" else config.model_dtype


def look_up(config: RunConfig) -> LanguageModel:
    """Return the run's language model, from its config alone.

    Raises:
        `ValueError`: if the config cannot be read, or the model has no such hookpoint.
    """
    name = embedded_lm_path() if config.model == EMBEDDED else config.model
    revision = None if config.model == EMBEDDED else config.model_revision
    try:
        lm_config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The config of the language model {config.model!r} cannot be read: {error} Give --d_in and "
            "--lm_parameters instead."
        ) from error
    if SENTENCE_EMBEDDING in config.hookpoints:  # the model has run, and is gone, before the first step
        width = lm_config.get_text_config().hidden_size
        return LanguageModel(0, 4, 0.0, {SENTENCE_EMBEDDING: width}, 0, 0)
    named = _named_dtype(config)
    dtype = getattr(torch, named) if named else lm_config.dtype or torch.float32
    text = lm_config.get_text_config()
    with FakeTensorMode():
        # Eager attention consists of matmuls that are counted; the fused kernels do as much work.
        model = model_class(lm_config).from_config(lm_config, dtype=dtype, attn_implementation="eager").eval()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        hookpoints = resolve_hookpoints(model, config.hookpoints)
        try:
            widths = hookpoint_widths(model, hookpoints)
            with FlopCounterMode(display=False) as counter:
                harvest(model, torch.zeros(1, config.context_length, dtype=torch.long), None, hookpoints)
            flops = counter.get_total_flops() / config.context_length
        except RuntimeError as error:  # routing that depends on the data has no shape
            logger.warning(f"{config.model} cannot be run without data ({error}); counted as 2 operations a weight.")
            widths, flops = dict.fromkeys(hookpoints, text.hidden_size), 2.0 * parameters
    hidden = 4 * text.hidden_size + 3 * getattr(text, "intermediate_size", 4 * text.hidden_size)
    return LanguageModel(parameters, dtype.itemsize, flops, widths, hidden, text.vocab_size)
