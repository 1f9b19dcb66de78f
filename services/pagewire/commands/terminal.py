"""What `pagewire chat` needs of a terminal: texts that a person types or pastes, a history of them
over sessions, and a sign that something is awaited. Knows no server."""

import contextlib
import os
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

FENCE: Final = '"""'
"""Before and after a text of several lines."""
PROMPT: Final = "> "
FURTHER: Final = ". "
MARK_PASTES: Final = "\x1b[?2004h"
MARK_NO_PASTES: Final = "\x1b[?2004l"
"""To a terminal: put marks around what is pasted (xterm's bracketed paste mode)."""
LOCAL_FLAGS: Final = 3
"""Where termios.tcgetattr has them; input flags are at 0."""
SIGN_AFTER_S: Final = 0.3
"""A faster answer needs no sign."""


class Lines:
    """Texts from standard input: typed in a terminal, with editing and history, or line by line
    from a pipe."""

    def __init__(self, command: str) -> None:
        """`command` has a history of its own."""
        self.interactive = sys.stdin.isatty()
        self._session: Any = _session(command) if self.interactive and sys.stdout.isatty() else None

    def read(self) -> str:
        '''The next text: a line, a pasted text of several, or all lines between two `"""`. Raises
        EOFError at the end of the input, and KeyboardInterrupt.'''
        text = self._line(PROMPT)
        if not text.lstrip().startswith(FENCE):
            return text.strip()
        text = text.lstrip()[len(FENCE) :]
        try:
            while not text.rstrip().endswith(FENCE):
                text += "\n" + self._line(FURTHER)
        except EOFError:
            if not text.strip():
                raise
        return text.rstrip().removesuffix(FENCE).strip("\n")

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Within, what is typed or pasted is kept for the next `read`, and not shown: something
        else is being written. Pastes are marked as they are while a text is read, so that several
        lines stay one text; Ctrl-C interrupts."""
        if self._session is None:  # Python's own line editing knows no marks
            yield
            return
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
        keeping = termios.tcgetattr(descriptor)
        # Line by line, the terminal's driver would drop what is longer than 4 KiB.
        keeping[LOCAL_FLAGS] &= ~(termios.ECHO | termios.ICANON)
        try:
            # Neither way may what has been typed be thrown away, as TCSAFLUSH does.
            termios.tcsetattr(descriptor, termios.TCSANOW, keeping)
            print(MARK_PASTES, end="", flush=True)
            yield
        finally:
            print(MARK_NO_PASTES, end="", flush=True)
            termios.tcsetattr(descriptor, termios.TCSANOW, before)

    def _line(self, prompt: str) -> str:
        if self._session is not None:
            return self._session.prompt(prompt)
        try:
            return input(prompt if self.interactive else "")
        except EOFError:
            print(end="\n" if self.interactive else "")
            raise


def history_file(command: str) -> Path:
    """Where the texts that were typed are kept, by the XDG base directory specification."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "pagewire" / f"{command}_history"


def _session(command: str) -> Any:
    """A prompt_toolkit session, which takes a pasted text for one and not for many lines. None
    where that package is missing: Python's own line editing remains."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
    except ImportError:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        return None
    file = history_file(command)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        history = FileHistory(str(file))
    except OSError:
        history = InMemoryHistory()
    return PromptSession(history=history, enable_open_in_editor=True)


class Waiting:
    """Within the context, a sign in a terminal that an answer is awaited and for how long, until
    `end` is called."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True)

    def __enter__(self) -> "Waiting":
        if sys.stdout.isatty():
            self._thread.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """Take the sign away. Does nothing the second time."""
        if not self._ended.is_set():
            self._ended.set()
            if self._thread.is_alive():
                self._thread.join()

    def _draw(self) -> None:
        waited = 0
        if self._ended.wait(SIGN_AFTER_S):
            return
        while True:
            print(f"\r… {waited} s" if waited else "\r…", end="", flush=True)
            if self._ended.wait(1):
                break
            waited += 1
        print("\r\x1b[K", end="", flush=True)
