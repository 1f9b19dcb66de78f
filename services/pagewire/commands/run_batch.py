"""`pagewire run-batch`: answers a file of requests, each line as the HTTP endpoint would, on
services that it starts and ends.

A line in is {"custom_id", "method": "POST", "url", "body"}, a line out {"id", "custom_id",
"response", "error"}, in the order in which the answers come. This process is a frontend without
HTTP: parsing, checking and answering are the frontend's own.
"""

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from msgspec import structs

from ..config import FrontendConfig
from ..frontend.auth import Auth
from ..frontend.errors import ApiError, as_api_error
from ..frontend.generate import Running, new_reply
from ..frontend.params import Plan
from ..frontend.reading import read
from ..frontend.service import Service
from ..frontend.state import State
from ..frontend.tokenizer_queries import resolve
from ..launch import flags, stack
from ..launch.background import BackgroundServices, find_files
from ..offline.engine import EngineError
from ..offline.sinks import Bar
from ..requests.errors import RequestError, invalid, unavailable
from ..requests.retries import REQUESTS_AHEAD, RetryBudget
from .batch_lines import Answered, Journal, Line, Outcome, refusal_of

POLL_S = 0.1
"""Between two looks at the services."""
PAUSE_S = 0.2
"""Before a line is sent again."""
DESCRIPTION = (
    "Answer the requests of a file, one a line, as the server would; lines that the output answers already are skipped. "
    "Exit status: 0 when every line has an answer, 1 when some have an error, 130 after Ctrl-C."
)
HTTP_ONLY = (
    "num_frontends",
    "shutdown_delay",
    *(name for name in FrontendConfig.__struct_fields__ if name != "served_model_name"),
)
"""Accepted for the sake of scripts that start a server with the same flags, and not shown."""


