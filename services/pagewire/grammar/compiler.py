"""Grammars compiled once and kept: what is asked for again is a copy. Safe in any thread."""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from llguidance import LLMatcher, LLParserLimits
from pagewire_protocol.grammar import DEFAULT_WHITESPACE, Grammar, GrammarKind

from .errors import GrammarError
from .sources import regex_term, source_of
from .vocabulary import Vocabulary

KEPT: Final = 256
"""Compiled grammars."""
MAX_MESSAGE: Final = 400
"""Characters of what is said about a grammar."""
NOTHING_MATCHES: Final = "no text matches it"
LIMITS: Final = LLParserLimits(initial_lexer_fuel=100_000, verbose_errors=False)
"""A grammar that takes more than these allow is refused, here or while it is matched. With
llguidance's own fuel for the lexer, ten times this one, 5 KB of rules take 8 s before they are
refused; of a thousand schemas of MaskBench the smaller one refuses none."""
TOO_COSTLY: Final = "it takes too much to be compiled"
OVERLAPPING: Final = (
    "oneOf is not supported where its branches may overlap; anyOf is, and with `strict` false oneOf "
    "is read so"
)
MAX_KEYWORD: Final = 80
_COSTLY: Final = ("initial_lexer_fuel", "initial lexer configuration", "Too many items")
_UNKNOWN_KEYS: Final = re.compile(r"Unimplemented keys: (\[.*\])")
_NOT_PRINTABLE: Final = re.compile("[^ -~]")
_REMOTE: Final = re.compile("Resource '(.*?)' is not present in a registry")
_MAY_BE_EMPTY: Final = (
    GrammarKind.REGEX,
    GrammarKind.LARK,
    GrammarKind.GBNF,
    GrammarKind.STRUCTURAL_TAG,
)


@dataclass
class Compiled:
    """One grammar. `ignored`: keywords that are not held."""

    original: LLMatcher
    """It has seen no token, and is copied. Copies share what they learn of the grammar, and would
    wait for each other if several threads computed their masks."""
    ignored: tuple[str, ...]


class Compiler:
    """For one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._kept: OrderedDict[Grammar, Compiled | GrammarError] = OrderedDict()
        self._lock = threading.Lock()

    def compiled(self, grammar: Grammar) -> Compiled:
        """Raises GrammarError."""
        with self._lock:
            outcome = self._kept.get(grammar)
            if outcome is not None:
                self._kept.move_to_end(grammar)
        if outcome is None:
            outcome = self._outcome(grammar)
            with self._lock:
                self._kept[grammar] = outcome
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        if isinstance(outcome, GrammarError):
            raise outcome
        return outcome

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A new one, before its first token. Raises GrammarError."""
        return self.compiled(grammar).original.deep_copy()

    def _outcome(self, grammar: Grammar) -> Compiled | GrammarError:
        try:
            return self._compile(grammar)
        except GrammarError as error:
            return error
        except Exception as error:  # whatever a library makes of what clients send
            return GrammarError(
                f"it cannot be compiled ({type(error).__name__}: {str(error)[:200]})"
            )

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        try:
            return self._of_source(source_of(grammar, self._vocabulary.special_ids))
        except GrammarError as error:
            if self._has_wrong_whitespace(grammar):
                raise GrammarError(f"`whitespace_pattern`: {error}") from None
            raise

    def _has_wrong_whitespace(self, grammar: Grammar) -> bool:
        """The expression for whitespace is none, whatever the schema is."""
        if grammar.whitespace in ("", DEFAULT_WHITESPACE):
            return False
        try:
            self._of_source(LLMatcher.grammar_from_lark(f"start: {regex_term(grammar.whitespace)}"))
        except GrammarError:
            return True
        return False

    def _of_source(self, source: str) -> LLMatcher:
        matcher = LLMatcher(self._vocabulary.matching, source, log_level=0, limits=LIMITS)
        _check(matcher)
        return matcher

    def _compile(self, grammar: Grammar) -> Compiled:
        matcher = self._matcher(grammar)
        warnings = matcher.get_grammar_warnings()
        probe = matcher.deep_copy()
        mask = int.from_bytes(probe.compute_bitmask(), "little")
        _check(probe)
        for token in self._vocabulary.eos:
            mask &= ~(1 << token)
        if not mask and (grammar.kind not in _MAY_BE_EMPTY or not matcher.is_accepting()):
            raise GrammarError(NOTHING_MATCHES)
        return Compiled(matcher, ignored_keywords(warnings))


def ignored_keywords(warnings: Iterable[str]) -> tuple[str, ...]:
    """The keywords that llguidance says it does not hold, each once, in printable ASCII."""
    names: set[str] = set()
    for warning in warnings:
        listed = _UNKNOWN_KEYS.search(warning)
        if listed:
            names.update(json.loads(listed[1]))
        elif warning.startswith("oneOf "):
            names.add("oneOf (held as anyOf)")
        else:
            names.add(warning)
    return tuple(sorted(_NOT_PRINTABLE.sub("?", name)[:MAX_KEYWORD] for name in names))


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(explained(matcher.get_error()))


def explained(error: str) -> str:
    """llguidance's message in one line, without the source that it points into."""
    lines = [line.strip() for line in error.splitlines()]
    kept = [line for line in lines if line and not set(line) <= set("^ |") and "|" not in line[:8]]
    text = " ".join(kept).replace("<non-verbose/>", "").strip() or "it cannot be compiled"
    if text.startswith("NoExtension"):
        return NOTHING_MATCHES
    if "coerce_one_of" in text:
        return OVERLAPPING
    if any(words in text for words in _COSTLY):
        return TOO_COSTLY
    remote = _REMOTE.search(text)
    if remote:
        name = remote[1][:120]
        return f"it refers to {name!r}, which is not in it; other documents are never fetched"
    text = text.replace("Unimplemented keys", "these keywords are not supported")
    return text.replace("Unknown format", "this format is not supported")[:MAX_MESSAGE]
