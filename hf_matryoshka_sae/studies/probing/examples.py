"""Examples that probes are fitted to: latents and hidden states of tokens or of whole texts, and their labels.

An example is a token, or a text with the means of its activations over kept tokens. Which tokens are taken, how
examples are numbered and which part of a split they are in follows from hashes of the text: neither the order of the
batches nor the number of processes matters, and the examples of one window or of equal texts are in the same part.

Shapes: N examples, D width of hidden states, T tasks, F latents, n kept tokens of a batch, B windows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import torch
from torch import Tensor

from ...activations import TokenBatch, TokenStream
from ...common.distributed import processes, reduce_sum
from ...common.logs import progress
from ...evaluation.data import HeldOut, windows_of
from ...evaluation.subjects import Dictionary
from .columns import LatentColumns, PairCollector
from .tasks import LabelledTask, TokenTasks


_TEXTS_AT_ONCE = 32


@dataclass
class Examples:
    """Examples of one kind with their labels, hidden states and latents.

    Args:
        kind (`str`): `"tokens"` or `"texts"`.
        names (`list[str]`): Names of the T tasks.
        labels (`Tensor` of shape `(N, T)`): Labels, bool.
        groups (`Tensor` of shape `(N,)`): Group of each example, ascending from 0; a split does not divide a group.
        keys (`list[bytes]`): Content of each group, from which its part of a split follows.
        hidden (`Tensor` of shape `(N, D)`): Hidden states of all processes, float32.
        latents (`dict[str, list[LatentColumns]]`): This process's latents of each dictionary: once for all widths, or
            once for each.
    """

    kind: str
    names: list[str]
    labels: Tensor
    groups: Tensor
    keys: list[bytes]
    hidden: Tensor
    latents: dict[str, list[LatentColumns]] = field(default_factory=dict)

    def held_out(self, share: float, seed: int) -> Tensor:
        """Return the examples of the test part, `(N,)` bool: `share` of the groups.

        Args:
            share (`float`): Share of the groups.
            seed (`int`): Seed of the split.

        Raises:
            `ValueError`: if a part would be empty.
        """
        distinct = dict.fromkeys(self.keys)
        count = round(share * len(distinct))
        if not 0 < count < len(distinct):
            what = "windows" if self.kind == "tokens" else "texts"
            raise ValueError(
                f"{len(distinct)} different {what} cannot be split with a share of {share} for the test. Give more."
            )
        chosen = set(sorted(distinct, key=lambda key: _digest(key, seed + 1))[:count])
        return torch.tensor([key in chosen for key in self.keys])[self.groups]


def _digest(key: bytes, seed: int = 0) -> bytes:
    return blake2b(key, digest_size=16, salt=seed.to_bytes(8, "little", signed=True)).digest()


def take_windows(data: HeldOut, tasks: Sequence[TokenTasks], max_tokens: int) -> tuple[HeldOut, list[TokenTasks]]:
    """Choose whole windows of the data and its labels by a hash: at most `max_tokens` kept tokens, or one window."""
    keys = [_window_key(batch, row) for batch in data.batches for row in range(len(batch.input_ids))]
    counts = [int(count) for batch in data.batches for count in batch.keep.sum(1)]
    chosen, room = set(), max_tokens
    for window in sorted(range(len(keys)), key=lambda window: _digest(keys[window])):
        if counts[window] <= room or not chosen:
            chosen.add(window)
            room -= counts[window]
    rows, first = [], 0
    for batch in data.batches:
        size = len(batch.input_ids)
        rows.append(torch.tensor([row for row in range(size) if first + row in chosen], dtype=torch.long))
        first += size
    batches = [windows_of(batch, some) for batch, some in zip(data.batches, rows, strict=True)]
    filled = [number for number, some in enumerate(rows) if len(some)]
    tasks_of_windows = [
        TokenTasks(task.names, [task.labels[number][rows[number]] for number in filled]) for task in tasks
    ]
    return replace(data, batches=[batches[number] for number in filled]), tasks_of_windows


def _window_key(batch: TokenBatch, row: int) -> bytes:
    return torch.stack([batch.input_ids[row], batch.keep[row].long()]).cpu().numpy().tobytes()


def token_examples(
    data: HeldOut, tasks: Sequence[TokenTasks], dictionaries: Mapping[str, Dictionary], max_pairs: int, show: bool
) -> Examples:
    """Return the kept tokens of the data as examples.

    Args:
        data ([`HeldOut`]): Language model, tokens and hookpoint.
        tasks (`Sequence[TokenTasks]`): Labels of all batches of the data.
        dictionaries (`Mapping[str, Dictionary]`): Dictionaries that encode the hidden states, by name.
        max_pairs (`int`): Largest number of activations that a process keeps.
        show (`bool`): Whether to show a progress bar in the main process.
    """
    windows = [(number, row) for number, batch in enumerate(data.batches) for row in range(len(batch.input_ids))]
    keys = {place: _window_key(data.batches[place[0]], place[1]) for place in windows}
    ordered = sorted(windows, key=lambda place: _digest(keys[place]))
    counts = torch.tensor([int(data.batches[number].keep[row].sum()) for number, row in ordered])
    starts = dict(zip(ordered, (counts.cumsum(0) - counts).tolist(), strict=True))
    labels = [torch.cat([task.labels[number] for task in tasks], -1) for number in range(len(data.batches))]
    label_rows = [labels[number][row][data.batches[number].keep[row].cpu()] for number, row in ordered]

    def batches() -> Iterator[tuple[TokenBatch, Tensor, Tensor | None]]:
        rank, world = processes()
        for number in range(rank, len(data.batches), world):
            batch = data.batches[number]
            ids = [torch.arange(int(keep.sum())) + starts[number, row] for row, keep in enumerate(batch.keep)]
            yield batch.to(data.device), torch.cat(ids), None

    names = [name for task in tasks for name in task.names]
    hidden, latents = _read(data, batches(), dictionaries, int(counts.sum()), max_pairs, show)
    groups = torch.repeat_interleave(torch.arange(len(ordered)), counts)
    return Examples(
        "tokens", names, torch.cat(label_rows), groups, [keys[place] for place in ordered], hidden, latents
    )


def text_batches(task: LabelledTask, data: HeldOut, context_length: int) -> tuple[list[TokenBatch], list[int]]:
    """Tokenise a task's texts; return rows with texts of similar length together, and the number of each row's text.

    Args:
        task ([`LabelledTask`]): Texts with labels.
        data ([`HeldOut`]): Data with the tokenizer.
        context_length (`int`): Largest number of tokens of a text.

    Raises:
        `ValueError`: if there is no tokenizer.
    """
    if data.tokenizer is None:
        raise ValueError("Labelled texts have to be tokenised: pass the `tokenizer` to `HeldOut`.")
    order = sorted(range(len(task.texts)), key=lambda number: (len(task.texts[number]), task.texts[number]))
    texts = [task.texts[number] for number in order]
    stream = TokenStream(texts, data.tokenizer, context_length, _TEXTS_AT_ONCE, pack=False, num_epochs=1)
    batches = list(stream)
    rows = sum(len(batch.input_ids) for batch in batches)
    if rows != len(texts):
        raise ValueError(
            f"The tokenizer has no token for {len(texts) - rows} of the texts of '{task.name}'. Leave out texts in a "
            "script or in characters that it does not know."
        )
    return batches, order


def text_examples(
    data: HeldOut,
    task: LabelledTask,
    dictionaries: Mapping[str, Dictionary],
    context_length: int,
    max_pairs: int,
    show: bool,
) -> Examples:
    """Return a task's texts as examples, with means over their kept tokens.

    Args:
        data ([`HeldOut`]): Language model, tokenizer and hookpoint.
        task ([`LabelledTask`]): Texts with labels.
        dictionaries (`Mapping[str, Dictionary]`): Dictionaries that encode the hidden states, by name.
        context_length (`int`): Largest number of tokens of a text.
        max_pairs (`int`): Largest number of activations that a process keeps.
        show (`bool`): Whether to show a progress bar in the main process.
    """
    rows, order = text_batches(task, data, context_length)
    keys = [text.encode("utf-8", "surrogatepass") for text in task.texts]
    ordered = sorted(range(len(keys)), key=lambda number: (_digest(keys[number]), task.labels[number].tolist()))
    place = torch.empty(len(keys), dtype=torch.long)
    place[ordered] = torch.arange(len(keys))
    of_row = place[order].split([len(batch.input_ids) for batch in rows])

    def batches() -> Iterator[tuple[TokenBatch, Tensor, Tensor | None]]:
        rank, world = processes()
        for number in range(rank, len(rows), world):
            yield rows[number].to(data.device), of_row[number], rows[number].keep.sum(1)

    hidden, latents = _read(data, batches(), dictionaries, len(keys), max_pairs, show)
    return Examples(
        "texts",
        task.names,
        task.labels[ordered],
        torch.arange(len(keys)),
        [keys[number] for number in ordered],
        hidden,
        latents,
    )


@torch.no_grad()
def _read(
    data: HeldOut,
    batches: Iterator[tuple[TokenBatch, Tensor, Tensor | None]],
    dictionaries: Mapping[str, Dictionary],
    num_rows: int,
    max_pairs: int,
    show: bool,
) -> tuple[Tensor, dict[str, list[LatentColumns]]]:
    """Read hidden states and latents of examples.

    A batch comes with the examples of its tokens; or with those of its rows, and then with the numbers of tokens over
    which to take means.
    """
    bound = max_pairs // max(1, sum(len(of.encodings) for of in dictionaries.values()))
    collectors = {
        name: [PairCollector(of.sae.config.num_latents, bound) for _ in of.encodings]
        for name, of in dictionaries.items()
    }
    hidden: Tensor | None = None
    for batch, ids, counts in progress(batches, desc="probes: activations", disable=not show, leave=False):
        states = data.states(batch)
        if not states.isfinite().all():
            raise ValueError(
                f"Hidden states at '{data.hookpoint}' are not finite. Load the model in bfloat16 or float32."
            )
        row = batch.keep.nonzero()[:, 0]
        if hidden is None:
            hidden = torch.zeros(num_rows, states.shape[1])
        hidden[ids] = (states if counts is None else _means(states, row, counts)).cpu()
        for name, of in dictionaries.items():
            of.check(name, states)
            for collector, pairs in zip(collectors[name], of.encode(states), strict=True):
                if counts is None:
                    collector.add(ids[pairs.rows.cpu()], pairs.cols, pairs.values)
                    continue
                dense = torch.zeros(len(ids), pairs.num_latents, device=states.device)
                dense.index_put_((row[pairs.rows], pairs.cols), pairs.values.float(), accumulate=True)
                dense /= counts.clamp(min=1).to(dense)[:, None]
                rows, cols = dense.nonzero(as_tuple=True)
                collector.add(ids[rows.cpu()], cols, dense[rows, cols])
    hidden = _joined(hidden, num_rows)
    return hidden, {name: [each.gather(num_rows) for each in some] for name, some in collectors.items()}


def _means(states: Tensor, row: Tensor, counts: Tensor) -> Tensor:
    total = states.new_zeros(len(counts), states.shape[1]).index_add_(0, row, states)
    return total / counts.clamp(min=1).to(total)[:, None]


def _joined(hidden: Tensor | None, num_rows: int) -> Tensor:
    """Return the hidden states of all processes; one that has read none learns their width from the others."""
    rank, world = processes()
    widths = torch.zeros(world, dtype=torch.int64)
    widths[rank] = 0 if hidden is None else hidden.shape[1]
    reduce_sum(widths)
    hidden = torch.zeros(num_rows, int(widths.max())) if hidden is None else hidden
    return reduce_sum(hidden)[0]
