"""`pagewire bench offline|serve`: figures for the offline interface and for a server under load."""

import sys
from collections.abc import Callable

USAGE = """usage: pagewire bench serve [--url URL | flags of pagewire serve] [--num-prompts N --concurrency N --input-len N --output-len N]
       pagewire bench offline [--model M] [--num-prompts N --input-len N --output-len N]

Each prints a table; --json FILE also writes the figures. `pagewire bench serve --help` lists the flags."""


def main(arguments: list[str]) -> int:
    kind = arguments[0] if arguments else ""
    if kind in ("", "-h", "--help"):
        print(USAGE)
        return 0 if kind else 2
    if kind not in ("serve", "offline"):
        print(f"pagewire bench: unknown kind {kind!r}; serve or offline", file=sys.stderr)
        return 2
    run: Callable[[list[str]], int]
    if kind == "serve":
        from .serve import main as run
    else:
        from .offline import main as run
    return run(arguments[1:])
