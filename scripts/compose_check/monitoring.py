"""The monitoring profile: Prometheus finds its targets, takes the alerts, answers each query of the
board, and sees no counter fall while services come and go.

Where the two images cannot be had, Debian's Prometheus stands in for the one, in the same network
and with the same files, and for Grafana a container that does nothing, whose mounted files alone
are looked at. The report says so.
"""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Protocol

import aiohttp

from . import engine
from .clients import Clients
from .engine import ROOT, CommandFailed, command
from .report import Report

PROMETHEUS_PORT: Final = 19090
GRAFANA_PORT: Final = 13000
PROMETHEUS: Final = f"http://127.0.0.1:{PROMETHEUS_PORT}"
GRAFANA: Final = f"http://127.0.0.1:{GRAFANA_PORT}"
BOARD: Final = ROOT / "compose/monitoring/board.json"
PATIENCE_S: Final = 60.0
SCRAPES_S: Final = 12.0
"""Two scrapes and a little."""
PULL_S: Final = 180.0
STAND_INS: Final = {
    "prom/prometheus": """
FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends prometheus wget && rm -rf /var/lib/apt/lists/* \
    && install -d -o 65534 -g 65534 /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
""",
    "grafana/grafana": """
FROM debian:bookworm-slim
RUN install -d -o 472 /var/lib/grafana
ENTRYPOINT ["sleep", "infinity"]
""",
}
EMPTY_IN_PEACE: Final = re.compile(
    r"failing|preempt|errors_total|redispatch|5xx|5\.\.|queue_requests"
)
"""Queries that may have no series as long as nothing is wrong."""
COUNTER: Final = re.compile(r"(vllm|pagewire):.*_(total|count|sum|bucket)")
GRAFANA_FILES: Final = (
    "/etc/grafana/provisioning/datasources/pagewire.yml",
    "/etc/grafana/provisioning/dashboards/pagewire.yml",
    "/etc/grafana/boards/pagewire.json",
)


class Lines(Protocol):
    """The deployment with the profile, as pages.Clone has it."""

    is_light: bool

    async def run(self, line: str) -> str:
        """A shell line in its directory."""
        ...

    async def containers(self, service: str) -> list[str]:
        """Ids of running containers."""
        ...


async def provide_images(directory: Path, environment: dict[str, str], report: Report) -> None:
    """The profile's images are pulled, or stand-ins get their names."""
    shown = await command(
        "docker",
        "compose",
        "--profile",
        "monitoring",
        "config",
        "--images",
        environment=environment,
        directory=directory,
    )
    for image in shown.split():
        name = image.partition(":")[0]
        if name not in STAND_INS:
            continue
        try:
            await engine.inspect(image)
        except CommandFailed:
            try:
                await command("docker", "pull", "-q", image, timeout_s=PULL_S)
            except CommandFailed:
                script = f"docker build -q -t {image} - <<'END'\n{STAND_INS[name]}\nEND"
                await command("bash", "-c", script, timeout_s=600.0)


async def is_stand_in(container_or_image: str) -> bool:
    """Whether it is not what the file names."""
    words = (await engine.inspect(container_or_image))["Config"]["Entrypoint"]
    return bool(words) and words[0] in ("/usr/bin/prometheus", "sleep")


async def remove_stand_ins() -> None:
    """What bears the profile's names and is something else."""
    for name in STAND_INS:
        for image in (await command("docker", "images", "-q", name)).split():
            if await is_stand_in(image):
                await command("docker", "rmi", image)


async def check(lines: Lines, url: str, report: Report) -> None:
    """All of it, on a deployment that runs with the profile and answers at `url`."""
    (prometheus,) = await lines.containers("prometheus")
    (grafana,) = await lines.containers("grafana")
    version = await _get(f"{PROMETHEUS}/api/v1/status/buildinfo", ready=True)
    stand_in = ", Debian's in its place" if await is_stand_in(prometheus) else ""
    report.check("Prometheus runs", True, f"{version['data']['version']}{stand_in}")
    text = await command(
        "docker",
        "exec",
        prometheus,
        "promtool",
        "check",
        "config",
        "/etc/prometheus/prometheus.yml",
    )
    report.check("promtool takes its files", "SUCCESS" in text, " ".join(text.split())[-100:])
    targets = await _until(_targets, lambda health: set(health.values()) == {"up"})
    report.check("its targets are up", set(targets.values()) == {"up"}, f"{targets}")
    if lines.is_light:
        async with Clients(url, 4, longest=200):
            await asyncio.sleep(SCRAPES_S)
            report.check(*await _scaled_up_and_down(lines))
    await asyncio.sleep(SCRAPES_S)
    rules = await _get(f"{PROMETHEUS}/api/v1/rules")
    alerts = {
        rule["name"]: rule.get("lastError") or rule["health"]
        for group in rules["data"]["groups"]
        for rule in group["rules"]
    }
    named = set(re.findall(r"alert: (\w+)", (ROOT / "compose/monitoring/alerts.yml").read_text()))
    report.check(
        f"{len(alerts)} alerts are evaluated",
        set(alerts) == named and set(alerts.values()) <= {"ok", "unknown"},
        f"{ {name: health for name, health in alerts.items() if health != 'ok'} or '' }",
    )
    await _board(report, lines.is_light)
    await _grafana(grafana, report)


