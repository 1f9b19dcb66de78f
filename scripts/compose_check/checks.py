"""What is promised of a deployment beside streams that outlive faults. Each check starts what it
needs on top of a deployment that runs, and says in a Report what it has seen."""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from . import engine, faults
from .clients import Clients
from .engine import KINDS, CommandFailed, Deployment, command, inspect, logs
from .faults import Stage, get
from .report import Report

AT_REST_S = 60.0
MOST_AT_REST = 0.02
LEFT_S = 1.0
LEAVING = 5
PATIENCE_S = 30.0
HUNG_S = 3.0
REST_S = 10.0
"""After the last fault, before it counts as rest."""
SAY_LOAD = """
touch /tmp/say-load
while [ -e /tmp/say-load ]; do
    exec 3<>/dev/tcp/127.0.0.1/8000
    printf 'GET /load HTTP/1.0\\r\\n\\r\\n' >&3
    text=$(cat <&3)
    text=${text##*:}
    echo "${text%\\}}"
    exec 3>&-
    sleep 0.02
done
"""
"""In a frontend's container: the number of its requests, in one line each time it is asked."""
FEW_FILES = 4096


async def clients_that_leave(stage: Stage, report: Report) -> None:
    """A request whose client has gone ends at once, streamed or not."""
    url = stage.deployment.url
    async with Loads(await stage.deployment.containers("frontend")) as loads:
        for streamed in (False, True):
            times: list[float] = []
            for _ in range(LEAVING):
                body = {"prompt": [1, 2, 3], "max_tokens": 20_000, "stream": streamed}
                async with aiohttp.ClientSession() as session:
                    task = asyncio.create_task(_ask(session, url, body))
                    await loads.until(lambda requests: requests > 0)
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                times.append(await loads.until(lambda requests: requests == 0))
            name = "streamed" if streamed else "not streamed"
            report.check(
                f"{LEAVING} clients that leave are noticed, {name}",
                max(times) <= LEFT_S,
                f"{', '.join(f'{seconds:.2f}' for seconds in times)} s",
            )


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        async for _ in answer.content:
            pass


class Loads:
    """How many requests the frontends own, as each of them says several times a second."""

    def __init__(self, containers: list[str]) -> None:
        self._containers = containers
        self._requests = dict.fromkeys(containers, 0)
        self._processes: list[asyncio.subprocess.Process] = []
        self._reading: list[asyncio.Task[None]] = []
        self._news = asyncio.Event()

    async def __aenter__(self) -> "Loads":
        for container in self._containers:
            process = await asyncio.create_subprocess_exec(
                "docker", "exec", container, "bash", "-c", SAY_LOAD, stdout=asyncio.subprocess.PIPE
            )
            self._processes.append(process)
            self._reading.append(asyncio.create_task(self._read(container, process)))
        return self

    async def __aexit__(self, *_: object) -> None:
        for container in self._containers:
            # What `docker exec` has started outlives it.
            with contextlib.suppress(CommandFailed):
                await engine.shell(container, "rm -f /tmp/say-load")
        await asyncio.gather(*self._reading)

    async def _read(self, container: str, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            if line.strip().isdigit():
                self._requests[container] = int(line)
                self._news.set()
        await process.wait()

    async def until(self, holds: Callable[[int], bool]) -> float:
        """Seconds until the sum is such; infinite after PATIENCE_S."""
        began = time.monotonic()
        while not holds(sum(self._requests.values())):
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), PATIENCE_S)
            except TimeoutError:
                return float("inf")
            if time.monotonic() - began > PATIENCE_S:
                return float("inf")
        return time.monotonic() - began


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
    """A service that dies at every start says why in /ready, and `pagewire doctor` repeats it."""
    deployment = stage.deployment
    locked = deployment.directory / "models" / "locked"
    locked.mkdir(parents=True)
    locked.chmod(0o700)
    deployment.environment["MODELS_DIR"] = str(locked.parent)
    try:
        await _dies(stage, report, "/models/nope", "could not start: /models/nope does not exist")
        if os.getuid() == 0:  # else the directory is not foreign to the user in the image
            await _dies(stage, report, "/models/locked", "user 10001 must be able to read it")
    finally:
        del deployment.environment["MODELS_DIR"]
        deployment.restore()
        await _anew(deployment, *stage.scales("tokenizer", "frontend"))
        await stage.settled()


