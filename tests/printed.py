"""What a program under test printed, read back."""

import ast

__all__ = ["printed_text"]


def printed_text(line: str, before: str) -> str:
    """The string whose `repr` follows `before` on a printed line.

    A sampled text may hold any character. `repr` puts it in double quotes when it holds a single
    one, so a test must not expect one kind of quote.
    """
    assert line.startswith(before), line
    text = ast.literal_eval(line.removeprefix(before))
    assert isinstance(text, str), line
    return text
