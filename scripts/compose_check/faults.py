"""What is done to a running deployment, and how long it takes until all of it serves again."""

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from . import engine
from .clients import Clients, Trouble, counted
from .engine import CommandFailed, Deployment, command

SETTLED_S: Final = 60.0
QUIET_S: Final = 0.7
"""After a fault is over, before the next one: what it still does to streams is seen as its own."""
PAUSE_S: Final = 1.5
REPLACED_S: Final = 30.0
GATEWAY_UP: Final = 'haproxy_server_check_status{proxy="frontends"'
Act = Callable[["Stage"], Awaitable[None]]


@dataclass
class Stage:
    """A deployment under the clients' load, and how many of each service there shall be."""

    deployment: Deployment
    clients: Clients
    scale: dict[str, int]
    patience_s: float = SETTLED_S
    """Until all of it is ready."""

    def scales(self, *kinds: str) -> list[str]:
        """The flags for it, of these services or of all."""
        shown = {kind: n for kind, n in self.scale.items() if not kinds or kind in kinds}
        return [word for kind, n in shown.items() for word in ("--scale", f"{kind}={n}")]

    async def up(self, *words: str) -> None:
        """`docker compose up` to this scale; what is there already stays as it is."""
        await self.deployment.compose(
            "up", "--detach", "--no-build", "--no-recreate", *self.scales(), *words
        )

    async def one(self, kind: str) -> str:
        """A container of this service, any of them."""
        return random.choice(await self.deployment.containers(kind))

    async def ready_services(self) -> dict[str, int]:
        """How many of each are ready, by what the gateway's container is told; empty where nothing
        answers."""
        try:
            figures = await get(self.deployment, "http://127.0.0.1:8000/metrics")
            gateway = await get(self.deployment, "http://127.0.0.1:8405/metrics")
        except (CommandFailed, IndexError):
            return {}
        ready = dict.fromkeys(engine.KINDS, 0)
        for line in figures.splitlines():
            if line.startswith("pagewire:service_ready{") and line.endswith(" 1.0"):
                ready[line.partition('role="')[2].partition('"')[0]] += 1
        ready["frontend"] = sum(
            line.startswith(GATEWAY_UP) and 'state="L7OK"' in line and line.endswith(" 1")
            for line in gateway.splitlines()
        )
        ready["scheduler"] = 1
        return ready

    async def settled(self) -> float:
        """Wait until there are as many of each as there shall be. Returns the seconds. Raises
        CommandFailed where they do not come."""
        began = time.monotonic()
        ready: dict[str, int] = {}
        while time.monotonic() - began < self.patience_s:
            ready = await self.ready_services()
            if all(ready.get(kind, 0) == count for kind, count in self.scale.items()):
                return time.monotonic() - began
            await asyncio.sleep(0.2)
        raise CommandFailed(f"after {self.patience_s:.0f} s {ready} are ready of {self.scale}")


async def get(deployment: Deployment, url: str) -> str:
    """What a URL answers inside the gateway's container."""
    container = (await deployment.containers("gateway"))[0]
    return await command("docker", "exec", container, "wget", "-q", "-T", "3", "-O", "-", url)


# --- faults, each of one kind of service ---


def kill(kind: str) -> Act:
    """The whole container dies at once."""

    async def act(stage: Stage) -> None:
        await _replaced(await stage.one(kind), engine.end_all)

    return act


async def _replaced(container: str, strike_it: Callable[[str], Awaitable[object]]) -> None:
    """Do it, and wait until the engine has started the container again: until then the stack looks
    as well as before."""
    before = (await engine.inspect(container))["State"]["StartedAt"]
    await strike_it(container)
    began = time.monotonic()
    while time.monotonic() - began < REPLACED_S:
        if (await engine.inspect(container))["State"]["StartedAt"] != before:
            return
        await asyncio.sleep(0.1)
    raise CommandFailed(f"{container} was not started again within {REPLACED_S:.0f} s")


def crash(kind: str) -> Act:
    """The service's own process is killed, below its watchdog."""

    async def act(stage: Stage) -> None:
        await _replaced(await stage.one(kind), lambda c: engine.signal_service(c, "KILL"))

    return act


