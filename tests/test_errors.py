"""Errors for users."""

from time import process_time

from robust_backbones.errors import InputError


def test_an_error_is_one_line_at_once_whatever_it_quotes() -> None:
    """A damaged file may give any text to quote: in time that grows with its square, one of a megabyte takes hours."""
    gap, start = " " * 2**15, process_time()
    assert str(InputError(f" a\n\n  b{gap}c\r\nd\u2028e\n")) == f"a b{gap}c d e"
    assert process_time() - start < 1
