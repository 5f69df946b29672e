"""How well patterns of tokens explain latents, at each width and by frequency, beside lookup tables and baselines.

Latents are drawn and a width's scores estimated as in `drawn_latents.py`. Beside the patterns stand the tables of
`lookup.py`, made from the same text; beside the SAE a random dictionary and the model's neurons. What a score owes to
how often latents fire is in `by_frequency.py`.

Explained are latents that fire at least `least` times in the text that examples come from, and `least_test` times in
the text that patterns are tested on; what fires less cannot be explained by examples, or judged, and its share is
reported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...common.checks import check_at_least
from ...common.distributed import gathered, processes
from ...common.logs import progress
from ...common.report import Column, Report
from ...evaluation.data import HeldOut
from ...models import SAEModel
from ..drawn_latents import DrawnLatents, as_records, firing_counts, with_baselines
from .by_frequency import by_frequency, frequency_text, matched, matched_text
from .lookup import LookupTables
from .n2g import Explained, Explainer, firing_examples, score


SCORES = ("f1", "token_f1", "pair_f1", "precision", "recall", "correlation", "token_correlation", "pair_correlation")


_COLUMNS = (
    Column("latents", "drawn", "latents that were drawn.", "d"),
    Column("explainable", "explainable", "share of latents that fire often enough to be explained.", ".1%", "higher"),
    Column("frequency", "fires on", "mean share of tokens on which they fire.", ".2%", table="value"),
    Column("f1", "F1", "of the patterns' prediction where a latent fires, on other text.", ".3f", "higher"),
    Column("token_f1", "token", "F1 of a table of the last token, from the same text.", ".3f", table="value"),
    Column("pair_f1", "2 tokens", "F1 of a table of the last two tokens.", ".3f", table="value"),
    Column("precision", "precision", "of the patterns' prediction.", ".3f", "higher", table="value"),
    Column("recall", "recall", "of the same.", ".3f", "higher", table="value"),
    Column("correlation", "corr.", "Pearson's, of predicted and actual activations.", ".3f", "higher", table="value"),
    Column("token_correlation", "(token)", "the same, of the last token's mean activation.", ".3f", table="value"),
    Column("pair_correlation", "(2 tokens)", "the same, of the last two tokens'.", ".3f", table="nothing"),
)
_BY_FREQUENCY = ("f1", "token_f1", "pair_f1", "correlation")


@dataclass(frozen=True)
class Scored(Explained):
    """An [`Explained`] latent beside the lookup tables, and how many latents of its SAE it was drawn for."""

    token_f1: float
    pair_f1: float
    token_correlation: float
    pair_correlation: float
    weight: float


def explainability(
    saes: Mapping[str, SAEModel],
    examples: HeldOut,
    test: HeldOut,
    widths: Sequence[int] | None = None,
    per_group: int = 48,
    substitutes: int = 2,
    effort: float = 0.5,
    least: int = 10,
    least_test: int = 5,
    baselines: bool = True,
    seed: int = 0,
    resamples: int = 1000,
    show: bool = True,
) -> Report:
    """Explain latents by patterns and test the patterns on other text.

    Args:
        saes (`dict[str, SAEModel]`): By name; of one hookpoint. Several processes share the latents.
        examples ([`HeldOut`]): Text that examples come from.
        test ([`HeldOut`]): Other text, that patterns are tested on; of the same model and hookpoint.
        widths (`Sequence[int]`, *optional*): By default each SAE's prefix widths.
        per_group (`int`, *optional*, defaults to 48): Latents drawn from each group that a width adds.
        substitutes (`int`, *optional*, defaults to 2): Substitutes of each token; see [`Explainer`].
        effort (`float`, *optional*, defaults to 0.5): Scales how many places of a latent are looked at.
        least (`int`, *optional*, defaults to 10): How often a latent has to fire in the text of examples.
        least_test (`int`, *optional*, defaults to 5): How often it has to fire in the other text.
        baselines (`bool`, *optional*, defaults to `True`): Also explain a random dictionary for each SAE, and the
            neurons: the dimensions of the hidden states, the strongest of each token.
        seed (`int`, *optional*, defaults to 0): Of what is drawn.
        resamples (`int`, *optional*, defaults to 1000): Of the intervals.
        show (`bool`, *optional*, defaults to `True`): Show progress bars in the main process.

    Returns:
        [`Report`]: for each subject and width the number of drawn `latents`, which share is `explainable`, and the
        scores of `SCORES`; the drawn `latents` as [`Scored`]. In `about`, and below the table: the scores
        `by_frequency`, and of several SAEs the scores of each `at_equal_frequency`, see [`matched`].

    Raises:
        `ValueError`: if there is no SAE, widths it does not have, or nothing fires often enough.
    """
    check_at_least(1, per_group=per_group, least=least, least_test=least_test)
    saes = {"sae": saes} if isinstance(saes, SAEModel) else saes
    rows, latents = {}, {}
    for name, (sae, chosen) in with_baselines(saes, examples, widths, baselines, seed).items():
        often = (firing_counts(sae, examples) >= least) & (firing_counts(sae, test) >= least_test)
        drawn = DrawnLatents.of(often, chosen, per_group, seed)
        if not drawn.latents:
            raise ValueError(
                f"No latent of `{name}` fires on at least {least} of the {examples.tokens} tokens that examples come "
                f"from, and on {least_test} of {test.tokens} others. Give more text, or smaller `least`, `least_test`."
            )
        from_text, on_text = (firing_examples(sae, data, drawn.latents, show) for data in (examples, test))
        explainer, tables = (
            Explainer(sae, examples, substitutes, effort, seed),
            LookupTables(from_text, on_text),
        )
        weights = drawn.weights
        rank, world = processes()
        bar = progress(
            drawn.latents[rank::world], desc=f"explaining {name}", disable=not show or rank != 0, leave=False
        )
        own = []
        for one in bar:
            found_here = score(one, explainer.explain(one, from_text), on_text, len(from_text.fired[one][0]))
            own.append(Scored(**vars(found_here), **tables.score(one), weight=weights[one]))
        explained = latents[name] = sorted(gathered(own), key=lambda one: one.latent)
        values = {one.latent: [getattr(one, key) for key in ("frequency", *SCORES)] for one in explained}
        rows[name] = drawn.rows(values, ("frequency", *SCORES), resamples, seed)
    about = {
        "hookpoint": test.hookpoint,
        "example_tokens": examples.tokens,
        "test_tokens": test.tokens,
        "per_group": per_group,
        "substitutes": substitutes,
        "effort": effort,
        "least": least,
        "least_test": least_test,
        "seed": seed,
    }
    about["by_frequency"] = by_frequency(latents, SCORES, resamples, seed)
    own = {name: latents[name] for name in saes}
    every = sorted({row["width"] for name in saes for row in rows[name]})
    about["at_equal_frequency"] = matched(own, SCORES, every, resamples, seed) if len(own) > 1 else []
    more = [frequency_text(about["by_frequency"], _COLUMNS, _BY_FREQUENCY)]
    more += [matched_text(about["at_equal_frequency"], _COLUMNS, _BY_FREQUENCY)] if len(own) > 1 else []
    return Report(
        "patterns",
        "N2G: patterns of tokens against firing on other text",
        as_records(rows),
        _COLUMNS,
        about,
        ["f1"],
        intervals="Intervals: 95%, bootstrap over the drawn latents within groups; none over fewer than eight.",
        latents=latents,
        grouped=True,
        more="\n\n".join(more),
    )