async def _dies(stage: Stage, report: Report, model: str, reason: str) -> None:
    """With this model no tokenizer starts, for this reason."""
    deployment = stage.deployment
    for container in await deployment.containers("tokenizer"):
        await command("docker", "rm", "-f", container)
    deployment.write({"model": model, "device": "fake"}, {})
    await _anew(deployment)
    text = ""
    for _ in range(60):
        await asyncio.sleep(0.5)
        with contextlib.suppress(aiohttp.ClientError):
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{deployment.url}/ready") as answer,
            ):
                text = await answer.text()
        if reason in text and " times" in text:
            break
    report.check(
        f"/ready says why a service does not start with {model}",
        reason in text and " times" in text,
        text[:200],
    )
    frontend = await stage.one("frontend")
    said = await engine.shell(frontend, "pagewire doctor || true")
    report.check(f"`pagewire doctor` says it too, with {model}", reason in said)


async def _anew(deployment: Deployment, *scales: str) -> None:
    """Tokenizers and frontends with the present settings."""
    words = ("up", "--detach", "--no-build", "--force-recreate", "--no-deps")
    await deployment.compose(*words, *scales, "tokenizer", "frontend")


async def hung_services(stage: Stage, report: Report) -> None:
    """A service of each kind that is stopped for good is ended by its watchdog within HUNG_S,
    whatever else the machine does. A stream is silent no longer than that and the successor's
    start, to which the engine's part belongs."""
    for kind in KINDS:
        async with Clients(stage.deployment.url, 4) as clients:
            await asyncio.sleep(1.5)
            container = await stage.one(kind)
            before = (await inspect(container))["State"]["StartedAt"]
            began = time.monotonic()
            stopped = await engine.signal_service(container, "STOP")
            state = (await inspect(container))["State"]
            while state["StartedAt"] == before and time.monotonic() - began < PATIENCE_S:
                await asyncio.sleep(0.1)
                state = (await inspect(container))["State"]
            await stage.settled()
            ready = time.time()
        # A silence is known once its stream goes on.
        gap_s = clients.record.longest_gap(began, time.monotonic())
        ended = engine.moment(state["FinishedAt"])
        started = engine.moment(state["StartedAt"])
        report.check(
            f"a hung {kind} is ended within {HUNG_S:.0f} s",
            0 < ended - stopped <= HUNG_S,
            f"{ended - stopped:.1f} s after the signal that stopped it",
        )
        print(
            f"       its successor: started by the engine {started - ended:.1f} s after that end, ready "
            f"{ready - started:.1f} s later; longest silence of a stream {gap_s:.1f} s",
            flush=True,
        )
        if kind != "frontend":  # whose streams end with it
            report.check(
                f"streams with a hung {kind} go on",
                gap_s <= HUNG_S + (ready - ended) and not clients.record.troubles,
                f"{clients.record.requests} streams, {len(clients.record.troubles)} troubles",
            )


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
    """What all containers use of a core while nobody asks anything, their health checks
    included."""
    files: dict[Path, str] = {}
    for kind in (*KINDS, "gateway"):
        for container in await stage.deployment.containers(kind):
            path = await _usage_file(container)
            if path is None:
                report.not_run("containers at rest", "there are no figures of control groups")
                return
            files[path] = kind
    await asyncio.sleep(REST_S)
    began = time.monotonic()
    before = {path: _seconds(path) for path in files}
    await asyncio.sleep(AT_REST_S)
    took = time.monotonic() - began
    shares: dict[str, float] = {}
    for path, kind in files.items():
        shares[kind] = shares.get(kind, 0.0) + (_seconds(path) - before[path]) / took
    share = sum(shares.values())
    report.check(
        f"{len(files)} containers at rest",
        share <= MOST_AT_REST,
        f"{share:.2%} of a core: {', '.join(f'{kind} {one:.2%}' for kind, one in shares.items())}",
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
