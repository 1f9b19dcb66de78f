"""Whether a request's grammar is one: the tokenizer's side of its matcher process (grammar/), which
compiles what it is asked about. What is wrong with a grammar is said before anything is computed.

Used by the loop's thread alone, which `watch` makes look when the process has answered. A process
that ends or hangs is replaced, and what it was asked about is asked again, one at a time: what ends
two by itself is refused. Knows no requests.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from typing import Final, NamedTuple, Protocol

from pagewire_protocol.grammar import Grammar
from pagewire_protocol.structs import MAX_IGNORED

from ..config import ModelConfig
from ..grammar.child import MatcherGone, MatcherProcess
from ..grammar.messages import Check, Checked, Start

log = logging.getLogger("pagewire.tokenizer")
KEPT: Final = 1024
"""Outcomes that are remembered."""
CHECK_S: Final = 5.0
"""How long a process that is ready may take for one grammar. The limits of
pagewire_protocol.grammar and llguidance's own keep nearly all of them under a second."""
LOAD_S: Final = 300.0
"""How long it may load its vocabulary, which may have to be downloaded."""
MAX_DEATHS: Final = 2
"""Processes that a grammar may end."""
MAX_FAILED_STARTS: Final = 5
"""Processes in a row that end before they are ready, after which those that wait are refused. No
grammar is to blame for that."""
ENDS_ITS_PROCESS: Final = "it cannot be compiled: the process that tried has ended each time"
NO_PROCESS: Final = (
    f"{MAX_FAILED_STARTS} processes that compile grammars have ended before they were ready; the "
    "tokenizer's log says how"
)
MISSING: Final = (
    "structured output needs the package llguidance, which is not installed where this server's "
    "tokenizer runs"
)


class Outcome(NamedTuple):
    """Of one grammar. `wrong`: what is wrong with it, empty for nothing. `ignored`: which keywords
    of its schema are not held."""

    wrong: str
    ignored: str = ""


NO_GRAMMAR: Final = Outcome("")


class Watch(Protocol):
    """Makes the loop come round when a descriptor is readable, or no longer."""

    def __call__(self, fileno: int, /) -> None: ...


class GrammarChecks:
    """Of one tokenizer."""

    def __init__(
        self,
        model: ModelConfig,
        watch: Watch,
        unwatch: Watch,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._watch = watch
        self._unwatch = unwatch
        self._clock = clock
        self._process: MatcherProcess | None = None
        self._outcomes: OrderedDict[Grammar, Outcome] = OrderedDict()
        self._pending: dict[int, _Pending] = {}
        """By key, in the order in which they were asked."""
        self._key_of: dict[Grammar, int] = {}
        self._last_key = 0
        self._one_by_one = False
        """A process has ended while it had several to compile."""
        self._failed_starts = 0
        self._settled: list[Grammar] = []
        self._vocabulary: tuple[int, tuple[int, ...]] = (0, ())

    def outcome(self, grammar: Grammar, vocab_size: int, eos: tuple[int, ...]) -> Outcome | None:
        """None where that has yet to be found out: it is then among those that `settle`
        returns."""
        outcome = self._outcomes.get(grammar)
        if outcome is not None:
            self._outcomes.move_to_end(grammar)
            return outcome
        if self._process is None and find_spec("llguidance") is None:
            return Outcome(MISSING)
        self._vocabulary = vocab_size, eos
        if grammar not in self._key_of:
            self._last_key += 1
            self._key_of[grammar] = self._last_key
            self._pending[self._last_key] = _Pending(grammar)
            self._ask()
        return None

    def settle(self) -> list[Grammar]:
        """Those that have been found out since the last call."""
        if self._pending and self._process is not None:
            try:
                messages = self._process.receive()
            except MatcherGone as gone:
                self._lost(f"has ended: it {gone}")
                messages = []
            for message in messages:
                if isinstance(message, Checked) and message.key in self._pending:
                    ignored = ", ".join(message.ignored)[:MAX_IGNORED]
                    if ignored:
                        log.warning("a schema is not held strictly: without %s", ignored)
                    self._settle(message.key, Outcome(message.message, ignored))
            self._look()
        settled = self._settled
        self._settled = []
        return settled

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._unwatch(self._process.fileno())
            self._process.close()
            self._process = None

    def _settle(self, key: int, outcome: Outcome) -> None:
        self._keep(key, outcome)
        self._one_by_one = self._one_by_one and bool(self._pending)
        self._ask()

    def _keep(self, key: int, outcome: Outcome) -> None:
        grammar = self._pending.pop(key).grammar
        del self._key_of[grammar]
        self._outcomes[grammar] = outcome
        if len(self._outcomes) > KEPT:
            self._outcomes.popitem(last=False)
        self._settled.append(grammar)

    def _ask(self) -> None:
        """What has not been asked yet."""
        if not self._pending:
            return
        if self._process is None:
            size, eos = self._vocabulary
            self._process = MatcherProcess(Start(self._model, size, eos))
            self._watch(self._process.fileno())
        for key, pending in self._pending.items():
            if not pending.since:
                pending.since = self._clock()
                self._process.send(Check(key, pending.grammar))
            if self._one_by_one:
                break

    def _look(self) -> None:
        """End a process that hangs."""
        if self._process is None:
            return
        limit = CHECK_S if self._process.is_ready else LOAD_S
        oldest = next((pending.since for pending in self._pending.values()), 0.0)
        if oldest and self._clock() - max(oldest, self._process.ready_at) > limit:
            self._lost(f"has not answered for {limit:.0f} s")

    def _lost(self, why: str) -> None:
        log.warning("the process that checks grammars %s", why)
        was_ready = self._process is not None and self._process.is_ready
        self.close()
        self._failed_starts = 0 if was_ready else self._failed_starts + 1
        asked = {key: pending for key, pending in self._pending.items() if pending.since}
        alone = len(asked) == 1
        for key, pending in asked.items():
            pending.since = 0.0
            pending.deaths += alone and was_ready
            if pending.deaths >= MAX_DEATHS:
                self._keep(key, Outcome(ENDS_ITS_PROCESS))
            elif self._failed_starts >= MAX_FAILED_STARTS:
                self._keep(key, Outcome(NO_PROCESS))
        if self._failed_starts >= MAX_FAILED_STARTS:
            self._failed_starts = 0
        self._one_by_one = bool(self._pending)
        self._ask()


class _Pending:
    """A grammar that has not been found out about."""

    __slots__ = ("deaths", "grammar", "since")

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.since = 0.0
        """When it was asked about; 0: not yet."""
        self.deaths = 0
        """Processes that ended while they worked for it alone."""
