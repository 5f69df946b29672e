"""Links that carry what is shown: `?sae=...&place=...&latent=71` opens just that."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlencode

from ...activations.language_model import EMBEDDED
from ..subject.library import ROOT
from ..subject.opened import RANKINGS


TABS = ("prune", "explore", "search", "text", "texts", "compare")
_FORMER_TABS = {"features": "explore", "tree": "explore", "try": "text"}
"""Names of tabs in links that were sent on before."""

_NUMBERS = ("width", "k", "latent", "other_width")
_CHOICES = {"tab": TABS, "ranking": RANKINGS, "other_ranking": RANKINGS, "kind": ("pattern", "words")}


@dataclass(frozen=True)
class View:
    """What a link opens.

    Args:
        sae (`str`), place (`str`): Repository or folder, and which of its SAEs; `""` is the first.
        tab (`str`): One of `TABS`.
        ranking (`str`), width (`int`), k (`int`): Of the pruning; 0 is all latents, and k as trained.
        latent (`int`, *optional*): The feature that is shown.
        other (`str`), other_place (`str`), other_ranking (`str`), other_width (`int`): What it is compared with.
        q (`str`), kind (`str`): What is searched for, and whether that is a `"pattern"` or `"words"`.
    """

    sae: str = EMBEDDED
    place: str = ""
    tab: str = "prune"
    ranking: str = "trained"
    width: int = 0
    k: int = 0
    latent: int | None = None
    other: str = ""
    other_place: str = ""
    other_ranking: str = "trained"
    other_width: int = 0
    q: str = ""
    kind: str = ""

    @classmethod
    def of(cls, query: Mapping[str, str], default: str = EMBEDDED) -> tuple["View", list[str]]:
        """What a query says, and what in it was not understood, in words; unknown parameters are none of ours."""
        values: dict[str, Any] = {"sae": default}
        problems = []
        for field in fields(cls):
            text = query.get(field.name, "")
            text = text if field.name == "q" else text.strip()  # in a pattern a leading space counts
            if not text.strip():
                continue
            if field.name in _NUMBERS:
                if not text.isdecimal() or not text.isascii():
                    problems.append(f"{field.name} should be a whole number, got '{text[:40]}'")
                    continue
                values[field.name] = int(text[:18])
                continue
            text = _FORMER_TABS.get(text, text) if field.name == "tab" else text
            if field.name in _CHOICES and text not in _CHOICES[field.name]:
                problems.append(f"there is no {field.name} '{text[:40]}'; there are {', '.join(_CHOICES[field.name])}")
            else:
                values[field.name] = text
        if values.get("latent") is not None and "tab" not in values:
            values["tab"] = "explore"
        return cls(**values), problems

    def query(self) -> str:
        """The link's query, without what is as it would be anyway."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}
        return "?" + urlencode({"sae": self.sae} | changed)


def latent_link(sae: str, place: str, latent: int) -> str:
    """Where a link to a latent leads; the SAE at the root is the first, which a link need not name."""
    return View(sae, "" if place == ROOT else place, "explore", latent=latent).query()
