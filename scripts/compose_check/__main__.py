"""The compose deployment in a real container engine: built, started, scaled, broken, upgraded and
taken down again, while clients check every token.

    scripts/compose-check                 light images, a fake worker, all faults under 40 streams, and
                                          the commands of the pages, line by line
    scripts/compose-check --quick         a minute of it
    scripts/compose-check --real          the worker's own image with the demo model, a few faults, and
                                          the commands of the pages with both

Prints a table and exits with 1 where something was not as promised. Without an engine it says so in
one line, and runs the containers' commands as processes. What it starts has project names and ports
of its own and is removed; the images, tagged `check`, stay for the next time. What a machine does
not allow (a port that is taken, an image that cannot be had) is listed as not run.
"""

import argparse
import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from . import checks, engine, faults, pages, real
from .clients import Clients
from .engine import CommandFailed, Deployment
from .faults import Act, Fault, Stage, strike

PLANNED = ("restart", "recreate", "scale")
"""Faults that somebody asks for: none may refuse a request."""
EXCUSED = ("kill frontend", "crash frontend", "hang frontend", "cut frontend", "kill gateway")
"""Faults that end streams, which their connections' owner takes along."""
SCALE = {"frontend": 2, "tokenizer": 2, "worker": 2}
MOST_OVER_BASE = 215_000_000
NEW_REQUEST_S = 5.0
COMMANDS = "tests/e2e/test_compose_commands.py"
LABELS = ("title", "description", "licenses", "version")


QUICK = (checks.clients_that_leave,)
CHECKS = (
    *QUICK,
    checks.hung_services,
    checks.doctors,
    checks.errors_of_the_gateway,
    checks.spare_scheduler,
    checks.last_words,
    checks.few_files,
    checks.at_rest,
)


Acts = list[tuple[str, Act]]
"""Faults in order, each with its name."""


def plan() -> list[Acts]:
    """All faults, in units that leave as many of each service as they began with."""
    units: list[Acts] = []
    for kind in ("worker", "tokenizer", "scheduler", "frontend"):
        for make in (
            faults.kill,
            faults.crash,
            faults.hang,
            faults.pause,
            faults.restart,
            faults.recreate,
        ):
            units += [[(f"{make.__name__} {kind}", make(kind))]] * 2
    for kind in ("worker", "tokenizer", "frontend"):
        acts: Acts = [(f"scale {kind} to {n}", faults.scale(kind, n)) for n in (3, 1)]
        # With a single one there is no other to take over: its successor does.
        acts.append((f"restart only {kind}", faults.restart(kind)))
        if kind != "frontend":
            acts.append((f"recreate only {kind}", faults.recreate(kind)))
        acts.append((f"scale {kind} to 2", faults.scale(kind, 2)))
        units.append(acts)
    units.append([("cut frontend", faults.cut("frontend"))])
    units.append([("everything but frontends killed", faults.everything_killed)])
    units.append([("upgrade", faults.upgraded)])
    return units


