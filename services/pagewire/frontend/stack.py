"""What this frontend has heard of the other services: which are ready, which are still loading, what
the model can take."""

import re
from typing import Any, Final

from pagewire_protocol.messages import Roster
from pagewire_protocol.structs import FAILING, SILENCE_S, Peer, Role

from ..requests.model_facts import ModelFacts, model_facts
from .errors import ApiError

_PATH: Final = re.compile(r"(?<![\w.])/[\w.@~/-]+")


class Stack:
    """The latest roster, and what follows from it."""

    def __init__(self, public_names: tuple[str, ...] = ()) -> None:
        """public_names: the model's, which may be paths. Others are shown to nobody: whoever asks
        needs no key."""
        self._public_names = public_names
        self.roster: Roster | None = None
        self.leaving = False
        """This process was told to end: others should be sent new requests, and what comes is served
        until it is `draining`."""
        self.draining = False
        self._model = ModelFacts()
        self.stats: dict[str, float] = {}
        """The last figures of a scheduler's, which not every roster has; empty before the first."""
        self._is_complete = self._was_complete = False
        """The newest roster, or any so far, has all that generation needs."""
        self.seen = 0.0
        """When the last roster came, on the caller's clock."""

    def on_roster(self, roster: Roster, now: float) -> None:
        """Keep the roster, unless it is a former scheduler's. `now`: the caller's clock, seconds."""
        if self.roster is None or roster.epoch >= self.roster.epoch:
            self.roster, self.seen = roster, now
            self.stats = roster.stats or self.stats
            self._is_complete = not self.loading(now)
            if self._is_complete or not self._was_complete:
                self._model = model_facts(roster)
            self._was_complete |= self._is_complete

    def model(self) -> ModelFacts:
        """What requests must fit, as long as a worker or a tokenizer is missing by the last roster
        that had both; without a roster, nothing is known and everything passes."""
        return self._model

    def loading(self, now: float) -> list[dict[str, Any]]:
        """What generation still waits for; empty when it can begin."""
        if self.roster is None or now - self.seen > SILENCE_S:
            return [_entry("scheduler", "", "waiting for it to answer", 0.0)]
        missing: list[dict[str, Any]] = []
        for role in (Role.TOKENIZER, Role.WORKER):
            peers = [peer for peer in self.roster.peers if peer.role is role]
            if not any(peer.ready for peer in peers):
                missing += [self._of_peer(peer) for peer in peers] or [
                    _entry(role.name.lower(), "", "not started yet", 0.0)
                ]
        return missing

    def is_heard(self, now: float) -> bool:
        """This process takes requests, and has heard of a scheduler lately, or never yet."""
        return not self.draining and (self.roster is None or now - self.seen <= SILENCE_S)

    def failing(self) -> list[dict[str, Any]]:
        """The services that have failed several times in a row and are tried again with pauses."""
        peers = self.roster.peers if self.roster else ()
        return [self._of_peer(peer) for peer in peers if peer.failures >= FAILING]

    def can_generate(self, now: float) -> bool:
        """Whether a request that comes now can be served."""
        return not self.draining and self._is_complete and now - self.seen <= SILENCE_S

    def ready(self, now: float) -> bool:
        """Whether generation can begin, here and in the next seconds."""
        return not self.leaving and self.can_generate(now)

    def unavailable(self, now: float) -> ApiError:
        """Why generation is not possible, as an answer to the client."""
        if self.draining or self.leaving:
            return ApiError(
                503,
                "The server is shutting down.",
                retry_after_s=5,
                extra={"status": "draining", "loading": []},
            )
        missing = self.loading(now)
        what = "; ".join(
            f"{item['role']}: {item['stage']}"
            + ("" if item.get("failures") else f" ({100 * item['fraction']:.0f}%)")
            for item in missing
        )
        return ApiError(
            503,
            f"The server is loading: {what}.",
            retry_after_s=2,
            extra={"status": "loading", "loading": missing},
        )

    def _of_peer(self, peer: Peer) -> dict[str, Any]:
        stage = _PATH.sub(self._shown, peer.stage or "starting")
        entry = _entry(peer.role.name.lower(), _PATH.sub("…", peer.name), stage, peer.fraction)
        return {**entry, "failures": peer.failures} if peer.failures else entry

    def _shown(self, path: "re.Match[str]") -> str:
        return path[0] if path[0] in self._public_names else "…"


def _entry(role: str, name: str, stage: str, fraction: float) -> dict[str, Any]:
    return {"role": role, "name": name, "stage": stage, "fraction": round(fraction, 3)}
