"""Docstrings in Hugging Face's format, read by griffe as Google's: for the API pages of the site (see mkdocs.yml).

Types are in the signature, which is shown; of a docstring's, shapes are kept and what the code does not say.
"""

import re

import griffe


_TYPE = r"\((?:[^()]|\([^()]*\))*\)"  # which may hold a shape
_SECTION = re.compile(r"^( *)Args:\n(?:\1 +.*\n?|\n)*", re.MULTILINE)
_ENTRY = re.compile(  # the arguments that share a description, and the description
    rf"^(?P<indent> +)(?P<heads>\w+(?: {_TYPE})?(?:, \w+(?: {_TYPE})?)*):(?P<text>(?=\s).*(?:\n(?P=indent) +.*)*)",
    re.MULTILINE,
)
_HEAD = re.compile(rf"(\w+)(?: ({_TYPE}))?(?:, |$)")
_SHAPE = re.compile(r"of shape (`[^`]+`)")
_RETURNS = re.compile(r"(Returns:\n +)\[?`[^`\n]+`\]?: ")
_RAISES = re.compile(r"^( +)`(\w+)`:", re.MULTILINE)
_REFERENCE = re.compile(r"\[(`[^`\n]+`)\](?![\[(])")


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = google(obj.docstring.value, _annotated(obj))


def google(text: str, annotated: set[str]) -> str:
    """A docstring of Hugging Face's format as one of Google's; `annotated` are arguments whose type the code says."""

    def entry(found: re.Match) -> str:
        lines = []
        for name, said in _HEAD.findall(found["heads"]):
            kind = re.sub(r",? ?\*optional\*.*|[`()]", "", said) if name not in annotated else ""
            shape = _SHAPE.search(said) if name in annotated else None
            kind, shape = kind and f" ({kind})", f" Of shape {shape[1]}." if shape else ""
            lines.append(f"{found['indent']}{name}{kind}:{shape}{found['text']}")
        return "\n".join(lines)

    text = _SECTION.sub(lambda section: _ENTRY.sub(entry, section[0]), text)
    return _REFERENCE.sub(r"\1", _RAISES.sub(r"\1\2:", _RETURNS.sub(r"\1", text)))


def _annotated(obj: griffe.Object) -> set[str]:
    if obj.is_function:
        return {parameter.name for parameter in obj.parameters if parameter.annotation}
    if obj.is_class and any("dataclass" in str(decorator.value) for decorator in obj.decorators):
        return {name for name, member in obj.members.items() if member.is_attribute and member.annotation}
    return set()
