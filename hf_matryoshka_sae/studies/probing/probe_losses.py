"""Probing: how well single latents predict labels, at every width, beside the hidden states themselves.

The probe loss of Gao et al. (2024, arXiv 2406.04093, section 4.2) is, for a task with labels y,

    min over latents i, w and b of  mean of  -y log sigmoid(w a_i + b) - (1 - y) log(1 - sigmoid(w a_i + b))

and its mean over tasks. Here a_i is the activation as users of the SAE get it (Gao et al. take it before the
activation function); the latent and w, b are chosen on a train part, the loss is that of a test part, and each class
weighs one half (Gao et al. have equally many examples of each). One fit of all latents gives the best of every prefix.

Shapes: T tasks, P widths, S splits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...common.checks import check_at_least
from ...common.distributed import processes
from ...common.intervals import CrossedBootstrap
from ...common.report import Report
from ...evaluation.data import HeldOut
from ...evaluation.subjects import Dictionary
from ...models import SAEModel
from ..drawn_latents import checked_dictionaries, random_dictionaries
from .examples import Examples, take_windows, text_batches, text_examples, token_examples
from .report import probe_records, probe_report
from .scores import Probing
from .tasks import LabelledTask, TokenTasks, usable_tasks


def probe_losses(
    data: HeldOut,
    subjects: Mapping[str, Dictionary | SAEModel] | SAEModel,
    tasks: Sequence[LabelledTask | TokenTasks] | LabelledTask | TokenTasks | None = None,
    widths: Sequence[int] | None = None,
    *,
    selection: str = "mask",
    k: Sequence[int] | None = None,
    baselines: bool = True,
    max_tokens: int = 10_000,
    splits: int = 3,
    test_share: float = 0.2,
    ridge: float | None = None,
    least_share: float = 0.005,
    context_length: int | None = None,
    max_pairs: int = 100_000_000,
    resamples: int = 1000,
    seed: int = 0,
    show: bool = True,
) -> Report:
    """Measure probe losses and k-sparse probes of dictionaries at each of their widths, beside baselines.

    Args:
        data ([`HeldOut`]): The language model, the hookpoint and, for token tasks, the tokens. Under
            `torch.distributed` each process reads its share and fits its share of the latents; all return the same.
        subjects (`Mapping[str, Dictionary or SAEModel]`, or one [`SAEModel`]): Dictionaries or SAEs, by name.
        tasks ([`LabelledTask`], [`TokenTasks`] or a sequence of them, *optional*): Tasks to probe for; by default
            properties of tokens that follow from the text alone ([`TokenTasks.of_properties`]).
        widths (`Sequence[int]`, *optional*): Widths of subjects that are SAEs; by default their prefix widths.
        selection (`str`, *optional*, defaults to `"mask"`): Selection of subjects that are SAEs; see [`Dictionary`].
        k (`Sequence[int]`, *optional*): Numbers of latents of k-sparse probes; `()` for none. By default 1, 2 and 5.
        baselines (`bool`, *optional*, defaults to `True`): Whether to add, for each dictionary, a random one with its
            L0; and the hidden state's channels: each alone, and all together as the ceiling.
        max_tokens (`int`, *optional*, defaults to 10,000): Largest number of tokens of token tasks, in whole windows.
        splits (`int`, *optional*, defaults to 3): Number of random splits.
        test_share (`float`, *optional*, defaults to 0.2): Share of the test part of a split.
        ridge (`float`, *optional*): Penalty of [`fit_probes`]; by default one over the number of train examples.
        least_share (`float`, *optional*, defaults to 0.005): Tasks are left out, with the reason, if one of their
            classes has a smaller share of the examples than this, or fewer than 20.
        context_length (`int`, *optional*): Tokens of a labelled text that are read; by default a window of the data.
        max_pairs (`int`, *optional*, defaults to 100,000,000): Activations that a process may keep, of all
            dictionaries together; 12 bytes each, and about 60 while those of one dictionary are fitted.
        resamples (`int`, *optional*, defaults to 1000): Number of bootstrap resamples over tasks and splits.
        seed (`int`, *optional*, defaults to 0): Seed of splits, random dictionaries and bootstrap.
        show (`bool`, *optional*, defaults to `True`): Whether to show progress bars in the main process.

    Returns:
        [`Report`]: Each record has `subject`, `kind` (`dictionary`, `random`, `channels`, `all channels`,
        `nothing`), `width`; `probe_loss` (nats, test part) and `train_loss`; `gain` over the best channel; each with
        an `_interval` of 95% but `train_loss`; `k_sparse`: by k `accuracy`, `f1` and `auc` on the test part, with
        intervals; `tasks`: by name `loss`, `train_loss`, the `latents` chosen in each split, and scores by k.

    Raises:
        `ValueError`: for options out of range, tasks of which none can be used, or more activations than `max_pairs`.
    """
    check_at_least(1, max_tokens=max_tokens, splits=splits, max_pairs=max_pairs, resamples=resamples)
    if not 0 < test_share < 1 or not 0 <= least_share < 0.5:
        raise ValueError(
            f"Expected `test_share` between 0 and 1 and `least_share` from 0 to below 0.5; got {test_share} and "
            f"{least_share}."
        )
    if k is not None and any(number < 1 for number in k):
        raise ValueError(f"`k` must hold numbers of latents, each at least 1; got {list(k)}.")
    dictionaries = checked_dictionaries(data, subjects, widths, selection)
    ks = [1, 2, 5] if k is None else sorted(set(k))
    show = show and processes()[0] == 0
    data, token_tasks, labelled = _sorted_tasks(data, tasks, max_tokens)
    if context_length is None:
        context_length = data.batches[0].input_ids.shape[1] if data.batches else 128
    if baselines:
        source = data if data.batches else replace(data, batches=text_batches(labelled[0], data, context_length)[0])
        dictionaries |= random_dictionaries(dictionaries, source, seed)
    sets = [token_examples(data, token_tasks, dictionaries, max_pairs, show)] if token_tasks else []
    sets += [text_examples(data, task, dictionaries, context_length, max_pairs, show) for task in labelled]
    seeds = [seed * splits + number for number in range(splits)]
    skipped: dict[str, str] = {}
    usable = [_usable(examples, test_share, least_share, seeds, skipped) for examples in sets]
    names = [name for examples, _ in usable for name in examples.names]
    _check_names(names, skipped)
    probing = Probing(ridge, ks, baselines, show)
    parts = [probing.run(examples, tests, dictionaries) for examples, tests in usable if examples.names]
    bootstrap = CrossedBootstrap(splits, len(names), resamples=resamples, seed=seed)
    records = probe_records(parts, ks, names, bootstrap)
    example_counts: dict[str, int] = {}
    for examples in sets:
        example_counts[examples.kind] = example_counts.get(examples.kind, 0) + len(examples.labels)
    about = {
        "hookpoint": data.hookpoint,
        "selection": " and ".join(dict.fromkeys(dictionary.selection for dictionary in dictionaries.values())),
        "examples": example_counts,
        "tasks": {
            name: share
            for examples, _ in usable
            for name, share in zip(examples.names, examples.labels.double().mean(0).tolist(), strict=True)
        },
        "skipped": skipped,
        "splits": splits,
        "test_share": test_share,
        "ridge": ridge,
        "k": list(ks),
        "seed": seed,
        "notes": [],
    }
    return probe_report(records, about)


def _sorted_tasks(data: HeldOut, tasks: Any, max_tokens: int) -> tuple[HeldOut, list[TokenTasks], list[LabelledTask]]:
    """Return the windows of the data that are read, the tasks of its tokens, and the tasks of texts."""
    tasks = [tasks] if tasks is None or isinstance(tasks, LabelledTask | TokenTasks) else list(tasks)
    wrong = [type(task).__name__ for task in tasks if not isinstance(task, LabelledTask | TokenTasks | None)]
    if wrong or not tasks:
        raise ValueError(f"`tasks` must be `LabelledTask`s and `TokenTasks`, got {wrong or 'none'}.")
    of_tokens = [task for task in tasks if isinstance(task, TokenTasks)]
    labelled = [task for task in tasks if isinstance(task, LabelledTask)]
    if not data.batches and len(labelled) < len(tasks):
        raise ValueError("Token tasks need tokens, and the data has no batches. See `open_heldout`.")
    for task in of_tokens:
        task.check(data)
    data, of_tokens = take_windows(data, of_tokens, max_tokens)
    if None in tasks:
        of_tokens.append(TokenTasks.of_properties(data))
    return data, of_tokens, labelled


def _usable(
    examples: Examples, test_share: float, least_share: float, seeds: Sequence[int], skipped: dict[str, str]
) -> tuple[Examples, list[Tensor]]:
    """Return the examples with the tasks that can be probed, and the test part of each split."""
    tests = [examples.held_out(test_share, seed) for seed in seeds]
    parts = [part for test in tests for part in (test, ~test)]
    columns, reasons = usable_tasks(examples.names, examples.labels, parts, least_share)
    skipped.update(reasons)
    names = [examples.names[number] for number in columns]
    return replace(examples, names=names, labels=examples.labels[:, columns]), tests


def _check_names(names: Sequence[str], skipped: Mapping[str, str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Tasks must have names of their own; {twice} come twice. Give `from_dataset` a `name`.")
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise ValueError(f"No task can be probed ({reasons}). Give more tokens or texts, or other tasks.")
