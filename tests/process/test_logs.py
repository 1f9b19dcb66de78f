"""What a log line looks like: text with date and zone, or a JSON object that holds an exception and
the record's own fields in one line."""

import json
import logging
import re
import sys

from pagewire.process.logs import DATE, TEXT, JsonFormatter


def record(**fields: object) -> logging.LogRecord:
    made = logging.LogRecord("pagewire.x", logging.ERROR, "x.py", 1, "%s went wrong", ("é",), None)
    if fields:
        made.fields = fields
    return made


def test_an_exception_is_part_of_its_line() -> None:
    made = record(status=500)
    try:
        raise ValueError("no\nsuch thing")
    except ValueError:
        made.exc_info = sys.exc_info()
    line = JsonFormatter("frontend-0").format(made)
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["message"], entry["level"], entry["status"]) == ("é went wrong", "error", 500)
    assert entry["exception"].startswith("Traceback") and "such thing" in entry["exception"]
    assert (entry["logger"], entry["process"]) == ("pagewire.x", "frontend-0")


def test_what_is_no_json_is_written_as_text() -> None:
    entry = json.loads(JsonFormatter("worker-0").format(record(path=object)))
    assert "object" in entry["path"] and "exception" not in entry


def test_text_has_date_and_zone() -> None:
    line = logging.Formatter(TEXT, DATE).format(record())
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}"
    assert re.fullmatch(stamp + r" E pagewire\.x: é went wrong", line)
