"""One training step of other libraries, each as that library's own trainer makes it.

sae-lens (6.54)
    `SAETrainer.step`, which `SAETrainer.fit` calls for every batch, on `MatryoshkaBatchTopKTrainingSAE` or
    `TopKTrainingSAE`, with the defaults of their configs and of `SAETrainerConfig`: Adam, the gradient's norm clipped
    to 1, AuxK weighted 1 on latents silent for 1,000 batches.
dictionary-learning (0.1)
    `MatryoshkaBatchTopKTrainer.update` or `TopKTrainer.update`, with their defaults: Adam, the decoder's gradient
    projected, the gradient's norm clipped to 1, rows made unit, AuxK weighted 1/32 on latents silent for 10 million
    tokens. The threshold that they follow from the 1,000th step on is followed from the second here, as in most of a
    long run.
sparsify (1.3)
    `Trainer.fit` has no step of its own to call, so its parts are called in its order:
    `set_decoder_norm_to_unit_norm`, `SparseCoder.forward` (which runs in bfloat16 on a GPU, unlike the others), the
    FVU's `backward`, `remove_gradient_parallel_to_decoder_directions`, its default optimizer (`SignSGD` in
    schedule-free's `ScheduleFreeWrapper`, "signum") and the count of tokens since each latent fired. `TrainConfig` has
    AuxK off.

No latent is dead at the beginning, so AuxK costs nothing yet, here as there. The first step of each initialises biases
from the batch, and buffers are made: leave a few steps out of the timing.
"""

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch


Step = Callable[[torch.Tensor], None]
Factory = Callable[[], Step]

_ENDLESS = 10**6  # steps that a trainer expects; only its learning rate depends on them


def peer_steps(
    d_in: int, num_latents: int, num_tokens: int, k: int, widths: list[int], device: str
) -> dict[str, Factory]:
    """Training steps of the libraries that are installed.

    Args:
        d_in (`int`), num_latents (`int`), k (`int`): Of the dictionary.
        num_tokens (`int`): Rows in a batch.
        widths (`list[int]`): Increasing prefix widths that end at `num_latents`.
        device (`str`): Where the weights and the batches lie.

    Returns:
        `dict[str, Callable]`: By name, what makes the weights and the optimizer and returns the step, which takes a
        batch `[num_tokens, d_in]` in float32.
    """
    kinds = ("Matryoshka BatchTopK", "TopK")
    factories: dict[str, Factory] = {}
    if find_spec("sae_lens"):
        for kind in kinds:
            factories[f"sae-lens {kind}"] = partial(_sae_lens, kind, d_in, num_latents, num_tokens, k, widths, device)
    if find_spec("dictionary_learning"):
        for kind in kinds:
            factories[f"dictionary-learning {kind}"] = partial(
                _dictionary_learning, kind, d_in, num_latents, k, widths, device
            )
    if find_spec("sparsify"):
        factories["sparsify TopK"] = partial(_sparsify, d_in, num_latents, num_tokens, k, device)
    return factories


def _sae_lens(kind: str, d_in: int, num_latents: int, num_tokens: int, k: int, widths: list[int], device: str) -> Step:
    """A step of sae-lens' trainer; its `fit` counts the steps itself, and so does this."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig

    name = kind.replace(" ", "")
    own = {"matryoshka_widths": list(widths)} if name.startswith("Matryoshka") else {}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=d_in, d_sae=num_latents, k=k, device=device, **own)
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    run = SAETrainerConfig(
        total_training_samples=_ENDLESS * num_tokens,
        train_batch_size_samples=num_tokens,
        lr_end=3e-5,  # a tenth of the rate, as the library's runner fills it in; the schedule is constant
        device=device,
    )
    trainer = sae_lens.SAETrainer(run, sae, data_provider=iter(()))

    def step(x: torch.Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def _dictionary_learning(kind: str, d_in: int, num_latents: int, k: int, widths: list[int], device: str) -> Step:
    """A step of dictionary-learning's trainer."""
    from dictionary_learning.trainers import matryoshka_batch_top_k, top_k

    trainers = {
        "Matryoshka BatchTopK": matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
        "TopK": top_k.TopKTrainer,
    }
    own = {"group_fractions": _fractions(widths)} if kind.startswith("Matryoshka") else {}
    trainer = trainers[kind](
        steps=_ENDLESS,
        activation_dim=d_in,
        dict_size=num_latents,
        k=k,
        layer=0,
        lm_name="",
        threshold_start_step=0,
        device=device,
        **own,
    )
    made = 0

    def step(x: torch.Tensor) -> None:
        nonlocal made
        trainer.update(made, x)
        made += 1

    return step


def _fractions(widths: list[int]) -> list[float]:
    """Group sizes as shares. The library rounds all but the last down, hence the half latent more."""
    sizes = [end - start for start, end in zip([0, *widths], widths, strict=False)]
    shares = [(size + 0.5) / widths[-1] for size in sizes[:-1]]
    return [*shares, 1 - sum(shares)]


def _sparsify(d_in: int, num_latents: int, num_tokens: int, k: int, device: str) -> Step:
    """A step as in the hook and the loop of sparsify's `Trainer.fit`."""
    if torch.device(device).type != "cuda":
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernel is for GPUs; read at import
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=num_latents, k=k), device, dtype=torch.float32)
    optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=5e-3 / (num_latents / 2**14) ** 0.5), momentum=0.95)
    optimizer.train()
    since_fired = torch.zeros(num_latents, dtype=torch.long, device=device)
    fired = torch.zeros(num_latents, dtype=torch.bool, device=device)
    first = True

    def step(x: torch.Tensor) -> None:
        nonlocal first
        if first:
            sae.b_dec.data = x.mean(0)
            first = False
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, x, total_variance=(x - x.mean(0)).square().sum())
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())  # the trainer moves it to the host at every step
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired.add_(num_tokens)
        since_fired[fired] = 0
        fired.zero_()

    return step
