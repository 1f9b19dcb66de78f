"""What goes wrong, in the shape OpenAI clients read. Knows HTTP statuses and bodies, nothing of
requests or sockets.

A body carries the same four fields flat and nested under "error", since clients of both shapes
exist. Texts of status 500 and above are fixed: whatever a service said about its own fault goes to
the log, never to a client.
"""

from typing import Any, Final

import msgspec

TYPES: Final = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestEntityTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}
JSON: Final = "application/json"


class ApiError(Exception):
    """An answer other than success. `extra` holds further top-level fields of the body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        kind: str | None = None,
        retry_after_s: int = 0,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.kind = (
            kind
            or TYPES.get(status)
            or ("InternalServerError" if status >= 500 else "BadRequestError")
        )
        self.retry_after_s = retry_after_s
        self.extra = extra or {}

    def body(self) -> bytes:
        fields = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.status,
        }
        return msgspec.json.encode({"object": "error", **fields, "error": fields, **self.extra})

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}


def bad(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def request_failed(
    message: str = "The server could not finish this request; try it again.",
) -> ApiError:
    return ApiError(500, message, kind="request_failed")


def unknown_model(name: str, known: tuple[str, ...]) -> ApiError:
    names = ", ".join(f"`{one}`" for one in known)
    return ApiError(
        404, f"The model `{name[:256]}` does not exist. This server has {names}.", param="model"
    )
