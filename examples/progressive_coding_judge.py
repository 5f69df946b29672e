"""What the SAEs of one seed are worth at every width: fidelity, power laws, the cost of a step."""

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from hf_matryoshka_sae.activations import (
    DatasetConfig,
    TokenBatch,
    TokenStream,
    WindowShuffle,
    has_lm_loss,
    heldout_batches,
    load_documents,
    load_language_model,
    resolve_hookpoints,
)
from hf_matryoshka_sae.evaluation import Dictionary, HeldOut, evaluate_fidelity
from hf_matryoshka_sae.evaluation.language_model import spliced_metrics
from hf_matryoshka_sae.models import MODELS, SAEModel
from hf_matryoshka_sae.progressive import (
    LatentStatistics,
    calibrate_thresholds,
    decoder_spectrum,
    fit_power_law,
    latent_statistics,
    plot_power_laws,
    rank_latents,
    sort_latents,
    with_threshold,
)
from hf_matryoshka_sae.training import RunConfig
from hf_matryoshka_sae.training.sae.learner import Learner


RANKINGS = (
    "trained",
    "energy",
    "frequency",
    "contribution",
    "attribution",
    "decoder-spectrum",
    "greedy",
    "random",
)
METRICS = ("fvu", "l0", "ce", "delta_ce", "recaptured_zero", "kl", "rsa")
WINDOWS_AT_ONCE = 8
POOL_TOKENS = 1_000_000  # from which the windows of training text are drawn
CALIBRATION_TOKENS = 16_384  # for a threshold: the L0 is then off by less than the texts differ
SIMILARITY_TOKENS = 500
TURNS, WARM_UP = 15, 12  # steps that are timed, and steps before: enough for latents to count as dead


def dataset_fields(given: dict[str, Any], which: str) -> dict[str, str]:
    """A dataset's fields; the embedded text has a split of each name."""
    return {"path": given[which], "split": which if given[which] == "embedded" else "train", "column": given["column"]}


@dataclass
class TestBed:
    """What SAEs are judged and ranked on, the same for all seeds.

    Args:
        heldout ([`HeldOut`]): Text to judge on.
        losses ([`HeldOut`]): The part of it on which the language model's loss is measured.
        training ([`HeldOut`]): Training text, for statistics and thresholds.
    """

    heldout: HeldOut
    losses: HeldOut
    training: HeldOut

    @classmethod
    def open(cls, given: dict[str, Any]) -> "TestBed":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer = load_language_model(given["model"], device=device)
        if not has_lm_loss(model):
            raise ValueError(f"{given['model']} predicts no tokens, so there is no loss to compare by. Take another.")
        (hookpoint,) = resolve_hookpoints(model, [given["hookpoint"]])
        dataset = DatasetConfig(**dataset_fields(given, "heldout"))
        size, exclude = given["context_length"], given["exclude"]
        judged = heldout_batches(dataset, tokenizer, size, given["eval_tokens"], WINDOWS_AT_ONCE, exclude=exclude)
        ranked = list(training_batches(given, tokenizer))
        parts = (
            HeldOut(model, batches, hookpoint, tokenizer.mask_token_id)
            for batches in (judged, judged[:: given["loss_every"]], ranked)
        )
        return cls(*parts)


def training_batches(given: dict[str, Any], tokenizer) -> Iterator[TokenBatch]:
    """Windows from all over the training text; a file begins with one kind of document."""
    documents = load_documents(DatasetConfig(**dataset_fields(given, "train")), tokenizer, shuffle=True)
    size, exclude = given["context_length"], given["exclude"]
    windows = WindowShuffle(TokenStream(documents, tokenizer, size, WINDOWS_AT_ONCE, exclude=exclude), POOL_TOKENS, 0)
    left = given["statistics_tokens"]
    while left > 0:
        batch = next(windows)
        left -= int(batch.keep.sum())
        yield batch


