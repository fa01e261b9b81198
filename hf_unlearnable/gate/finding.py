"""What the gate finds wrong: one problem of one check, with the rows that have it."""

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 5


def first_of(names: Sequence[object], count: int | None = None) -> str:
    """ "3, 7, 12, 15, 20 and 5 more": the first names, of `count` where not all are at hand."""
    shown, count = names[:SHOWN], len(names) if count is None else count
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return ", ".join(map(str, shown)) + more


@dataclass(frozen=True)
class Finding:
    """One problem: the name of the check that found it, and what it is, with its rows."""

    check: str
    problem: str

    def __str__(self) -> str:
        return f"{self.check}: {self.problem}"


@dataclass
class _Rows:
    first: list[int]
    detail: str
    count: int = 0


class Problems:
    """Problems met row by row, kept as counts and first rows: memory grows with the kinds of problems alone."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], _Rows] = {}

    def add(self, check: str, problem: str, row: int, detail: str = "") -> None:
        """One row with a problem; `detail`, where there is one, is told of the first such row."""
        rows = self._found.setdefault((check, problem), _Rows([], detail))
        rows.count += 1
        if len(rows.first) < SHOWN:
            rows.first.append(row)

    def has(self, check: str) -> bool:
        return any(name == check for name, _ in self._found)

    def findings(self) -> list[Finding]:
        """ "rows 3, 7, 12, 15, 20 and 5 more: problem (row 3: detail)", one for every kind of problem."""
        return [Finding(check, _told(problem, rows)) for (check, problem), rows in self._found.items()]


def _told(problem: str, rows: _Rows) -> str:
    named = f"row{'s' if rows.count > 1 else ''} {first_of(rows.first, rows.count)}"
    first = f"row {rows.first[0]}: " if rows.count > 1 else ""
    return f"{named}: {problem}" + (f" ({first}{rows.detail})" if rows.detail else "")
