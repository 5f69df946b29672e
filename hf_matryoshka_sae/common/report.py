"""The report of a study: figures of subjects at their widths, as rows, a table, Markdown, JSON and a plot.

A study gives records and describes its columns; everything else is done here, once.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, is_dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .figures import draw_widths, figure_html, save_figure
from .files import as_json, write_json


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


_PANELS = 3  # in a row of a plot
_ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}


@dataclass(frozen=True)
class Column:
    """A figure of a report.

    Args:
        name (`str`): Name of its column in the rows; its interval is in `<name>_low` and `<name>_high`.
        title (`str`): Head of its column in the table.
        meaning (`str`): A sentence that says what the figure is.
        form (`str`, *optional*, defaults to `".4f"`): Format of its values.
        better (`"higher"` or `"lower"`, *optional*): Which values are better, where either is.
        path (`str`, *optional*): Keys of the value in a record, joined by dots; by default its name.
        interval (`str`, *optional*): Keys of the interval in a record; by default `<path>_interval`.
        table (`str`, *optional*, defaults to `"interval"`): Whether the table shows the value with its interval, the
            `value` alone, or `nothing`.
        uninformed (`float`, *optional*): Score of knowing nothing, drawn as a line.
        limits (`tuple[float, float]`, *optional*): Ends of the drawn axis; the better end is always drawn.
    """

    name: str
    title: str
    meaning: str
    form: str = ".4f"
    better: Literal["higher", "lower"] | None = None
    path: str | None = None
    interval: str | None = None
    table: Literal["interval", "value", "nothing"] = "interval"
    uninformed: float | None = None
    limits: tuple[float, float] | None = None

    def value(self, record: dict[str, Any]) -> Any:
        """Return the figure in a record, `None` where it has none."""
        return _at(record, self.path or self.name)

    def bounds(self, record: dict[str, Any]) -> list[float] | None:
        """Return the figure's interval in a record, `None` where it has none."""
        return _at(record, self.interval or f"{self.path or self.name}_interval")

    def cell(self, record: dict[str, Any]) -> str:
        """Return the figure in a record as text."""
        value = self.value(record)
        return "-" if value is None else format(value, self.form)

    def bounds_cell(self, record: dict[str, Any]) -> str:
        """Return the figure's interval in a record as text."""
        bounds = self.bounds(record)
        return "-" if bounds is None or None in bounds else "..".join(format(bound, self.form) for bound in bounds)