def judge(config: RunConfig, given: dict[str, Any], tests: TestBed, folder: Path) -> dict[str, Any]:
    """Everything that is measured on the SAEs of one seed."""
    saes = load_saes(config, folder, tests.heldout.hookpoint, tests.heldout.device)
    widths, states = given["widths"], list(tests.training.activations())
    full = {"topk": saes[f"topk-{widths[-1]}"], "batch_topk": saes["batch_topk"], "matryoshka": saes["matryoshka"]}
    statistics = {
        name: latent_statistics(sae, tests.training, neighbours=0, attribution=True) for name, sae in full.items()
    }
    subjects, same_as = {}, {}
    for name in ("topk", "batch_topk"):
        orders = rank_all(full[name], statistics[name], states)
        same_as[name] = first_alike(orders, widths)
        chosen = {ranking: order for ranking, order in orders.items() if same_as[name][ranking] == ranking}
        subjects |= pruned_subjects(name, full[name], chosen, states, given)
    thresholds = calibrate_thresholds(saes["matryoshka"], first_tokens(states), given["k"], widths)
    subjects["matryoshka/trained/mask"] = Dictionary(saes["matryoshka"])
    for width, threshold in thresholds.items():
        smaller = with_threshold(saes["matryoshka"], width, threshold)
        subjects[f"matryoshka/trained/restrict/{width}"] = Dictionary(smaller, [width])
    for width in widths[:-1]:
        subjects[f"separate/trained/mask/{width}"] = Dictionary(saes[f"topk-{width}"])
    about, rows = measure(subjects, tests)
    return {
        **about,
        "rows": complete(rows, same_as, widths),
        "same_ranking": same_as,
        "power_laws": power_laws(full, statistics, folder),
        "cost": training_cost(config, saes, states, tests),
    }


def rank_all(sae: SAEModel, statistics: LatentStatistics, states: list[Tensor]) -> dict[str, Tensor]:
    """The order of each ranking."""
    return {
        ranking: rank_latents(sae, ranking, statistics, states if ranking == "greedy" else None)
        for ranking in tqdm(RANKINGS, desc="rankings", leave=False)
    }


def first_alike(orders: Mapping[str, Tensor], widths: list[int]) -> dict[str, str]:
    """For each ranking the first that puts the same latents into every prefix: it need not be judged again."""
    seen: dict[tuple[bytes, ...], str] = {}
    return {
        ranking: seen.setdefault(tuple(order[:width].sort().values.numpy().tobytes() for width in widths), ranking)
        for ranking, order in orders.items()
    }


def pruned_subjects(
    name: str, sae: SAEModel, orders: Mapping[str, Tensor], states: list[Tensor], given: dict[str, Any]
) -> dict[str, Dictionary]:
    """A plain SAE cut at every width in each order; at full width only as it was trained, all orders being equal."""
    widths, k, subjects = given["widths"], given["k"], {}
    for ranking, order in tqdm(orders.items(), desc=f"thresholds of {name}", leave=False):
        sorted_sae = sort_latents(sae, order=order, across_groups=True)
        measured = widths if ranking == "trained" else widths[:-1]
        subjects[f"{name}/{ranking}/mask"] = Dictionary(sorted_sae, measured)
        if sae.config.activation_name == "topk":
            subjects[f"{name}/{ranking}/restrict"] = Dictionary(sorted_sae, measured, "restrict")
            continue
        for width, threshold in calibrate_thresholds(sorted_sae, first_tokens(states), k, measured).items():
            smaller = with_threshold(sorted_sae, width, threshold)
            subjects[f"{name}/{ranking}/restrict/{width}"] = Dictionary(smaller, [width])
    return subjects


def first_tokens(states: list[Tensor]) -> list[Tensor]:
    return list(torch.cat(states)[:CALIBRATION_TOKENS].split(4096))


