"""The tokenizer's checks of grammars, when the process that compiles them ends. The processes are
stand-ins."""

from typing import Any

import pytest
from pagewire.config import ModelConfig
from pagewire.grammar.child import MatcherGone
from pagewire.grammar.messages import Check, Checked
from pagewire.tokenizer import grammar_checks
from pagewire.tokenizer.grammar_checks import (
    MAX_DEATHS,
    MAX_FAILED_STARTS,
    NO_GRAMMAR,
    GrammarChecks,
)
from pagewire_protocol.grammar import Grammar

ONE, OTHER = Grammar("regex", "a+"), Grammar("regex", "b+")


class Process:
    """A matcher process: `ready`, `gone`, and what it answers are set by the test."""

    def __init__(self, start: Any) -> None:
        self.is_ready = False
        self.ready_at = 0.0
        self.gone = False
        self.asked: list[Check] = []
        self.answers: list[Checked] = []
        everyone.append(self)

    def fileno(self) -> int:
        return 0

    def send(self, message: Check) -> None:
        self.asked.append(message)

    def receive(self) -> list[Checked]:
        if self.gone:
            raise MatcherGone("was killed by SIGKILL")
        answers, self.answers = self.answers, []
        return answers

    def close(self) -> None:
        pass


everyone: list[Process] = []


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> GrammarChecks:
    everyone.clear()
    monkeypatch.setattr(grammar_checks, "MatcherProcess", Process)
    monkeypatch.setattr(grammar_checks, "find_spec", lambda name: object())
    nothing: Any = lambda fileno: None  # noqa: E731
    return GrammarChecks(ModelConfig(model="m"), nothing, nothing, lambda: 1.0)


def ends(checks: GrammarChecks, ready: bool) -> list[Grammar]:
    """The latest process ends; what was found out by it."""
    everyone[-1].is_ready = ready
    everyone[-1].gone = True
    return checks.settle()


def outcome(checks: GrammarChecks, grammar: Grammar) -> Any:
    return checks.outcome(grammar, 100, (2,))


def test_a_grammar_that_ends_its_process_each_time_is_refused(checks: GrammarChecks) -> None:
    assert outcome(checks, ONE) is None
    for _ in range(MAX_DEATHS - 1):
        assert ends(checks, ready=True) == []
    assert ends(checks, ready=True) == [ONE]
    assert "ended each time" in outcome(checks, ONE).wrong


def test_processes_that_end_while_they_load_are_nobody_s_fault(checks: GrammarChecks) -> None:
    assert outcome(checks, ONE) is None
    for _ in range(MAX_FAILED_STARTS - 1):
        assert ends(checks, ready=False) == []
    everyone[-1].answers = [Checked(everyone[-1].asked[0].key, "")]
    assert checks.settle() == [ONE] and outcome(checks, ONE) == NO_GRAMMAR


def test_processes_that_never_start_are_told(checks: GrammarChecks) -> None:
    assert outcome(checks, ONE) is None
    found = [grammar for _ in range(MAX_FAILED_STARTS) for grammar in ends(checks, ready=False)]
    assert found == [ONE] and "before they were ready" in outcome(checks, ONE).wrong
    # those that come later are tried again
    assert outcome(checks, OTHER) is None and ends(checks, ready=False) == []
    assert [check.grammar for check in everyone[-1].asked] == [OTHER]


def test_which_of_several_ends_processes_is_found_out(checks: GrammarChecks) -> None:
    assert outcome(checks, ONE) is None and outcome(checks, OTHER) is None
    assert ends(checks, ready=True) == []
    assert [check.grammar for check in everyone[-1].asked] == [ONE]
    found = [grammar for _ in range(MAX_DEATHS) for grammar in ends(checks, ready=True)]
    assert found == [ONE]
    assert [check.grammar for check in everyone[-1].asked] == [OTHER]
    everyone[-1].answers = [Checked(everyone[-1].asked[0].key, "")]
    assert checks.settle() == [OTHER] and outcome(checks, OTHER) == NO_GRAMMAR
