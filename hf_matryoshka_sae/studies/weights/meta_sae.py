"""Meta-SAE: how far a dictionary's latents are sums of few common directions.

A small SAE is trained on the decoder's rows as if they were hidden states: a BatchTopK SAE of F/4 latents with k = 4,
by the learner of training (1500 steps of up to 1024 rows, Adam at a constant rate of 5e-4, no auxiliary loss), its
decoder rows kept at length 1. Reported is the share of the rows' variance about their mean that it explains (Leask et
al. 2025, arXiv 2502.04878; Bussmann et al. 2025, arXiv 2503.17547): a lower share means latents that are less composed
of each other. Lengths of rows do not count.

F/4 latents explain a good part of any rows, the more the fewer rows there are for their dimension, and the share still
grows at the end of training. So compare only with random rows of the same number and dimension, and only between runs
of one recipe.

Shapes: F latents, D `d_in`.
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ...common.checks import check_at_least
from ...common.distributed import processes
from ...common.intervals import seed_interval
from ...common.logs import progress
from ...common.report import Column, Report
from ...common.seeds import derived_seed
from ...evaluation.geometry import checked_widths, unit_rows
from ...models import SAEModel, build_sae
from ...models.sharding import Layout
from ...training.config.spec import SAESpec
from ...training.sae.initialization import initialize
from ...training.sae.learner import Learner


K = 4
_SHARE = 4  # decoder rows for each latent of the meta-SAE
_RECIPE = {"lr_warmup_steps": 0, "lr_decay_fraction": 0.0, "auxk_coefficient": 0.0}


_COLUMNS = (
    Column(
        "explained",
        "explained",
        f"share of the variance of decoder rows that F/{_SHARE} latents explain, {K} at a time, mean over seeds; "
        "compare only with random rows of the same shape.",
        ".3f",
        "lower",
        interval="interval",
    ),
)


def meta_sae(
    saes: Mapping[str, SAEModel] | SAEModel,
    widths: Sequence[int] | None = None,
    *,
    steps: int = 1500,
    batch_size: int = 1024,
    lr: float = 5e-4,
    baselines: bool = True,
    seeds: Sequence[int] = (0, 1, 2),
    show: bool = True,
) -> Report:
    """Train meta-SAEs on the decoder of each prefix and on random rows; report the variance they explain.

    Only weights are read; every process computes the same.

    Args:
        saes (`dict[str, SAEModel]`, or one [`SAEModel`]): SAEs by name.
        widths (`Sequence[int]`, *optional*): Widths, each at least 8; by default each SAE's prefix widths.
        steps (`int`, *optional*, defaults to 1500): Training steps of each meta-SAE.
        batch_size (`int`, *optional*, defaults to 1024): Decoder rows in a step.
        lr (`float`, *optional*, defaults to 5e-4): Learning rate of Adam.
        baselines (`bool`, *optional*, defaults to `True`): Whether to add random unit rows of the shape of each SAE.
        seeds (`Sequence[int]`, *optional*, defaults to `(0, 1, 2)`): Seeds of first weights, batches and random rows.
        show (`bool`, *optional*, defaults to `True`): Whether to show a progress bar in the main process.

    Returns:
        [`Report`]: For each subject and width `explained`, the mean over seeds, its `interval` (95%, Student's t over
        seeds; `None` for one seed), and `seeds`, the share for each seed.

    Raises:
        `ValueError`: for options out of range, or a decoder that is not finite or of which too few rows have a
            direction.
    """
    check_at_least(1, steps=steps, batch_size=batch_size)
    if not lr > 0 or not seeds:
        raise ValueError(f"Expected `lr` above 0 and a seed, got {lr} and {list(seeds)}.")
    saes = saes if isinstance(saes, Mapping) else {"sae": saes}
    if not saes or not all(isinstance(sae, SAEModel) for sae in saes.values()):
        types = {name: type(sae).__name__ for name, sae in saes.items()}
        raise ValueError(f"Expected one SAE or several by name, got {types or 'none'}.")
    chosen = {name: checked_widths(widths, sae) for name, sae in saes.items()}
    decoders = {(name, width): _directions(name, saes[name], width) for name in saes for width in chosen[name]}
    runs = len(decoders) * len(seeds) * (1 + baselines) * steps
    rows, random = [], {}
    with progress(
        total=runs, desc="meta-SAEs", unit="step", disable=not show or processes()[0] != 0, leave=False
    ) as bar:

        def explained(decoder: Tensor, seed: int) -> float:
            return explained_variance(decoder, steps, batch_size, lr, seed, bar)

        for name in saes:
            for width in chosen[name]:
                decoder = decoders[name, width]
                rows.append(_row(name, "dictionary", width, [explained(decoder, seed) for seed in seeds]))
            for width in chosen[name] if baselines else ():
                shape = decoders[name, width].shape
                if shape not in random:
                    random[shape] = [explained(_random_rows(shape, seed), seed) for seed in seeds]
                rows.append(_row(f"random ({name})", "random", width, random[shape]))
    about = {"steps": steps, "batch_size": batch_size, "lr": lr, "k": K, "seeds": list(seeds)}
    title = (
        f"Meta-SAE: variance of decoder rows explained by F/{_SHARE} latents, {K} at a time ({steps} steps); compare "
        "with random rows of the same width"
    )
    return Report("meta_sae", title, rows, _COLUMNS, about, intervals="Intervals: 95%, Student's t over seeds.")


def _directions(name: str, sae: SAEModel, width: int) -> Tensor:
    rows = sae.W_dec[:width].detach().float()
    if not rows.isfinite().all():
        raise ValueError(f"The decoder of `{name}` holds NaN or infinity.")
    unit, directed = unit_rows(rows)
    if int(directed.sum()) < 2 * _SHARE:
        raise ValueError(
            f"A meta-SAE needs {2 * _SHARE} rows with a direction, the first {width} of `{name}` have "
            f"{int(directed.sum())}. Choose larger `widths`."
        )
    return unit[directed]


def _random_rows(shape: torch.Size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed(seed, "rows"))  # other rows than the meta-SAE starts from
    return unit_rows(torch.randn(shape, generator=generator))[0]


def explained_variance(
    rows: Tensor, steps: int, batch_size: int, lr: float, seed: int = 0, bar: progress | None = None
) -> float:
    """Train a meta-SAE; return the fraction of the variance of rows `(F, D)` about their mean that it explains.

    Activations are chosen among all rows together, k of each on average: the meta-SAE stays in training mode.

    Args:
        rows (`Tensor` of shape `(F, D)`): Decoder rows.
        steps (`int`): Training steps.
        batch_size (`int`): Rows in a step.
        lr (`float`): Learning rate of Adam.
        seed (`int`, *optional*, defaults to 0): Seed of first weights and batches.
        bar (`progress`, *optional*): Progress bar of steps.
    """
    middle, count = rows.mean(0), len(rows) // _SHARE
    fields = {"type": "batch_topk", "num_latents": count, "k": min(K, count), "lr": lr, **_RECIPE}
    spec = SAESpec.from_dict(fields, "")
    sae = build_sae(spec.sae_config(rows.shape[1], "decoder rows", "W_dec"))
    initialize(sae, spec, rows, middle.to(sae.b_dec), seed)
    # Every process trains the same meta-SAE alone. Each has an accelerator of its own, as an accelerator keeps every
    # optimizer that it has prepared.
    accelerator, own = Accelerator(cpu=not torch.cuda.is_available()), Layout(count)
    start = torch.zeros_like(middle), 1.0  # rows are taken as they are
    options = {"steps": steps, "batch_size": min(batch_size, len(rows)), "layout": own, "device": rows.device}
    learner = Learner("meta", "W_dec", sae, spec, *start, accelerator, **options)
    generator = torch.Generator().manual_seed(derived_seed(seed, "batches"))
    for step in range(steps):
        batch = rows
        if batch_size < len(rows):
            batch = rows[torch.randperm(len(rows), generator=generator)[:batch_size].to(rows.device)]
        learner.accumulate(batch, step)
        learner.step(step)
        if bar is not None:
            bar.update()
    with torch.no_grad():
        error = sae.prefix_errors(sae.encode_pairs(rows), rows, [count])[0].sum()
        return 1 - (error / (rows - middle).square().sum(1).mean()).item()


def _row(subject: str, kind: str, width: int, values: list[float]) -> dict[str, Any]:
    return {
        "subject": subject,
        "kind": kind,
        "width": width,
        "explained": mean(values),
        "interval": seed_interval(values),
        "seeds": values,
    }
