"""What the scripts in this folder share: their flags, the figures of processes, and how a run ends."""

import argparse
import contextlib
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def parser_of(doc: str | None, minutes: float = 1.0) -> argparse.ArgumentParser:
    """With --minutes and --report."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--report", type=Path, help="file for the report in Markdown")
    return parser


def finish(text: str, faults: list[str], report: Path | None) -> int:
    """Print and keep the report; the exit code, 1 where something was wrong."""
    lines = [text.rstrip(), f"- {load()}", *(f"- **wrong**: {fault}" for fault in faults)]
    text = "\n".join(lines) + "\n"
    print(text)
    if report:
        report.write_text(text)
    return 1 if faults else 0


def load() -> str:
    """How busy the machine is, which the figures depend on."""
    return f"load average at the end {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    descriptors: int
    sockets: int
    threads: int

    def __str__(self) -> str:
        return f"{self.descriptors} descriptors ({self.sockets} sockets), {self.threads} threads"


def descriptors_of(pid: int) -> list[str]:
    """What they are links to. Raises OSError for a process that is gone."""
    links: list[str] = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has been closed since
            links.append(os.readlink(path))
    return links


def held_by(pid: int) -> Held:
    """Raises OSError for a process that is gone."""
    links = descriptors_of(pid)
    kinds = Counter(link.partition(":")[0] for link in links)
    threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    return Held(len(links), kinds["socket"], threads)


def resident_bytes(pid: int) -> int:
    """Of memory, as of proc(5)'s statm."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
