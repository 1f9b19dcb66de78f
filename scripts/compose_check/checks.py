"""What is promised of a deployment beside streams that outlive faults. Each check starts what it
needs on top of a deployment that runs, and says in a Report what it has seen."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from . import faults
from .engine import KINDS, CommandFailed, command, inspect, logs
from .faults import Stage, get

AT_REST_S = 30.0
MOST_AT_REST = 0.02
LEFT_S = 1.0
FEW_FILES = 4096


class Report(Protocol):
    """Where the outcome goes."""

    def check(self, what: str, holds: bool, detail: str = "") -> None:
        """One promise."""
        ...


async def clients_that_leave(stage: Stage, report: Report) -> None:
    """A request whose client has gone ends at once, streamed or not."""
    url = stage.deployment.url
    for streamed in (False, True):
        body = {"prompt": [1, 2, 3], "max_tokens": 20_000, "stream": streamed}
        async with aiohttp.ClientSession() as session:
            task = asyncio.create_task(_ask(session, url, body))
            await _until(lambda: _running(stage), lambda n: n > 0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        seconds = await _until(lambda: _running(stage), lambda n: n == 0)
        name = "streamed" if streamed else "not streamed"
        report.check(
            f"a client that leaves is noticed, {name}", seconds <= LEFT_S + 1.0, f"{seconds:.1f} s"
        )


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        async for _ in answer.content:
            pass


async def _running(stage: Stage) -> float:
    """Requests that some frontend owns, as each of them says."""
    total = 0.0
    for container in await stage.deployment.containers("frontend"):
        script = "exec 3<>/dev/tcp/127.0.0.1/8000; printf 'GET /load HTTP/1.0\\r\\n\\r\\n' >&3; tail -n 1 <&3"
        total += json.loads(await command("docker", "exec", container, "bash", "-c", script))[
            "server_load"
        ]
    return total


async def _until(value: Callable[[], Awaitable[float]], holds: Callable[[float], bool]) -> float:
    """Seconds until it holds, 30 at most."""
    began = time.monotonic()
    while time.monotonic() - began < 30.0:
        asked = time.monotonic()
        if holds(await value()):
            return asked - began
        await asyncio.sleep(0.05)
    return float("inf")


async def errors_of_the_gateway(stage: Stage, report: Report) -> None:
    """Without a frontend it answers as the API does."""
    await stage.deployment.compose("stop", "frontend")
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{stage.deployment.url}/v1/models") as answer,
        ):
            text = await answer.text()
            is_error = answer.status == 503 and answer.content_type == "application/json"
            wait = answer.headers.get("Retry-After", "")
        error = json.loads(text)["error"] if is_error else {}
        report.check(
            "the gateway's own error is the API's JSON",
            is_error and error.get("code") == 503 and wait.isdecimal(),
            text[:80],
        )
    finally:
        await stage.up()
        await stage.settled()


class Counts:
    """Every counter of /metrics, asked again and again, and which of them fell."""

    def __init__(self) -> None:
        self.readings = 0
        self.fallen: list[str] = []
        self.stopping = False
        self._last: dict[str, float] = {}

    async def watch(self, stage: Stage) -> None:
        """Until `stopping`."""
        async with aiohttp.ClientSession() as session:
            while not self.stopping:
                await asyncio.sleep(0.1)
                try:
                    async with session.get(f"{stage.deployment.url}/metrics") as answer:
                        text = await answer.text()
                        if answer.status == 200:
                            self.take(text)
                except aiohttp.ClientError:
                    continue

    def take(self, text: str) -> None:
        """One answer of /metrics."""
        self.readings += 1
        for family in text_string_to_metric_families(text):
            if family.type not in ("counter", "histogram"):
                continue
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                name = f"{sample.name}{sorted(sample.labels.items())}"
                if sample.value < self._last.get(name, 0.0):
                    self.fallen.append(f"{name}: {self._last[name]:g} -> {sample.value:g}")
                self._last[name] = sample.value


async def last_words(stage: Stage, report: Report) -> None:
    """A service that dies at every start says why in /ready and in `pagewire doctor`."""
    deployment = stage.deployment
    for container in await deployment.containers("tokenizer"):
        await command("docker", "rm", "-f", container)
    deployment.write({"model": "/models/nope", "device": "fake"}, {})
    await deployment.compose(
        "up", "--detach", "--no-build", "--force-recreate", "--no-deps", "tokenizer", "frontend"
    )
    try:
        text = ""
        for _ in range(60):
            await asyncio.sleep(0.5)
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{deployment.url}/ready") as answer,
            ):
                text = await answer.text()
            if "could not start: /models/nope" in text and " times" in text:
                break
        report.check(
            "/ready says why a service does not start",
            "could not start: /models/nope" in text and " times" in text,
            text[:160],
        )
    finally:
        deployment.restore()
        await deployment.compose(
            "up",
            "--detach",
            "--no-build",
            "--force-recreate",
            "--no-deps",
            *stage.scales("tokenizer", "frontend"),
            "tokenizer",
            "frontend",
        )
        await stage.settled()


async def doctors(stage: Stage, report: Report) -> None:
    """`pagewire doctor` finds nothing broken in any of the containers."""
    for kind in KINDS:
        try:
            text = await command("docker", "exec", await stage.one(kind), "pagewire", "doctor")
        except CommandFailed as error:
            text = str(error)
        report.check(f"`pagewire doctor` in {kind}", "everything works" in text, text.strip()[-60:])


async def spare_scheduler(stage: Stage, report: Report) -> None:
    """A second scheduler waits, and takes over."""
    deployment = stage.deployment
    (first,) = await deployment.containers("scheduler")
    await deployment.compose(
        "up", "--detach", "--no-build", "--no-recreate", *stage.scales(), "--scale", "scheduler=2"
    )
    await asyncio.sleep(3.0)
    (spare,) = set(await deployment.containers("scheduler")) - {first}
    state = await inspect(spare)
    waits = state["State"]["Running"] and not state["RestartCount"]
    await command("docker", "stop", first)
    await stage.settled()
    log = await logs(spare)
    report.check(
        "a second scheduler waits and takes over", waits and "epoch" in log, log.strip()[-80:]
    )
    await command("docker", "start", first)
    await command("docker", "rm", "-f", spare)
    await stage.settled()


async def few_files(stage: Stage, report: Report) -> None:
    """All services run where only FEW_FILES files may be open, and say how many connections that
    allows."""
    deployment = stage.deployment
    limit = {"ulimits": {"nofile": FEW_FILES}}
    deployment.override({name: dict(limit) for name in (*KINDS, "gateway")})
    try:
        await faults.everything_recreated(stage)
        await stage.settled()
        log = await logs(await stage.one("frontend"))
        gateway = await get(deployment, "http://127.0.0.1:8405/metrics")
        report.check(
            f"runs with {FEW_FILES} files",
            f"at most {FEW_FILES - 256} connections" in log
            and "haproxy_process_max_connections" in gateway,
            next((line[26:] for line in log.splitlines() if "listening" in line), ""),
        )
    except CommandFailed as error:
        report.check(f"runs with {FEW_FILES} files", False, str(error))
    finally:
        deployment.restore()


async def at_rest(stage: Stage, report: Report) -> None:
    """What all containers use of a core while nobody asks anything."""
    containers = [
        c for kind in (*KINDS, "gateway") for c in await stage.deployment.containers(kind)
    ]
    files = [path for container in containers if (path := await _usage_file(container))]
    if len(files) < len(containers):
        print("no figures of control groups: not measured at rest", flush=True)
        return
    began = time.monotonic()
    before = sum(map(_seconds, files))
    await asyncio.sleep(AT_REST_S)
    share = (sum(map(_seconds, files)) - before) / (time.monotonic() - began)
    # A machine on which others compute has colder caches and slower cores.
    report.check(
        f"{len(files)} containers at rest",
        share <= 1.5 * MOST_AT_REST,
        f"{100 * share:.1f}% of a core",
    )


async def _usage_file(container: str) -> Path | None:
    name = (await inspect(container))["Id"]
    for path in (
        Path(f"/sys/fs/cgroup/cpuacct/docker/{name}/cpuacct.usage"),
        Path(f"/sys/fs/cgroup/system.slice/docker-{name}.scope/cpu.stat"),
        Path(f"/sys/fs/cgroup/docker/{name}/cpu.stat"),
    ):
        if path.exists():
            return path
    return None


def _seconds(path: Path) -> float:
    """Of a processor, since the container's start."""
    words = path.read_text().split()
    return int(words[0]) / 1e9 if len(words) == 1 else int(words[1]) / 1e6
