"""A scheduler and a tokenizer that follow a script, over real inboxes: what the frontend sees of
the stack, without a stack.

The prompt is the script: see `Script.of`. Both run in one thread; `received` keeps what the
frontend sent, for tests to look at.
"""

import contextlib
import itertools
import re
import threading
import time
from dataclasses import dataclass, field, replace

from pagewire_protocol.channels import Inbox, Outbox, new_incarnation
from pagewire_protocol.columns import pack, unpack
from pagewire_protocol.messages import (
    Cancel,
    Deltas,
    Detokenize,
    Generate,
    Hello,
    Roster,
    Tokenize,
    Tokenized,
)
from pagewire_protocol.sampling import SamplingDefaults
from pagewire_protocol.structs import (
    End,
    Finish,
    PartKind,
    Peer,
    Prompt,
    PromptLogprobs,
    Role,
    Started,
    TokenLogprobs,
)

WORDS = ("Hello", ",", " 世界", "!", " 🦙", ' a"b\\c\n', " é", " end")
MODEL_LEN = 4096
VOCABULARY = 1000


Parts = list[tuple[PartKind, int, str]]
PARTS: tuple[Parts, ...] = (
    [(PartKind.REASONING, 0, "Hm, ")],
    [(PartKind.REASONING, 0, "世界.")],
    [(PartKind.CONTENT, 0, "Sure.")],
    [(PartKind.CALL_ID, 0, "call_a"), (PartKind.CALL_NAME, 0, "f")],
    [(PartKind.ARGUMENTS, 0, '{"a":')],
    [(PartKind.ARGUMENTS, 0, ' "1"}')],
    [(PartKind.CALL_ID, 1, "call_b"), (PartKind.CALL_NAME, 1, "g"), (PartKind.ARGUMENTS, 1, "{}")],
)
"""What each token brings of an answer with parts, where the prompt has the word `calls`."""
LATE_TEXT: tuple[Parts, ...] = (*PARTS[:6], [(PartKind.CONTENT, 0, "Done")])
"""The same for the word `late`: text follows a call, and max_tokens cuts it off."""
HANG = 666
"""A prompt with this id hangs; so it would with this word."""
FIRST_WORD = 700
"""Ids from here on are words of prompts, in the order in which they were first seen."""


def word(position: int) -> str:
    return WORDS[position % len(WORDS)]


def expected(count: int, start: int = 0) -> str:
    return "".join(word(p) for p in range(start, start + count))


def token(position: int) -> int:
    return 100 + position


@dataclass
class Script:
    """What happens to a request: `tokens` of output; an end; an accident after `accident_after`
    tokens of the first attempt."""

    tokens: int = 8
    reason: Finish = Finish.LENGTH
    stop_reason: int | str | None = None
    refuse: tuple[int, str, str | None, int] | None = None
    accident: str = ""
    accident_after: int = 3
    hang_after: int | None = None
    delay: float = 0.0
    mum: bool = False
    """Says nothing for a second and a half, then the tokens come."""

    @staticmethod
    def of(generate: Generate) -> "Script":
        """Read from the prompt, words like `refuse429`, `lost`, `gap`, `failed`, `hang`, `stop`,
        `slow`; max_tokens gives the length."""
        text = prompt_text(generate)
        if not text:
            return Script(refuse=(400, "the prompt is empty: it has 0 tokens", "prompt", 0))
        script = Script(tokens=8 if generate.max_tokens_is_rest else generate.sampling.max_tokens)
        if found := re.search(r"refuse(\d+)", text):
            script.refuse = (
                int(found.group(1)),
                "System role not supported",
                "messages",
                7 if found.group(1) == "429" else 0,
            )
        if "stop" in text.split():
            script.tokens, script.reason, script.stop_reason = (
                min(script.tokens, 5),
                Finish.STOP,
                generate.text.stop[0] if generate.text.stop else None,
            )
        for name in ("lost", "gap", "failed", "cancelled"):
            if name in text.split():
                script.accident = name
        if "hang" in text.split():
            script.hang_after = 2 if generate.prompt.ids is None else 0
        if "calls" in text.split() and generate.text.answer is not None:
            script.tokens, script.reason = len(PARTS), Finish.STOP
        if "late" in text.split() and generate.text.answer is not None:
            script.tokens, script.reason = len(LATE_TEXT), Finish.LENGTH
            if generate.text.stop:
                script.reason, script.stop_reason = Finish.STOP, generate.text.stop[0]
        if "silent" in text.split():
            script.tokens, script.reason = 0, Finish.STOP
        if "slow" in text.split():
            script.delay = 0.05
        script.mum = "mum" in text.split()
        return script


