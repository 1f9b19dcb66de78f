"""The commands of README.md and docs/deployment.md, run as they stand there: every block of shell
lines in which docker is called is taken from the page itself, and each of its lines is run in a
copy of the tree, as after `git clone`."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

from . import engine, monitoring
from .engine import KINDS, ROOT, CommandFailed, command
from .report import Report

PAGES: Final = ("README.md", "docs/deployment.md")
BLOCK: Final = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
PORT: Final = 8000
"""What `docker run` publishes on the pages, and the default of the compose files."""
TAG: Final = "check-pages"
PROJECT: Final = "pagewire-check-pages"
PLAIN_IMAGES: Final = ("pagewire", "pagewire-gpu")
"""What `docker build` is told to call its images. The names may be in use here."""
CACHE: Final = "pagewire-cache"
HOST_MODELS: Final = Path("/data/models")
"""Where the pages have models on the host."""
ANSWER_S: Final = 120.0
BUILD_S: Final = 1200.0
FOLLOW_S: Final = 4.0
COMPOSE_PANIC: Final = "compose/pkg/compose/up.go"
"""In the trace of Compose 2.26, which crashes at one Ctrl-C in three."""
NO_GPU: Final = "could not select device driver"
FAKE: Final = {
    "PAGEWIRE_DEVICE": "fake",
    "PAGEWIRE_SKIP_TOKENIZER_INIT": "true",
    "PAGEWIRE_FAKE_VOCAB_SIZE": str(engine.VOCAB),
}
LIGHTER: Final = (
    ('".[worker]"', '".[scheduler]"'),
    ('".[all]"', '".[frontend,scheduler,tokenizer]"'),
    (
        "ENV PAGEWIRE_IMAGE=all\n",
        f"ENV PAGEWIRE_IMAGE=all {' '.join(f'{name}={value}' for name, value in FAKE.items())}\n",
    ),
)
"""What the copy's Dockerfile says otherwise where no torch is wanted: a fake worker needs none."""


@dataclass(frozen=True)
class Snippet:
    """One block of a page."""

    page: str
    lines: tuple[str, ...]


def snippets() -> list[Snippet]:
    """All blocks in which docker is called, in the order of the pages."""
    return [
        Snippet(page, tuple(line for line in block.splitlines() if line.strip()))
        for page in PAGES
        for block in BLOCK.findall((ROOT / page).read_text())
        if re.search(r"^(\w+=\S+ )*docker ", block, re.M)
    ]


def calls(line: str) -> list[list[str]]:
    """The words of each command of a line, without variables before it and remarks behind it."""
    words = shlex.split(line, comments=True)
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            commands.append([])
        elif commands[-1] or not re.match(r"\w+=", word):
            commands[-1].append(word)
    return commands


class Clone:
    """A copy of the tree in a directory of its own, and the lines that are run in it."""

    def __init__(self, is_light: bool) -> None:
        """`is_light`: without torch, with a fake worker."""
        self.is_light = is_light
        self._directory = tempfile.TemporaryDirectory(prefix="pagewire-check-pages-")
        self.path = Path(self._directory.name)
        tracked = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
        )
        for name in filter(None, tracked.stdout.decode().split("\0")):
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        self.environment = {
            **os.environ,
            "TAG": TAG,
            "PORT": str(PORT),
            "PROMETHEUS_PORT": str(monitoring.PROMETHEUS_PORT),
            "GRAFANA_PORT": str(monitoring.GRAFANA_PORT),
            "COMPOSE_PROJECT_NAME": PROJECT,
            "COMPOSE_PROGRESS": "plain",
            "BUILDKIT_PROGRESS": "plain",
        }
        if is_light:
            self._lighten()

    def _lighten(self) -> None:
        file = self.path / "Dockerfile"
        text = file.read_text()
        for old, new in LIGHTER:
            if text.count(old) != 1:
                raise ValueError(f"Dockerfile has {old!r} {text.count(old)} times")
            text = text.replace(old, new)
        file.write_text(text)
        lines = [f"{name}={value}\n" for name, value in FAKE.items()]
        (self.path / "compose/.env").write_text("".join(lines))
        self.environment["DEVICE"] = "fake"

    async def run(self, line: str, timeout_s: float = BUILD_S) -> str:
        """A line to its end. Returns what it prints on both streams. Raises CommandFailed."""
        return await command(
            "bash",
            "-c",
            f"exec 2>&1\n{line}",
            environment=self.environment,
            timeout_s=timeout_s,
            directory=self.path,
        )

    async def start(self, line: str) -> asyncio.subprocess.Process:
        """A line that runs until it is interrupted, as by Ctrl-C."""
        return await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            line,
            cwd=self.path,
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )

    async def containers(self, service: str = "") -> list[str]:
        """The ids of running containers, of one service or of all."""
        label = "label=com.docker.compose"
        chosen = ["--filter", f"{label}.service={service}"] if service else []
        text = await command(
            "docker", "ps", "-q", "--filter", f"{label}.project={PROJECT}", *chosen
        )
        return sorted(text.split())

    async def down(self, *more: str) -> None:
        """End what any line has started."""
        with contextlib.suppress(CommandFailed):
            words = f"--remove-orphans --timeout 5 {' '.join(more)}"
            await self.run(f"docker compose --profile '*' down {words}")

    def close(self) -> None:
        """Remove the copy."""
        self._directory.cleanup()


