"""Columns of a table line up."""

from __future__ import annotations

from mogeo.figures.table import Table


def test_columns_of_a_table_line_up() -> None:
    table = Table(
        "Title", ("method", "net", "accuracy"), [("a", "-1.0", "55.0"), ("longer name", "+10.0", "5.0")], "Note."
    )
    assert table.text().splitlines() == [
        "Title",
        "method         net  accuracy",
        "-----------  -----  --------",
        "a             -1.0      55.0",
        "longer name  +10.0       5.0",
        "Note.",
    ]