def prompt_text(generate: Generate) -> str:
    prompt = generate.prompt
    if prompt.chat is not None:
        return prompt.chat.messages[-1].content
    if prompt.text is not None:
        return prompt.text
    ids = unpack("i", prompt.ids or b"").tolist()
    return f"{len(ids)} ids" + " hang" * (HANG in ids)


def deltas(generate: Generate, start: int, count: int, execution: int, **more: object) -> Deltas:
    """Rows of one token each, from output position `start` on."""
    positions = range(start, start + count)
    wants_parts = generate.text.answer is not None
    words = prompt_text(generate).split()
    table = {"calls": PARTS, "late": LATE_TEXT}.get(words[-1] if words else "", ())
    has_parts = bool(count and wants_parts and table)
    if has_parts:
        more |= parts_of(table, positions)
    return Deltas(
        handles=pack("I", [generate.handle] * count),
        attempts=pack("I", [generate.attempt] * count),
        executions=pack("Q", [execution] * count),
        positions=pack("i", positions),
        counts=pack("i", [1] * count),
        tokens=pack("i", map(token, positions)),
        texts=("",) * count if has_parts else tuple(map(word, positions)),
        logprobs=logprobs(generate, positions) if generate.sampling.logprobs >= 0 else (),
        **more,
    )


def parts_of(table: tuple[Parts, ...], positions: range) -> dict[str, object]:
    """The columns of the parts that these positions bring."""
    rows = [(row, *part) for row, position in enumerate(positions) for part in table[position]]
    indices, kinds, calls, texts = zip(*rows, strict=True)
    return {
        "part_rows": pack("i", indices),
        "part_kinds": bytes(kinds),
        "part_calls": pack("i", calls),
        "part_texts": texts,
    }


def chosen(generate: Generate) -> float:
    """The log-probability of each token of this request: it varies with the seed where the prompt
    says so."""
    return -0.5 - (generate.sampling.seed % 97 if "varied" in prompt_text(generate) else 0)


def logprobs(generate: Generate, positions: range) -> tuple[TokenLogprobs, ...]:
    k = generate.sampling.logprobs
    return tuple(
        TokenLogprobs(
            row=row,
            index=0,
            rank=1,
            ids=(token(p), *range(k)),
            values=(chosen(generate), *(-0.5 * (i + 1) for i in range(k))),
            texts=(
                word(p).encode(),
                *(f"t{i}".encode() if i else word(p).encode() for i in range(k)),
            ),
            offset=len(expected(p)),
        )
        for row, p in enumerate(positions)
    )


class Words:
    """A tokenizer: a token is a word with the spaces before it."""

    def __init__(self) -> None:
        self.texts = {token(p): word(p) for p in range(100)}
        self.ids: dict[str, int] = {}

    def encode(self, prompt: Prompt) -> list[int]:
        if prompt.ids is not None:
            return unpack("i", prompt.ids).tolist()
        text = (
            prompt.text
            if prompt.text is not None
            else "".join(f" {m.role}: {m.content}" for m in prompt.chat.messages)
        )
        found = re.findall(r"\s*\S+", text)
        for one in found:
            if one not in self.ids:
                self.ids[one] = FIRST_WORD + len(self.ids)
                self.texts[self.ids[one]] = one
        return [self.ids[one] for one in found]

    def text(self, token_id: int) -> str:
        return self.texts.get(token_id, f"<{token_id}>")

    def decode(self, ids: list[int]) -> str:
        return "".join(map(self.text, ids))

    def places(self, ids: list[int]) -> dict[str, bytes]:
        ends = itertools.accumulate(len(self.text(token_id)) for token_id in ids)
        offsets = [0, *ends][: len(ids)]
        return {"offsets": pack("i", offsets), "first": self.decode(ids[:1]).encode()}


