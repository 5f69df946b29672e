"""What can be asked of an open SAE, in plain values: the endpoints of the API, and what the tabs show."""

from pathlib import Path
from typing import Any

from ..features.patterns.search import TokenPattern
from ..features.text import checked_latent
from ..features.tree.picture import nested_picture
from ..steering.continuation import MODES
from .limits import checked_text
from .looks.family_card import family_card
from .subject.answers import feature_of, list_latents
from .subject.comparing import check_comparable, compare
from .subject.exporting import export, push
from .subject.families import family_tree
from .subject.library import Library
from .subject.opened import Opened, Pruning
from .subject.running import Runner
from .subject.texts import MOST_TEXTS, check_reads_texts


class Endpoints:
    """Questions to SAEs by name; `sae` is a repository id, a folder or `embedded`, `place` which of its SAEs.

    Arguments are checked before an SAE is opened and before anything waits for a language model, which all run by way
    of a [`Runner`].

    Args:
        library ([`Library`]): Opens them.
    """

    def __init__(self, library: Library) -> None:
        self.library, self.runner = library, Runner(library)

    def describe(self, sae: str = "embedded", place: str = "") -> dict[str, Any]:
        """What an SAE is: its family, sizes, language model and hookpoint, and whether it has a feature index."""
        opened = self.library.look(sae, place)
        config = opened.sae.config
        index = opened.index
        return {
            "sae": opened.source,
            "place": opened.place,
            "places": opened.siblings,
            "type": config.model_type,
            "activation": config.activation_name,
            "d_in": config.d_in,
            "num_latents": opened.num_latents,
            "prefix_widths": list(opened.sae.prefix_widths),
            "k": config.k if opened.counts else None,
            "generates": opened.reader.generates,
            "base_model": config.base_model,
            "hookpoint": opened.hookpoint,
            "tokens": opened.tokens,
            "index_tokens": None if index is None else index.about["tokens"],
            "index_problem": opened.index_problem if index is None else "",
        }

    def measure(
        self, sae: str = "embedded", place: str = "", ranking: str = "trained", width: int = 0, k: int = 0
    ) -> dict[str, Any]:
        """What the first `width` latents in the order of a ranking are worth: FVU, L0, recaptured loss, KL, RSA, size.

        Rankings are trained, energy, frequency and attribution; 0 stands for all latents, and for k as trained.
        """
        return self._figures(*self._pruning(sae, place, ranking, width, k))

    def _pruning(self, sae: str, place: str, ranking: str, width: int, k: int = 0) -> tuple[Opened, Pruning]:
        opened = self.library.open(sae, place)
        return opened, opened.check(Pruning(ranking, width, k or None))

    def _figures(self, opened: Opened, pruning: Pruning) -> dict[str, Any]:
        self.runner.have(opened, "measured", pruning)
        return opened.figures(pruning)

    def feature(self, latent: int, sae: str = "embedded", place: str = "") -> dict[str, Any]:
        """All that the feature index knows of a latent: contexts, histogram, logit effects, neighbours, family."""
        return feature_of(self.library.look(sae, place), latent)

    def latents(
        self,
        sae: str = "embedded",
        place: str = "",
        sort: str = "energy",
        descending: bool = True,
        contains: str = "",
        start: int = 0,
        count: int = 50,
    ) -> list[dict[str, Any]]:
        """Latents with what they fire on, how often and how strongly, in an order; `contains` looks at the tokens."""
        return list_latents(self.library.look(sae, place), sort, descending, contains, start, count)

    def search(
        self, query: str, kind: str = "pattern", sae: str = "embedded", place: str = "", width: int = 0, top: int = 20
    ) -> list[dict[str, Any]]:
        """Latents that fire where a token pattern matches, or on words (`kind="words"`), by cosine with that."""
        query = checked_text(query, "Write a pattern, or words to look for.", 2_000)
        if kind not in ("pattern", "words"):
            raise ValueError(f"Search is for a 'pattern' or for 'words', got '{kind}'.")
        words = [word for word in query.split(",") if word.strip()]
        opened = self.library.open(sae, place)
        chosen = opened.check(Pruning(width=width)).width
        if kind == "pattern":
            TokenPattern.compile(query, opened.tokenizer)  # what cannot be read is said at once
        asked = query if kind == "pattern" else words
        hits = self.runner.search(opened.source, opened.place, asked, chosen, top)
        return [{**vars(hit), "label": opened.labels[hit.latent]} for hit in hits]

    def family(self, latent: int, sae: str = "embedded", place: str = "") -> dict[str, Any]:
        """A latent's place in the tree: its parents up to the smallest prefix, and what is below it, by level."""
        opened = self.library.look(sae, place)
        tree = opened.tree()
        levels, below = [], tree.children(checked_latent(latent, len(tree)))
        while below:
            levels.append(below)
            below = [child for one, _ in below for child in tree.children(one)]
        return {
            "latent": latent,
            "ancestors": tree.ancestors(latent),
            "below": [
                [{"latent": one, "score": score, "label": opened.labels[one]} for one, score in level]
                for level in levels
            ],
        }

    def read_text(
        self, text: str, sae: str = "embedded", place: str = "", width: int = 0, top: int = 5
    ) -> dict[str, Any]:
        """The strongest latents of each token of a text, and of the whole text with their activations along it."""
        text = checked_text(text)
        opened = self.library.open(sae, place)
        chosen = opened.check(Pruning(width=width)).width
        features = self.runner.read(opened.source, opened.place, text, chosen, top)
        for row in features["latents"]:
            row["label"] = opened.labels[row["latent"]]
        fires = {latent for token in features["top"] for latent, _ in token}
        return features | {"labels": {str(latent): opened.labels[latent] for latent in fires}}

    def activations(
        self, text: str, latent: int, sae: str = "embedded", place: str = "", width: int = 0
    ) -> dict[str, Any]:
        """One latent's activations along a text."""
        text = checked_text(text)
        opened = self.library.open(sae, place)
        chosen = opened.check(Pruning(width=width)).width
        return self.runner.read(opened.source, opened.place, text, chosen, 1, checked_latent(latent, chosen))

    def reconstruct(
        self,
        text: str,
        sae: str = "embedded",
        place: str = "",
        ranking: str = "trained",
        width: int = 0,
        k: int = 0,
        new_tokens: int = 20,
    ) -> dict[str, Any]:
        """A text as a pruned SAE leaves it: what the language model loses on each token, and how it goes on."""
        text = checked_text(text)
        if not 0 <= new_tokens <= 100:
            raise ValueError(f"A text can be continued by up to 100 tokens, got {new_tokens}.")
        opened, pruning = self._pruning(sae, place, ranking, width, k)
        return self.runner.reconstruct(opened.source, opened.place, vars(pruning), text, new_tokens)

    def search_texts(
        self, texts: str, query: str, sae: str = "embedded", place: str = "", width: int = 0, top: int = 10
    ) -> list[dict[str, Any]]:
        """Of texts, one in each line, those that answer a query, and which latents of their embeddings answered."""
        lines = tuple(line.strip() for line in checked_text(texts, "Paste some texts first.").splitlines())
        lines = tuple(dict.fromkeys(line for line in lines if line))
        query = checked_text(query, "Write what to look for.", 2_000)
        if len(lines) > MOST_TEXTS or not 1 <= top <= MOST_TEXTS:
            raise ValueError(
                f"Up to {MOST_TEXTS} texts are searched here, got {len(lines)}, of which {top} are asked for."
            )
        opened = self.library.look(sae, place)
        check_reads_texts(opened)
        chosen = opened.check(Pruning(width=width)).width
        return self.runner.search_texts(opened.source, opened.place, lines, query, chosen, top)

    def steer(
        self,
        text: str,
        latent: int,
        mode: str = "add",
        strength: float = 1.0,
        sae: str = "embedded",
        place: str = "",
        width: int = 0,
        new_tokens: int = 30,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> dict[str, Any]:
        """A text continued twice: as the model does, and with a latent added, clamped or removed.

        The strength is in units of the latent's largest activation in the feature index.
        """
        text = checked_text(text)
        if mode not in MODES:
            raise ValueError(f"The mode must be one of {', '.join(MODES)}, got '{mode}'.")
        if not 1 <= new_tokens <= 100:
            raise ValueError(f"A text can be continued by 1 to 100 tokens, got {new_tokens}.")
        if isinstance(strength, int | float) and 100 < abs(strength) < float("inf"):
            raise ValueError(f"The strength must lie between -100 and 100, got {strength}.")
        if not 0 <= seed < 2**63:
            raise ValueError(f"The seed must lie between 0 and 2^63 - 1, got {seed}.")
        if temperature and not 0.01 <= temperature <= 10:
            raise ValueError(f"The temperature must be 0 or lie between 0.01 and 10, got {temperature}.")
        opened = self.library.open(sae, place)
        chosen = opened.check(Pruning(width=width)).width
        latent = checked_latent(latent, chosen)
        unit = None if opened.index is None else opened.index.feature(latent, contexts=False).max
        options = {"mode": mode, "strength": strength, "width": chosen, "unit": unit or None, "seed": seed}
        options |= {"max_new_tokens": new_tokens, "temperature": temperature}
        steered = self.runner.steer(opened.source, opened.place, text, latent, options)
        return {"plain": steered.plain, "steered": steered.steered, "amount": steered.amount, "unit": unit}

    def compare(
        self,
        sae: str = "embedded",
        place: str = "",
        ranking: str = "trained",
        width: int = 0,
        other: str = "embedded",
        other_place: str = "",
        other_ranking: str = "energy",
        other_width: int = 0,
    ) -> dict[str, Any]:
        """Two SAEs, or two prunings of one: figures of both, latents both keep, and the most similar latents."""
        sides = (
            self._pruning(sae, place, ranking, width),
            self._pruning(other, other_place, other_ranking, other_width),
        )
        check_comparable(*sides)
        for opened, pruning in sides:
            self.runner.have(opened, "measured", pruning)
            if pruning.ranking != "trained":
                self.runner.have(opened, "statistics")
        return compare(*sides)

    # What the tabs ask besides; no endpoints of the API

    def curve_point(self, sae: str, place: str, ranking: str, width: int) -> dict[str, Any]:
        """The figures of one width of a curve, measured in a turn of its own, so that others come in between."""
        return self.measure(sae, place, ranking, width)

    def is_measured(self, sae: str, place: str, ranking: str, width: int) -> bool:
        """Whether the figures of a width are there, and the order they belong to."""
        opened = self.library.look(sae, place)
        pruning = opened.check(Pruning(ranking, width))
        ordered = ranking == "trained" or opened.has("statistics", pruning)
        return ordered and opened.has("measured", pruning)

    def num_latents(self, sae: str, place: str) -> int:
        """How many latents an SAE has."""
        return self.library.look(sae, place).num_latents

    def showcase(self, sae: str, place: str) -> dict[str, Any] | None:
        """What is stored with the index for a first look, and what its latents are called; `None` without it.

        `comparable`: whether what is measured here belongs on the same curve.
        """
        opened = self.library.look(sae, place)
        stored = None if opened.index is None else opened.index.showcase()
        if stored is None:
            return None
        return stored | {
            "labels": {latent: opened.labels[int(latent)] for latent in stored["largest"]},
            "comparable": self.library.measures_like(stored, opened.sae.config.activation_name),
        }

    def picture(self, sae: str, place: str, threshold: float, most: int = 1500) -> str:
        """The picture of the prefixes, nested in each other, as SVG; of at most so many latents."""
        return self.library.look(sae, place).picture(threshold, most)

    def family_card(self, latent: int, sae: str, place: str, threshold: float, address: str) -> str:
        """A latent's family as a picture to send on, as SVG; `address` is where its page is."""
        opened = self.library.look(sae, place)
        feature = feature_of(opened, latent)
        picture = nested_picture(family_tree(opened, latent, threshold), opened.labels, open_latent=latent, alone=True)
        title = f"Latent {latent}" + (f": {feature['label']}" if feature["label"] else "")
        return family_card(picture, title, feature["verdict"], address)

    def kept(self, sae: str, place: str, ranking: str, width: int) -> list[int]:
        """The latents that a pruning keeps, by their numbers as trained."""
        opened, pruning = self._pruning(sae, place, ranking, width)
        if pruning.ranking != "trained":
            self.runner.have(opened, "statistics")
        return opened.order(pruning.ranking)[: pruning.width].tolist()

    def build_index(self, sae: str, place: str, tokens: int) -> int:
        """Build an SAE's feature index on the page's text; returns of how many tokens it is."""
        opened = self.library.open(sae, place)
        read_tokens = self.runner.build_index(opened.source, opened.place, tokens)
        opened.forget_index()
        return read_tokens

    def download(self, sae: str, place: str, ranking: str, width: int, k: int, folder: str) -> str:
        """The path of a zip file in `folder` that holds a pruned SAE."""
        return str(export(*self._to_keep(sae, place, ranking, width, k), Path(folder)))

    def _to_keep(self, sae: str, place: str, ranking: str, width: int, k: int) -> tuple[Opened, Pruning]:
        """The same as `_pruning`, with all there that the pruned SAE is made of."""
        opened, pruning = self._pruning(sae, place, ranking, width, k)
        if pruning.ranking != "trained":
            self.runner.have(opened, "statistics")
        self.runner.have(opened, "pruned", pruning)
        return opened, pruning

    def push(
        self, pruned: tuple[str, str, str, int, int], repo: str, token: str | None, private: bool
    ) -> tuple[str, str]:
        """Push a pruned SAE (SAE, place, ranking, width and k) to a repository; returns its id and address.

        Raises:
            `ValueError`: if the repository is not named as it must be, or strangers visit and give no token.
        """
        if self.library.public and not token:
            raise ValueError("Give a token with write access to your repositories: this page pushes with no other.")
        opened, pruning = self._to_keep(*pruned)
        return push(opened.pruned(pruning), repo, token, private)
