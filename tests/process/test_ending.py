"""How a service that nobody supervises ends: when it is told to, and what it leaves behind."""

import errno
import os
from pathlib import Path

import pytest
from pagewire.process import errors, last_words
from pagewire.process.health_file import HealthFile
from pagewire.process.watchdog import Stop


def test_it_is_told_after_the_delay_and_once() -> None:
    stop = Stop(1.0, lambda: {1: False, 2: True})
    assert not stop.is_due(1e18), "nobody has asked"
    assert not stop.ask() and not stop.is_due(0.0)
    assert stop.is_due(1e18) and not stop.is_due(1e18)


def test_it_is_told_at_once_without_a_delay_and_when_asked_again() -> None:
    stop = Stop(0.0, dict)
    assert stop.ask() and not stop.is_due(1e18), "a second signal may kill what is about to end"
    stop = Stop(5.0, lambda: {1: True})
    assert not stop.ask() and stop.ask()


def test_it_goes_on_until_the_last_frontends_have_finished() -> None:
    """However long they take, and no longer."""
    frontends = {1: True, 2: True}
    stop = Stop(1000.0, lambda: frontends)
    stop.ask()
    assert not stop.is_due(1e18)
    frontends.clear()
    assert stop.is_due(0.0)


def test_last_words_are_read_by_the_parent(capfd: pytest.CaptureFixture[str]) -> None:
    page = last_words.new_page()
    assert last_words.read(page) == ""
    pid = os.fork()
    if not pid:
        last_words.leave_in(page)
        last_words.say("worker", "no such model: " + "ü" * 2000)
        os._exit(0)
    os.waitpid(pid, 0)
    assert last_words.read(page).startswith("no such model: üü")
    assert capfd.readouterr().err.startswith("pagewire worker: no such model: ü")


def test_a_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose it must be, and the command that makes it so."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    error = PermissionError(errno.EACCES, "Permission denied", "/models/mine")
    line = errors.error_line(error)
    assert line == (
        f"Permission denied: /models/mine; user {os.getuid()} must be able to read it, which "
        "`chmod -R a+rX /models/mine` allows"
    )
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    assert "chmod" not in errors.error_line(error)


def test_the_health_line_is_whole_and_goes_with_its_service(tmp_path: Path) -> None:
    file = HealthFile(tmp_path, "worker-a/b")
    path = tmp_path / "health-worker-a_b"
    file.write("loading weights\n(40%)" + "x" * 1000)
    file.write("ok")
    (line,) = path.read_text().splitlines()
    at, text = line.split()
    assert text == "ok"
    assert abs(float(Path("/proc/uptime").read_text().split()[0]) - int(at)) < 60
    file.close()
    assert not path.exists()
    file.write("ok")
