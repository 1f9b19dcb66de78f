"""Servers to measure: one that is started here and ended afterwards, or one that runs already."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping

READY_S = 900.0


@contextlib.contextmanager
def started(
    arguments: list[str], environment: Mapping[str, str] | None = None, within_s: float = READY_S
) -> Iterator[str]:
    """A stack on a free port, ready; yields its URL and ends it afterwards. Raises OSError when it
    does not come up in time."""
    command = [sys.executable, "-m", "pagewire", "serve", "--host", "127.0.0.1", "--port", "0"]
    # The load says how tokens are sampled, the same for every model.
    command += ["--generation-config", "vllm", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    timer = threading.Timer(within_s, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if " at http" in line), None)
        if line is None:
            was_killed = process.wait() < 0
            late = f"the server was not ready in {within_s:.0f} s"
            raise OSError(late if was_killed else "the server did not start")
        timer.cancel()
        yield line.rpartition(" at ")[2].strip().removesuffix("/v1")
    finally:
        timer.cancel()
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def ready_seconds(
    arguments: list[str], environment: Mapping[str, str] | None = None, within_s: float = READY_S
) -> float:
    """From the start of `pagewire serve` to its ready line."""
    began = time.monotonic()
    with started(arguments, environment, within_s):
        return time.monotonic() - began


def base_of(url: str) -> str:
    return (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")


def ask_model(url: str, key: str = "") -> str:
    """The first model name. Raises OSError in plain words when no server answers."""
    request = urllib.request.Request(f"{base_of(url)}/v1/models")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except urllib.error.HTTPError as error:
        error.close()
        hint = "; it wants a key (--api-key)" if error.code == 401 else ""
        raise OSError(f"{url} answered {error.code} {error.reason}{hint}") from None
    except (ValueError, LookupError, TypeError):
        raise OSError(f"what answers at {url} lists no models as OpenAI's API does") from None
    except OSError as error:
        raise OSError(f"no server answers at {url}: {getattr(error, 'reason', error)}") from None


def metrics(url: str) -> dict[str, float]:
    """The values of /metrics by name, summed over labels; empty when the server shows none. Several
    frontends answer in turns."""
    values: dict[str, float] = {}
    try:
        with urllib.request.urlopen(f"{base_of(url)}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return values
    for name, value in re.findall(r"^([\w:]+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE):
        values[name] = values.get(name, 0.0) + float(value)
    return values
