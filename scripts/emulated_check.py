"""`pagewire serve` with the demo model on processors that this machine is not, emulated by qemu:
does each start, and answer with the tokens that this machine answers with?

    python scripts/emulated_check.py                      this machine, then Haswell (AVX2, no AVX-512), Nehalem (no AVX), qemu64 (too old)
    python scripts/emulated_check.py Haswell Opteron_G5   others: `qemu-x86_64 -cpu help` lists them

Every start is a first one, with an empty cache: it compiles and times its machine code. Prints a
line for each processor, and exits with 1 where one gave other tokens or none. One that is refused
in a line, as a user would read it, is listed as that.

Needs qemu-x86_64 (Debian: qemu-user) and Pagewire installed in .venv (VENV names another one).
Beside other work a start may take many times as long as on a machine with nothing else to do.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from pagewire.hub.huggingface import demo_gguf

ROOT: Final = Path(__file__).resolve().parents[1]
PROCESSORS: Final = ("Haswell", "Nehalem", "qemu64")
BODY: Final = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 8,
    "temperature": 0,
    "return_token_ids": True,
}
FLAGS: Final = ("--device", "cpu", "--host", "127.0.0.1", "--port", "0", "--watchdog-timeout", "0")
"""Of `pagewire serve`. An emulated process may be slow enough to look as if it hung."""


class Failed(Exception):
    """What did not happen, in a line."""


class Answer(NamedTuple):
    """What a stack said, and how long its start and its answer took."""

    tokens: list[int]
    text: str
    ready_s: float
    answer_s: float


class Stack:
    """A `pagewire serve` of the demo model, with a cache and a run directory of its own below
    `place`. Its lines go to a file."""

    def __init__(self, pagewire: Path, place: Path, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began = time.monotonic()
        self._log = place / "log"
        demo = place / "cache" / "demo"
        demo.mkdir(parents=True)
        (demo / demo_gguf().name).symlink_to(demo_gguf().resolve())
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [pagewire, "serve", *FLAGS, "--run-dir", place / "run"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PAGEWIRE_CACHE": str(place / "cache")},
            )

    def lines(self) -> list[str]:
        return self._log.read_text().splitlines()

    def url(self) -> str:
        """Where it answers, once it does. "" where it ended by itself, with a line that says why.
        Raises Failed."""
        while self._process.poll() is None:
            found = [line for line in self.lines() if line.startswith("Pagewire serves ")]
            if found:
                return found[0].rpartition(" at ")[2]
            if time.monotonic() - self._began > self._limit_s:
                raise Failed(f"was not ready within {self._limit_s:.0f} s")
            time.sleep(0.2)
        said = "\n".join(self.lines())
        if self._process.returncode != 1 or "Traceback" in said or "giving up" in said:
            raise Failed(f"ended with {self._process.returncode}")
        return ""

    def answer(self, url: str) -> Answer:
        """Raises Failed."""
        ready_s = time.monotonic() - self._began
        request = urllib.request.Request(
            f"{url}/chat/completions",
            json.dumps(BODY).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self._limit_s) as response:
                choice: dict[str, Any] = json.load(response)["choices"][0]
        except OSError as error:
            raise Failed(f"did not answer within {self._limit_s:.0f} s: {error}") from None
        answer_s = time.monotonic() - self._began - ready_s
        return Answer(choice["token_ids"], choice["message"]["content"], ready_s, answer_s)

    def end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def served(processor: str, limit_s: float) -> Iterator[Stack]:
    """A stack on a processor by qemu's name, "" for this one."""
    venv = Path(os.environ.get("VENV", ROOT / ".venv"))
    with tempfile.TemporaryDirectory(prefix="pagewire-") as name:
        place = Path(name)
        if processor:
            subprocess.run([ROOT / "scripts/emulated", place / "venv", processor], check=True)
            venv = place / "venv"
        stack = Stack(venv / "bin" / "pagewire", place, limit_s)
        try:
            yield stack
        finally:
            stack.end()


def ask(processor: str, limit_s: float) -> Answer | None:
    """None where it was refused in a line, which is printed. Raises Failed."""
    title = processor or "this machine"
    with served(processor, limit_s) as stack:
        try:
            url = stack.url()
            if not url:
                print(f"{title}: refused: {stack.lines()[-1]}", flush=True)
                return None
            found = stack.answer(url)
        except Failed:
            print("\n".join(stack.lines()[-20:]), file=sys.stderr)
            raise
        (kind,) = [line for line in stack.lines() if " parameters as " in line]
        print(
            f"{title}: {kind.partition(' parameters as ')[2]}; ready in {found.ready_s:.0f} s, "
            f"{len(found.tokens)} tokens in {found.answer_s:.1f} s: {found.text!r}",
            flush=True,
        )
        return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("processor", nargs="*", default=PROCESSORS, help="qemu's names")
    parser.add_argument(
        "--limit", type=float, default=900, metavar="S", help="seconds for each start and answer"
    )
    options = parser.parse_args()
    title, failed = "this machine", False
    try:
        wanted = ask("", options.limit)
        if wanted is None:
            raise Failed("there is nothing to compare with")
        for title in options.processor:
            found = ask(title, options.limit)
            if found and found.tokens != wanted.tokens:
                print(f"{title}: other tokens: {found.tokens}, not {wanted.tokens}")
                failed = True
    except (Failed, subprocess.CalledProcessError) as error:
        print(f"{title}: {error}")
        failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
