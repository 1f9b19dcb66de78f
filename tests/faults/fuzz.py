"""Fuzzes all that comes from outside of a process, for as long as wanted.

    python -m tests.faults.fuzz --minutes 60 --report report.md

In turns: frames to the decoder of each service, whole messages to a scheduler and a tokenizer, bodies
to each endpoint of a running stack. A frame is decoded or refused; no message ends a service; no body
is answered with 5xx; and between all that, good requests are served.
"""

import copy
import http.client
import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from .reports import finish, parser_of  # isort: skip

import msgspec
from abuse.test_strange_messages import (
    SchedulerStand,
    TokenizerStand,
    anything_to,
    run_directory,
)
from api.test_strange_values import BODIES, VALUES
from e2e.conftest import Stack
from hypothesis import HealthCheck, Phase, given, seed, settings
from pagewire.frontend.neutral import NEUTRAL
from pagewire.scheduler.state import Tick
from pagewire_protocol.messages import Roster, ToScheduler, ToTokenizer
from protocol.test_wire_types import ANY_MESSAGE, decode_or_refuse

ROUND: Final = 300
"""Examples in one turn."""
LONGEST: Final = 40
HOME: Final = str(Path(__file__).parents[2]).encode()
"""A path of the server, which no answer shows."""
FLAGS: Final = (
    *("--device", "fake", "--fake-step-ms", "1"),
    *("--num-frontends", "1", "--num-tokenizers", "1", "--request-timeout", "20"),
)
KEYS: Final = ("role", "content", "type", "text", "json_schema", "schema", "1", "", "name")

Round = Callable[[random.Random], None]
"""Examples of one sort, drawn from this. Raises for what must not be."""


def examples(strategy: Any, make: random.Random, check: Callable[[Any], None]) -> None:
    """`check` for a round of the strategy's values; a value that fails is made small."""

    @seed(make.randrange(2**32))
    @settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(strategy)
    def property_(value: Any) -> None:
        check(value)

    property_()


def mutated(data: bytes, make: random.Random) -> bytes:
    """`data` with a few bytes changed, cut, added or repeated."""
    frame = bytearray(data)
    for _ in range(make.randrange(1, 6)):
        at = make.randrange(len(frame)) if frame else 0
        match make.randrange(4):
            case 0 if frame:
                frame[at] = make.randrange(256)
            case 1:
                del frame[at + make.randrange(1, 9) :]
            case 2:
                frame[at:at] = make.randbytes(make.randrange(1, 9))
            case _:
                frame[at:at] = frame[max(0, at - make.randrange(1, 33)) : at]
    return bytes(frame)


def frames(make: random.Random) -> None:
    """Frames near those of good messages."""

    def check(message: Any) -> None:
        frame = msgspec.msgpack.encode(message)
        assert decode_or_refuse(frame)
        for _ in range(20):
            decode_or_refuse(mutated(frame, make))

    examples(ANY_MESSAGE, make, check)


def to_scheduler(make: random.Random) -> None:
    """One scheduler gets them all; then it serves."""
    with run_directory() as run_dir:
        stand = SchedulerStand(run_dir)

        def check(message: Any) -> None:
            stand.loop.handle(message)
            stand.loop.handle(Tick(0.5))

        try:
            examples(anything_to(ToScheduler), make, check)
            assert stand.serves()
        finally:
            stand.close()


def to_tokenizer(make: random.Random) -> None:
    """One tokenizer gets them all; then it serves."""
    with run_directory() as run_dir:
        stand = TokenizerStand(run_dir)

        def check(message: Any) -> None:
            if not isinstance(message, Roster):  # one of a later epoch would be heeded from then on
                stand.take(message)

        try:
            examples(anything_to(ToTokenizer), make, check)
            assert stand.serves()
        finally:
            stand.service.close()


def strange(make: random.Random, depth: int = 0) -> Any:
    """Any JSON value, not too large; now and then one that many fields take."""
    if not depth and make.random() < 0.4:
        return make.choice((None, 0, 1, 2, 0.5, True, False, "", [], {}))
    match make.randrange(8 if depth < 4 else 5):
        case 0 | 1:
            return make.choice(VALUES)
        case 2:
            return make.choice(
                (make.randrange(-3, 300), make.random() * 3, 2 ** make.randrange(70))
            )
        case 3:
            return "".join(chr(make.randrange(1, 0x3000)) for _ in range(make.randrange(LONGEST)))
        case 4:
            return make.choice(("auto", "none", "json_object", "json_schema", "text", "user", "hi"))
        case 5 | 6:
            return [strange(make, depth + 1) for _ in range(make.randrange(6))]
        case _:
            return {make.choice(KEYS): strange(make, depth + 1) for _ in range(make.randrange(5))}


def body_of(path: str, make: random.Random) -> bytes:
    """A body for the endpoint, with some fields that do not fit, and now and then no JSON."""
    kind, good = BODIES[path]
    body = copy.deepcopy(good)
    fields = [name for name in kind.__struct_fields__ if name not in NEUTRAL]
    # What is refused by its name is refused before anything else is looked at.
    names = [*fields, "no_such_thing"] if make.random() < 0.9 else list(NEUTRAL)
    for _ in range(make.choice((1, 1, 2, 4))):
        body[make.choice(names)] = strange(make)
    data = json.dumps(body).encode()
    return mutated(data, make) if make.random() < 0.2 else data


class Http:
    """Bodies for one stack."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)
        self.statuses: Counter[int] = Counter()

    def __call__(self, make: random.Random) -> None:
        """A round of them; then a good one."""
        for _ in range(ROUND):
            path = make.choice(list(BODIES))
            body = body_of(path, make)
            status, answer = self._post(path, body)
            self.statuses[status] += 1
            wrong = status >= 500 or b"Traceback" in answer or HOME in answer
            assert not wrong, f"{status} for {path} {body!r}: {answer[:500]!r}"
        good = json.dumps({"prompt": [1, 2, 3], "max_tokens": 2}).encode()
        assert self._post("/v1/completions", good)[0] == 200

    def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        address = self._address
        client = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
        try:
            client.request("POST", path, body, {"Content-Type": "application/json"})
            answer = client.getresponse()
            return answer.status, answer.read()
        finally:
            client.close()


@contextmanager
def rounds() -> Any:
    """What there is to fuzz, by name."""
    stack = Stack(*FLAGS).wait_ready()
    try:
        yield {
            "frames": frames,
            "messages to a scheduler": to_scheduler,
            "messages to a tokenizer": to_tokenizer,
            "bodies": Http(stack.url),
        }
    finally:
        stack.end()


def main() -> int:
    """0 when nothing failed."""
    parser = parser_of(__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    make = random.Random(options.seed)
    logging.disable(logging.CRITICAL)
    end = time.monotonic() + 60 * options.minutes
    done: Counter[str] = Counter()
    failures: list[str] = []
    with rounds() as all_rounds:
        while time.monotonic() < end and not failures:
            for name, run in all_rounds.items():
                try:
                    run(make)
                except Exception as error:
                    failures.append(f"{name}: {type(error).__name__}: {error}"[:2000])
                done[name] += ROUND
        statuses = dict(sorted(all_rounds["bodies"].statuses.items()))
    text = f"- seed {options.seed}\n" + "\n".join(
        f"- {name}: {number:,}" for name, number in done.items()
    )
    return finish(f"{text}\n- answers to bodies: {statuses}", failures, options.report)


if __name__ == "__main__":
    sys.exit(main())
