"""Cross-origin requests: which web pages may talk to this server, by the four flags that vLLM has.
Knows headers, not routes."""

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from pagewire.config import FrontendConfig

FLAGS: Final = ("allowed-origins", "allowed-methods", "allowed-headers")
SIMPLE_HEADERS: Final = ("accept", "accept-language", "content-language", "content-type")
METHODS: Final = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
MAX_AGE_S: Final = 600
ANY: Final = "*"


def flag_values(name: str, given: Iterable[str]) -> tuple[str, ...]:
    """What a flag lists: each value is plain, or a JSON list of strings. Raises ValueError naming
    the flag."""
    values: list[str] = []
    for one in given:
        if not one.lstrip().startswith("["):
            values.append(one)
            continue
        try:
            values += msgspec.json.decode(one, type=list[str])
        except msgspec.DecodeError as error:
            raise ValueError(
                f"--{name} {one}: {error}; give values, or a JSON list like '[\"https://a.example\"]'"
            ) from None
    return tuple(values)


def cors_of(config: FrontendConfig) -> "Cors":
    """Raises ValueError naming the flag that cannot be read."""
    flags = (flag_values(name, getattr(config, name.replace("-", "_"))) for name in FLAGS)
    return Cors(*flags, credentials=config.allow_credentials)


class Cors:
    def __init__(
        self,
        origins: Iterable[str],
        methods: Iterable[str],
        headers: Iterable[str],
        credentials: bool,
    ) -> None:
        self._origins, self._credentials = frozenset(origins), credentials
        self._methods = (
            frozenset(METHODS)
            if ANY in (named := set(methods))
            else frozenset(map(str.upper, named))
        )
        self._headers = frozenset(map(str.lower, headers))

    def headers(self, origin: str) -> dict[str, str]:
        """For the answer to any request from a page of `origin`; none when it is not allowed to
        read it."""
        if not self._allows(origin):
            return {}
        shown = {"Access-Control-Expose-Headers": "X-Request-Id, Retry-After"}
        if ANY in self._origins and not self._credentials:
            return {"Access-Control-Allow-Origin": ANY, **shown}
        named = {"Access-Control-Allow-Origin": origin, "Vary": "Origin", **shown}
        return {**named, "Access-Control-Allow-Credentials": "true"} if self._credentials else named

    def preflight(self, asked: Mapping[str, str]) -> tuple[int, str, dict[str, str]]:
        """Status, text and headers for an OPTIONS request that asks what its page may send."""
        origin, method = (
            asked.get("Origin", ""),
            asked.get("Access-Control-Request-Method", "").upper(),
        )
        wanted = [
            name.strip().lower()
            for name in asked.get("Access-Control-Request-Headers", "").split(",")
            if name.strip()
        ]
        checks = {
            "origin": self._allows(origin),
            "method": method in self._methods,
            "headers": all(map(self._allows_header, wanted)),
        }
        if refused := [name for name, fine in checks.items() if not fine]:
            return 400, f"Disallowed CORS {', '.join(refused)}", self.headers(origin)
        allowed = ", ".join(
            wanted if ANY in self._headers else sorted({*SIMPLE_HEADERS, *self._headers})
        )
        told = {
            "Access-Control-Allow-Methods": ", ".join(sorted(self._methods)),
            "Access-Control-Max-Age": str(MAX_AGE_S),
        }
        return (
            200,
            "OK",
            {
                **self.headers(origin),
                **told,
                **({"Access-Control-Allow-Headers": allowed} if allowed else {}),
            },
        )

    def _allows(self, origin: str) -> bool:
        return ANY in self._origins or origin in self._origins

    def _allows_header(self, name: str) -> bool:
        return ANY in self._headers or name in self._headers or name in SIMPLE_HEADERS
