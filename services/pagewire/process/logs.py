"""What log lines look like: text for people, or one JSON object a line for collectors. Only the
standard library is imported here.

A record may carry fields of its own, `extra={"fields": {...}}`: JSON has them by name, and text has
them in the message already.
"""

import datetime
import json
import logging
import sys
from typing import Any, Final

TEXT: Final = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
DATE: Final = "%Y-%m-%dT%H:%M:%S%z"


class JsonFormatter(logging.Formatter):
    """time (ISO 8601 with zone), level, process, logger, message; exception where there is one;
    then the record's fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry = json_entry(self._process, record.getMessage(), record.levelname, record.created)
        entry["logger"] = record.name
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        entry.update(getattr(record, "fields", {}))
        return json.dumps(entry, ensure_ascii=False, default=str)


def json_entry(process: str, message: str, level: str, created: float) -> dict[str, Any]:
    """What every JSON line begins with. created: Unix time in seconds."""
    moment = datetime.datetime.fromtimestamp(created).astimezone()
    return {
        "time": moment.isoformat(timespec="milliseconds"),
        "level": level.lower(),
        "process": process,
        "message": message,
    }


def set_up(level: str, log_format: str, process: str) -> None:
    """Log to standard error: Pagewire's messages from `level` on, those of libraries from warnings
    on. process: this one's name in the stack."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(process) if log_format == "json" else logging.Formatter(TEXT, DATE)
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("pagewire").setLevel(level.upper())
