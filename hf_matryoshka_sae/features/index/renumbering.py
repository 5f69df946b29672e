"""What an index says of the latents that another SAE still has, under their numbers there."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from .layout import Feature


# Columns of lists, and for each the column of latents that decides which entries stay when latents are removed
_DECIDING = {
    "neighbours": "neighbours",
    "neighbour_cosines": "neighbours",
    "cofiring": "cofiring",
    "cofiring_rates": "cofiring",
    "children": "children",
    "candidates": "candidates",
    "candidate_scores": "candidates",
}
_OF_LATENTS = ("latent", "parent", "neighbours", "cofiring", "children", "candidates")


def needed_columns(names: Iterable[str]) -> list[str]:
    """Return the columns that decide which entries of others stay, beside those others."""
    deciding = _DECIDING | {"parent_score": "parent"}
    return list(dict.fromkeys([*names, *(deciding[name] for name in names if name in deciding)]))


class Renumbering:
    """New numbers of the latents of an index, for an SAE that was sorted, truncated or pruned.

    Args:
        places (`np.ndarray` of shape `(n,)`): Row in the files of each latent of that SAE.
        num_latents (`int`): Number of latents in the files.
    """

    def __init__(self, places: np.ndarray, num_latents: int) -> None:
        # -1 where a latent is gone; the last entry maps -1 to -1.
        self.numbers = np.full(num_latents + 1, -1)
        self.numbers[places] = np.arange(len(places))

    def table(self, table: pa.Table, names: Iterable[str]) -> pa.Table:
        """Return the columns `names` with latents renumbered and without relations to those that are gone."""
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        moved = {}
        for name in names:
            if name in _DECIDING:
                moved[name] = self._lists(columns[_DECIDING[name]], columns[name], renumber=name in _OF_LATENTS)
            elif name in _OF_LATENTS:
                moved[name] = pa.array(self.numbers[columns[name].to_numpy()], pa.int32())
            elif name == "parent_score":
                there = self.numbers[columns["parent"].to_numpy()] >= 0
                moved[name] = pa.array(np.where(there, columns[name].to_numpy(), 0), pa.float32())
            else:
                moved[name] = columns[name]
        return pa.table(moved)

    def _lists(self, latents: pa.ListArray, values: pa.ListArray, renumber: bool) -> pa.ListArray:
        """Return lists of latents, or of values that belong to latents, without the latents that are gone."""
        numbers = self.numbers[latents.flatten().to_numpy()]
        there = numbers >= 0
        rows = np.repeat(np.arange(len(latents)), latents.value_lengths().to_numpy())
        sizes = np.bincount(rows[there], minlength=len(latents))
        entries = numbers if renumber else values.flatten().to_numpy()
        offsets = pa.array(np.concatenate([[0], sizes.cumsum()]), pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(entries[there], values.type.value_type))

    def feature(self, feature: Feature, latent: int) -> Feature:
        """Return a latent of the index as this latent of the other SAE."""

        def there(pairs: list[tuple[int, float]]) -> list[tuple[int, float]]:
            moved = [(int(self.numbers[other]), value) for other, value in pairs]
            return [pair for pair in moved if pair[0] >= 0]

        feature.latent = latent
        feature.neighbours, feature.cofiring = there(feature.neighbours), there(feature.cofiring)
        feature.candidates = there(feature.candidates)
        feature.children = [child for child, _ in there([(child, 0.0) for child in feature.children])]
        if feature.parent is not None:
            feature.parent = int(self.numbers[feature.parent])
            if feature.parent < 0:
                feature.parent = feature.parent_score = None
        return feature
