"""Display of results: in a terminal, in a notebook, as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["Result", "counted"]


def counted(number: float, noun: str, *, plural: str = "") -> str:
    """Return a number with its noun, in the singular for one.

    Example:
        >>> counted(1, "batch", plural="batches"), counted(8, "layer")
        ('1 batch', '8 layers')
    """
    return f"{number:.6g} {noun if number == 1 else plural or noun + 's'}"


class Result:
    """A value whose `str`, `repr` and notebook table come from two methods.

    A subclass defines `to_text()`, and `to_rows()` if it holds a list. A dataclass
    needs `repr=False`, or it writes a `__repr__` of its own.

    Example:
        >>> class Count(Result):
        ...     def to_text(self):
        ...         return "2 layers"
        ...
        ...     def to_rows(self):
        ...         return [{"name": "bn1", "size": 8}, {"name": "bn2", "size": 16}]
        >>> Count()
        2 layers
        >>> Count()._repr_html_().count("<tr>")
        3
    """

    def to_text(self) -> str:
        """Return the result as plain text; the first line stands for the whole."""
        raise NotImplementedError

    def to_rows(self) -> Sequence[Mapping[str, object]]:
        """Return one mapping per line of the table, as `pandas.DataFrame` takes them.

        The first one names the columns; none is a result without a table.
        """
        return ()

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        """Return the table with the first line as its caption, for notebooks."""
        rows = self.to_rows()
        if not rows:
            return f"<pre>{escape(self.to_text())}</pre>"
        caption, _, rest = self.to_text().partition("\n")
        columns = list(rows[0])
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        lines = [
            "".join(f"<td>{escape(_shown(row.get(name)))}</td>" for name in columns)
            for row in rows
        ]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        text = f"<details><summary>as text</summary><pre>{escape(rest)}</pre></details>"
        return (
            f"<table><caption>{escape(caption)}</caption><tr>{head}</tr>{body}</table>"
            + (text if rest else "")
        )


def _shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
