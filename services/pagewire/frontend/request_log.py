"""`--enable-log-requests`: one log line at the end of each request that is not a probe. Knows what was
asked and how it ended, and never what was said."""

import logging
from typing import Any, Final

from aiohttp import web

from .reply import Reply
from .request_ids import request_id
from .routes import method_of, route_of

log = logging.getLogger("pagewire.frontend.requests")
CLIENT_GONE: Final = 499
REPLY: Final = web.RequestKey("reply", Reply)
"""Set on a request for generation, once it is under way."""
_CODES: Final = {400: "refused", 401: "refused", 404: "refused", 413: "refused", 429: "overloaded"}


def log_request(request: web.Request, status: int, began: float, now: float) -> None:
    """began, now: seconds on the clock of the requests' owner. Times are logged in seconds."""
    fields: dict[str, Any] = {
        "request_id": request_id(request),
        "method": method_of(request),
        "route": route_of(request),
        "status": status,
        "total_s": round(now - began, 4),
    }
    if REPLY in request:
        reply = request[REPLY]
        usage = reply.usage()
        fields |= {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens
            or sum(r.output_tokens for r in reply.requests),
        }
        first_tokens = [r.first_token_time for r in reply.requests if r.first_token_time]
        if first_tokens:
            fields["ttft_s"] = round(min(first_tokens) - began, 4)
    fields["reason"] = _reason(request, status)
    log.info(
        "%s",
        " ".join(f"{name}={value}" for name, value in fields.items()),
        extra={"fields": fields},
    )


def _reason(request: web.Request, status: int) -> str:
    """How the request ended: the finish reasons of its choices, or what went wrong."""
    if status == CLIENT_GONE:
        return "cancelled"
    if REPLY in request:
        reply = request[REPLY]
        if reply.error is not None:
            return _CODES.get(status, "failed")
        reasons = {choice.reason for choice in reply.choices if choice.reason}
        return ",".join(sorted(reasons)) or "failed"
    return "ok" if status < 400 else _CODES.get(status, "failed")