@contextlib.contextmanager
def host_models(is_light: bool) -> Iterator[bool]:
    """The models that the pages have on the host, in their place if nothing is there. Whether they
    are."""
    model = HOST_MODELS / "my-model"
    made = [path for path in (model, *model.parents) if not path.exists()]
    if model.exists():
        yield True
        return
    try:
        model.mkdir(parents=True)
    except OSError:
        yield False
        return
    try:
        if not is_light:
            from pagewire.hub import huggingface

            shutil.copy(huggingface.demo_gguf(), model / "model.gguf")
        for path in (*made, *model.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield True
    finally:
        shutil.rmtree(model)
        for path in made[1:]:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.asynccontextmanager
async def names_kept() -> AsyncIterator[None]:
    """Images and the volume that bear the pages' names are afterwards what they were."""
    former: dict[str, str] = {}
    for name in PLAIN_IMAGES:
        with contextlib.suppress(CommandFailed):
            former[name] = (await engine.inspect(f"{name}:latest"))["Id"]
    volumes = (await command("docker", "volume", "ls", "-q")).split()
    try:
        yield
    finally:
        for name in PLAIN_IMAGES:
            with contextlib.suppress(CommandFailed):
                if name in former:
                    await command("docker", "tag", former[name], f"{name}:latest")
                else:
                    await command("docker", "rmi", f"{name}:latest")
        if CACHE not in volumes:
            with contextlib.suppress(CommandFailed):
                await command("docker", "volume", "rm", CACHE)
        tagged = (await command("docker", "images", "--format", "{{.Repository}}:{{.Tag}}")).split()
        for image in tagged:
            if image.endswith(f":{TAG}"):
                with contextlib.suppress(CommandFailed):
                    await command("docker", "rmi", image)


class Reader:
    """Somebody who follows the pages line by line and looks whether it works."""

    def __init__(self, clone: Clone, report: Report, has_models: bool) -> None:
        self.clone = clone
        self.report = report
        self.has_models = has_models

    async def follow(self, snippet: Snippet) -> None:
        """Every line of it."""
        for line in snippet.lines:
            shown = f"{snippet.page}: {line.partition('  #')[0].strip()}"
            if not calls(line)[0]:
                continue
            if str(HOST_MODELS) in line and not self.has_models:
                self.report.not_run(shown, f"{HOST_MODELS} cannot be made here")
                continue
            began = time.monotonic()
            try:
                detail = await self.line(line)
            except (CommandFailed, AssertionError, OSError) as error:
                self.report.check(shown, holds=False, detail=f"{error}"[-300:])
            else:
                took = f"{time.monotonic() - began:.0f} s"
                self.report.check(shown, holds=True, detail=f"{took}{detail and ', '}{detail}")
        await self.clone.down()

    async def line(self, line: str) -> str:
        """One line. Returns what there is to say of it. Raises CommandFailed and AssertionError."""
        *_, words = calls(line)
        key = (re.findall(r"\bPAGEWIRE_API_KEY=(\S+)", line) or [""])[0]
        if words[:2] == ["docker", "run"] or words == ["docker", "compose", "up"]:
            return await self.foreground(line, is_run=words[1] == "run")
        if words[:2] == ["docker", "compose"] and "up" in words:
            return await self.up(line, words, key)
        if words[:2] == ["docker", "compose"] and "logs" in words:
            return await self.logs(line)
        if words[0].endswith("compose-upgrade"):
            return await self.upgrade(line)
        await self.clone.run(line)
        if words[:2] == ["docker", "compose"] and "down" in words:
            left = await self.clone.containers()
            assert not left, f"{len(left)} containers are left"
        return ""

    async def foreground(self, line: str, is_run: bool) -> str:
        """What runs until Ctrl-C, serves, and ends in order at that."""
        if is_run:
            await self.clone.down()  # which has the port
        process = await self.clone.start(line)
        reading = asyncio.create_task(_read_all(process))
        try:
            detail = await self.answered(process=process)
        except AssertionError:
            text = (await reading)[-2000:] if process.returncode is not None else ""
            if NO_GPU in text:
                return "no GPU here: the engine has refused the device, as it must"
            raise AssertionError(f"no answer: {text[-300:]}") from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGINT)
        try:
            status = await asyncio.wait_for(process.wait(), 60.0)
        except TimeoutError:
            raise AssertionError("it has not ended 60 s after Ctrl-C") from None
        text = await reading
        if status == 2 and COMPOSE_PANIC in text:
            return f"{detail}{detail and '; '}Compose itself has crashed at Ctrl-C"
        assert status in (0, 130), f"status {status} after Ctrl-C"
        return detail

    async def up(self, line: str, words: Sequence[str], key: str) -> str:
        """Detached; as many of each as it says."""
        with_monitoring = "monitoring" in words
        if words[2] != "up":  # the forms are alternatives
            await self.clone.down()
        if with_monitoring:
            await monitoring.provide_images(self.clone.path, self.clone.environment, self.report)
        try:
            await self.clone.run(line)
        except CommandFailed as error:
            if NO_GPU in str(error):
                await self.clone.down()
                return "no GPU here: the engine has refused the device, as it must"
            raise
        detail = await self.answered(key)
        for word, following in itertools.pairwise(words):
            if word == "--scale":
                kind, _, count = following.partition("=")
                running = len(await self.clone.containers(kind))
                assert running == int(count), f"{running} of {kind}"
        if "--scale" in words and not self.clone.is_light:
            await self.ask_as_the_page_does()
        if with_monitoring:
            await monitoring.check(self.clone, f"http://127.0.0.1:{PORT}", self.report)
        return detail

    async def logs(self, line: str) -> str:
        """What is followed, for a while."""
        process = await self.clone.start(line)
        reading = asyncio.create_task(_read_all(process))
        await asyncio.sleep(FOLLOW_S)
        os.killpg(process.pid, signal.SIGINT)
        text = await reading
        await process.wait()
        missing = [kind for kind in KINDS if f"{kind}-1" not in text]
        assert not missing, f"nothing of {', '.join(missing)}"
        return f"{text.count(chr(10))} lines"

    async def upgrade(self, line: str) -> str:
        """All containers of the four services are others afterwards. It needs some that run."""
        if not await self.clone.containers():
            await self.clone.run("docker compose up --detach")
            await self.answered()
        before = {c for kind in KINDS for c in await self.clone.containers(kind)}
        await self.clone.run(line)
        after = {c for kind in KINDS for c in await self.clone.containers(kind)}
        assert len(after) == len(before) and not before & after, f"{before} {after}"
        return await self.answered()

    async def ask_as_the_page_does(self) -> None:
        """The README's call of curl, from the page."""
        for block in BLOCK.findall((ROOT / "README.md").read_text()):
            if block.startswith("curl ") and f"localhost:{PORT}" in block:
                answer = json.loads(await self.clone.run(block.replace("curl ", "curl -sS ", 1)))
                text = answer["choices"][0]["message"]["content"]
                self.report.check("README.md: curl …/v1/chat/completions", bool(text), text[:60])

    async def answered(
        self, key: str = "", process: asyncio.subprocess.Process | None = None
    ) -> str:
        """Wait until a completion is answered, with the key if one is asked for. Raises
        AssertionError."""
        prompt: Any = [1, 2, 3] if self.clone.is_light else "The capital of France is"
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        url = f"http://127.0.0.1:{PORT}/v1/completions"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        last = ""
        began = time.monotonic()
        limit_s = ANSWER_S if process is None else BUILD_S  # it may build before anything listens
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30.0)) as session:
            while time.monotonic() - began < limit_s:
                if process is not None and process.returncode is not None:
                    break
                try:
                    async with session.post(url, json=body, headers=headers) as answer:
                        last = f"{answer.status} {(await answer.text())[:200]}"
                        if answer.status == 200:
                            break
                except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
                    last = f"{type(error).__name__}: {error}"
                await asyncio.sleep(0.2)
            assert last.startswith("200 "), last
            if not key:
                return ""
            async with session.post(url, json=body) as answer:
                assert answer.status == 401, f"{answer.status} without the key"
        return "401 without the key"


