"""Cross-origin requests: which web pages may talk to this server, by the four flags that vLLM has.
Knows headers, not routes."""

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from pagewire.config import FrontendConfig

FLAGS: Final = ("allowed-origins", "allowed-methods", "allowed-headers")
"""Their names in the configuration have underscores instead of dashes."""
SIMPLE_HEADERS: Final = ("accept", "accept-language", "content-language", "content-type")
"""Allowed whatever the flags say, as browsers send them without asking."""
METHODS: Final = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
MAX_AGE_S: Final = 600
"""How long a browser may keep the answer to a preflight."""
ANY: Final = "*"


def flag_values(name: str, words: Iterable[str]) -> tuple[str, ...]:
    """The values that the words after a flag list: each word is a value, or a JSON list of them.
    Raises ValueError naming the flag."""
    values: list[str] = []
    for word in words:
        if not word.lstrip().startswith("["):
            values.append(word)
            continue
        try:
            values += msgspec.json.decode(word, type=list[str])
        except msgspec.DecodeError as error:
            raise ValueError(
                f"--{name} {word}: {error}; give values, or a JSON list like '[\"https://a.example\"]'"
            ) from None
    return tuple(values)


def cors_of(config: FrontendConfig) -> "Cors":
    """The rules that the flags state. Raises ValueError naming the flag that cannot be read."""
    flags = (flag_values(name, getattr(config, name.replace("-", "_"))) for name in FLAGS)
    return Cors(*flags, credentials=config.allow_credentials)


class Cors:
    """Answers browsers that ask whether a page of another origin may read an answer, or send a
    request."""

    def __init__(
        self,
        origins: Iterable[str],
        methods: Iterable[str],
        headers: Iterable[str],
        credentials: bool,
    ) -> None:
        """`*` among origins, methods or headers allows all. `credentials`: pages may send cookies
        and keys that the browser keeps."""
        self._origins = frozenset(origins)
        self._credentials = credentials
        self._methods = frozenset(map(str.upper, methods))
        if ANY in self._methods:
            self._methods = frozenset(METHODS)
        self._headers = frozenset(map(str.lower, headers))

    def headers(self, origin: str) -> dict[str, str]:
        """The headers to add to the answer to a page of `origin`; none when the page may not read
        it."""
        if not self._allows(origin):
            return {}
        exposed = {
            "Access-Control-Expose-Headers": "X-Request-Id, Retry-After, X-RateLimit-Limit-Requests, X-RateLimit-Limit-Tokens, "
            "X-RateLimit-Remaining-Requests, X-RateLimit-Remaining-Tokens, "
            "X-RateLimit-Reset-Requests, X-RateLimit-Reset-Tokens, X-Ignored-Schema-Keywords"
        }
        if ANY in self._origins and not self._credentials:
            return {"Access-Control-Allow-Origin": ANY, **exposed}
        # With credentials a browser does not accept `*`: the origin itself must be named.
        headers = {"Access-Control-Allow-Origin": origin, "Vary": "Origin", **exposed}
        if self._credentials:
            headers["Access-Control-Allow-Credentials"] = "true"
        return headers

    def preflight(self, request: Mapping[str, str]) -> tuple[int, str, dict[str, str]]:
        """Status, text and headers for an OPTIONS request, by its headers: whether the page may
        send the request that it announces."""
        origin = request.get("Origin", "")
        method = request.get("Access-Control-Request-Method", "").upper()
        wanted = [
            name.strip().lower()
            for name in request.get("Access-Control-Request-Headers", "").split(",")
            if name.strip()
        ]
        checks = {
            "origin": self._allows(origin),
            "method": method in self._methods,
            "headers": all(map(self._allows_header, wanted)),
        }
        if refused := [name for name, passed in checks.items() if not passed]:
            return 400, f"Disallowed CORS {', '.join(refused)}", self.headers(origin)
        headers = {
            **self.headers(origin),
            "Access-Control-Allow-Methods": ", ".join(sorted(self._methods)),
            "Access-Control-Max-Age": str(MAX_AGE_S),
        }
        allowed = wanted if ANY in self._headers else sorted({*SIMPLE_HEADERS, *self._headers})
        if allowed:
            headers["Access-Control-Allow-Headers"] = ", ".join(allowed)
        return 200, "OK", headers

    def _allows(self, origin: str) -> bool:
        return ANY in self._origins or origin in self._origins

    def _allows_header(self, name: str) -> bool:
        return ANY in self._headers or name in self._headers or name in SIMPLE_HEADERS
