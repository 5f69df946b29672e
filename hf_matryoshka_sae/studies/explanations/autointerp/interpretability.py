"""Automated interpretability at each width: explain latents, then examine the explanations on other text.

After Bills et al. 2023 (simulation), Paulo et al. 2024 (arXiv 2410.13928: detection, fuzzing) and SAEBench (arXiv
2503.09532: passages, numbers of them). A judge is a language model; without one, N2G's patterns stand in: they are
made from the examples and answer the same questions about the same passages.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ....common.checks import check_at_least
from ....common.distributed import processes
from ....common.logs import progress
from ....common.report import Report
from ....evaluation.data import HeldOut
from ....models import SAEModel
from ...drawn_latents import DrawnLatents, firing_counts, with_baselines
from ..n2g import Examples, Explainer, firing_examples
from .answers import AnswerCache, Judge
from .contexts import ACTIVE, Context, LatentContexts, TokenTexts
from .examination import COUNTS, SCORES, Interpreted, PassageCounts, examine
from .judges import open_judge
from .questions import Questions
from .readers import STAND_IN, JudgeReader, PatternReader, Reader
from .report import interpretability_report


GREETING = [{"role": "user", "content": "Are you there? Answer with the word yes."}]
_STAND_IN_EFFORT = 0.1
_EXAMPLES, _TEST = 0, 1
"""What the passages of a latent are drawn for: each draws for itself."""


def greet(judge: Judge, cache: str | Path | None = None) -> None:
    """Ask a judge one thing, or find in the cache that it has answered.

    Raises:
        `ValueError`: if it cannot be asked.
    """
    AnswerCache(cache).ask(judge, GREETING)


def automated_interpretability(
    saes: Mapping[str, SAEModel],
    examples: HeldOut,
    test: HeldOut,
    judge: Judge | str | None = None,
    widths: Sequence[int] | None = None,
    per_group: int = 8,
    scores: Sequence[str] = tuple(SCORES),
    passages: PassageCounts | None = None,
    least: int = 15,
    baselines: bool = True,
    cache: str | Path | None = None,
    prompts: str | Path | None = None,
    price: tuple[float, float] | None = None,
    workers: int = 4,
    seed: int = 0,
    resamples: int = 1000,
    show: bool = True,
) -> Report | None:
    """Explain latents and examine the explanations by detection, fuzzing and simulation.

    A judge is asked 3 questions about a latent and one for each passage that is simulated, with the defaults 17.

    Args:
        saes (`Mapping[str, SAEModel]`): By name; of one hookpoint.
        examples ([`HeldOut`]): Text that explanations are made from.
        test ([`HeldOut`]): Other text, that they are examined on; of the same model and hookpoint.
        judge ([`Judge`] or `str`, *optional*): What explains and answers, or what [`open_judge`] opens; by default
            N2G's patterns stand in.
        widths (`Sequence[int]`, *optional*): By default each SAE's prefix widths.
        per_group (`int`, *optional*, defaults to 8): Latents drawn from each group that a width adds.
        scores (`Sequence[str]`, *optional*): Of `detection`, `fuzzing` and `simulation`; all by default.
        passages ([`PassageCounts`], *optional*): How many.
        least (`int`, *optional*, defaults to 15): How often a latent has to fire among the examples; in the test text
            it has to fire as often as there are passages in which it is to be detected.
        baselines (`bool`, *optional*, defaults to `True`): Also explain a random dictionary for each SAE, and neurons.
        cache (`str` or `Path`, *optional*): JSONL file of answers. With it, what was answered is not asked again, in
            another run or after a break; without it answers are forgotten.
        prompts (`str` or `Path`, *optional*): Folder with templates; see [`Questions`].
        price (`tuple[float, float]`, *optional*): Of a million tokens read, and of a million written.
        workers (`int`, *optional*, defaults to 4): Latents that a judge is asked about at the same time; results do
            not depend on it.
        seed (`int`, *optional*, defaults to 0): Of what is drawn.
        resamples (`int`, *optional*, defaults to 1000): Of the intervals.
        show (`bool`, *optional*, defaults to `True`): Show progress bars in the main process.

    Returns:
        [`Report`] with the drawn `latents` as [`Interpreted`]; `None` in all but the main process, which alone asks.

    Raises:
        `ValueError`: if there is no SAE, widths it does not have, no score or one of another name, nothing fires
            often enough, a prompt or the cache is broken, or the judge cannot be asked. What was answered stays in the
            cache.
    """
    scores = _checked_scores(scores)
    check_at_least(1, per_group=per_group, least=least, workers=workers)
    if examples.tokenizer is None:
        raise ValueError("Explanations need the language model's tokenizer: `HeldOut(..., tokenizer=...)`.")
    counts, templates, answers = passages or PassageCounts(), Questions(prompts), AnswerCache(cache)
    judge = open_judge(judge) if judge is None or isinstance(judge, str) else judge
    if judge is not None and processes()[0] == 0:
        answers.ask(judge, GREETING)  # whether it answers at all is known before the long work
    subjects = with_baselines(saes, examples, widths, baselines, seed)
    if processes()[0] != 0:  # an answer is paid for once
        return None

    texts = TokenTexts(examples.tokenizer)
    rows: dict[str, list[dict[str, Any]]] = {}
    latents: dict[str, list[Interpreted]] = {}
    for name, (sae, chosen) in subjects.items():
        eligible = (firing_counts(sae, examples) >= least) & (firing_counts(sae, test) >= counts.firing)
        drawn = DrawnLatents.of(eligible, chosen, per_group, seed)
        if not drawn.latents:
            raise ValueError(
                f"No latent of `{name}` fires on at least {least} of the {examples.tokens} tokens that examples come "
                f"from and on {counts.firing} of the {test.tokens} of the test text. Give more text, or a smaller "
                "`least`."
            )
        from_text, on_text = (firing_examples(sae, data, drawn.latents, show) for data in (examples, test))
        if judge is None:
            explainer = Explainer(sae, examples, substitutes=0, effort=_STAND_IN_EFFORT, seed=seed)
            read = partial(_read_by_patterns, explainer, from_text, texts, on_text.windows.numpy())
        else:
            read = partial(
                _read_by_judge, partial(JudgeReader, judge, answers, templates, texts), from_text, counts, seed
            )
        work = partial(_examined, read, from_text, on_text, scores, counts, seed)
        bar = progress(total=len(drawn.latents), desc=f"interpreting {name}", disable=not show, leave=False)
        latents[name] = _each(work, drawn.latents, 1 if judge is None else workers, answers, bar)
        rows[name] = _rows(drawn, latents[name], scores, resamples, seed)

    cost = vars(answers.cost) | ({} if price is None else {"money": answers.cost.money(price)})
    about = {
        "hookpoint": test.hookpoint,
        "judge": STAND_IN if judge is None else judge.name,
        "settings": {} if judge is None else dict(judge.settings),
        "stand_in": judge is None,
        "scores": scores,
        "cost": cost,
        "example_tokens": examples.tokens,
        "test_tokens": test.tokens,
        "passages": vars(counts),
        "per_group": per_group,
        "least": least,
        "seed": seed,
    }
    return interpretability_report(rows, latents, about)


def _checked_scores(scores: Sequence[str]) -> list[str]:
    chosen = [scores] if isinstance(scores, str) else list(dict.fromkeys(scores))
    if not chosen or not set(chosen) <= set(SCORES):
        raise ValueError(f"`scores` takes any of {', '.join(SCORES)}, got {', '.join(chosen) or 'none'}.")
    return chosen


def _read_by_patterns(
    explainer: Explainer, from_text: Examples, texts: TokenTexts, windows: np.ndarray, latent: int
) -> Reader:
    return PatternReader(explainer.explain(latent, from_text), texts, windows)


def _read_by_judge(
    reader: Callable[[list[Context]], Reader], from_text: Examples, counts: PassageCounts, seed: int, latent: int
) -> Reader:
    contexts = LatentContexts(from_text, latent, _least_active(from_text, latent))
    generator = np.random.default_rng([seed, latent, _EXAMPLES])
    return reader(contexts.spread(counts.examples_top, counts.spread(len(from_text.fired[latent][0])), generator))


def _examined(
    read: Callable[[int], Reader],
    from_text: Examples,
    on_text: Examples,
    scores: list[str],
    counts: PassageCounts,
    seed: int,
    latent: int,
) -> Interpreted:
    contexts = LatentContexts(on_text, latent, _least_active(from_text, latent))
    generator = np.random.default_rng([seed, latent, _TEST])
    interpreted = examine(latent, read(latent), contexts, scores, counts, generator)
    return replace(interpreted, frequency=len(on_text.fired[latent][0]) / int(on_text.keep.sum()))


def _least_active(from_text: Examples, latent: int) -> float:
    return ACTIVE * float(from_text.fired[latent][1].max())


def _each(
    work: Callable[[int], Interpreted], latents: list[int], workers: int, answers: AnswerCache, bar: progress
) -> list[Interpreted]:
    """Every latent's scores, in order; an error ends all threads at their next question."""
    with bar, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, latent) for latent in latents]
        try:
            for done in as_completed(futures):
                done.result()
                bar.update()
        except BaseException as error:
            answers.end(error)
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _rows(
    drawn: DrawnLatents, latents: Iterable[Interpreted], scores: list[str], resamples: int, seed: int
) -> list[dict[str, Any]]:
    by_latent = {one.latent: one for one in latents}
    names = [name for score in scores for name in SCORES[score]]
    values = {latent: [one.scores[name] for name in names] for latent, one in by_latent.items()}
    rows = drawn.rows(values, names, resamples, seed)
    for number, row in enumerate(rows, start=1):
        below = [by_latent[latent] for group in drawn.groups[:number] for latent in group]
        row |= {name: sum(getattr(one, name) for one in below) for name in COUNTS}
    return rows
