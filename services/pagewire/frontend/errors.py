"""Errors in the shape that OpenAI's clients read: an HTTP status, headers and a body.

A body carries the same four fields flat and nested under "error", since clients of both shapes
exist.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from ..requests.errors import ErrorKind, RequestError

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
"""The `type` of a body, by status."""
STATUSES: Final = {
    ErrorKind.INVALID: 400,
    ErrorKind.OVERLOADED: 429,
    ErrorKind.UNAVAILABLE: 503,
    ErrorKind.FAILED: 500,
    ErrorKind.TIMED_OUT: 504,
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
        type: str | None = None,
        retry_after_s: int = 0,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.type = type or TYPES.get(status) or TYPES[500 if status >= 500 else 400]
        self.retry_after_s = retry_after_s
        self.extra = extra or {}

    def fields(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.status,
        }

    def body(self) -> bytes:
        """The JSON body of the answer."""
        fields = self.fields()
        return msgspec.json.encode({"object": "error", **fields, "error": fields, **self.extra})

    def headers(self) -> dict[str, str]:
        """Those of the answer beside the content's."""
        return {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}


def as_api_error(error: ApiError | RequestError) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    return ApiError(
        STATUSES[error.kind],
        error.message,
        param=error.param,
        type=error.type or ("request_failed" if error.kind is ErrorKind.FAILED else None),
        retry_after_s=error.retry_after_s,
    )


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The same error for clients of an API that calls parameters by other names than chats do: by
    the name of a chat, that of the API. Its own parameters are in no chat by these names."""
    message = error.message
    for name, own in names.items():
        message = re.sub(rf"`{re.escape(name)}\b", f"`{own}", message)
    message = re.sub(r"`tools\[(\d+)\]\.function\b", r"`tools[\1]", message)
    result = ApiError(
        error.status,
        message,
        param=names.get(error.param or "", error.param),
        type=error.type,
        retry_after_s=error.retry_after_s,
        extra=error.extra,
    )
    result.headers = error.headers
    return result


def unknown_model(name: str, served: tuple[str, ...]) -> ApiError:
    """The refusal of a model's name that is none of `served`."""
    names = ", ".join(f"`{model}`" for model in served)
    return ApiError(
        404, f"The model `{name[:256]}` does not exist. This server has {names}.", param="model"
    )