def hang(kind: str) -> Act:
    """The service's own process is stopped for good, and holds all that it held."""

    async def act(stage: Stage) -> None:
        await _replaced(await stage.one(kind), lambda c: engine.signal_service(c, "STOP"))

    return act


def pause(kind: str) -> Act:
    """All of the container is frozen for PAUSE_S."""

    async def act(stage: Stage) -> None:
        container = await stage.one(kind)
        await command("docker", "pause", container)
        await asyncio.sleep(PAUSE_S)
        await command("docker", "unpause", container)

    return act


def restart(kind: str) -> Act:
    """`docker restart` of one container."""

    async def act(stage: Stage) -> None:
        await command("docker", "restart", "--time", "130", await stage.one(kind))

    return act


def recreate(kind: str) -> Act:
    """All containers of the service are made anew; of several frontends one after the other, as the
    page on upgrades says."""

    async def act(stage: Stage) -> None:
        if kind == "frontend":
            await replace(stage, kind)
            return
        anew = ("up", "--detach", "--no-build", "--no-deps", "--force-recreate")
        await stage.deployment.compose(*anew, *stage.scales(kind), kind)

    return act


async def replace(stage: Stage, kind: str) -> None:
    """New containers beside the old ones, which then end."""
    old = await stage.deployment.containers(kind)
    count = stage.scale[kind]
    stage.scale[kind] = 2 * count
    await stage.up()
    await stage.settled()
    stage.scale[kind] = count
    await command("docker", "stop", "--time", "130", *old)
    await command("docker", "rm", *old)


def scale(kind: str, count: int) -> Act:
    """`docker compose up --scale` to so many."""

    async def act(stage: Stage) -> None:
        stage.scale[kind] = count
        await stage.up()

    return act


def cut(kind: str) -> Act:
    """The container is taken off its network, and put back later."""

    async def act(stage: Stage) -> None:
        container = await stage.one(kind)
        network = f"{stage.deployment.project}_inside"
        await command("docker", "network", "disconnect", network, container)
        await asyncio.sleep(2.0)
        await command("docker", "network", "connect", "--alias", kind, network, container)

    return act


async def everything_killed(stage: Stage) -> None:
    """All workers, the scheduler and all tokenizers at once."""
    for kind in ("worker", "scheduler", "tokenizer"):
        for container in await stage.deployment.containers(kind):
            await engine.end_all(container)


async def upgraded(stage: Stage) -> None:
    """scripts/compose-upgrade, as the page says."""
    deployment = stage.deployment
    options = ("-p", deployment.project, *deployment.files)
    await command(
        str(engine.ROOT / "scripts/compose-upgrade"), *options, environment=deployment.environment
    )


async def everything_recreated(stage: Stage) -> None:
    """`docker compose up --force-recreate` of all there is, the gateway included."""
    await stage.deployment.compose(
        "up", "--detach", "--no-build", "--force-recreate", *stage.scales()
    )
    # Each look at what is ready is two commands in a container, at the expense of what just starts.
    began = time.monotonic()
    while stage.clients.under_way and time.monotonic() - began < REPLACED_S:
        if stage.clients.record.answered_since(began):
            return
        await asyncio.sleep(0.1)


@dataclass
class Fault:
    """One fault as it was."""

    name: str
    began: float
    ended: float
    back_s: float
    """Seconds until all services were ready again, of which the command itself took a part."""
    troubles: list[Trouble]
    gap_s: float
    """The longest silence of a stream."""
    failed: str = ""
    """What the engine said, if the fault itself could not be made."""

    def count(self, what: str) -> int:
        """Troubles of this sort."""
        return counted(self.troubles, what)


async def strike(stage: Stage, name: str, act: Act) -> Fault:
    """Make one fault, wait until all serves again, and say what the clients met meanwhile."""
    record = stage.clients.record
    began = time.monotonic()
    failed = ""
    back_s = 0.0
    try:
        await act(stage)
        await stage.settled()
        back_s = time.monotonic() - began
    except CommandFailed as error:
        failed = str(error)
        with contextlib.suppress(CommandFailed):
            await stage.up()
            await stage.settled()
    await asyncio.sleep(QUIET_S)
    ended = time.monotonic()
    return Fault(
        name,
        began,
        ended,
        back_s,
        record.since(began, ended),
        record.longest_gap(began, ended),
        failed,
    )
