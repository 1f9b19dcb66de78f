"""What each API key of the file may use, and has used. Knows keys and numbers, no HTTP; time comes
with the calls.

A limit a minute is a bucket that fills evenly and holds a minute's worth. A request takes its
prompt's tokens, as far as they are known, before it runs, and the others when it has ended: so a
bucket may be in debt, and the next request waits for that. Several frontends share the limits: each
learns once a second what the others have let pass.
"""

import contextlib
from collections.abc import Generator, Iterable, Mapping
from math import ceil
from typing import Final

from ..requests.counters import Counters
from ..requests.errors import ErrorKind, RequestError
from .api_keys import ApiKey

MINUTE_S: Final = 60.0
LIMITED: Final = ("requests", "tokens")


class Bucket:
    """So much a minute; 0: any amount."""

    __slots__ = ("_filled_at", "level", "limit")

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self.level = float(limit)
        self._filled_at = now

    def fill(self, now: float) -> None:
        """Up to what has come in by now."""
        grown = (now - self._filled_at) * self.limit / MINUTE_S
        self.level = min(float(self.limit), self.level + grown)
        self._filled_at = now

    def wait_s(self, amount: float) -> float:
        """Until so much is there; at most until it is full."""
        missing = min(amount, float(self.limit)) - self.level
        return max(0.0, missing * MINUTE_S / self.limit) if self.limit else 0.0


class KeyUse:
    """One key's buckets and what runs for it here."""

    def __init__(self, key: ApiKey, now: float) -> None:
        self.key = key
        self.requests = Bucket(key.requests_per_minute, now)
        self.tokens = Bucket(key.tokens_per_minute, now)
        self.running = 0
        self.others_running = 0
        """At the other frontends, a second ago or less."""
        self.others_used: tuple[int, int] = (0, 0)
        """Requests and tokens of the other frontends, since these started."""

    def fill(self, now: float) -> None:
        """Both buckets."""
        self.requests.fill(now)
        self.tokens.fill(now)


class Lease:
    """One request that was let pass, until it has ended."""

    def __init__(self, limits: "KeyLimits", use: KeyUse | None, charged: int) -> None:
        self._limits = limits
        self._use = use
        self._charged = charged

    @property
    def is_counted(self) -> bool:
        """What it uses is counted, until it is closed."""
        return self._use is not None

    @property
    def priority(self) -> int:
        """What the key's requests begin with."""
        return self._use.key.priority if self._use else 0

    def charge(self, tokens: int) -> None:
        """Its prompt has so many tokens, about. Raises RequestError OVERLOADED where the key has
        not so many left."""
        if self._use is None:
            return
        use = self._use
        if use.tokens.limit and (wait := use.tokens.wait_s(tokens)):
            self._limits.refuse(use, f"{use.tokens.limit} tokens a minute", wait)
        use.tokens.level -= tokens
        self._charged += tokens

    def close(self, prompt_tokens: int, generated: int) -> None:
        """It has ended, and used so many tokens. Once."""
        use, self._use = self._use, None
        if use is None:
            return
        use.running -= 1
        use.tokens.level -= prompt_tokens + generated - self._charged
        self._limits.count(
            use, running=-1, prompt_tokens=prompt_tokens, generation_tokens=generated
        )


class KeyLimits:
    """All keys of a file; keys that are given otherwise have no limits."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._uses: dict[str, KeyUse] = {}
        """By tenant."""
        self._unlimited = Lease(self, None, 0)
        """Of all requests whose keys have no limits."""

    def replace(self, keys: Iterable[ApiKey], now: float) -> None:
        """From now on these keys. One whose limits are as they were keeps what it has used."""
        former = self._uses
        self._uses = {}
        for key in keys:
            use = former.get(key.tenant)
            if use is None or use.key != key:
                fresh = KeyUse(key, now)
                fresh.running = use.running if use else 0
                use = fresh
            self._uses[key.tenant] = use

    def admit(self, tenant: str, now: float) -> Lease:
        """Let one request of `tenant` pass. Raises RequestError OVERLOADED with the wait where the
        key has used up its minute, or runs as many as it may."""
        use = self._uses.get(tenant)
        if use is None:
            return self._unlimited
        use.fill(now)
        key = use.key
        if key.parallel and use.running + use.others_running >= key.parallel:
            self.refuse(use, f"{key.parallel} requests at a time", 1.0)
        if wait := use.requests.wait_s(1):
            self.refuse(use, f"{key.requests_per_minute} requests a minute", wait)
        if wait := use.tokens.wait_s(1):
            self.refuse(use, f"{key.tokens_per_minute} tokens a minute", wait)
        if use.requests.limit:
            use.requests.level -= 1
        use.running += 1
        self.count(use, running=1, requests=1)
        return Lease(self, use, 0)

    @contextlib.contextmanager
    def leased(self, tenant: str, now: float) -> Generator[None]:
        """Within the context one request of `tenant` runs, which uses no tokens. Raises as
        `admit`."""
        lease = self.admit(tenant, now)
        try:
            yield
        finally:
            lease.close(0, 0)

    def refuse(self, use: KeyUse, limit: str, wait_s: float) -> None:
        """Raises RequestError."""
        self.count(use, refused=1)
        retry = max(1, ceil(wait_s))
        raise RequestError(
            ErrorKind.OVERLOADED,
            f"The key {use.key.name!r} may use {limit}; try again in {retry} s.",
            retry_after_s=retry,
        )

    def headers(self, tenant: str, now: float) -> dict[str, str]:
        """OpenAI's x-ratelimit headers for what the key has limits of."""
        use = self._uses.get(tenant)
        if use is None:
            return {}
        use.fill(now)
        headers: dict[str, str] = {}
        for what, bucket in zip(LIMITED, (use.requests, use.tokens), strict=True):
            if bucket.limit:
                headers[f"x-ratelimit-limit-{what}"] = str(bucket.limit)
                headers[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.level)))
                headers[f"x-ratelimit-reset-{what}"] = f"{bucket.wait_s(bucket.limit):.1f}s"
        return headers

    def count(self, use: KeyUse, **amounts: int) -> None:
        """Add to what the key has used, by name in /metrics."""
        usage = self._counters.key_usage
        for what, amount in amounts.items():
            name = f"{what} {use.key.name}"
            usage[name] = usage.get(name, 0) + amount

    def share(self, total: Mapping[str, int]) -> None:
        """What all frontends have counted, this one included."""
        own = self._counters.key_usage
        for use in self._uses.values():

            def others(what: str, name: str = use.key.name) -> int:
                return total.get(f"{what} {name}", 0) - own.get(f"{what} {name}", 0)

            requests = others("requests")
            tokens = others("prompt_tokens") + others("generation_tokens")
            use.others_running = max(0, others("running"))
            before_requests, before_tokens = use.others_used
            use.others_used = requests, tokens
            # A frontend that is gone takes its counts with it.
            use.requests.level -= max(0, requests - before_requests)
            use.tokens.level -= max(0, tokens - before_tokens)
