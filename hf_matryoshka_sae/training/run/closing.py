"""The end of a run: thresholds solved for, normalisation folded in, dictionaries saved, loaded back and evaluated."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from ...common.distributed import among
from ...common.files import write_json
from ...evaluation import Dictionary, HeldOut
from ...evaluation.report import excluded
from ...evaluation.sources import figures_by_source, heldout_by_source, off_target
from ...evaluation.subjects import ShardedDictionary
from ...models import SAEModel
from ...models.places import collection_index, is_collection, saes_below
from ..config.run import RunConfig, calibration_tokens, eval_tokens
from ..data.feed import EndOfStates, Feed
from ..data.harvest import Harvest
from ..data.placement import Placement
from ..sae.calibration import calibrate_l0, calibrate_threshold
from ..sae.learner import Learner
from ..sae.sharded_files import load_own_rows, save_own_rows
from .provenance import Provenance, describe_sae
from .report import LARGEST_SHIFT, evaluate, missed_targets, write_report


_SOURCE_TOKENS = 10_000


class Closing:
    """What is done when the last step is done.

    Args:
        config ([`RunConfig`]), accelerator (`Accelerator`), harvest ([`Harvest`]): The run.
        placements (`list[Placement]`): Of all dictionaries.
        learners (`list[Learner]`): Those of this process, in the same order.
        provenance ([`Provenance`]): Told of every saved SAE.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        harvest: Harvest,
        placements: list[Placement],
        learners: list[Learner],
        provenance: Provenance,
    ) -> None:
        self.config, self.accelerator, self.harvest, self.provenance = config, accelerator, harvest, provenance
        rank, remaining = accelerator.process_index, iter(learners)
        self.own = [(place, next(remaining) if rank in place.ranks else None) for place in placements]

    def run(self, feed: Feed, folder: Path, skipped: int) -> tuple[list[dict[str, Any]], list[str]]:
        """Save and evaluate every dictionary.

        Args:
            feed ([`Feed`]): Where the rows for the thresholds come from; it is closed.
            folder (`Path`): The run's.
            skipped (`int`): Steps that were left out.

        Returns:
            What [`report.evaluate`] gives, for each hookpoint, and what the user should know of the run at its end.
        """
        calibration, tokens = self._calibration(feed)
        left_out = feed.num_not_finite()
        feed.close()  # from here on the language model is the evaluation's
        descriptions: list[dict[str, Any]] = [{} for _ in self.own]
        for described, (place, learner) in zip(descriptions, self.own, strict=True):
            if learner is not None:
                batches = calibration.get((learner.hookpoint, place.streams_of(self.accelerator.process_index)), [])
                described.update(self._save(learner, folder, batches, tokens))
        self.accelerator.wait_for_everyone()
        for path, description in self._everywhere(descriptions):
            self.provenance.add_sae(folder / path, description)
        if self.accelerator.is_main_process:
            _write_collection(folder)
        world = self.accelerator.num_processes
        everybody = all(len(place.ranks) == world and place.shards == 1 for place, _ in self.own)
        results = self._evaluate_together(folder) if everybody else self._evaluate_apart(folder)
        by_source = [sentence for result in results for sentence in off_target(result.get("sources", ()))]
        warnings = [*self._left_out(skipped, left_out, results), *self._missed_targets(results), *by_source]
        if self.accelerator.is_main_process:
            write_report(results, warnings, folder, self.accelerator)
        self.provenance.save(self.config.steps, skipped, left_out, warnings)
        self.accelerator.wait_for_everyone()
        return results, warnings

    def _left_out(self, skipped: int, left_out: int, results: list[dict[str, Any]]) -> list[str]:
        """Sentences about what is not in the figures and weights because it is not finite."""
        sentences = []
        if left_out:
            sentences.append(
                f"{left_out:,} hidden states with NaN or infinite values were left out of training on "
                f"{self.config.steps * self.config.batch_size:,}. `model_dtype: float32` may have none."
            )
        if skipped:
            sentences.append(f"{skipped:,} of {self.config.steps:,} steps were skipped: NaN or infinite values.")
        return sentences + [sentence for result in results for sentence in excluded(result)]

    def _missed_targets(self, results: list[dict[str, Any]]) -> list[str]:
        """Sentences about the dictionaries of all processes that are not what was asked for."""
        of_hookpoint = {result["hookpoint"]: result for result in results}
        by_place: list[dict[str, Any]] = [{} for _ in self.own]
        for of_place, (_, learner) in zip(by_place, self.own, strict=True):
            if learner is not None:
                result = of_hookpoint[learner.hookpoint]
                of_place[place_of(learner)] = missed_targets(learner, result, self.config.tokens)
        return [sentence for _, missed in self._everywhere(by_place) for sentence in missed]

    def _everywhere(self, by_place: list[dict[str, Any]]) -> list[tuple[str, Any]]:
        """What the first process of each dictionary tells, by path, in all processes."""
        parts = [by_place] * self.accelerator.num_processes
        if self.accelerator.num_processes > 1:
            dist.all_gather_object(parts, by_place)
        joined = (parts[place.ranks[0]][i] for i, (place, _) in enumerate(self.own))
        return [item for items in joined for item in items.items()]

    def _calibration(self, feed: Feed) -> tuple[dict[tuple, list[Tensor]], int]:
        """Batches for the thresholds of this process's dictionaries, and the tokens in all streams' batches."""
        rank, rows = self.accelerator.process_index, {}
        mine = [(place, learner) for place, learner in self.own if learner is not None]
        wanting = [(place, one) for place, one in mine if _wanted_l0(one) is not None]
        anyone = torch.tensor(float(bool(wanting)), device=self.accelerator.device)
        if not bool(self.accelerator.reduce(anyone)):
            return {}, 0
        keys = {(one.hookpoint, place.streams_of(rank)) for place, one in wanting}
        in_batch = self.harvest.processes.streams * self.harvest.processes.rows
        # The run's own rows, evenly; a run that began with an earlier version kept none, and reads on.
        batches = feed.replay() or max(1, -(-calibration_tokens(self.config) // in_batch))
        hidden = not self.accelerator.is_main_process
        for number in tqdm(range(batches), desc="states for the thresholds", disable=hidden, leave=False):
            try:
                feed.advance()
            except EndOfStates:  # an iterator that gives hardly more than is trained on
                if self.accelerator.num_processes > 1:
                    raise
                rows = rows or {key: [self.harvest.sample[key[0]]] for key in keys}
                return rows, number * in_batch or len(next(iter(self.harvest.sample.values())))
            for key in keys:
                rows.setdefault(key, []).append(feed.rows(*key))
        return rows, batches * in_batch

    def _save(self, learner: Learner, folder: Path, calibration: list[Tensor], tokens: int) -> dict[str, Any]:
        """Save a dictionary as it is used; what is to be said of it, by its path in the run's folder."""
        sae: SAEModel = learner.finished()
        solved, path, wanted = {}, place_of(learner), _wanted_l0(learner)
        batches = _Normalised(calibration, learner)
        if sae.config.activation_name == "batch_topk":
            solved = {"threshold": calibrate_threshold(sae, batches, wanted, learner.layout)}
        elif wanted is not None and _may_move(learner, wanted):
            solved = {"threshold_shift": calibrate_l0(sae, batches, wanted, learner.layout, learner.fixed)}
        sae.fold_normalization_(learner.mean, learner.scale)
        if learner.base is not None:
            learner.base.restore(sae)
        layout = learner.layout
        first = layout.replica == layout.shard == 0
        if layout.shards > 1:
            save_own_rows(sae, whole_config(learner, sae), layout, folder / path)
        elif first:
            try:
                sae.save_pretrained(folder / path)
            except SafetensorError as error:  # how that library tells of a full disk
                raise OSError(f"{folder / path} could not be saved: {error}") from error
        return {path: describe_sae(learner, folder / path, solved, wanted, tokens)} if first else {}

    def _evaluate_together(self, folder: Path) -> list[dict[str, Any]]:
        """All processes share the held-out tokens."""
        results = []
        for hookpoint in self.harvest.hookpoints:
            heldout = self.harvest.heldout(hookpoint)
            saes = {
                one.name: Dictionary(self._load(one, folder, heldout.device))
                for _, one in self.own
                if one.hookpoint == hookpoint
            }
            if saes:
                result = evaluate(heldout, saes, baselines=self.config.eval_baselines)
                results.append(result | self._by_source(heldout, saes))
        return results

    def _by_source(self, heldout: Any, saes: dict[str, Dictionary]) -> dict[str, Any]:
        """Figures of a hookpoint's dictionaries on each source of the held-out text, where the text names any."""
        config = self.config
        if not config.eval_dataset or not config.eval_dataset.source_column or not isinstance(heldout, HeldOut):
            return {}
        tokens = min(_SOURCE_TOKENS, eval_tokens(config))
        sizes = config.context_length, tokens, config.lm_batch_size
        sources = heldout_by_source(heldout, config.eval_dataset, *sizes, pack=config.pack, exclude=config.exclude)
        targets = {learner.name: _wanted_l0(learner) for _, learner in self.own if learner is not None}
        return {"sources": figures_by_source({name: one.sae for name, one in saes.items()}, sources, targets)}

    def _evaluate_apart(self, folder: Path) -> list[dict[str, Any]]:
        """The processes of each dictionary evaluate it; all get all results."""
        by_place: list[dict[str, Any]] = [{} for _ in self.own]
        for of_place, (place, learner) in zip(by_place, self.own, strict=True):
            if learner is None:
                continue
            layout, heldout = learner.layout, self.harvest.heldout(place.hookpoint)
            sae = self._load(learner, folder, heldout.device)
            subject = ShardedDictionary(sae, layout, learner.config.widths) if layout.shards > 1 else Dictionary(sae)
            with among(layout.replica, layout.replicas, layout.replica_group):
                first = self.accelerator.process_index == place.ranks[0]
                result = evaluate(heldout, {learner.name: subject}, first, self.config.eval_baselines)
                of_place[learner.name] = result
        results: dict[str, dict[str, Any]] = {}
        for _, result in self._everywhere(by_place):
            of_hookpoint = results.setdefault(result["hookpoint"], result)
            for part in ("saes", "baselines"):
                of_hookpoint[part] |= result[part]
        return [results[name] for name in self.harvest.hookpoints if name in results]

    def _load(self, learner: Learner, folder: Path, device: torch.device) -> SAEModel:
        path = folder / place_of(learner)
        if learner.layout.shards > 1:
            return load_own_rows(type(learner.sae), learner.sae.config, path, learner.layout).to(device)
        return type(learner.sae).from_pretrained(path).to(device)


def _write_collection(folder: Path) -> None:
    """Write the `config.json` by which `AutoModel` finds the SAEs of the run's folder; another's is left alone."""
    if is_collection(folder) or not (folder / "config.json").exists():
        write_json(folder / "config.json", collection_index(saes_below(folder)))


class _Normalised:
    """Batches of raw rows in a dictionary's units, one at a time, as often as they are asked for."""

    def __init__(self, rows: list[Tensor], learner: Learner) -> None:
        self.rows, self.learner = rows, learner

    def __iter__(self) -> Iterator[Tensor]:
        mean, scale = self.learner.mean, self.learner.scale
        return ((rows.to(mean).float() - mean) / scale for rows in self.rows)


def _may_move(learner: Learner, wanted: float) -> bool:
    """Whether thresholds may be moved to meet an L0: a ReLU's activations move along, so only by little."""
    if learner.config.activation_name != "relu" or not learner.last:
        return True
    return abs(learner.last["l0"].item() - wanted) <= LARGEST_SHIFT * wanted


def _wanted_l0(learner: Learner) -> float | None:
    """The L0 that thresholds are solved for, where there are any."""
    if not learner.spec.solves_thresholds:
        return None
    return learner.k if learner.config.activation_name == "batch_topk" else learner.spec.target_l0


def place_of(learner: Learner) -> str:
    """The folder of a saved SAE in that of its run."""
    return f"{learner.name}/{learner.hookpoint.replace(':', '-')}"


def whole_config(learner: Learner, sae: SAEModel) -> Any:
    """The config of the whole dictionary whose part `sae` is, with what was folded into it."""
    config = copy.deepcopy(sae.config)
    for name in sae.config.truncated(sae.config.num_latents):
        setattr(config, name, getattr(learner.config, name))
    config.architectures, config.dtype = [type(sae).__name__], str(sae.dtype).removeprefix("torch.")
    return config
