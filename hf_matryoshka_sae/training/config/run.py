"""A run is one YAML file; the same fields are these dataclasses, and every command-line flag overrides one of them.

How many hidden states a run spends on what is not training is here too, where its fields leave that open: a short run
should not wait longer for its text, normalisation, thresholds and report than for its training, so these are shares of
`tokens`, up to a size that is enough for any run.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ...common.data_source import EMBEDDED, DatasetConfig, local_files
from .fields import errors_named, from_dict, override, read_yaml
from .spec import SAESpec
from .trackers import check_installed, check_names


_SIZES = ("normalization_tokens", "calibration_tokens", "eval_tokens", "shuffle_tokens", "window_pool_tokens")
_BEFORE = dict.fromkeys(("lr_steps", "betas_steps", "level_weights_steps", "topk_fraction", "dead_threshold_decay"), 0)
_BEFORE |= {"decoder_bias_lr_scale": 1.0}  # of fields that an earlier version did not have
_SMALLEST = 4096
LARGEST_POOL = 4_000_000
LARGEST_EVALUATION = 60_000
LARGEST_CALIBRATION = 32_768  # they are part of every checkpoint


@dataclass(kw_only=True)
class RunConfig:
    """A training run. See `examples/` for files that hold these fields.

    Where hidden states are handed to [`train`], `model`, `dataset` and `hookpoints` may be left out: `model` and
    `hookpoints` then only say whose states they are, and nothing is loaded.
    """

    # Language model and text
    model: str | None = None
    """Any transformers causal LM, masked LM or encoder: Hub id or folder; `embedded` for the shipped one."""
    dataset: DatasetConfig | None = None
    """Text that the language model reads; a path alone is enough."""
    hookpoints: list[str] = field(default_factory=list)
    """Module paths, globs allowed; `module.path:input` for an input."""
    saes: list[SAESpec]
    """The dictionaries; one forward pass of the language model feeds them all."""
    output_dir: str
    """Folder of the run: SAEs, checkpoints, metrics, results."""
    tokens: int = 50_000_000
    """Hidden states to train on."""
    batch_size: int = 2048
    """Tokens per optimizer step, over all processes."""
    context_length: int = 128
    """Tokens of a window of text."""
    model_revision: str | None = None
    """Branch, tag or commit of the language model on the Hub."""
    model_dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    """Of the language model; by default what its checkpoint has. auto: bfloat16 where this hardware is fast at it."""
    init_from: str | None = None
    """Continue every SAE from this folder or repository."""

    # Which hidden states
    pack: bool = True
    """Fill windows with consecutive documents; otherwise one document a row."""
    exclude: Literal["special", "first", "none"] = "special"
    """Positions left out of training: special tokens, only the first of each window, or none (padding always is)."""
    max_norm_factor: float | None = None
    """Leave out hidden states whose norm exceeds this many times the median."""
    shuffle: bool = True
    """Shuffle documents, and windows of packed text, before the language model reads them; tokens are always shuffled
    across windows."""
    window_pool_tokens: int | None = None
    """Tokens of text (5 bytes each) in the pool from which each process draws windows; by default eight times its
    share of `tokens`, at most 4 million."""
    shuffle_tokens: int | None = None
    """Hidden states in the shuffle buffer of each process; by default a quarter of its `tokens`, at most 131,072."""

    # Devices and processes
    lm_batch_size: int = 32
    """Windows per forward pass of the language model."""
    lm_device: str | None = None
    """Device of the language model, where it is not the SAEs' (for example `cuda:1`)."""
    overlap: bool | None = None
    """Run the language model ahead in a thread of its own; by default where there is a GPU or a core that torch's
    threads leave free. Results are the same; half of `shuffle_tokens` more hidden states are held."""
    latent_shards: int = 1
    """Split every dictionary over this many processes by its latents, where it does not fit one device. The others
    are replicas that see different tokens."""
    capacity_factor: float = 4.0
    """With shards: how many times its even share of the k places a shard may fill before it sends all candidates.
    Results do not depend on it."""
    data_streams: int | None = None
    """Independent readers of the data; by default one for each process that runs the language model. With the same
    number, batches are the same on any number of processes."""
    lm_processes: int | None = None
    """Only the first so many processes run the language model, ahead of the others, which hold the SAEs; by default
    all do both."""

    # Hidden states that are kept, and measured
    activation_cache: str | None = None
    """Folder in which hidden states are kept, to be shared by several runs, or a URL that fsspec knows (`s3://...`,
    `hf://datasets/user/repo/...`). `matryoshka-sae cache` builds it beforehand; otherwise the run does."""
    activation_cache_dtype: Literal["fp32", "fp16", "bf16", "int8"] | None = None
    """How the cache's rows must be stored; by default a run reads any, and one that builds it stores its own type."""
    normalization_tokens: int | None = None
    """Hidden states whose mean and scale are measured; by default an eighth of `tokens`, 4,096 to 65,536."""

    # Closing report
    eval_dataset: DatasetConfig | None = None
    """Held-out text; by default a share of `dataset`'s documents, which training then leaves out."""
    eval_fraction: float = 0.01
    """Share of `dataset`'s documents that are held out where there is no `eval_dataset`."""
    eval_tokens: int | None = None
    """Held-out tokens of the closing report; by default a quarter of `tokens`, 4,096 to 60,000."""
    eval_baselines: bool = True
    """Put random directions that fire as often beside each SAE of the closing report, at its first and last width, and
    principal components, on 8,192 tokens; no random ones beside SAEs that are sharded or of over 2**26 weights."""
    calibration_tokens: int | None = None
    """Hidden states to solve thresholds on (of all but TopK), kept evenly over the run; by default a fifth of
    `tokens`, 4,096 to 32,768."""

    # Steps, checkpoints and logs
    seed: int = 0
    """Of everything that is drawn."""
    mixed_precision: Literal["no", "bf16"] | None = None
    """`bf16`: products of matrices in bfloat16; by default what `accelerate config` says."""
    gradient_accumulation_steps: int = 1
    """Parts that each optimizer step's batch is cut into."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints (0: only when interrupted)."""
    keep_checkpoints: int = 2
    """How many of the newest stay."""
    resume: bool = True
    """Go on from the newest whole checkpoint in `output_dir`; `false` moves what is there to `before-<time>/`."""
    log_every: int = 10
    """Optimizer steps between two lines of metrics.jsonl and of the trackers."""
    trackers: list[str] = field(default_factory=list)
    """Accelerate trackers, for example `[tensorboard]`, `[wandb]` or `[trackio]`."""
    project: str = "hf_matryoshka_sae"
    """What trackers compare this run with others in; the run has the name of `output_dir`."""

    def __post_init__(self) -> None:
        counts = "tokens", "batch_size", "context_length", "gradient_accumulation_steps", "eval_tokens", "data_streams"
        for name, value in ((name, getattr(self, name)) for name in counts):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.capacity_factor < 1:
            raise ValueError(f"`capacity_factor` must be at least 1, got {self.capacity_factor}.")
        check_names(self.trackers)
        if not self.saes:
            raise ValueError("`saes` is empty: name at least one, for example saes: [{type: matryoshka, k: 32}].")
        if self.tokens < self.batch_size:
            raise ValueError(f"`tokens` ({self.tokens}) is less than one batch (`batch_size` {self.batch_size}).")
        for spec in self.saes:
            if spec.grow_from and self.init_from:
                raise ValueError(
                    "An SAE with `grow_from` cannot be in a run with `init_from`. Give `init_from` by entry."
                )

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.tokens // self.batch_size

    def check_saes(self) -> "RunConfig":
        """This config; raises `ValueError` for fields that do not fit an SAE's family. Only this needs torch."""
        for i, spec in enumerate(self.saes):
            if spec.num_latents is not None and not (spec.init_from or spec.grow_from or self.init_from):
                with errors_named(f"saes.{i}"):
                    spec.sae_config(1, self.model, "")
        return self

    def check_text(self) -> "RunConfig":
        """This config; raises `ValueError` where it does not say which hidden states of which text are trained on."""
        missing = [name for name in ("model", "dataset") if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"Missing field{'s' * (len(missing) > 1)}: {', '.join(f'`{name}`' for name in missing)}. Only "
                "`train(config, states=...)` needs none."
            )
        if not self.hookpoints:
            raise ValueError("`hookpoints` is empty: name at least one module, for example [model.layers.3].")
        return self

    @classmethod
    def from_dict(cls, data: dict) -> "RunConfig":
        """A checked config from nested dicts. Raises `ValueError` for whatever does not fit."""
        return cls.read(data).check_saes()

    @classmethod
    def read(cls, data: dict) -> "RunConfig":
        """A config of known fields and possible values, from nested dicts. Raises `ValueError` for others."""
        if not isinstance(data, dict):
            raise ValueError(f"A run's config must hold fields such as `model:`, got {data!r}.")
        data = dict(data)
        if isinstance(data.get("dataset"), str):
            data["dataset"] = {"path": data["dataset"]}
        if isinstance(data.get("eval_dataset"), str):
            data["eval_dataset"] = {"path": data["eval_dataset"]}
        if isinstance(data.get("hookpoints"), str):
            data["hookpoints"] = [data["hookpoints"]]
        if isinstance(data.get("saes"), list):
            data["saes"] = [SAESpec.from_dict(entry, f"saes.{i}.") for i, entry in enumerate(data["saes"])]
        return from_dict(cls, data)

    def to_dict(self) -> dict[str, Any]:
        """The same fields as nested dicts, every default filled in."""
        return dataclasses.asdict(self)


