"""`pagewire bench serve`: concurrent streaming load on a server that runs, or on one that is started for it."""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from ..cli import new_parser, positive
from .figures import FIRST_ID, add_load, summarize, table, write_json
from .load import Target, send_all

READY_S = 900.0


def main(arguments: list[str]) -> int:
    options, rest = _parse(arguments)
    with contextlib.ExitStack() as cleanup:
        if not options.url:
            options.url = cleanup.enter_context(started(rest))
        target = Target.of(options.url, options.api_key)
        model = options.served_model or ask_model(options.url, options.api_key)
        make = random.Random(options.seed)
        bodies = [body(model, make, options) for _ in range(options.num_prompts)]
        asyncio.run(send_all(target, [body(model, make, options) for _ in range(min(2, options.num_prompts))], 2))
        samples = asyncio.run(send_all(target, bodies, options.concurrency))
    figures = {"concurrency": options.concurrency, "input_len": options.input_len, "output_len": options.output_len}
    figures |= summarize(samples, options.input_len)
    print(table(f"{model} at {options.url}", figures))
    if options.json:
        write_json(options.json, figures)
    for error in sorted({sample.error for sample in samples if sample.error})[:3]:
        print(f"failed: {error}", file=sys.stderr)
    return 1 if figures["failed"] else 0


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser("bench serve", "Streaming load. Without --url, every other flag goes to a `pagewire serve` started for it.")
    parser.add_argument("--url", default="", help="a running server, like http://localhost:8000")
    parser.add_argument("--api-key", default=os.environ.get("PAGEWIRE_API_KEY", ""))
    parser.add_argument("--served-model", default="", help="model name to ask for (default: the first the server names)")
    add_load(parser, num_prompts=64)
    parser.add_argument("--concurrency", type=positive, default=16, help="requests at a time (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    options, rest = parser.parse_known_args(arguments)
    if options.url and rest:
        parser.error(f"unknown with --url: {' '.join(rest)}")
    return options, rest


def body(model: str, make: random.Random, options: argparse.Namespace) -> dict[str, Any]:
    prompt = [make.randrange(FIRST_ID, options.vocab) for _ in range(options.input_len)]
    return {"model": model, "prompt": prompt, "max_tokens": options.output_len, "ignore_eos": True, "temperature": 0}


def ask_model(url: str, key: str) -> str:
    """The first model name. Raises OSError in plain words when no server answers."""
    base = url if "://" in url else f"http://{url}"
    request = urllib.request.Request(f"{base.rstrip('/').removesuffix('/v1')}/v1/models")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except OSError as error:
        raise OSError(f"no server answers at {url}: {getattr(error, 'reason', error)}") from None


@contextlib.contextmanager
def started(arguments: list[str]) -> Iterator[str]:
    """A stack on a free port, ready; yields its URL and ends it afterwards. Raises OSError when it does not come up."""
    command = [sys.executable, "-m", "pagewire", "serve", "--host", "127.0.0.1", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(READY_S, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at http" not in line:
            process.wait()
            raise OSError("the server did not start")
        yield line.rpartition(" at ")[2].strip().removesuffix("/v1")
    finally:
        timer.cancel()
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def ready_seconds(arguments: list[str]) -> float:
    """From the start of `pagewire serve` to its ready line."""
    began = time.monotonic()
    with started(arguments):
        return time.monotonic() - began
