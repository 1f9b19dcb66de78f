"""The services of one stack, kept running by a thread of the program that uses them. It touches no
socket."""

import sys
import threading
from collections.abc import Callable
from functools import partial

from ..config import ModelConfig
from ..hub import huggingface
from ..process.announce import Announcer
from . import stack
from .supervisor import Supervisor


def forward(name: str, line: str) -> None:
    """A service's line, on this program's error stream."""
    print(f"[{name}] {line}", file=sys.stderr, flush=True)


class BackgroundServices:
    """Starts at once. `wake` is called, in the thread, when the services have ended; `log` gets the
    name of a service and each line that it prints."""

    def __init__(
        self,
        config: stack.StackConfig,
        model: ModelConfig,
        wake: Callable[[], None],
        log: Callable[[str, str], None] = forward,
    ) -> None:
        self._announcer = Announcer(config.run.run_dir)
        self._supervisor = Supervisor(
            [*stack.model_services(config, model), *stack.early_services(config)],
            log,
            partial(stack.announce, self._announcer),
        )
        self._wake = wake
        self._thread = threading.Thread(target=self._supervise, name="pagewire", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def failure(self) -> str:
        """Why they are gone: the last words of the service that could not be kept running."""
        return self._supervisor.failure or "the services have been shut down"

    def mark_ready(self) -> None:
        self._supervisor.mark_ready()

    def pids(self) -> dict[str, int]:
        """The services' process ids by name."""
        return self._supervisor.pids()

    def stop(self) -> None:
        """Returns when all have ended."""
        self._supervisor.stop()
        self._thread.join()

    def _supervise(self) -> None:
        try:
            self._supervisor.run()
        except BaseException as error:
            self._supervisor.fail(f"the supervisor failed: {error!r}")
            raise
        finally:
            self._announcer.close()
            self._wake()


def find_files(config: stack.StackConfig, say: Callable[[str], None]) -> ModelConfig:
    """The model with local paths. Raises hub.ModelNotFound."""
    model = config.model
    if not stack.needs_files(config):
        return model
    tokenizer = (
        huggingface.resolve(huggingface.tokenizer_model(model), say)
        if huggingface.has_own_tokenizer(model)
        else None
    )
    return stack.local_model(model, huggingface.resolve(model, say), tokenizer)
