"""The tokenizer service: a loop around one inbox. It moves messages between sockets and `Requests`,
and decides nothing about them.

The tokenizer is built, and long prompts are encoded, in threads; they hand their results over in a
queue and wake the loop.
"""

import contextlib
import logging
import os
import queue
import signal
import threading
import time
from pathlib import Path

from pagewire_protocol.columns import unpack
from pagewire_protocol.messages import (
    Cancel,
    Detokenize,
    End,
    Finish,
    Generate,
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
from ..checkpoint.sampling_defaults import sampling_defaults
from ..config import ModelConfig, RunConfig, TokenizerConfig
from ..hub.huggingface import cached, has_own_tokenizer, resolve, tokenizer_model
from ..process.node import MANY_OBJECTS, Node, settle_gc
from .decode import Decoding
from .encode import Encoded, Encoder, Refused
from .load import Loaded, NoTokenizer, load
from .outgoing import OutgoingDeltas
from .queries import Query, answer, is_long, still_loading
from .requests import Requests, encode
from .template import ChatTemplate, read_option

log = logging.getLogger("pagewire.tokenizer")
WAKE_S = 0.5
"""How long the loop waits for a message before it sends a heartbeat."""
THREADS = 2
"""For long prompts and queries."""
WARMUPS = 3
WARMUP_TEXT = "The quick brown fox jumps over the lazy dog, 1234 times.\n" * 20


class Text:
    """What was loaded: encoder, decoders, and the facts that the other services learn of them."""

    def __init__(
        self, loaded: Loaded | None, option: str = "", defaults: SamplingDefaults | None = None
    ) -> None:
        tokenizer = loaded.tokenizer if loaded else None
        source = read_option(option) if option else loaded.chat_template if loaded else ""
        template = (
            ChatTemplate(source, loaded.names if loaded else {}) if source and tokenizer else None
        )
        self.decoding = Decoding(tokenizer)
        self.encoder = Encoder(tokenizer, template, self.decoding)
        self.facts = TokenizerFacts(
            tokenizer is not None,
            template is not None,
            self.decoding.size,
            defaults or SamplingDefaults(),
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
        loaded = load(resolve(tokenizer_model(model), log.info))
        # The model itself is not fetched for the sake of this one file.
        path = cached(model) or Path(model.model)
        return Text(loaded, config.chat_template, _defaults(model, path))
    path = resolve(model, log.info)
    defaults = _defaults(model, path)
    try:
        return Text(load(path), config.chat_template, defaults)
    except NoTokenizer:
        # That the model cannot be served comes first: no tokenizer would help it.
        model_types.check(path, model.trust_remote_code)
        raise


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
        self._to_encode: queue.SimpleQueue[tuple[Encoder, Generate | Query] | None] = (
            queue.SimpleQueue()
        )
        self._encoded: queue.SimpleQueue[tuple[Generate, Encoded | Refused]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[str, Tokenized]] = queue.SimpleQueue()
        self._encoder: Encoder | None = None
        self._loaded: queue.SimpleQueue[Text | Exception] = queue.SimpleQueue()

    def loop(self) -> None:
        """Serve until `stop`. Raises what kept the tokenizer from loading."""
        self.members.loading("loading the tokenizer")
        for work in (self._load, *[self._encode_long] * THREADS):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        while not self.stopping:
            self.inbox.wait(WAKE_S)
            if self.requests is None:
                self._finish_loading()
            self._drain()
            self._send()
            self.members.progress += 1
            self.members.busy = bool(self.requests)
            self.members.tick(time.monotonic())
        self.members.goodbye()

    def stop(self) -> None:
        """Ends the loop; safe from a thread or a signal handler."""
        self.stopping = True
        self.inbox.wake()

    def close(self) -> None:
        """End the threads and close the sockets."""
        for _ in range(THREADS):
            self._to_encode.put(None)
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
            lambda request: self._offload(text.encoder, request),
        )
        if self.members.roster is not None:
            self._follow_roster(self.requests, self.members.roster, new_epoch=False)
        settle_gc(MANY_OBJECTS)
        self.members.ready(tokenizer=text.facts)
        log.info(
            "ready: %d tokens, chat template: %s",
            text.facts.vocab_size,
            "yes" if text.facts.has_chat_template else "no",
        )

    def _drain(self) -> None:
        steps: list[Tokens] = []
        for message in self.inbox.drain():
            match message:
                case Tokens():
                    steps.append(message)
                case Generate():
                    self._generate(message)
                case Tokenize() | Detokenize():
                    self._answer_query(message)
                case Cancel() if self.requests is not None:
                    self.requests.cancel(message)
                case Roster():
                    self._on_roster(message)
                case _:
                    pass
            self.members.tick(time.monotonic())
        if self.requests is not None:
            while not self._encoded.empty():
                self.requests.encoded(*self._encoded.get())
            if steps:
                self.requests.tokens(steps)

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
            self._to_encode.put((self._encoder, query))
        else:
            self._answers.put((query.reply_to, answer(self._encoder, query)))

    def _on_roster(self, roster: Roster) -> None:
        new_epoch = self.members.on_roster(roster)
        if self.requests is not None and self.members.was_forgotten:
            self.requests.lose_all("the scheduler had given up this tokenizer")
        if self.requests is not None and self.members.roster is roster:
            self._follow_roster(self.requests, roster, new_epoch)

    def _follow_roster(self, requests: Requests, roster: Roster, new_epoch: bool) -> None:
        for inbox in requests.on_roster(roster, new_epoch):
            self.outbox.forget(inbox)
        for inbox in requests.frontends:
            self.outbox.reach(inbox)

    def _offload(self, encoder: Encoder, request: Generate) -> None:
        self._to_encode.put((encoder, request))

    def _encode_long(self) -> None:
        while (job := self._to_encode.get()) is not None:
            encoder, request = job
            if isinstance(request, Generate):
                self._encoded.put((request, encode(encoder, request)))
            else:
                self._answers.put((request.reply_to, answer(encoder, request)))
            self._wake()

    def _send(self) -> None:
        while not self._answers.empty():
            self.outbox.send(*self._answers.get())
        requests = self.requests
        if requests is None:
            return
        for inbox, outgoing in list(requests.outgoing.items()):
            if outgoing and not all(
                self.outbox.send(inbox, deltas) for deltas in outgoing.messages()
            ):
                log.warning("a frontend reads nothing any more; its requests are cancelled")
                requests.drop_frontend(inbox)
        messages, requests.to_scheduler = requests.to_scheduler, []
        for message in messages:
            if not self.outbox.send(self.members.scheduler, message):
                log.error(
                    "the scheduler reads nothing: could not send a %s", type(message).__name__
                )
                requests.not_sent(message)


def run(run: RunConfig, model: ModelConfig, config: TokenizerConfig) -> int:
    """Serve until SIGTERM or SIGINT. Returns 0 after an orderly end. Raises ValueError, OSError
    when the tokenizer cannot be loaded."""
    # One prompt at a time needs no pool of threads, one for each core.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    service = Service(run, model, config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    try:
        service.loop()
    finally:
        service.close()
    return 0
