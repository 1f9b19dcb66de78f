"""What every answer that refuses looks like."""

import re

LEAK = re.compile(r"0x[0-9a-f]{6,}|Traceback|/(?:usr|home|opt|root|work|tmp|secret)/")


def check_error(answer, status: int, kind: str, param: str | None = None) -> dict:
    """Both shapes in one body; returns the body."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    body = answer.json()
    four = {name: body[name] for name in ("message", "type", "param", "code")}
    assert body["object"] == "error" and body["error"] == four
    assert (
        four["code"] == status
        and four["type"] == kind
        and four["param"] == param
        and four["message"]
    )
    assert not LEAK.search(answer.text)
    return body


def refused(answer, param: str, *parts: str) -> None:
    message = check_error(answer, 400, "BadRequestError", param)["message"]
    assert all(part in message for part in parts), message
