"""API keys: which requests may pass, and whose they are. Knows header values, not routes.

Keys are compared as hashes in constant time, every key each time, so that neither content nor
length of a key shows in timing and no input can raise (comparing non-ASCII strings would).
"""

import hashlib
import hmac
import os
from collections.abc import Iterable

KEY_VARIABLES = ("PAGEWIRE_API_KEY", "VLLM_API_KEY")
NOBODY = ""
"""The tenant of a server without keys."""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def configured_keys(flag: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of the flag, else those of the environment. Raises ValueError for an empty key,
    which would admit everybody."""
    if any(not key for key in flag):
        raise ValueError(
            "--api-key: an empty key was given; leave the flag out to serve without keys"
        )
    if flag:
        return flag
    return next(((value,) for name in KEY_VARIABLES if (value := os.environ.get(name))), ())


class Auth:
    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]
        self._tenants = [digest.hex() for digest in self._digests]

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def tenant(self, authorization: list[str]) -> str | None:
        """Whose key these Authorization header values hold: exactly one `Bearer KEY` with a known
        key. None: nobody's who may pass."""
        if not self._digests:
            return NOBODY
        if len(authorization) != 1:
            return None
        scheme, _, key = authorization[0].partition(" ")
        given = _digest(key.strip(" "))
        known = [hmac.compare_digest(given, digest) for digest in self._digests]
        return (
            self._tenants[known.index(True)] if any(known) and scheme.lower() == "bearer" else None
        )

    def salt(self, tenant: str, asked: str) -> str:
        """The cache salt of a tenant's request that asks for `asked`: prefixes of different keys
        never meet. The key stays secret."""
        return hmac.new(
            bytes.fromhex(tenant),
            b"cache salt\0" + asked.encode("utf-8", "surrogatepass"),
            hashlib.sha256,
        ).hexdigest()
