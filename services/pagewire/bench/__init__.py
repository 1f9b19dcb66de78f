"""`pagewire bench KIND`: figures for the offline interface, a server under load, one request, the
kernels, and the path between."""

import difflib
import importlib
import sys

KINDS = {
    "offline": "throughput of LLM.generate: [--model M] [--workloads LIST]",
    "serve": "streaming load over HTTP: [--url URL | flags of pagewire serve] [--loads LIST] [--against URL] [--plot FILE]",
    "latency": "one request at a time, percentiles by size: [--model M] [--sizes LIST]",
    "path": "CPU time of a token between worker and client, without a model: [--replicas LIST] [--step-ms LIST] [--asking LIST]",
    "kernels": "times of the GPU kernels beside those of other libraries",
}
USAGE = "\n".join(
    [
        "usage: pagewire bench KIND [flags]",
        "",
        *(f"  pagewire bench {kind:<8} {text}" for kind, text in KINDS.items()),
        "",
        "Each prints a table; --json FILE also writes the figures. `pagewire bench KIND --help` lists the flags.",
    ]
)


def main(arguments: list[str]) -> int:
    kind = arguments[0] if arguments else ""
    if kind in ("", "-h", "--help", "help"):
        print(USAGE)
        return 0 if kind else 2
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(KINDS)}"
        print(f"pagewire bench: unknown kind {kind!r}; {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(f".{kind}", __package__).main(arguments[1:])
