"""The deployment as it runs in the container engine: the commands of docker and docker compose, and
what is asked of them. Knows no check."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
TAG: Final = "check"
LIGHT: Final[tuple[str, ...]] = ("frontend", "scheduler", "tokenizer")
"""The images without torch. A fake worker runs from the scheduler's."""
KINDS: Final[tuple[str, ...]] = (*LIGHT, "worker")
BASES: Final = ("debian:bookworm-slim", "haproxy:3.2-alpine")
VOCAB: Final = 1000
FAKE: Final = {
    "device": "fake",
    "skip_tokenizer_init": True,
    "fake_vocab_size": VOCAB,
    "fake_step_ms": 4,
}
"""Settings of a stack whose model is a hash function."""
COMMAND_S: Final = 180.0
FIND_CHILD: Final = """
for stat in /proc/[0-9]*/stat; do
    read -r pid name state parent rest <"$stat" 2>/dev/null || continue
    case $name in "(pagewire"*|"(python"*) [ "$parent" -gt 1 ] && [ "$pid" != $$ ] && echo "$pid";; esac
done
:
"""
"""Process ids, within a container, of the service below its watchdog."""


class CommandFailed(Exception):
    """A command of the engine ended with an error."""


def why_not() -> str:
    """Why nothing can be checked here, in one line; empty when it can."""
    try:
        asked = subprocess.run(
            ["docker", "info", "--format", "{{.ServerVersion}}"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "no container engine answers"
    if asked.returncode or not asked.stdout.strip():
        return "no container engine answers"
    compose = subprocess.run(
        ["docker", "compose", "version"], capture_output=True, timeout=20, check=False
    )
    return "the engine has no Compose 2" if compose.returncode else ""


def missing_bases() -> list[str]:
    """The images that the files name and the engine does not have."""
    return [
        name
        for name in BASES
        if subprocess.run(
            ["docker", "image", "inspect", name], capture_output=True, check=False
        ).returncode
    ]


class Deployment:
    """One project of compose with a name and a port of its own."""

    def __init__(self, port: int, is_real: bool = False) -> None:
        """`is_real`: with the worker's own image and the files' own settings; else a fake worker
        runs from the scheduler's."""
        self.port = port
        self.project = f"pagewire-check-{port}"
        self.url = f"http://127.0.0.1:{port}"
        self._is_real = is_real
        self._dir = tempfile.TemporaryDirectory(prefix="pagewire-check-")
        self._file = Path(self._dir.name) / "override.yaml"
        self.environment = {
            **os.environ,
            "TAG": TAG,
            "PORT": str(port),
            "BIND": "127.0.0.1",
            "COMPOSE_PROGRESS": "quiet",
            "BUILDKIT_PROGRESS": "plain",
        }
        self.restore()

    @property
    def directory(self) -> Path:
        """For what belongs to this deployment alone."""
        return Path(self._dir.name)

    @property
    def files(self) -> tuple[str, ...]:
        """The flags of its files."""
        return ("-f", str(ROOT / "compose/default.yaml"), "-f", str(self._file))

    def write(self, settings: dict[str, Any], services: dict[str, Any]) -> None:
        """The settings file, and services of a file over the default one."""
        shown = Path(self._dir.name) / "settings.yaml"
        shown.write_text(yaml.safe_dump(settings))
        shown.chmod(0o644)
        fake = {"image": f"pagewire-scheduler:{TAG}", "entrypoint": ["pagewire-service", "worker"]}
        worker = {**({} if self._is_real else fake), **services.pop("worker", {})}
        content = {
            "services": {"worker": worker, **services},
            "configs": {"settings": {"file": str(shown)}},
        }
        self._file.write_text(yaml.safe_dump(content))

    def override(self, services: dict[str, Any]) -> None:
        """The usual settings, with these services over the default ones."""
        self.write({} if self._is_real else FAKE, services)

    def restore(self) -> None:
        """As at the beginning."""
        self.override({})

    async def compose(self, *words: str, timeout_s: float = COMMAND_S) -> str:
        """`docker compose` on this project. Raises CommandFailed."""
        return await command(
            "docker",
            "compose",
            "-p",
            self.project,
            *self.files,
            *words,
            environment=self.environment,
            timeout_s=timeout_s,
        )

    async def containers(self, service: str) -> list[str]:
        """The ids of the containers of a service, the running and restarting ones."""
        label = "label=com.docker.compose"
        text = await command(
            "docker",
            "ps",
            "-q",
            "--filter",
            f"{label}.project={self.project}",
            "--filter",
            f"{label}.service={service}",
        )
        return sorted(text.split())

    async def close(self) -> None:
        """Remove containers, networks and volumes."""
        with contextlib.suppress(CommandFailed):
            await self.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")
        await remove_project(self.project)
        self._dir.cleanup()


async def remove_project(project: str) -> None:
    """All that is left of it, such as the networks of another file."""
    label = f"label=com.docker.compose.project={project}"
    for listed, removed in (
        (("ps", "-aq"), ("rm", "-f")),
        (("network", "ls", "-q"), ("network", "rm")),
        (("volume", "ls", "-q"), ("volume", "rm")),
    ):
        for name in (await command("docker", *listed, "--filter", label)).split():
            with contextlib.suppress(CommandFailed):
                await command("docker", *removed, name)


async def command(
    *words: str,
    environment: dict[str, str] | None = None,
    timeout_s: float = COMMAND_S,
    directory: Path | None = None,
) -> str:
    """What a command prints. Raises CommandFailed with its last lines."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        cwd=directory,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), timeout_s)
    except TimeoutError:
        process.kill()
        raise CommandFailed(f"{' '.join(words)}: not done in {timeout_s:.0f} s") from None
    if process.returncode:
        last = (errors or output).decode(errors="replace").strip().splitlines()[-3:]
        raise CommandFailed(f"{' '.join(words)}: {' / '.join(last)}")
    return output.decode(errors="replace")


async def inspect(container: str) -> dict[str, Any]:
    """All that the engine says of a container or an image."""
    return json.loads(await command("docker", "inspect", container))[0]


@dataclass(frozen=True)
class Event:
    """Something that the engine has done with a container of a service."""

    at: float
    """Seconds since the epoch."""
    service: str
    action: str
    """As the engine names it: create, kill, die, destroy, start and others."""


async def events(project: str, since: float) -> list[Event]:
    """What the engine has done with the containers of a project from then until now, in order."""
    words = (
        "--filter",
        "type=container",
        "--filter",
        f"label=com.docker.compose.project={project}",
    )
    span = ("--since", f"{since:.3f}", "--until", f"{time.time():.3f}")
    text = await command("docker", "events", *span, *words, "--format", "{{json .}}")
    listed: list[Event] = []
    for line in text.splitlines():
        event = json.loads(line)
        service = event["Actor"]["Attributes"]["com.docker.compose.service"]
        listed.append(Event(event["timeNano"] / 1e9, service, event["Action"]))
    return sorted(listed, key=lambda event: event.at)


async def logs(container: str) -> str:
    """What it has printed, on either stream."""
    return await command("sh", "-c", f"docker logs {container} 2>&1")


async def shell(container: str, script: str) -> str:
    """What a shell in the container prints."""
    return await command("docker", "exec", container, "sh", "-c", script)


async def end_all(container: str) -> None:
    """Kill the first process of a container, which ends all of it, in a way that its restart policy
    takes for a crash: what `docker kill` ends is not started again."""
    os.kill((await inspect(container))["State"]["Pid"], signal.SIGKILL)


async def signal_service(container: str, name: str) -> float:
    """Send a signal to the service itself, below its container's init and its watchdog. Returns
    when, in seconds since the epoch."""
    pids: list[str] = []
    for _ in range(20):
        with contextlib.suppress(CommandFailed):
            pids = (await shell(container, FIND_CHILD)).split()
        if pids:
            break
        await asyncio.sleep(0.5)  # it is between two lives
    return float(await shell(container, f"date +%s.%N; kill -{name} {' '.join(pids)}"))


def moment(text: str) -> float:
    """A time as the engine writes it, with nanoseconds, in seconds since the epoch."""
    return datetime.fromisoformat(f"{text[:26].rstrip('Z')}+00:00").timestamp()