def load_run_config(
    path: str | Path | None, flags: list[str] | None = None, look: Callable[[RunConfig], None] | None = None
) -> RunConfig:
    """The run that a YAML file and command-line flags describe.

    Args:
        path (`str` or `Path` or `None`): The YAML file; `None` where the flags say everything.
        flags (`list[str]`, *optional*): For example `["--batch_size", "4096", "--saes.0.k", "64"]`.
        look (`Callable[[RunConfig], None]`, *optional*): Sees the fields before torch is imported to check the rest.

    Raises:
        `ValueError`: for a file that is missing or no YAML, and whatever [`RunConfig.from_dict`] raises.
    """
    run = RunConfig.read(override(read_yaml(path) if path is not None else {}, flags or []))
    if look is not None:
        look(run)
    return run.check_saes()


def check_ready(config: RunConfig) -> None:
    """Look for the files and packages that a run names.

    Raises:
        `ValueError`: for fields, a data file, a folder of a model or a tracker's package that are not there.
    """
    config.check_text()
    check_installed(config.trackers)
    if config.lm_processes is not None:
        return  # processes that only hold SAEs may be where neither the text nor the language model is
    if config.dataset.source_column:
        raise ValueError(
            "`dataset.source_column` is not used in training. Set `eval_dataset.source_column`, for figures by source."
        )
    for dataset in (config.dataset, config.eval_dataset):
        if dataset is not None and dataset.path != EMBEDDED:
            local_files(dataset)
    path = Path(config.model).expanduser()
    if (path.is_absolute() or config.model.startswith((".", "~"))) and not path.is_dir():
        raise ValueError(f"The language model's folder {config.model!r} does not exist. Check `model`.")


