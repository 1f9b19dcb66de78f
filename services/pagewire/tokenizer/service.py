"""The tokenizer service: a loop around one inbox. It moves messages between sockets and `Requests`,
and decides nothing about them.

The tokenizer is built, and long prompts are encoded, in threads; they hand their results over in a
queue and wake the loop. Tokens pass at once. New requests are taken a few milliseconds at a time,
so that however many arrive together, and whatever their texts take, tokens pass between them.
"""

import contextlib
import ctypes
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from pagewire_protocol.columns import unpack
from pagewire_protocol.messages import (
    Cancel,
    CancelQuery,
    Detokenize,
    End,
    Finish,
    Generate,
    Park,
    Prompt,
    Role,
    Roster,
    Tokenize,
    Tokenized,
    TokenizerFacts,
    Tokens,
    ToTokenizer,
)
from pagewire_protocol.sampling import SamplingDefaults

from ..checkpoint import model_types
from ..checkpoint.chat_templates import read_option
from ..checkpoint.sampling_defaults import sampling_defaults
from ..config import ModelConfig, RunConfig, TokenizerConfig, template_defaults
from ..hub.huggingface import cached, has_own_tokenizer, resolve, tokenizer_model
from ..process.node import MANY_OBJECTS, Node, settle_gc
from .answers.model import ModelAnswers
from .decode import Decoding
from .encode import Encoder
from .encodings import EncodingTask
from .grammar_checks import GrammarChecks
from .lanes import SHORT, Lanes
from .load import Loaded, NoTokenizer, load
from .longest_token import longest_token
from .outgoing import OutgoingDeltas
from .queries import Query, QueryTask, answer, is_long, still_loading
from .requests import Requests, encode
from .template import ChatTemplate

log = logging.getLogger("pagewire.tokenizer")
WAKE_S = 0.5
"""How long the loop waits for a message before it sends a heartbeat."""
THREADS = 2
"""For long prompts and queries; the first takes shorter ones only."""
SLICE_S: Final = 0.005
"""How long new requests are taken before tokens are looked for again."""
SWITCH_S: Final = 0.001
"""After which a thread that computes lets the loop's go on: templates are rendered in Python."""
Arrival = Generate | Cancel | Park | CancelQuery | Query | EncodingTask
"""What waits for its turn in the loop: everything but tokens and rosters."""
WARMUPS = 3
WARMUP_TEXT = "The quick brown fox jumps over the lazy dog, 1234 times.\n" * 20


class Text:
    """What was loaded: encoder, decoders, and the facts that the other services learn of them."""

    def __init__(
        self,
        loaded: Loaded | None,
        config: TokenizerConfig | None = None,
        defaults: SamplingDefaults | None = None,
    ) -> None:
        """Raises ValueError."""
        config = config or TokenizerConfig()
        tokenizer = loaded.tokenizer if loaded else None
        template = None
        if loaded and loaded.chat_template:
            variables = template_defaults(config)
            template = ChatTemplate(loaded.chat_template, loaded.names, defaults=variables)
        self.decoding = Decoding(tokenizer)
        self.answers: ModelAnswers | None = None
        if template is not None:
            self.answers = ModelAnswers(
                template,
                tokenizer,
                config.tool_call_parser,
                config.reasoning_parser,
                loaded.response_template if loaded else "",
            )
        self.encoder = Encoder(tokenizer, template, self.decoding, self.answers)
        self.facts = TokenizerFacts(
            tokenizer is not None,
            template is not None,
            self.decoding.size,
            defaults or SamplingDefaults(),
            longest_token(tokenizer, self.decoding.longest) if tokenizer else 0,
            self.answers is not None and self.answers.has_reasoning,
            self.answers.format.name if self.answers else "",
        )

    def warm_up(self) -> None:
        """Encode and decode something, so that what the tokenizers library makes on first use is
        there before the first request."""
        with contextlib.suppress(Exception):  # a vocabulary need not have these letters
            for _ in range(WARMUPS):
                column = self.encoder.encode(Prompt(text=WARMUP_TEXT), add_special_tokens=True)
                self.decoding.decode(unpack("i", column).tolist())


def load_text(model: ModelConfig, config: TokenizerConfig) -> Text:
    """What the model's files or --tokenizer hold; no tokenizer under --skip-tokenizer-init. Raises
    ValueError, OSError."""
    if model.skip_tokenizer_init:
        return Text(None, defaults=_defaults(model, Path(model.model)))
    if has_own_tokenizer(model):
        loaded = _load(resolve(tokenizer_model(model), log.info), model)
        # The model itself is not fetched for the sake of this one file.
        path = cached(model) or Path(model.model)
        return Text(loaded, config, _defaults(model, path))
    path = resolve(model, log.info)
    defaults = _defaults(model, path)
    try:
        return Text(_load(path, model), config, defaults)
    except NoTokenizer:
        # That the model cannot be served comes first: no tokenizer would help it.
        model_types.check(path, model.trust_remote_code)
        raise


