"""Probing: how much single latents know of labels, at every width, beside the hidden states they are made of.

The probe loss of Gao et al. (2024, arXiv 2406.04093, section 4.2) is, for a task with labels y,

    min over latents i, w and b of  mean of  -y log sigmoid(w a_i + b) - (1 - y) log(1 - sigmoid(w a_i + b))

and its mean over tasks. Here a_i is the activation, as a user of the SAE sees it (Gao et al. take it before the
activation function); the latent and w, b are chosen on a train part, the loss is that of a test part, and each class
weighs one half where they had as many examples of each. One fit of all latents gives the best of every prefix.

Shapes: N examples, D width of hidden states, F latents, T tasks, P widths, S splits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..models import SAEModel
from .baselines import random_dictionary
from .data import HeldOut
from .distributed import processes, reduce_sum
from .probe_columns import LatentColumns, own_latents
from .probe_examples import Examples, take_windows, text_batches, text_examples, token_examples
from .probe_newton import Probes, class_weights, cross_entropy, fit_probes
from .probe_report import Bootstrap, ProbeReport
from .probe_tasks import LabelledTask, TokenTasks, usable_tasks
from .probes import fit_logistic
from .sparse_probing import SCORES, classifier_scores, has_scikit_learn, shown_latents, sparse_probes
from .subjects import Dictionary


CHANNELS, ALL_CHANNELS, NOTHING = "hidden-state channels", "all channels together", "knows nothing"


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
) -> ProbeReport:
    """Probe losses and k-sparse probes of dictionaries at each of their widths, beside baselines.

    Args:
        data ([`HeldOut`]): The language model, the hookpoint and, for token tasks, the tokens. Under
            `torch.distributed` each process reads its share and fits its share of the latents; all return the same.
        subjects (`Mapping[str, Dictionary or SAEModel]`, or one [`SAEModel`]): By name.
        tasks ([`LabelledTask`], [`TokenTasks`] or a sequence of them, *optional*): By default what follows from the
            text alone ([`TokenTasks.of_properties`]).
        widths (`Sequence[int]`, *optional*), selection (`str`, *optional*, defaults to `"mask"`): Of those subjects
            that are no [`Dictionary`], see there.
        k (`Sequence[int]`, *optional*): Latents of k-sparse probes; `()` for none. By default 1, 2 and 5 where
            scikit-learn is installed.
        baselines (`bool`, *optional*, defaults to `True`): Beside each dictionary a random one with its L0, and the
            hidden state's channels: each alone, and all together as the ceiling.
        max_tokens (`int`, *optional*, defaults to 10,000): Tokens of token tasks, in whole windows.
        splits (`int`, *optional*, defaults to 3), test_share (`float`, *optional*, defaults to 0.2): How often
            examples are split anew, and into what.
        ridge (`float`, *optional*): See [`fit_probes`]; by default one over the number of train examples.
        least_share (`float`, *optional*, defaults to 0.005): Tasks are left out, with the reason, if one of their
            classes is fewer of the examples than this, or fewer than 20.
        context_length (`int`, *optional*): Tokens of a labelled text that are read; by default a window of the data.
        max_pairs (`int`, *optional*, defaults to 100,000,000): Activations that a process may keep, of all
            dictionaries together; 12 bytes each, and about 60 while those of one dictionary are fitted.
        resamples (`int`, *optional*, defaults to 1000): Of the bootstrap over tasks and splits.
        seed (`int`, *optional*, defaults to 0): Of splits, random dictionaries and bootstrap.
        show (`bool`, *optional*, defaults to `True`): Show progress bars in the main process.

    Returns:
        [`ProbeReport`]: each row has `subject`, `kind` (`dictionary`, `random`, `channels`, `all channels`,
        `nothing`), `width`; `probe_loss` (nats, test part) and `train_loss`; `gain` over the best channel; each with
        an `_interval` of 95% but `train_loss`; `k_sparse`: by k `accuracy`, `f1` and `auc` on the test part, with
        intervals; `tasks`: by name `loss`, `train_loss`, the `latents` chosen in each split, and scores by k.

    Raises:
        `ValueError`: for options out of range, tasks of which none can be used, or more activations than `max_pairs`.
        `ImportError`: if `k` asks for probes and scikit-learn is not installed.
    """
    _check_options(max_tokens, splits, test_share, least_share, max_pairs, resamples, k)
    dictionaries = _dictionaries(data, subjects, widths, selection)
    ks, notes = _sparse_ks(k)
    show = show and processes()[0] == 0
    data, token_tasks, labelled = _sorted_tasks(data, tasks, max_tokens)
    if context_length is None:
        context_length = data.batches[0].input_ids.shape[1] if data.batches else 128
    kinds = {name: "dictionary" for name in dictionaries}
    if baselines:
        source = data if data.batches else replace(data, batches=text_batches(labelled[0], data, context_length)[0])
        for name, dictionary in list(dictionaries.items()):
            random = random_dictionary(dictionary.sae, source, dictionary.widths, seed=seed)
            kinds[f"random ({name})"] = "random"
            dictionaries[f"random ({name})"] = Dictionary(random, dictionary.widths, dictionary.selection)
    sets = [token_examples(data, token_tasks, dictionaries, max_pairs, show)] if token_tasks else []
    sets += [text_examples(data, task, dictionaries, context_length, max_pairs, show) for task in labelled]
    seeds = [seed * splits + number for number in range(splits)]
    skipped: dict[str, str] = {}
    found = [_usable(examples, test_share, least_share, seeds, skipped) for examples in sets]
    names = [name for examples, _ in found for name in examples.names]
    _check_names(names, skipped)
    probing = _Probing(ridge, ks, baselines, show)
    parts = [probing.run(examples, tests, dictionaries) for examples, tests in found if examples.names]
    rows = _rows(parts, kinds, ks, names, Bootstrap(splits, len(names), resamples, seed))
    examples_found: dict[str, int] = {}
    for examples in sets:
        examples_found[examples.kind] = examples_found.get(examples.kind, 0) + len(examples.labels)
    about = {
        "hookpoint": data.hookpoint,
        "selection": selection,
        "examples": examples_found,
        "tasks": {
            name: share
            for examples, _ in found
            for name, share in zip(examples.names, examples.labels.double().mean(0).tolist(), strict=True)
        },
        "skipped": skipped,
        "splits": splits,
        "test_share": test_share,
        "ridge": ridge,
        "k": list(ks),
        "seed": seed,
        "notes": notes,
    }
    return ProbeReport(rows, about)


def _check_options(
    max_tokens: int,
    splits: int,
    test_share: float,
    least_share: float,
    max_pairs: int,
    resamples: int,
    k: Sequence[int] | None,
) -> None:
    if min(max_tokens, splits, max_pairs, resamples) < 1 or not 0 < test_share < 1 or not 0 <= least_share < 0.5:
        raise ValueError(
            "Expected `max_tokens`, `splits`, `max_pairs` and `resamples` of at least 1, `test_share` between 0 and 1 "
            f"and `least_share` from 0 to below 0.5; got {max_tokens}, {splits}, {max_pairs}, {resamples}, "
            f"{test_share} and {least_share}."
        )
    if k is not None and any(number < 1 for number in k):
        raise ValueError(f"`k` must hold numbers of latents, each at least 1; got {list(k)}.")


def _sparse_ks(k: Sequence[int] | None) -> tuple[list[int], list[str]]:
    if k is not None:
        return sorted(set(k)), []
    if has_scikit_learn():
        return [1, 2, 5], []
    return [], ["k-sparse probes left out: they need scikit-learn (pip install 'hf_matryoshka_sae[probes]')"]


def _dictionaries(
    data: HeldOut, subjects: Mapping[str, Dictionary | SAEModel] | SAEModel, widths: Sequence[int] | None, selection: str
) -> dict[str, Dictionary]:
    subjects = subjects if isinstance(subjects, Mapping) else {"sae": subjects}
    found = {}
    for name, subject in subjects.items():
        if not isinstance(subject, Dictionary | SAEModel):
            raise ValueError(f"Subjects must be SAEs or `Dictionary`s; '{name}' is a {type(subject).__name__}.")
        if isinstance(subject, SAEModel):
            subject = Dictionary(subject, widths, selection)
        subject.sae.to(data.device)
        found[name] = subject
    if not found:
        raise ValueError("There is no dictionary to probe: `subjects` is empty.")
    return found


def _sorted_tasks(
    data: HeldOut, tasks: Any, max_tokens: int
) -> tuple[HeldOut, list[TokenTasks], list[LabelledTask]]:
    """The data cut to what is read of it, tasks of its tokens, and those of texts."""
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
    """The examples with those tasks that can be probed, and the test part of each split."""
    tests = [examples.held_out(test_share, seed) for seed in seeds]
    parts = [part for test in tests for part in (test, ~test)]
    kept, reasons = usable_tasks(examples.names, examples.labels, parts, least_share)
    skipped.update(reasons)
    names = [examples.names[number] for number in kept]
    return replace(examples, names=names, labels=examples.labels[:, kept]), tests


def _check_names(names: Sequence[str], skipped: Mapping[str, str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Tasks must have names of their own; {twice} come twice. Give `from_dataset` a `name`.")
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise ValueError(f"No task can be probed ({reasons}). Give more tokens or texts, or other tasks.")


@dataclass
class _Found:
    """What one subject scored on some tasks, at one width; `k_sparse` is `(S, K, T, 3)`, the others `(S, T)`."""

    loss: list[Tensor] = field(default_factory=list)
    train_loss: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    k_sparse: list[Tensor] = field(default_factory=list)


Key = tuple[str, int]


@dataclass
class _Probing:
    """Everything fitted to one set of examples after the other."""

    ridge: float | None
    ks: Sequence[int]
    baselines: bool
    show: bool

    def run(
        self, examples: Examples, tests: Sequence[Tensor], dictionaries: Mapping[str, Dictionary]
    ) -> dict[Key, _Found]:
        """What each subject scores at each width."""
        found: dict[Key, _Found] = {}
        work: list[tuple[str, LatentColumns, list[int]]] = []
        for name, dictionary in dictionaries.items():
            columns, widths = examples.latents[name], dictionary.widths
            each = [widths] if dictionary.encodes_once else [[width] for width in widths]
            work += [(name, some, at) for some, at in zip(columns, each, strict=True)]
        if self.baselines:
            d_in = examples.hidden.shape[1]
            own, alone = own_latents(d_in), torch.zeros_like(examples.hidden)
            alone[:, own] = examples.hidden[:, own]
            work.append((CHANNELS, LatentColumns.of_dense(alone), [d_in]))
        total = len(tests) * sum(len(own_latents(columns.num_latents)) for _, columns, _ in work)
        with tqdm(total=total, desc="probes: latents", disable=not self.show, leave=False) as bar:
            for name, columns, widths in work:
                self._columns(name, columns, widths, examples.labels, tests, found, bar)
        if self.baselines:
            self._hidden(examples, tests, found)
        return found

    def _columns(
        self,
        name: str,
        columns: LatentColumns,
        widths: Sequence[int],
        labels: Tensor,
        tests: Sequence[Tensor],
        found: dict[Key, _Found],
        bar: tqdm,
    ) -> None:
        own, probes = own_latents(columns.num_latents), None
        for test in tests:
            ridge = self.ridge or 1 / int((~test).sum())
            train = columns.among(~test).select(own)
            probes = fit_probes(train, labels, class_weights(labels, ~test), ridge, probes, bar.update)
            everywhere = _in_all_processes(probes, own, columns.num_latents)
            chosen = _best(everywhere.loss, widths)
            losses = _test_losses(columns, everywhere, chosen, labels, class_weights(labels, test))
            scores = sparse_probes(columns, labels, test, widths, self.ks) if self.ks else None
            for p, width in enumerate(widths):
                at = found.setdefault((name, width), _Found())
                at.loss.append(losses[p])
                at.train_loss.append(everywhere.loss.gather(0, chosen[p][None])[0])
                at.latents.append(chosen[p])
                if scores is not None:
                    at.k_sparse.append(scores[p])

    def _hidden(self, examples: Examples, tests: Sequence[Tensor], found: dict[Key, _Found]) -> None:
        """Logistic regression on the whole hidden state."""
        at = found.setdefault((ALL_CHANNELS, examples.hidden.shape[1]), _Found())
        for test in tqdm(tests, desc="probes: all channels", disable=not self.show, leave=False):
            labels = examples.labels
            probe = fit_logistic(examples.hidden[~test], labels[~test])
            scores = probe.scores(examples.hidden)
            at.loss.append(cross_entropy(scores, labels, class_weights(labels, test)))
            at.train_loss.append(cross_entropy(scores, labels, class_weights(labels, ~test)))
            tasks = range(labels.shape[1])
            of_tasks = [classifier_scores(scores[test, task], labels[test, task]) for task in tasks]
            at.k_sparse.append(torch.stack(of_tasks)[None])


def _in_all_processes(probes: Probes, own: Tensor, num_latents: int) -> Probes:
    """The probes of all latents, of which each process has fitted some."""
    tensors = []
    for part in (probes.weight, probes.bias, probes.loss):
        whole = part.new_zeros(num_latents, part.shape[1])
        whole[own] = part
        tensors.append(reduce_sum(whole)[0])
    return Probes(*tensors)


def _best(loss: Tensor, widths: Sequence[int]) -> Tensor:
    """The latent of least loss among the first of each width, `(P, T)`; of equal ones the first."""
    # argsort can be told to be stable, which argmin cannot.
    return torch.stack([loss[:width].sort(dim=0, stable=True).indices[0] for width in widths])


def _test_losses(columns: LatentColumns, probes: Probes, chosen: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The losses `(P, T)` of the chosen latents on examples with weights."""
    latents, places = chosen.unique(return_inverse=True)
    x = shown_latents(columns, latents).double()
    losses = []
    for some, place in zip(chosen, places, strict=True):
        scores = x[:, place] * probes.weight.gather(0, some[None]) + probes.bias.gather(0, some[None])
        losses.append(cross_entropy(scores, labels, weights))
    return torch.stack(losses)


