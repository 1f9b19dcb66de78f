"""API keys: which requests may pass, and whose they are. Knows header values, not routes.

Keys are compared as hashes in constant time, every key each time, so that neither content nor
length of a key shows in timing and no input can raise (comparing non-ASCII strings would).
"""

import hashlib
import hmac
import os
from collections.abc import Iterable

import msgspec

KEY_VARIABLES = ("PAGEWIRE_API_KEY", "VLLM_API_KEY")
KEYS_VARIABLE = "PAGEWIRE_API_KEYS"
"""A JSON list of keys, for several: how a launcher hands them to its frontends."""
NO_TENANT = ""
"""Whose requests are, on a server without keys."""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def configured_keys(flag: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of the flag, else those of the environment. Raises ValueError for an empty key,
    which would admit everybody."""
    if not flag and (text := os.environ.get(KEYS_VARIABLE)):
        flag = _listed(text)
    if any(not key for key in flag):
        raise ValueError(
            "--api-key: an empty key was given; leave the flag out to serve without keys"
        )
    if flag:
        return flag
    return next(((value,) for name in KEY_VARIABLES if (value := os.environ.get(name))), ())


def _listed(text: str) -> tuple[str, ...]:
    try:
        return msgspec.json.decode(text, type=tuple[str, ...])
    except msgspec.DecodeError as error:
        raise ValueError(f"{KEYS_VARIABLE} is not a JSON list of strings: {error}") from None


class Auth:
    """The keys of one server; a tenant is the hash of a key, in hexadecimal."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._own = [_digest(key) for key in keys]
        self._digests = list(self._own)
        self._tenants = [digest.hex() for digest in self._digests]
        self._required = bool(self._digests)

    def add(self, tenants: Iterable[str]) -> None:
        """Beside its own keys, let these pass, and none that were added before. From now on a key
        is required, even if there are none."""
        self._digests = [*self._own, *map(bytes.fromhex, tenants)]
        self._tenants = [digest.hex() for digest in self._digests]
        self._required = True

    @property
    def required(self) -> bool:
        """Whether requests need a key at all."""
        return self._required

    def tenant(self, authorization: list[str]) -> str | None:
        """The tenant whose key these Authorization header values hold: exactly one `Bearer KEY`
        with one of the server's keys. None: the request may not pass."""
        if not self._required:
            return NO_TENANT
        if len(authorization) != 1:
            return None
        scheme, _, key = authorization[0].partition(" ")
        digest = _digest(key.strip(" "))
        # All keys are compared, also after a match: the time says nothing about the keys.
        matches = [hmac.compare_digest(digest, own) for own in self._digests]
        if scheme.lower() != "bearer" or True not in matches:
            return None
        return self._tenants[matches.index(True)]

    def salt(self, tenant: str, request_salt: str) -> str:
        """The cache salt of a tenant's request whose own `cache_salt` is `request_salt`: requests
        of different keys never share cached blocks. The key stays secret."""
        message = b"cache salt\0" + request_salt.encode("utf-8", "surrogatepass")
        return hmac.new(bytes.fromhex(tenant), message, hashlib.sha256).hexdigest()