def _load(path: Path, model: ModelConfig) -> Loaded:
    """With the chat template of --chat-template, where there is one."""
    loaded = load(path)
    if model.chat_template:
        return loaded._replace(chat_template=read_option(model.chat_template))
    return loaded


def _defaults(model: ModelConfig, path: Path) -> SamplingDefaults:
    return sampling_defaults(model.generation_config, path)


class Service:
    """The parts of a tokenizer process, wired to its inbox."""

    def __init__(self, run: RunConfig, model: ModelConfig, config: TokenizerConfig) -> None:
        """Raises PermissionError and ValueError for a run directory that cannot be used."""
        node: Node[ToTokenizer] = Node(run.run_dir, Role.TOKENIZER, run.name)
        self.inbox = node.inbox
        self.outbox = node.outbox
        self.members = node.membership
        self.stopping = False
        self.requests: Requests | None = None
        self._model, self._config = model, config
        self._grammars = GrammarChecks(model, self.inbox.watch, self.inbox.unwatch)
        self._arrivals: deque[Arrival] = deque()
        self._lanes: Lanes[EncodingTask | QueryTask] = Lanes()
        self._query_tasks: dict[tuple[str, int], QueryTask] = {}
        """By the inbox and the handle that the answer goes to."""
        self._encoded: queue.SimpleQueue[EncodingTask] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[str, Tokenized]] = queue.SimpleQueue()
        self._encoder: Encoder | None = None
        self._loaded: queue.SimpleQueue[Text | Exception] = queue.SimpleQueue()

    def loop(self) -> None:
        """Serve until `stop`. Raises what kept the tokenizer from loading."""
        self.members.loading("loading the tokenizer")
        threading.Thread(target=self._load, name="load", daemon=True).start()
        while not self.stopping:
            self.inbox.wait(0.0 if self._arrivals else WAKE_S)
            if self.requests is None:
                self._finish_loading()
            self._drain()
            self._send()
            self.members.progress += 1
            self.members.busy = bool(self.requests or self._arrivals)
            self.members.tick(time.monotonic())
        self.members.goodbye()

    def stop(self) -> None:
        """Ends the loop; safe from a thread or a signal handler."""
        self.stopping = True
        self.inbox.wake()

    def close(self) -> None:
        """End the threads and close the sockets."""
        self._lanes.close()
        self._grammars.close()
        self.inbox.close()
        self.outbox.close(linger_ms=200)

    def _load(self) -> None:
        try:
            text = load_text(self._model, self._config)
            text.warm_up()
            self._loaded.put(text)
        except Exception as error:
            self._loaded.put(error)
        self._wake()

    def _wake(self) -> None:
        if not self.stopping:
            self.inbox.wake()

    def _finish_loading(self) -> None:
        if self._loaded.empty():
            return
        text = self._loaded.get()
        if isinstance(text, Exception):
            raise text
        self._encoder = text.encoder
        self.requests = Requests(
            text.encoder,
            text.decoding,
            self.inbox.address,
            self._lanes.put,
            self._grammars.outcome,
            text.answers,
        )
        for index in range(THREADS):
            threading.Thread(
                target=self._work,
                args=(text.encoder, index == 0),
                name=f"encode-{index}",
                daemon=True,
            ).start()
        if self.members.roster is not None:
            self._follow_roster(self.requests, self.members.roster, new_epoch=False)
        settle_gc(MANY_OBJECTS)
        self.members.ready(tokenizer=text.facts)
        answers = text.answers
        log.info(
            "ready: %d tokens, chat template: %s",
            text.facts.vocab_size,
            f"yes, tool calls: {answers.format.name}, reasoning: {answers.reasoning_name}"
            if answers
            else "no",
        )

    def _drain(self) -> None:
        steps: list[Tokens] = []
        for message in self.inbox.drain():
            match message:
                case Tokens():
                    steps.append(message)
                case Roster():
                    self._on_roster(message)
                case _:
                    self._arrivals.append(message)
            self.members.tick(time.monotonic())
        while not self._encoded.empty():
            self._arrivals.append(self._encoded.get())
        if self.requests is not None and steps:
            self._pass_tokens(self.requests, steps)
        if self.requests is not None:
            for grammar in self._grammars.settle():
                self.requests.grammar_settled(grammar)
        self._take_arrivals(time.monotonic)

    def _pass_tokens(self, requests: Requests, steps: list[Tokens]) -> None:
        try:
            requests.tokens(steps)
        except Exception:
            # A peer's message ends no service. Which streams miss tokens cannot be known.
            log.exception("Tokens could not be handled; all %d streams are lost", len(requests))
            requests.lose_streams("a step's result was damaged on the way to the tokenizer")

    def _take_arrivals(self, clock: Callable[[], float]) -> None:
        """Until none is left, or SLICE_S is over."""
        end = clock() + SLICE_S
        while self._arrivals:
            arrival = self._arrivals.popleft()
            try:
                self._take(arrival)
            except Exception:
                # A peer's message ends no service.
                log.exception("a %s could not be handled", type(arrival).__name__)
                self._fail(arrival)
            if clock() >= end:
                break

    def _fail(self, arrival: Arrival) -> None:
        """Whoever waits for what became of it is told that nothing did."""
        if isinstance(arrival, Generate) and self.requests is not None:
            self.requests.fail(arrival)
        elif isinstance(arrival, Tokenize | Detokenize):
            failure = Tokenized(arrival.handle, status=500, message="the query failed")
            self._answers.put((arrival.reply_to, failure))

    def _take(self, arrival: Arrival) -> None:
        match arrival:
            case Generate():
                self._generate(arrival)
            case Tokenize() | Detokenize():
                self._answer_query(arrival)
            case Cancel() if self.requests is not None:
                self.requests.cancel(arrival)
            case Park() if self.requests is not None:
                self.requests.to_scheduler.append(arrival)
            case CancelQuery():
                task = self._query_tasks.pop((arrival.reply_to, arrival.handle), None)
                if task is not None:
                    task.cancelled = True
            case EncodingTask():
                if self.requests is not None and self.requests.encoded(arrival):
                    self._arrivals.appendleft(arrival)
            case _:
                pass

    def _generate(self, request: Generate) -> None:
        if self.requests is not None:
            self.requests.generate(request)
            return
        outgoing = OutgoingDeltas()
        message = "this tokenizer is still loading"
        outgoing.ended.append(
            End(
                request.handle,
                request.attempt,
                Finish.REFUSED,
                status=503,
                message=message,
                retry_after_s=1,
            )
        )
        self.outbox.send(request.reply_to, outgoing.take())

    def _answer_query(self, query: Query) -> None:
        if self._encoder is None:
            self._answers.put((query.reply_to, still_loading(query)))
        elif is_long(query):
            task = self._query_tasks[query.reply_to, query.handle] = QueryTask(query)
            self._lanes.put(task)
        else:
            self._answers.put((query.reply_to, answer(self._encoder, query)))

    def _on_roster(self, roster: Roster) -> None:
        new_epoch = self.members.on_roster(roster)
        if self.requests is not None and self.members.was_forgotten:
            self.requests.lose_all("the scheduler had given up this tokenizer")
        if self.requests is not None and self.members.roster is roster:
            self._follow_roster(self.requests, roster, new_epoch)

    def _follow_roster(self, requests: Requests, roster: Roster, new_epoch: bool) -> None:
        gone = requests.on_roster(roster, new_epoch)
        for inbox in gone:
            self.outbox.forget(inbox)
        if gone:
            self._drop_arrivals(gone)
        for inbox in requests.frontends:
            self.outbox.reach(inbox)

    def _drop_arrivals(self, inboxes: set[str]) -> None:
        """Nobody waits at these inboxes for what has not been taken yet."""
        self._arrivals = deque(
            arrival for arrival in self._arrivals if getattr(arrival, "reply_to", "") not in inboxes
        )
        for (inbox, _), task in self._query_tasks.items():
            task.cancelled = task.cancelled or inbox in inboxes

    def _work(self, encoder: Encoder, short_only: bool) -> None:
        """What a thread does: long texts, one after the other."""
        while (task := self._lanes.take(short_only)) is not None:
            if isinstance(task, EncodingTask):
                task.result = encode(encoder, task.text, partial(getattr, task, "cancelled"))
                self._encoded.put(task)
            else:
                query = task.query
                self._answers.put((query.reply_to, answer(encoder, query)))
            if task.size > SHORT:
                _return_memory()
            self._wake()

    def _send(self) -> None:
        while not self._answers.empty():
            inbox, answered = self._answers.get()
            task = self._query_tasks.pop((inbox, answered.handle), None)
            if task is None or not task.cancelled:
                self.outbox.send(inbox, answered)
        requests = self.requests
        if requests is None:
            return
        for inbox, outgoing in list(requests.outgoing.items()):
            if outgoing and not all(
                self.outbox.send(inbox, deltas) for deltas in outgoing.messages()
            ):
                log.warning("a frontend reads nothing any more; its requests are cancelled")
                requests.drop_frontend(inbox)
        messages = requests.to_scheduler
        requests.to_scheduler = []
        for message in messages:
            if not self.outbox.send(self.members.scheduler, message):
                log.error(
                    "the scheduler reads nothing: could not send a %s", type(message).__name__
                )
                requests.not_sent(message)


def _return_memory() -> None:
    """The C library keeps what a long text took, hundreds of megabytes; give it back to the
    system."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def run(run: RunConfig, model: ModelConfig, config: TokenizerConfig) -> int:
    """Serve until SIGTERM or SIGINT. Returns 0 after an orderly end. Raises ValueError, OSError
    when the tokenizer cannot be loaded."""
    # One prompt at a time needs no pool of threads, one for each core.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.setswitchinterval(SWITCH_S)
    service = Service(run, model, config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    try:
        service.loop()
    finally:
        service.close()
    return 0