def _rows(
    parts: Sequence[dict[Key, _Found]],
    kinds: Mapping[str, str],
    ks: Sequence[int],
    names: Sequence[str],
    bootstrap: Bootstrap,
) -> list[dict[str, Any]]:
    """A row for each subject and width, over the tasks of all parts."""
    kinds = {**kinds, CHANNELS: "channels", ALL_CHANNELS: "all channels"}
    joined = {key: _joined([part[key] for part in parts]) for key in parts[0]}
    channels = next((found["loss"] for (name, _), found in joined.items() if name == CHANNELS), None)
    rows = [
        {"subject": name, "kind": kinds[name], "width": width, **_row(found, channels, ks, names, bootstrap)}
        for (name, width), found in joined.items()
    ]
    if channels is not None:
        nothing = {"loss": np.full_like(channels, np.log(2)), "train_loss": np.full_like(channels, np.log(2))}
        rows.append(
            {"subject": NOTHING, "kind": "nothing", "width": None, **_row(nothing, channels, ks, names, bootstrap)}
        )
    return rows


def _joined(found: Sequence[_Found]) -> dict[str, np.ndarray]:
    """The tasks of several sets of examples side by side."""
    joined = {}
    for name in ("loss", "train_loss", "latents", "k_sparse"):
        tensors = [torch.stack(values) for each in found if (values := getattr(each, name))]
        if tensors:
            joined[name] = torch.cat(tensors, dim=2 if name == "k_sparse" else 1).numpy()
    return joined


