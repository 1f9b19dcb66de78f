"""`pagewire complete`: texts continued by a running server, in the terminal."""

from .chat import Continuation, run


def main(arguments: list[str]) -> int:
    """`pagewire complete`."""
    return run(
        "complete",
        "Texts, continued by a running server. Ctrl-C ends a continuation, Ctrl-D the command.",
        Continuation,
        arguments,
    )