@dataclass
class FakeStack:
    run_dir: object
    epoch: int = 1
    ready: bool = True
    tokenizers: int = 1
    has_chat_template: bool = True
    stats: dict[str, float] = field(default_factory=dict)
    received: list[Generate | Cancel | Tokenize | Detokenize] = field(default_factory=list)
    words: Words = field(default_factory=Words)
    has_text: bool = True
    has_reasoning: bool = False
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)

    def __post_init__(self) -> None:
        self.scheduler = Inbox(self.run_dir, Role.SCHEDULER, 0)
        self.outbox = Outbox()
        self.frontends: dict[int, Peer] = {}
        self.inboxes: dict[int, Inbox] = {}
        for _ in range(self.tokenizers):
            self.add_tokenizer()
        self._work: list[tuple[float, Generate, int]] = []
        self._executions = 0
        self._done = threading.Event()
        self._do: list[object] = []
        self._next_roster = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # --- for tests; each runs in the stack's thread ---

    def do(self, call) -> None:
        finished = threading.Event()
        self._do.append(lambda: (call(), finished.set()))
        assert finished.wait(5)

    def change(self, **values: object) -> None:
        self.do(
            lambda: (
                [setattr(self, name, value) for name, value in values.items()],
                self.send_rosters(),
            )
        )

    def kill_tokenizer(self, replace_it: bool = True) -> None:
        def kill() -> None:
            incarnation, inbox = next(iter(self.inboxes.items()))
            del self.inboxes[incarnation]
            inbox.close()
            self._work.clear()
            if replace_it:
                self.add_tokenizer()
            self.send_rosters()

        self.do(kill)

    def new_scheduler(self) -> None:
        self.do(
            lambda: (
                self._work.clear(),
                setattr(self, "epoch", self.epoch + 1),
                self.send_rosters(),
            )
        )

    def generates(self) -> list[Generate]:
        return [message for message in self.received if isinstance(message, Generate)]

    def cancels(self) -> set[tuple[bytes, int]]:
        return {
            pair
            for message in self.received
            if isinstance(message, Cancel)
            for pair in message.requests
        }

    def close(self) -> None:
        self._done.set()
        self._thread.join(5)
        for inbox in (self.scheduler, *self.inboxes.values()):
            inbox.close()
        self.outbox.close()

    # --- the stack itself ---

    def add_tokenizer(self) -> None:
        incarnation = new_incarnation()
        self.inboxes[incarnation] = Inbox(self.run_dir, Role.TOKENIZER, incarnation)

    def roster(self) -> Roster:
        stage = ("", 1.0) if self.ready else ("reading weights from /secret/place/model.gguf", 0.42)
        peers = [
            Peer(Role.TOKENIZER, f"t{i}", x.address, n, self.ready, *stage)
            for i, (n, x) in enumerate(self.inboxes.items())
        ]
        peers += [
            Peer(Role.WORKER, "w", "ipc:///nowhere", 5, self.ready, *stage),
            *self.frontends.values(),
        ]
        room, text = MODEL_LEN if self.ready else 0, (self.has_text, self.has_chat_template)
        return Roster(
            self.epoch,
            tuple(peers),
            room,
            VOCABULARY,
            (2,),
            *text,
            dict(self.stats),
            self.sampling_defaults,
            has_reasoning=self.has_reasoning,
        )

    def send_rosters(self) -> None:
        self._next_roster = time.monotonic() + 0.5
        for peer in self.frontends.values():
            self.outbox.send(peer.inbox, self.roster())

    def _run(self) -> None:
        while not self._done.is_set():
            self.scheduler.wait(0.002)
            for message in self.scheduler.drain():
                if (
                    isinstance(message, Hello)
                    and self.frontends.get(message.peer.incarnation) != message.peer
                ):
                    self.frontends[message.peer.incarnation] = message.peer
                    self.send_rosters()
            while self._do:
                self._do.pop(0)()
            if time.monotonic() > self._next_roster:
                self.send_rosters()
            for inbox in list(self.inboxes.values()):
                for message in inbox.drain():
                    self._receive(message)
            self._step()

    def _receive(self, message: object) -> None:
        if isinstance(message, Cancel):
            self.received.append(message)
            gone = {rid for rid, _ in message.requests}
            self._work = [item for item in self._work if item[1].rid not in gone]
        elif isinstance(message, Generate):
            self.received.append(message)
            self._executions += 1
            self._begin(message, self._executions)
        elif isinstance(message, Tokenize | Detokenize):
            self.received.append(message)
            self._answer(message)

    def _answer(self, question: Tokenize | Detokenize) -> None:
        if isinstance(question, Detokenize):
            ids = unpack("i", question.ids).tolist()
            places = self.words.places(ids) if question.with_offsets else {}
            answer = Tokenized(question.handle, text=self.words.decode(ids), **places)
        elif "refuse" in (question.prompt.text or ""):
            answer = Tokenized(
                question.handle,
                status=400,
                message="There is a word that cannot be.",
                param="prompt",
            )
        else:
            ids = self.words.encode(question.prompt)
            answer = Tokenized(
                question.handle,
                pack("i", ids),
                tuple(map(self.words.text, ids)) if question.with_texts else (),
                **(self.words.places(ids) if question.with_offsets else {}),
            )
        self.outbox.send(question.reply_to, answer)

    def _begin(self, generate: Generate, execution: int) -> None:
        script = Script.of(generate)
        if script.refuse:
            status, text, param, retry = script.refuse
            self._send(
                generate,
                end(
                    generate,
                    Finish.REFUSED,
                    status=status,
                    message=text,
                    param=param,
                    retry_after_s=retry,
                ),
            )
            return
        if script.mum:
            self._work.append((time.monotonic() + 1.5, generate, execution))
            return
        ids = self.words.encode(generate.prompt) if generate.text.return_prompt_ids else None
        started = Started(
            generate.handle,
            generate.attempt,
            3 if ids is None else len(ids),
            2,
            None if ids is None else pack("i", ids),
        )
        self._send(generate, replace_rows(generate, started=(started,)))
        if generate.sampling.prompt_logprobs >= 0:
            self._score(generate, execution)
        self._work.append((time.monotonic(), generate, execution))

    def _score(self, generate: Generate, execution: int) -> None:
        """In two runs. Token i of the prompt has the log-probability -i and the rank i; id 7 is
        always the likeliest, then 8, ..."""
        ids, k = self.words.encode(generate.prompt), generate.sampling.prompt_logprobs
        for first, last in ((1, 2), (2, len(ids))):
            run = ids[first:last]
            entry = PromptLogprobs(
                None,
                first,
                pack("i", [k + 1] * len(run)),
                pack("i", range(first, first + len(run))),
                pack("i", [one for own in run for one in (own, *range(7, 7 + k))]),
                pack(
                    "f",
                    [
                        value
                        for i in range(len(run))
                        for value in (-float(first + i), *(-0.25 * (j + 1) for j in range(k)))
                    ],
                ),
                generate.attempt,
                execution,
                tuple(
                    self.words.text(one).encode() for own in run for one in (own, *range(7, 7 + k))
                ),
                generate.handle,
            )
            self._send(generate, replace_rows(generate, prompt_logprobs=(entry,) if run else ()))

    def _step(self) -> None:
        """The next token of everything that is due; the end comes with the last one, as it does
        from a tokenizer."""
        now, work, self._work = time.monotonic(), self._work, []
        for due, generate, execution in work:
            at, script = len(generate.output) // 4, Script.of(generate)
            if due > now:
                self._work.append((due, generate, execution))
            elif at == script.hang_after:
                continue
            elif script.accident and generate.attempt == 1 and at == script.accident_after:
                self._accident(generate, script.accident, at, execution)
            elif at >= script.tokens:
                self._send(generate, end(generate, script.reason, stop_reason=script.stop_reason))
            elif at == script.tokens - 1:
                last = End(
                    generate.handle,
                    generate.attempt,
                    script.reason,
                    stop_reason=script.stop_reason,
                    reasoning_tokens=2,
                )
                self._send(generate, deltas(generate, at, 1, execution, ended=(last,)))
            else:
                self._send(generate, deltas(generate, at, 1, execution))
                longer = generate_with(generate, generate.output + pack("i", [token(at)]))
                self._work.append((now + script.delay, longer, execution))

    def _accident(self, generate: Generate, name: str, at: int, execution: int) -> None:
        if name == "gap":
            self._send(generate, deltas(generate, at + 1, 1, execution))
        else:
            self._send(
                generate,
                end(
                    generate,
                    Finish[name.upper()],
                    status=500,
                    message="cuda error at 0xdeadbeef in /opt/x.py",
                ),
            )

    def _send(self, generate: Generate, message: Deltas) -> None:
        self.outbox.send(generate.reply_to, message)


def replace_rows(generate: Generate, **more: object) -> Deltas:
    return deltas(generate, 0, 0, 0, **more)


def end(generate: Generate, finish: Finish, **more: object) -> Deltas:
    return replace_rows(generate, ended=(End(generate.handle, generate.attempt, finish, **more),))


def generate_with(generate: Generate, output: bytes) -> Generate:
    values = {name: getattr(generate, name) for name in generate.__struct_fields__}
    return Generate(**{**values, "output": output})


def tokens_of(generate: Generate) -> list[int]:
    return unpack("i", generate.output).tolist()


@contextlib.contextmanager
def fake_stack(run_dir, **options: object):
    stack = FakeStack(run_dir, **options)
    try:
        yield stack
    finally:
        stack.close()


__all__ = [
    "MODEL_LEN",
    "FakeStack",
    "Script",
    "deltas",
    "end",
    "expected",
    "fake_stack",
    "replace",
    "tokens_of",
    "word",
]
