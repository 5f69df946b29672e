"""Questions to a judge, from templates in files: `prompts/`, or a folder of a user's own."""

import re
from pathlib import Path
from string import Template

from .answers import Message


_OWN = Path(__file__).parent / "prompts"
PLACEHOLDERS = {
    "explain": {"passages"},
    "detection": {"explanation", "count", "passages"},
    "fuzzing": {"explanation", "count", "passages"},
    "simulation": {"explanation", "count", "tokens"},
}
_OPTIONAL = {"count"}
_PLACEHOLDER = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


class Questions:
    """Templates, checked when they are read.

    A template is the user's one message, as plain text with `$placeholders`; `$$` is a dollar sign.

    Args:
        folder (`str` or `Path`, *optional*): With any of `explain.md`, `detection.md`, `fuzzing.md` and
            `simulation.md`; what is not there is the package's own.

    Raises:
        `ValueError`: if there is no such folder, it holds none of them, or a placeholder is unknown or missing.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        paths = {name: _OWN / f"{name}.md" for name in PLACEHOLDERS}
        if folder is not None:
            own = {name: Path(folder).expanduser() / f"{name}.md" for name in PLACEHOLDERS}
            own = {name: path for name, path in own.items() if path.is_file()}
            if not own:
                raise ValueError(
                    f"'{folder}' holds no prompts: expected a folder with any of "
                    + ", ".join(f"{name}.md" for name in PLACEHOLDERS)
                    + "."
                )
            paths |= own
        self._templates = {name: _checked(name, path) for name, path in paths.items()}

    def of(self, name: str, **values: str | int) -> list[Message]:
        """The messages of a question."""
        return [{"role": "user", "content": self._templates[name].substitute(values)}]


def _checked(name: str, path: Path) -> Template:
    text = path.read_text(encoding="utf-8").strip()
    known = PLACEHOLDERS[name]
    names = {braced or plain for braced, plain in _PLACEHOLDER.findall(text.replace("$$", ""))}
    wrong = sorted(names - known) + sorted(known - names - _OPTIONAL)
    if wrong or not Template(text).is_valid():
        expected = ", ".join(f"${one}" for one in sorted(known))
        what = f"${wrong[0]} is {'unknown' if wrong[0] in names else 'missing'}" if wrong else "a lone $ stands there"
        raise ValueError(
            f"The prompt '{path.name}' takes {expected}; {what}. Write $$ for a dollar sign, and every placeholder "
            "but $count at least once."
        )
    return Template(text)