def main(arguments: list[str]) -> int:
    """The command's exit status."""
    parser = flags.new("run-batch", DESCRIPTION, hidden=HTTP_ONLY)
    parser.usage = f"{parser.prog} -i FILE -o FILE [MODEL] [flags]"
    parser.add_argument(
        "-i",
        "--input-file",
        required=True,
        type=_file,
        metavar="FILE",
        help="requests, one JSON object a line",
    )
    parser.add_argument(
        "-o",
        "--output-file",
        required=True,
        type=_file,
        metavar="FILE",
        help="answers; an interrupted run goes on where it stopped",
    )
    parser.add_argument(
        "--retry-errors",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="answer lines again whose answer in the output is an error that may not come again: 408, 429 or 5xx (default: True)",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    config, options = flags.parse(parser, arguments, flags.warn)
    try:
        with Journal(options.input_file, options.output_file, options.retry_errors) as journal:
            return _run(config, options, journal)
    except EngineError as error:
        print(f"pagewire run-batch: {error}", file=sys.stderr)
        return 1


def _file(name: str) -> Path:
    """vLLM takes URLs here; a Path of one would be a directory `http:`."""
    if "://" in name:
        raise argparse.ArgumentTypeError(
            f"{name} is a URL, and files are needed here: `curl -o FILE URL` fetches one, `curl -T FILE URL` sends it"
        )
    return Path(name)


def _run(config: stack.StackConfig, options: argparse.Namespace, journal: Journal) -> int:
    began = time.monotonic()
    try:
        _answer_rest(config, options, journal)
    except (KeyboardInterrupt, SystemExit) as end:
        done = journal.before + journal.answered + journal.failed
        print(
            f"\n{options.output_file}: stopped with {done} of {journal.total} lines done; the same command goes on with the rest",
            file=sys.stderr,
        )
        return end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 130
    print(f"{options.output_file}: {summary(journal, time.monotonic() - began)}", file=sys.stderr)
    return 1 if journal.failed or journal.failed_before else 0


def summary(journal: Journal, seconds: float) -> str:
    """What became of the lines, for a person."""
    before = f"{journal.before} done before"
    if journal.failed_before:
        before += f", {journal.failed_before} of them with an error"
    text = (
        f"{journal.answered} answered, {journal.failed} with an error, {before}, in {seconds:.1f} s"
    )
    if journal.worth_retrying:
        text += f"; the same command tries {journal.worth_retrying} of the errors again"
    return text


def _answer_rest(config: stack.StackConfig, options: argparse.Namespace, journal: Journal) -> None:
    if journal.left:
        if "max_step_ms" not in options:  # nobody waits for single tokens here
            config = structs.replace(
                config, scheduler=structs.replace(config.scheduler, max_step_ms=0.0)
            )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        asyncio.run(_with_services(config, journal, not options.no_progress))


async def _with_services(config: stack.StackConfig, journal: Journal, shows_progress: bool) -> None:
    model = find_files(config, flags.warn)
    run_dir = stack.new_run_dir()
    config = structs.replace(
        config, run=structs.replace(config.run, run_dir=str(run_dir), log_level="warning")
    )
    frontend = config.frontend
    services = None
    assert frontend is not None
    try:
        service = Service(
            config.run, frontend.served_model_name or (config.model.model,), Auth(()), frontend
        )
        services = BackgroundServices(structs.replace(config, frontend=None), model, lambda: None)
        with service.joined():
            await _while_alive(services, _wait_ready(service.state))
            services.mark_ready()
            limit = REQUESTS_AHEAD * config.scheduler.num_seqs() * config.num_workers
            with contextlib.closing(
                Bar(shows_progress, journal.total, "Running batch", journal.before)
            ) as bar:
                await _while_alive(
                    services,
                    answer_all(
                        service.state,
                        journal.lines(),
                        limit,
                        lambda outcome: _note(journal, bar, outcome),
                    ),
                )
    finally:
        if services is not None:
            services.stop()
        stack.remove_run_dir(run_dir)


def _note(journal: Journal, bar: Bar, outcome: Outcome) -> None:
    journal.write(outcome)
    bar.add(outcome.prompt_tokens, outcome.completion_tokens)


async def _wait_ready(state: State) -> None:
    while not state.stack.ready(state.clock()):
        await asyncio.sleep(POLL_S)


async def _while_alive(services: BackgroundServices, work: Awaitable[None]) -> None:
    """Raises EngineError when the services end before the work does."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=POLL_S))[0]:
            if not services.alive:
                raise EngineError(services.failure)
        task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def answer_all(
    state: State, lines: Iterable[Line], limit: int, note: Callable[[Outcome], None]
) -> None:
    """All lines, `limit` at a time; `note` gets each outcome when it is there."""
    running: set[asyncio.Task[Outcome]] = set()
    try:
        for line in lines:
            running.add(asyncio.create_task(answer(state, line)))
            if len(running) >= limit:
                running = _noted(
                    *await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED), note
                )
        while running:
            running = _noted(
                *await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED), note
            )
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _noted(
    done: set[asyncio.Task[Outcome]],
    running: set[asyncio.Task[Outcome]],
    note: Callable[[Outcome], None],
) -> set[asyncio.Task[Outcome]]:
    for task in done:
        note(task.result())
    return running


async def answer(state: State, line: Line) -> Outcome:
    """The line's answer or error. Full queues and services that are starting again are waited
    for."""
    retries = RetryBudget(state.clock)
    while True:
        try:
            return await _answer_once(state, line)
        except ApiError as error:
            return refusal_of(line, error)
        except RequestError as error:
            if not retries.allows(error):
                return refusal_of(line, as_api_error(error))
        await asyncio.sleep(PAUSE_S)


async def _answer_once(state: State, line: Line) -> Outcome:
    plan = _plan(state, line)
    if not state.stack.ready(state.clock()):
        raise unavailable("The services are starting.")
    return await _generate(state, line, plan)


def _plan(state: State, line: Line) -> Plan:
    if line.error is not None:
        raise invalid(line.error)
    plan: Plan = read("chat" if line.chat else "completion", line.body, state.served())
    if plan.rendering.stream:
        raise invalid("`stream` is not possible in a file of requests.", "stream")
    return plan


async def _generate(state: State, line: Line, plan: Plan) -> Outcome:
    plan, echoes = await resolve(state, plan)
    reply = new_reply(state, plan, line.request_id, echoes)
    running = Running(state)
    try:
        await running.start(plan, reply)
        await reply.done
    finally:
        running.end()
    if reply.error is not None:
        raise reply.error
    usage = reply.usage()
    answered = Answered(line, 200, await reply.body())
    return Outcome(answered, usage.prompt_tokens, usage.completion_tokens)