def _row(
    found: dict[str, np.ndarray],
    channels: np.ndarray | None,
    ks: Sequence[int],
    names: Sequence[str],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    loss = found["loss"]
    row = {
        "probe_loss": float(loss.mean()),
        "probe_loss_interval": bootstrap.interval(loss),
        "train_loss": float(found["train_loss"].mean()),
        "gain": None if channels is None else float((channels - loss).mean()),
        "gain_interval": None if channels is None else bootstrap.interval(channels - loss),
    }
    tasks = {
        name: {"loss": float(loss[:, t].mean()), "train_loss": float(found["train_loss"][:, t].mean())}
        for t, name in enumerate(names)
    }
    if "latents" in found:
        for t, name in enumerate(names):
            tasks[name]["latents"] = found["latents"][:, t].tolist()
    row["k_sparse"] = {}
    if "k_sparse" in found:
        scores = found["k_sparse"]
        # All channels together are one probe, of as many inputs as there are.
        for number, k in enumerate(ks if "latents" in found else ["all"]):
            row["k_sparse"][str(k)] = {}
            for s, score in enumerate(SCORES):
                values = scores[:, number, :, s]
                row["k_sparse"][str(k)][score] = float(values.mean())
                row["k_sparse"][str(k)][f"{score}_interval"] = bootstrap.interval(values)
            for t, name in enumerate(names):
                of_task = {score: float(scores[:, number, t, s].mean()) for s, score in enumerate(SCORES)}
                tasks[name].setdefault("k_sparse", {})[str(k)] = of_task
    return {**row, "tasks": tasks}
