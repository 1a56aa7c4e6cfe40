"""What an error says on one line."""

from __future__ import annotations

import pytest

from bsafusion.errors import one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (FileNotFoundError(2, "No such file", "a.png"), "[Errno 2] No such file: 'a.png'"),
        (ValueError(), "ValueError"),
        (KeyError("fixed"), "KeyError: 'fixed'"),
        (AttributeError("no attribute x"), "AttributeError: no attribute x"),
    ],
    ids=repr,
)
def test_a_line_names_the_type_of_what_nobody_raises_for_users(error: Exception, line: str) -> None:
    assert one_line(error) == line
