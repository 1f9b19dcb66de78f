"""Each request of the corpus in tests/abuse beside eight paced streams: how long these wait for it.

    python -m tests.faults.stalls --report report.md

A row's gap is the shortest of three tries, since one process or another of the machine may run in
any of them; beside it is the longest gap of as many windows without the request.
"""

import sys
from typing import Final

from .reports import finish, parser_of  # isort: skip

from abuse.corpus import CORPUS
from abuse.stall import FLAGS, Gaps, Outcome, abuse, resident
from e2e.conftest import Stack

TRIES: Final = 3
GAP_S: Final = 0.1


def main() -> int:
    """0 when no request made the streams wait for longer than GAP_S."""
    options = parser_of(__doc__).parse_args()
    stack = Stack(*FLAGS).wait_ready()
    rows: list[str] = []
    faults: list[str] = []
    try:
        before = resident(list(stack.children()))
        for case in CORPUS:
            body = case.body()
            gaps = Gaps(stack.url)
            usual: list[float] = []
            outcomes: list[Outcome] = []
            for _ in range(TRIES):
                usual.append(gaps.usual())
                outcomes.append(abuse(stack.url, gaps, case.path, body, case.copies))
            gaps.close()
            gap = min(outcome.gap for outcome in outcomes)
            statuses = sorted({status for outcome in outcomes for status in outcome.statuses})
            rows.append(
                f"| {case.name} | {case.copies} | {len(body) / 1e6:.1f} | "
                f"{', '.join(map(str, statuses))} | {outcomes[-1].seconds:.2f} | {1000 * gap:.0f} | "
                f"{1000 * max(usual):.0f} |"
            )
            if gap > GAP_S:
                faults.append(f"{case.name}: a gap of {1000 * gap:.0f} ms")
        kept = resident(list(stack.children())) - before
    finally:
        stack.end()
    lines = [
        "| request | copies | MB | status | answered after, s | longest gap of others, ms | without, ms |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"- {kept >> 20} MiB kept by all services after the last one",
    ]
    return finish("\n".join(lines), faults, options.report)


if __name__ == "__main__":
    sys.exit(main())