def normalization_tokens(config: RunConfig) -> int:
    """Hidden states whose mean and scale are measured, over all processes; they are trained on as well."""
    return _size(config.normalization_tokens, config.tokens // 8, 65_536)


def calibration_tokens(config: RunConfig) -> int:
    """Hidden states that thresholds are solved for on, over all processes: of those trained on, evenly."""
    return _size(config.calibration_tokens, config.tokens // 5, LARGEST_CALIBRATION)


def eval_tokens(config: RunConfig) -> int:
    """Held-out tokens that dictionaries are measured on at the end."""
    return _size(config.eval_tokens, config.tokens // 4, LARGEST_EVALUATION)


def window_pool_tokens(config: RunConfig, streams: int = 1) -> int:
    """Tokens of text in the pool of each of a run's streams, which is filled before the first forward pass."""
    return _size(config.window_pool_tokens, 8 * config.tokens // streams, LARGEST_POOL)


def shuffle_tokens(config: RunConfig, streams: int = 1) -> int:
    """Hidden states in the shuffle buffer of each of a run's streams.

    A buffer is full before the first step, and what it holds at the end is never used.
    """
    return _size(config.shuffle_tokens, config.tokens // (4 * streams), 131_072)


def _size(given: int | None, share: int, largest: int) -> int:
    return given if given is not None else max(_SMALLEST, min(share, largest))


def with_sizes_of(config: RunConfig, before: Mapping[str, Any]) -> RunConfig:
    """The run with the sizes that the fields of an earlier one state, where its own fields leave them open.

    Of an SAE whose fields were written before short runs were trained otherwise, the schedules are those of that time.
    """
    stated = {name: before[name] for name in _SIZES if getattr(config, name) is None and before.get(name) is not None}
    saes = [_as_of_then(spec, entry) for spec, entry in zip(config.saes, before.get("saes") or [], strict=False)]
    return dataclasses.replace(config, **stated, saes=[*saes, *config.saes[len(saes) :]])


def _as_of_then(spec: SAESpec, entry: Mapping[str, Any]) -> SAESpec:
    """An SAE's fields with what an earlier version took where its entry, all of whose fields it wrote, lacks some."""
    stated = {name: value for name, value in _BEFORE.items() if name not in entry}
    if "betas" not in entry or not stated:
        return spec
    if spec.controller_rate == SAESpec.controller_rate and "controller_rate" in entry:
        stated["controller_rate"] = entry["controller_rate"]
    return dataclasses.replace(spec, **stated)


def as_begun(config: RunConfig) -> RunConfig:
    """A run with the sizes with which it was begun, where it goes on from a checkpoint in its folder.

    An earlier version wrote them into `run.yaml` whatever the length of the run.
    """
    folder = Path(config.output_dir)
    path = folder / "run.yaml"
    if not (config.resume and path.is_file() and any(folder.glob("checkpoint-*"))):
        return config
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    return with_sizes_of(config, before) if isinstance(before, dict) else config