def chosen(units: list[Acts], most: int) -> Acts:
    """About `most` of the faults, from all over the plan; all of them with 0."""
    if most:
        every = max(1, round(sum(map(len, units)) / most))
        units = units[every // 2 :: every]
    return [act for unit in units for act in unit]


def quick_plan() -> Acts:
    """A few of them, of each sort."""
    return [
        ("kill worker", faults.kill("worker")),
        ("restart scheduler", faults.restart("scheduler")),
        ("restart frontend", faults.restart("frontend")),
    ]


class Report:
    """What is printed, and whether all was as promised."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.left_out: list[str] = []

    def check(self, what: str, holds: bool, detail: str = "") -> None:
        """One promise."""
        print(
            f"{'ok    ' if holds else 'BROKEN'} {what}{f': {detail}' if detail else ''}", flush=True
        )
        if not holds:
            self.broken.append(what)

    def not_run(self, what: str, why: str) -> None:
        """Something that this machine does not allow."""
        line = f"{what}: {why}"
        print(f"not run {line}", flush=True)
        self.left_out.append(line)

    def judge(self, fault: Fault) -> None:
        """One fault against what is promised of it."""
        print(
            f"  {fault.name:<34} lost {fault.count('lost'):>3}  503 {fault.count('503'):>3}  refused "
            f"{fault.count('refused'):>3}  wrong {fault.count('wrong'):>2}  silence {fault.gap_s:5.2f} s  "
            f"back {fault.back_s:5.1f} s",
            flush=True,
        )
        problems = [fault.failed] if fault.failed else []
        if fault.count("wrong"):
            problems.append(f"{fault.count('wrong')} streams with wrong tokens")
        if fault.count("lost") and fault.name not in EXCUSED:
            problems.append(f"{fault.count('lost')} streams lost")
        others = [t for t in fault.troubles if t.what not in ("lost", "wrong")]
        if others and fault.name not in EXCUSED:
            problems.append(
                f"{len(others)} requests not taken: {others[0].what} {others[0].detail}"
            )
        for trouble in fault.troubles[:3]:
            print(f"      {trouble.what}: {trouble.detail}", flush=True)
        self.broken += [f"{fault.name}: {problem}" for problem in problems]


async def build(report: Report, limit_s: float, targets: Sequence[str]) -> None:
    """The images, and how large they are."""
    began = time.monotonic()
    deployment = Deployment(0, is_real="worker" in targets)
    await deployment.compose("build", *targets, timeout_s=limit_s)
    print(f"built in {time.monotonic() - began:.0f} s", flush=True)
    base = (await engine.inspect(engine.BASES[0]))["Size"]
    for name in targets:
        image = await engine.inspect(f"pagewire-{name}:{engine.TAG}")
        size = image["Size"]
        report.check(
            f"image of {name}",
            size - base <= MOST_OVER_BASE or name not in engine.LIGHT,
            f"{size / 1e6:.0f} MB, {(size - base) / 1e6:.0f} MB on top of the base of {base / 1e6:.0f} MB",
        )
        labels = image["Config"]["Labels"] or {}
        missing = [label for label in LABELS if not labels.get(f"org.opencontainers.image.{label}")]
        report.check(f"labels of {name}", not missing, ", ".join(missing))


async def under_faults(
    deployment: Deployment,
    report: Report,
    acts: Sequence[tuple[str, Act]],
    streams: int,
    with_upgrade: bool,
) -> Stage:
    """Start it, and strike."""
    began = time.monotonic()
    stage = Stage(deployment, Clients(deployment.url, 0), dict(SCALE))
    await stage.up()
    await stage.settled()
    print(f"ready {time.monotonic() - began:.1f} s after `up`", flush=True)
    async with Clients(deployment.url, streams) as clients:
        stage.clients = clients
        await asyncio.sleep(2.0)
        struck: list[Fault] = []
        counts = checks.Counts()
        watching = asyncio.create_task(counts.watch(stage))
        for name, act in acts:
            fault = await strike(stage, name, act)
            report.judge(fault)
            struck.append(fault)
        counts.stopping = True
        await watching
        report.check(
            "no counter fell",
            not counts.fallen,
            f"{counts.readings} readings; {'; '.join(counts.fallen[:3])}",
        )
        if with_upgrade:
            # Streams that end within the grace period, which everything at once must leave whole.
            clients.longest = 300
            await asyncio.sleep(4.0)
            since = time.time()
            fault = await strike(stage, "everything recreated", faults.everything_recreated)
            upgrade(report, fault, clients)
            say_course(await engine.events(deployment.project, since), clients, since)
            struck.append(fault)
    record = clients.record
    table(struck)
    print(
        f"{len(struck)} faults, {record.requests:,} requests, {record.tokens:,} tokens checked",
        flush=True,
    )
    wrong = sum(trouble.what == "wrong" for trouble in record.troubles)
    report.check("no token was wrong", wrong == 0, f"{wrong} streams")
    return stage


def upgrade(report: Report, fault: Fault, clients: Clients) -> None:
    """Everything made anew at once: nothing is lost, and a new request is soon answered."""
    print(
        f"  {fault.name:<34} lost {fault.count('lost'):>3}  503 {fault.count('503'):>3}  refused "
        f"{fault.count('refused'):>3}  wrong {fault.count('wrong'):>2}  back {fault.back_s:5.1f} s"
    )
    for trouble in [t for t in fault.troubles if t.what == "lost"][:5]:
        print(f"      {trouble.what}: {trouble.detail}", flush=True)
    report.check("everything recreated at once loses no stream", not fault.count("lost"))
    times = sorted(at + s for at, s in clients.record.firsts if at + s > fault.began)
    quiet = max((b - a for a, b in itertools.pairwise(times)), default=0.0)
    report.check(
        f"a new request is answered within {NEW_REQUEST_S:.0f} s",
        quiet <= NEW_REQUEST_S,
        f"{quiet:.1f} s, at a load of {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
    )


def say_course(events: Sequence[engine.Event], clients: Clients, since: float) -> None:
    """When the engine told the containers to end, saw them end and started the next ones, and when
    tokens came again: seconds since the command."""
    for action, shown in (("kill", "told to end"), ("die", "ended"), ("start", "started")):
        times: dict[str, list[str]] = {}
        for event in events:
            if event.action == action:
                times.setdefault(event.service, []).append(f"{event.at - since:.1f}")
        services = (f"{service} {' '.join(at)}" for service, at in sorted(times.items()))
        print(f"      {shown}: {', '.join(services)}")
    begun = time.monotonic() - (time.time() - since)
    firsts = sorted(at + s - begun for at, s in clients.record.firsts if at + s > begun)
    pauses = [(b - a, a, b) for a, b in itertools.pairwise(firsts)]
    if pauses:
        _, last, first = max(pauses)
        print(f"      new requests answered until {last:.1f} and from {first:.1f} on", flush=True)


def table(struck: Sequence[Fault]) -> None:
    """The faults by name, as Markdown: times in seconds, median and longest."""
    print("| fault | times | lost | 503 | refused | wrong | longest silence | all ready again |")
    print("|---|---|---|---|---|---|---|---|")
    by_name: dict[str, list[Fault]] = {}
    for fault in struck:
        by_name.setdefault(fault.name, []).append(fault)
    for name, faults_of_it in by_name.items():
        counts = [
            str(sum(fault.count(what) for fault in faults_of_it))
            for what in ("lost", "503", "refused", "wrong")
        ]
        gap_s = max(fault.gap_s for fault in faults_of_it)
        backs = [fault.back_s for fault in faults_of_it]
        words = [name, str(len(faults_of_it)), *counts, f"{gap_s:.1f}", f"{max(backs):.1f}"]
        print(f"| {' | '.join(words)} |", flush=True)


async def run(options: argparse.Namespace) -> int:
    """All that the options ask for. Returns the exit code."""
    report = Report()
    targets = engine.KINDS if options.real else engine.LIGHT
    try:
        await build(report, options.build_limit, targets)
    except CommandFailed as error:
        if "not done in" not in str(error):
            raise
        limit_s = options.build_limit
        print(f"compose-check: no images within {limit_s:.0f} s, so nothing was checked")
        return 0
    if options.real:
        await real.run_all(report, options.port, options.keep)
    elif not options.pages:
        await with_fake_worker(report, options)
    if options.pages or not (options.quick or options.only):
        await pages.run_all(report, is_light=not options.real, only=options.only)
    print(f"load averages {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    for line in report.left_out:
        print(f"not run {line}")
    for line in report.broken:
        print(f"BROKEN {line}")
    print("everything as promised" if not report.broken else f"{len(report.broken)} broken")
    return 1 if report.broken else 0


async def with_fake_worker(report: Report, options: argparse.Namespace) -> None:
    """The faults, then the checks."""
    deployment = Deployment(options.port)
    try:
        acts = quick_plan() if options.quick else chosen(plan(), options.faults)
        if options.only:
            acts = [entry for entry in acts if options.only in entry[0]]
        stage = await under_faults(
            deployment, report, acts, options.streams, with_upgrade=not options.quick
        )
        for check in QUICK if options.quick else CHECKS:
            try:
                await check(stage, report)
            except CommandFailed as error:  # the others are worth knowing too
                report.check(check.__name__.replace("_", " "), holds=False, detail=str(error))
                await stage.up()
                await stage.settled()
    finally:
        if not options.keep:
            await deployment.close()


async def until_told(options: argparse.Namespace) -> int:
    """What was started is removed after SIGTERM too."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await run(options)
    except asyncio.CancelledError:
        print("compose-check: told to end")
        return 1


def without_engine(why: str, offline: bool) -> int:
    """The same commands as processes, unless somebody else runs those tests anyway."""
    if offline or not (engine.ROOT / COMMANDS).exists():
        print(f"compose-check: {why}, so nothing was checked")
        return 0
    print(f"compose-check: {why}, so the commands of the containers run as processes", flush=True)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", COMMANDS]
    return subprocess.run(words, cwd=engine.ROOT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser("scripts/compose-check", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--real", action="store_true", help="with the worker's own image")
    parser.add_argument("--pages", action="store_true", help="the commands of the pages alone")
    parser.add_argument("--build-limit", type=float, default=2400.0, help="seconds for the images")
    parser.add_argument(
        "--offline", action="store_true", help="nothing is checked where base images are missing"
    )
    parser.add_argument("--keep", action="store_true", help="leave the deployment running")
    parser.add_argument("--port", type=int, default=18000)
    parser.add_argument("--faults", type=int, default=0, help="about so many of them; 0: all")
    parser.add_argument("--streams", type=int, default=40)
    parser.add_argument(
        "--only", default="", help="faults, or lines of the pages, with this in them"
    )
    options = parser.parse_args()
    why = engine.why_not()
    if not why and options.offline and (missing := engine.missing_bases()):
        why = f"the engine has no {' and no '.join(missing)}"
    if why:
        return without_engine(why, options.offline)
    return asyncio.run(until_told(options))


if __name__ == "__main__":
    sys.exit(main())
