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

    def __init__(self) -> None:
        self.roster: Roster | None = None
        self.draining = False
        self._model = ModelFacts()
        self._was_complete = False
        self.seen = 0.0
        """When the last roster came, on the caller's clock."""

    def on_roster(self, roster: Roster, now: float) -> None:
        """Keep the roster, unless it is a former scheduler's. `now`: the caller's clock, seconds."""
        if self.roster is None or roster.epoch >= self.roster.epoch:
            self.roster, self.seen = roster, now
            is_complete = not self.loading(now)
            if is_complete or not self._was_complete:
                self._model = model_facts(roster)
            self._was_complete |= is_complete

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
                missing += [_of_peer(peer) for peer in peers] or [
                    _entry(role.name.lower(), "", "not started yet", 0.0)
                ]
        return missing

    def is_heard(self, now: float) -> bool:
        """This process takes requests, and has heard of a scheduler lately, or never yet."""
        return not self.draining and (self.roster is None or now - self.seen <= SILENCE_S)

    def failing(self) -> list[dict[str, Any]]:
        """The services that have failed several times in a row and are tried again with pauses."""
        peers = self.roster.peers if self.roster else ()
        return [_of_peer(peer) for peer in peers if peer.failures >= FAILING]

    def ready(self, now: float) -> bool:
        """Whether generation can begin."""
        return not self.draining and not self.loading(now)

    def unavailable(self, now: float) -> ApiError:
        """Why generation is not possible, as an answer to the client."""
        if self.draining:
            return ApiError(
                503,
                "The server is shutting down.",
                retry_after_s=5,
                extra={"status": "draining", "loading": []},
            )
        missing = self.loading(now)
        what = "; ".join(
            f"{item['role']}: {item['stage']} ({100 * item['fraction']:.0f}%)" for item in missing
        )
        return ApiError(
            503,
            f"The server is loading: {what}.",
            retry_after_s=2,
            extra={"status": "loading", "loading": missing},
        )


def _of_peer(peer: Peer) -> dict[str, Any]:
    return _entry(peer.role.name.lower(), peer.name, peer.stage or "starting", peer.fraction)


def _entry(role: str, name: str, stage: str, fraction: float) -> dict[str, Any]:
    return {
        "role": role,
        "name": _PATH.sub("…", name),
        "stage": _PATH.sub("…", stage),
        "fraction": round(fraction, 3),
    }