def measure(subjects: Mapping[str, Dictionary], tests: TestBed) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts about the held-out text, and a row for each subject and width."""
    result = evaluate_fidelity(tests.heldout, subjects, language_model=False, similarity_tokens=SIMILARITY_TOKENS)
    mean = torch.cat(list(tests.losses.activations())).double().mean(0)
    passes = sum(len(subject.widths) for subject in subjects.values()) * len(tests.losses.batches)
    with tqdm(total=passes, desc="language-model loss", leave=False) as bar:
        baselines, losses = spliced_metrics(tests.losses, mean, list(subjects.values()), bar.update)
    rows = []
    for (name, found), of_widths in zip(result["subjects"].items(), losses, strict=True):
        method, ranking, selection = name.split("/")[:3]
        for row, loss in zip(found, of_widths, strict=True):
            known = {**row, **loss, "rsa": row["rsa"]["spearman"]}
            about = {"method": method, "ranking": ranking, "selection": selection, "width": row["width"]}
            rows.append(about | {metric: known[metric] for metric in METRICS})
    about = {"tokens": result["tokens"], "loss_tokens": tests.losses.tokens}
    return about | {"clean_ce": baselines.clean_ce, "zero_ce": baselines.zero_ce}, rows


def complete(rows: list[dict], same_as: Mapping[str, Mapping[str, str]], widths: list[int]) -> list[dict]:
    """All rows that there should be: those of rankings alike, and of full widths, are those that were measured."""
    by_key = {(row["method"], row["ranking"], row["selection"], row["width"]): row for row in rows}
    found = [row for row in rows if row["method"] not in same_as]
    for method, others in same_as.items():
        for ranking, measured in others.items():
            for selection in ("mask", "restrict"):
                for width in widths:
                    key = (method, "trained" if width == widths[-1] else measured, selection, width)
                    found.append(by_key[key] | {"ranking": ranking})
    full = by_key["topk", "trained", "mask", widths[-1]]
    return [*found, full | {"method": "separate"}]


# Power laws and cost


def power_laws(saes: Mapping[str, SAEModel], statistics: Mapping[str, LatentStatistics], folder: Path) -> list[dict]:
    """A fit to each importance of each SAE; draws them into the seed's folder."""
    importance = {
        (method, name): decoder_spectrum(sae) if name == "decoder spectrum" else getattr(statistics[method], field)
        for name, field in (
            ("energy", "mean_square"),
            ("frequency", "frequency"),
            ("contribution", "contribution"),
            ("decoder spectrum", ""),
        )
        for method, sae in saes.items()
    }
    rows, drawn = [], {}
    for (method, name), values in tqdm(importance.items(), desc="power laws", leave=False):
        row = {"method": method, "importance": name}
        try:
            fit = fit_power_law(values)
        except ValueError as error:  # too few live latents say nothing about a law, and spoil nothing else
            rows.append(row | {"error": str(error)})
            continue
        rows.append(row | {"fit": fit.to_dict()})
        if name != "contribution" or not torch.allclose(values, importance[method, "energy"], rtol=1e-3):
            drawn[f"{name}, {method}"] = (values, fit)  # with unit decoder rows the picture of energy is enough
    if drawn:
        plot_power_laws(drawn, folder / "power_laws.png")
    return rows


def training_cost(
    config: RunConfig, saes: Mapping[str, SAEModel], states: list[Tensor], tests: TestBed
) -> dict[str, Any]:
    """Parameters of each SAE, and the median seconds of one optimizer step, all SAEs taking turns.

    Steps go on from the trained weights, so that selection and dead latents are those of a run.
    """
    x = torch.cat(states)
    mean = x.mean(0)
    scale = (x - mean).square().sum(1).mean().sqrt().item()
    batches = x.repeat(-(-config.batch_size // len(x)), 1).split(config.batch_size)
    batches = [batch for batch in batches if len(batch) == config.batch_size]
    accelerator, learners = Accelerator(), {}
    for spec in config.saes:
        sae = copy.deepcopy(saes[spec.name]).requires_grad_(True)
        sae.fold_normalization_(-mean / scale, 1 / scale)
        shape = {"steps": config.steps, "batch_size": config.batch_size}
        learners[spec.name] = Learner(
            spec.name, tests.training.hookpoint, sae, spec, mean, scale, accelerator, **shape
        )
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    for turn in tqdm(range(WARM_UP + TURNS), desc="time of a step", leave=False):
        for name, learner in learners.items():
            began = time.perf_counter()
            step = min(config.steps // 2 + turn, config.steps - 1)
            learner.accumulate(batches[turn % len(batches)], step)
            learner.step(step)
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds[name] += [time.perf_counter() - began] * (turn >= WARM_UP)
    began = time.perf_counter()
    harvested = sum(len(batch) for batch in tests.training.activations())
    return {
        "batch_size": config.batch_size,
        "turns": TURNS,
        "step_seconds": {name: median(times) for name, times in seconds.items()},
        "parameters": {name: sum(p.numel() for p in sae.parameters()) for name, sae in saes.items()},
        "language_model_seconds": (time.perf_counter() - began) * config.batch_size / harvested,
    }


def load_saes(config: RunConfig, folder: Path, hookpoint: str, device: torch.device) -> dict[str, SAEModel]:
    """The trained SAEs by name."""
    classes = {model.config_class.model_type: model for model in MODELS.values()}
    place = hookpoint.replace(":", "-")
    return {
        spec.name: classes[f"{spec.type}_sae"].from_pretrained(folder / spec.name / place).to(device).eval()
        for spec in config.saes
    }