async def _scaled_up_and_down(lines: Lines) -> tuple[str, bool, str]:
    """Prometheus counts a fall of any counter as a reset."""
    up = "docker compose --profile monitoring up --detach --no-build --no-recreate --scale"
    await lines.run(f"{up} frontend=3 --scale tokenizer=2")
    await asyncio.sleep(SCRAPES_S)
    await engine.end_all((await lines.containers("frontend"))[0])
    await lines.run(f"{up} frontend=1")
    await asyncio.sleep(SCRAPES_S)
    names = (await _get(f"{PROMETHEUS}/api/v1/label/__name__/values"))["data"]
    counters = [name for name in names if COUNTER.fullmatch(name)]
    fallen = [
        name
        for name in counters
        if any(float(series["value"][1]) for series in await _query(f"resets({name}[10m])"))
    ]
    rates = await _query("max_over_time(rate(vllm:generation_tokens_total[15s])[5m:5s])")
    highest = max((float(series["value"][1]) for series in rates), default=0.0)
    return (
        "Prometheus sees no counter fall over scale-ups, a kill and a scale-down",
        bool(counters) and not fallen,
        f"{len(counters)} names, highest rate {highest:,.0f} tokens/s {fallen[:3] or ''}",
    )


async def _board(report: Report, is_light: bool) -> None:
    """Each query of the board, as Grafana would ask it."""
    text = re.sub(r"\$__rate_interval|\$__interval", "1m", BOARD.read_text())
    queries = [
        target["expr"]
        for panel in json.loads(text)["panels"]
        for target in panel.get("targets", ())
    ]
    empty: list[str] = []
    for query in queries:
        if not await _query(query) and not EMPTY_IN_PEACE.search(query):
            empty.append(query)
    report.check(
        f"{len(queries)} queries of the board have figures",
        bool(queries) and (not empty or not is_light),
        "; ".join(empty)[:300],
    )


async def _grafana(container: str, report: Report) -> None:
    uid = json.loads(BOARD.read_text())["uid"]
    if await is_stand_in(container):
        for path in GRAFANA_FILES:
            await command("docker", "exec", container, "cat", path)
        report.not_run(
            "Grafana itself",
            "its image cannot be had; its files are mounted, and its user reads them",
        )
        return
    health = await _get(f"{GRAFANA}/api/health", ready=True)
    board = await _get(f"{GRAFANA}/api/dashboards/uid/{uid}")
    report.check(
        "Grafana has the board",
        board["dashboard"]["uid"] == uid,
        f"{health['version']}, {len(board['dashboard']['panels'])} panels",
    )


async def _targets() -> dict[str, str]:
    answer = await _get(f"{PROMETHEUS}/api/v1/targets")
    return {
        target["labels"]["job"]: target["lastError"] or target["health"]
        for target in answer["data"]["activeTargets"]
    }


async def _query(query: str) -> list[dict[str, Any]]:
    answer = await _get(f"{PROMETHEUS}/api/v1/query", query=query)
    return answer["data"]["result"]


async def _get(url: str, ready: bool = False, **parameters: str) -> dict[str, Any]:
    """Its JSON; `ready`: wait until it listens. Raises CommandFailed."""
    began = time.monotonic()
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url, params=parameters) as answer:
                    text = await answer.text()
                    if answer.status == 200:
                        return json.loads(text)
            except (aiohttp.ClientError, ConnectionError) as error:
                text = f"{type(error).__name__}: {error}"
            if not ready or time.monotonic() - began > PATIENCE_S:
                raise CommandFailed(f"{url} {parameters or ''}: {text[:200]}")
            await asyncio.sleep(0.5)


async def _until(
    value: Callable[[], Awaitable[dict[str, str]]], holds: Callable[[dict[str, str]], bool]
) -> dict[str, str]:
    began = time.monotonic()
    latest = await value()
    while not holds(latest) and time.monotonic() - began < PATIENCE_S:
        await asyncio.sleep(0.5)
        latest = await value()
    return latest