async def _read_all(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.read()).decode(errors="replace")


async def one_name(clone: Clone, report: Report) -> None:
    """All forms of `docker compose` on the pages are one project."""
    environment = {k: v for k, v in clone.environment.items() if k != "COMPOSE_PROJECT_NAME"}
    forms = {
        tuple(words[2 : words.index("up")])
        for snippet in snippets()
        for line in snippet.lines
        for words in calls(line)
        if words[:2] == ["docker", "compose"] and "up" in words
    }
    names: dict[str, str] = {}
    for form in sorted(forms):
        shown = await command(
            "docker",
            "compose",
            *form,
            "config",
            "--format",
            "json",
            environment=environment,
            directory=clone.path,
        )
        names[" ".join(form)] = json.loads(shown)["name"]
    report.check(
        f"one project in {len(names)} forms", set(names.values()) == {"pagewire"}, f"{names}"[:200]
    )


async def run_all(report: Report, is_light: bool, only: str = "") -> None:
    """Every snippet of the pages; `only`: the lines with this in them."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", PORT))
        except OSError:
            report.not_run("the commands of the pages", f"port {PORT}, which they name, is taken")
            return
    everything = snippets()
    report.check("snippets of the pages", len(everything) == 6, f"{len(everything)}")
    clone = Clone(is_light)
    try:
        await one_name(clone, report)
        async with names_kept():
            try:
                with host_models(is_light) as has_models:
                    reader = Reader(clone, report, has_models)
                    for snippet in everything:
                        lines = tuple(line for line in snippet.lines if only in line)
                        await reader.follow(Snippet(snippet.page, lines))
            finally:
                await clone.down("--volumes")
                await engine.remove_project(PROJECT)
                await monitoring.remove_stand_ins()
    finally:
        clone.close()
