"""`pagewire serve`: one command that brings up every service on this machine and keeps it up.

It opens the listening socket, finds the model's files, hands both to the services and shows how far
they are. It holds no request.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType

from msgspec import structs

from ..config import FrontendConfig, ModelConfig, to_flags
from ..frontend.api_keys import read_keys
from ..frontend.auth import configured_keys
from ..frontend.cors import cors_of
from ..frontend.tls import context_of
from ..hub import huggingface
from ..process import processors, signals
from ..process.announce import Announcer
from ..process.listening import listening_socket
from ..process.parent import REASON_IN_OUTPUT, how_it_ended
from ..process.service_manager import READY, STOPPING, ServiceManager
from . import flags, stack
from .progress import Display, Health
from .supervisor import PARENT_VARIABLE, Supervisor


def main(arguments: list[str]) -> int:
    config = parse(arguments)
    has_own_run_dir = config.run.run_dir == ""
    assert config.frontend is not None
    check_frontend(config.frontend)
    run_dir = stack.new_run_dir() if has_own_run_dir else stack.take_run_dir(config.run.run_dir)
    with contextlib.ExitStack() as cleanup:
        if has_own_run_dir:
            cleanup.callback(stack.remove_run_dir, run_dir)
        listener = cleanup.enter_context(
            listening_socket(config.frontend.host, config.frontend.port)
        )
        frontend = structs.replace(
            config.frontend, socket_fd=listener.fileno(), port=listener.getsockname()[1]
        )
        run = structs.replace(config.run, run_dir=str(run_dir))
        return Launch(structs.replace(config, run=run, frontend=frontend)).run()


def check_frontend(config: FrontendConfig) -> None:
    """Raises ValueError, before anything is started, for a flag that no frontend could start
    with."""
    configured_keys(config.api_key)
    if config.api_keys_file:
        read_keys(config.api_keys_file)
    context_of(config)
    cors_of(config)


def parse(arguments: list[str]) -> stack.StackConfig:
    parser = flags.new(
        "serve", "Start every service on this machine behind an OpenAI-compatible endpoint."
    )
    return flags.parse(parser, arguments, flags.warn)[0]


class Launch:
    """One run of `pagewire serve`, from start to end."""

    def __init__(self, config: stack.StackConfig) -> None:
        assert config.frontend is not None
        self.config = config
        self.began = time.monotonic()
        self.display = Display(sys.stderr, config.run.log_format)
        self.announcer = Announcer(config.run.run_dir)
        self.supervisor = Supervisor(
            stack.early_services(config),
            self.display.log,
            partial(stack.announce, self.announcer),
        )
        self.health = Health(
            config.frontend.host,
            config.frontend.port,
            (config.frontend.ssl_certfile, config.frontend.ssl_keyfile),
        )
        self.manager = ServiceManager()
        self.fetch: subprocess.Popen[str] | None = None
        self.ready = False

    def run(self) -> int:
        signals.handle(signals.ENDING, self._on_signal)
        try:
            self._find_files()
            self.health.start()
            code = self.supervisor.run(self._tick)
        finally:
            self.health.stop()
            self._end_fetch()
            self.announcer.close()
        if self.supervisor.failure:
            self.display.end(f"pagewire serve: {self.supervisor.failure}")
        return code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.supervisor.stop()
        self.manager.say(STOPPING)
        self.display.end("stopping")

    def _find_files(self) -> None:
        model = self.config.model
        if not stack.needs_files(self.config):
            return self._start_model(model)
        files = huggingface.cached(model)
        tokenizer = (
            huggingface.cached(huggingface.tokenizer_model(model))
            if huggingface.has_own_tokenizer(model)
            else None
        )
        if files is not None and (
            tokenizer is not None or not huggingface.has_own_tokenizer(model)
        ):
            return self._start_model(stack.local_model(model, files, tokenizer))
        command = [sys.executable, "-m", "pagewire", "fetch", *to_flags(model)]
        environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
        self.fetch = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, process_group=0, env=environment
        )

    def _start_model(self, model: ModelConfig) -> None:
        for service in reversed(stack.model_services(self.config, model)):
            self.supervisor.add(service)

    def _tick(self) -> None:
        if self.fetch is not None and self.fetch.poll() is not None:
            self._on_fetched(self.fetch)
        if self.ready:
            self.manager.tick(time.monotonic())
            return
        state = self.health.state
        if state.ready:
            self._on_ready()
        elif self.fetch is None:
            self.display.show(state.stage, state.fraction)

    def _on_fetched(self, fetch: subprocess.Popen[str]) -> None:
        self.fetch = None
        output = fetch.communicate()[0].splitlines()
        if fetch.returncode or not output:
            if fetch.returncode == REASON_IN_OUTPUT and output:
                return self.supervisor.fail(output[-1])
            ending = how_it_ended(fetch.returncode)
            return self.supervisor.fail(
                f"the download of {self.config.model.model} {ending}; above stands why"
            )
        tokenizer = Path(output[1]) if len(output) > 1 else None
        self._start_model(stack.local_model(self.config.model, Path(output[0]), tokenizer))

    def _end_fetch(self) -> None:
        if self.fetch is not None and self.fetch.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.fetch.pid, signal.SIGTERM)
            self.fetch.communicate()

    def _on_ready(self) -> None:
        self.ready = True
        self.supervisor.mark_ready()
        self.health.stop()
        self.manager.say(READY, f"STATUS=serving {self.config.model.model}")
        self.display.end(
            f"ready in {time.monotonic() - self.began:.1f} s{service_counts(self.config)}"
        )
        text = invitation(self.config)
        if self.config.run.log_format == "json":
            for line in text.splitlines():
                self.display.end(line.strip())
        else:
            print(text, flush=True)


def service_counts(config: stack.StackConfig) -> str:
    """How many frontends and tokenizers there are, where there are several."""
    if config.num_frontends == config.num_tokenizers == 1:
        return ""
    return f" with {config.num_frontends} frontend(s) and {config.num_tokenizers} tokenizer(s), on {processors.usable()} cores"


def invitation(config: stack.StackConfig) -> str:
    """A command to try the server with and, last, its URL, which opens in a browser too."""
    assert config.frontend is not None
    host = "localhost" if config.frontend.host in ("", "0.0.0.0", "::") else config.frontend.host
    scheme = "https" if config.frontend.ssl_certfile else "http"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.frontend.port}/v1"
    name = (*config.frontend.served_model_name, config.model.model)[0]
    key = (
        " -H 'Authorization: Bearer YOUR_KEY'"
        if config.frontend.api_keys_file or configured_keys(config.frontend.api_key)
        else ""
    )
    question = json.dumps(
        {
            "model": name,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 64,
        }
    )
    return (
        "Ask it in a browser, at the URL below, or with\n"
        f"  curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{question}'\n"
        f"Pagewire serves {name} at {url}"
    )