@dataclass
class Report:
    """The results of a study; `str()` is its table.

    Args:
        name (`str`): Name of its files, without suffix.
        title (`str`): Line above the table.
        records (`list[dict]`): For each subject and width `subject` (its name), `kind` (`dictionary`, `random`,
            `neurons` and other baselines), `width` (`None` where there is none) and figures, JSON-able.
        columns (`Sequence[Column]`): The figures.
        about (`dict`): Facts of the run, JSON-able: data, options, seed; `skipped` has reasons by name.
        plotted (`Sequence[str]`, *optional*): Names of the columns that are drawn; by default the first.
        notes (`list[str]`, *optional*): Remarks below the table.
        warning (`str`, *optional*): A warning above the table and the plot.
        intervals (`str`, *optional*): A sentence that says what the intervals are.
        latents (`dict`, *optional*): Results of single latents, by subject.
        grouped (`bool`, *optional*, defaults to `False`): In JSON, records are listed by subject as `saes`, not as
            `rows`.
        more (`str`, *optional*): Plain text below the table, such as another table.
    """

    name: str
    title: str
    records: list[dict[str, Any]]
    columns: Sequence[Column]
    about: dict[str, Any]
    plotted: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)
    _: KW_ONLY
    warning: str | None = None
    intervals: str = ""
    latents: dict[str, Any] = field(default_factory=dict)
    grouped: bool = False
    more: str = ""

    @property
    def rows(self) -> "DataFrame":
        """Return the figures as a pandas DataFrame.

        Its columns are `subject`, `kind`, `width`, and for each figure its value, `<name>_low` and `<name>_high` where
        it has intervals; `attrs` says what each figure means and which way is better.
        """
        from pandas import DataFrame

        data = {key: [record.get(key) for record in self.records] for key in ("subject", "kind", "width")}
        for column in self.columns:
            data[column.name] = [column.value(record) for record in self.records]
            bounds = [column.bounds(record) for record in self.records]
            if any(bounds):
                for number, end in enumerate(("low", "high")):
                    data[f"{column.name}_{end}"] = [each and each[number] for each in bounds]
        frame = DataFrame(data).astype({"width": "Int64"})  # there may be none
        frame.attrs = {
            "meaning": {column.name: column.meaning for column in self.columns},
            "better": {column.name: column.better for column in self.columns},
        }
        return frame

    @property
    def explanation(self) -> str:
        """Return a sentence for each figure, by its title and its name in JSON, and one for the intervals."""
        same = {column.name: column.title.lower().replace(" ", "_") == column.name for column in self.columns}
        names = (c.title + ("" if same[c.name] else f" ({c.name})") for c in self.columns)
        told = (f"{name}: {column.meaning}" for name, column in zip(names, self.columns, strict=True))
        return " ".join(filter(None, [*told, self.intervals]))

    def subject(self, name: str) -> list[dict[str, Any]]:
        """Return the records of one subject, narrowest first.

        Raises:
            `ValueError`: if there is no such subject.
        """
        subjects = self.subjects()
        if name not in subjects:
            raise ValueError(f"No subject is called '{name}'; there are {', '.join(map(repr, subjects))}.")
        return subjects[name]

    def subjects(self) -> dict[str, list[dict[str, Any]]]:
        """Return the records by subject."""
        subjects: dict[str, list[dict[str, Any]]] = {}
        for record in self.records:
            subjects.setdefault(record["subject"], []).append(record)
        return subjects

    def flat(self) -> dict[str, list[dict[str, Any]]]:
        """Return rows by subject: `width`, `kind` and each figure by its column's name, with its `_interval`."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for record in self.records:
            row = {key: record[key] for key in ("width", "kind") if key in record}
            for column in self.columns:
                value, bounds = column.value(record), column.bounds(record)
                row |= {} if value is None else {column.name: value}
                row |= {} if bounds is None else {f"{column.name}_interval": bounds}
            rows.setdefault(record["subject"], []).append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        head = {"explanation": self.explanation} | ({} if self.warning is None else {"warning": self.warning})
        data = {**head, **self.about}
        if self.grouped:
            data["saes"] = {
                name: [{key: value for key, value in row.items() if key not in ("subject", "kind")} for row in rows]
                for name, rows in self.subjects().items()
            }
        else:
            data["rows"] = self.records
        return data | ({"latents": _plain(self.latents)} if self.latents else {})

    def as_json(self, indent: int | None = None) -> str:
        """Return the report as JSON that any reader takes: numbers that are not finite are null."""
        return as_json(self.to_dict(), indent)

    def _cells(self, arrows: bool) -> tuple[list[str], list[list[str]]]:
        """Return heads and rows of the table."""
        titles, cells = ["", "width"], [[r["subject"], str(r["width"] or "-")] for r in self.records]
        for column in self.columns:
            if column.table == "nothing" or not any(column.value(record) is not None for record in self.records):
                continue
            titles.append(column.title + (_ARROWS[column.better] if arrows else ""))
            cells = [[*row, column.cell(record)] for row, record in zip(cells, self.records, strict=True)]
            if column.table == "interval" and any(map(column.bounds, self.records)):
                titles.append("95%")
                cells = [[*row, column.bounds_cell(record)] for row, record in zip(cells, self.records, strict=True)]
        return titles, cells

    def _remarks(self) -> list[str]:
        skipped = [f"left out: {name} ({reason})" for name, reason in self.about.get("skipped", {}).items()]
        return skipped + self.notes

    def __str__(self) -> str:
        warning = [f"warning: {self.warning}"] if self.warning else []
        more = ["", self.more] if self.more else []
        return "\n".join([self.title, *warning, *text_table(*self._cells(arrows=False)), *self._remarks(), *more])

    def markdown(self) -> str:
        """Return the table as Markdown; arrows say which way is better."""
        warning = [f"**{self.warning}**"] if self.warning else []
        remarks = ["\n".join(f"- {line}" for line in self._remarks())]
        more = f"```text\n{self.more}\n```" if self.more else ""
        parts = [self.title, *warning, markdown_table(*self._cells(arrows=True)), *remarks, more, self.explanation]
        return "\n\n".join(filter(None, parts)) + "\n"

    def table_html(self) -> str:
        """The table as HTML, what is left out below it."""
        lines = [escape(line) for line in ([self.warning] if self.warning else []) + self._remarks()]
        return f"<p>{escape(self.title)}</p>{html_table(*self._cells(arrows=True))}<p>{'<br>'.join(lines)}</p>"

    def _repr_html_(self) -> str:
        """What a notebook shows: table and plot."""
        return self.table_html() + figure_html(self.figure())

    def save(self, folder: str | Path, name: str | None = None) -> None:
        """Write `<name>.json` and `<name>.png` into a folder; the name is by default the report's."""
        path = Path(folder) / (name or self.name)
        write_json(path.with_name(f"{path.name}.json"), self.to_dict())
        self.plot(path.with_name(f"{path.name}.png"))

    def plot(self, path: str | Path) -> None:
        """Write what [`figure`] draws to a PNG."""
        save_figure(self.figure(), Path(path))

    def figure(self) -> "Figure":
        """Draw figures against width with their intervals, baselines of one width as lines."""
        from matplotlib.figure import Figure

        count = len(self._drawn)
        across = min(_PANELS, count)
        down = -(-count // across)
        figure = Figure(figsize=(5.2 * across + 1.8, 4.2 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).flatten()
        self.draw(axes)
        for axis in axes[count:]:
            axis.set_axis_off()
        handles = axes[0].get_legend_handles_labels()
        axes[0].get_legend().remove()  # inside it would hide intervals
        figure.legend(*handles, loc="outside right upper", fontsize=8)
        colour = "tab:red" if self.warning else "black"
        figure.suptitle(self.warning or self.title, fontsize=9, color=colour, wrap=True)
        return figure

    @property
    def _drawn(self) -> list[Column]:
        names = self.plotted or [self.columns[0].name]
        return [column for column in self.columns if column.name in names]

    def draw(self, axes: Sequence[Any]) -> None:
        """Draw the figures on axes of matplotlib, one each; the first has the legend."""
        subjects = self.subjects()
        kinds = {name: records[0].get("kind") for name, records in subjects.items()}
        flat = [name for name, kind in kinds.items() if kind not in (None, "dictionary", "random")]
        for axis, column in zip(axes, self._drawn, strict=False):
            lines = {
                name: [
                    (record["width"], column.value(record), column.bounds(record))
                    for record in records
                    if column.value(record) is not None
                ]
                for name, records in subjects.items()
            }
            draw_widths(axis, lines, flat, [name for name, kind in kinds.items() if kind == "random"])
            if column.uninformed is not None:
                axis.axhline(column.uninformed, color="black", linewidth=0.8, linestyle="--", label="knows nothing")
            if column.limits is not None:
                (low, high), (least, most) = axis.get_ylim(), column.limits
                low = least if column.better == "lower" else max(low, least)
                axis.set_ylim(low, most if column.better == "higher" else min(high, most))
            axis.set(ylabel=column.title + (f" ({column.better} is better)" if column.better else ""))
        axes[0].legend(fontsize=8)


def text_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; the first column is flush left, all others right."""
    sizes = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = []
    for first, *others in [titles, *rows]:
        right = [f"{cell:>{size}}" for cell, size in zip(others, sizes[1:], strict=True)]
        lines.append(" ".join([f"{first:<{sizes[0]}}", *right]))
    return lines


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: int | None = None) -> str:
    """Return a table in Markdown; columns from number `right` on are flush right."""
    rule = ["---" if right is None or number < right else "---:" for number in range(len(titles))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [titles, rule, *rows])


def html_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in HTML."""
    head, *body = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in [titles, *rows]]
    return f"<table><thead>{head.replace('td>', 'th>')}</thead><tbody>{''.join(body)}</tbody></table>"


def _at(record: dict[str, Any], path: str) -> Any:
    value: Any = record
    for key in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def _plain(data: Any) -> Any:
    """Return nested data with dataclasses as dictionaries."""
    if is_dataclass(data):
        return vars(data)
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    return [_plain(value) for value in data] if isinstance(data, list | tuple) else data
