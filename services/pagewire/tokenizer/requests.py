"""The requests of this tokenizer: which attempts live, what becomes of the messages about them. No
sockets, no threads.

Messages go in through the methods; what is to be sent collects in `to_scheduler` and `outgoing`
until the service sends it, once a drain.
"""

import logging
import time
from collections.abc import Callable, Iterable
from itertools import count

import numpy as np
from pagewire_protocol.columns import epoch_of
from pagewire_protocol.deadlines import NO_DEADLINE, TIMEOUT_STATUS, deadline_of, timeout_ms
from pagewire_protocol.grammar import Grammar
from pagewire_protocol.messages import (
    Cancel,
    End,
    Finish,
    Generate,
    Park,
    Placed,
    Role,
    Roster,
    Submit,
    Tokens,
)

from .answers.forced import UnsupportedAnswer
from .answers.model import ModelAnswers
from .decode import Decoding
from .encode import Cancelled, Encoded, Encoder, Refused, check, limit_of, truncated
from .encodings import Encodings, EncodingTask, Text
from .outgoing import OutgoingDeltas
from .rows import columns_of, entries_of, fill, pass_prompts
from .stream import ParsedStream, Stream

log = logging.getLogger("pagewire.tokenizer")
GrammarOutcome = Callable[[Grammar, int, tuple[int, ...]], str | None]


def no_grammars(grammar: Grammar, vocab_size: int, eos: tuple[int, ...]) -> str | None:
    """The outcome of every grammar where nothing can check them."""
    return "this tokenizer checks none"


class Requests:
    """All requests of this tokenizer, by their handles here and by rid."""

    def __init__(
        self,
        encoder: Encoder,
        decoding: Decoding,
        inbox: str,
        offload: Callable[[EncodingTask], None],
        grammar_outcome: GrammarOutcome = no_grammars,
        answers: ModelAnswers | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`inbox`: where the scheduler sends results. `offload` has a thread encode a long text,
        and later hands the task to `encoded`. `grammar_outcome`: see GrammarChecks.outcome; what it
        does not know yet is told to `grammar_settled`. `answers`: how the model's are taken apart;
        None without a chat template. `clock`: monotonic seconds."""
        self.to_scheduler: list[Submit | Cancel | Park] = []
        self.outgoing: dict[str, OutgoingDeltas] = {}
        """What each frontend gets at the end of this drain, by its inbox."""
        self.roster: Roster | None = None
        self.frontends: set[str] = set()
        """Inboxes."""
        self._grammar_outcome = grammar_outcome
        self._unchecked: dict[bytes, tuple[Generate, Encoded]] = {}
        """Requests that wait for their grammars to be checked, by rid."""
        self._encodings = Encodings(lambda text: encode(encoder, text), offload)
        self._decoding = decoding
        self._answers = answers
        self._inbox = inbox
        self._streams: dict[int, Stream] = {}
        self._by_rid: dict[bytes, Stream] = {}
        self._handles = count()
        self._clock = clock
        self._deadlines: dict[bytes, float] = {}
        """By rid, of requests that have one and were not submitted yet."""

    def __len__(self) -> int:
        return len(self._streams) + len(self._encodings) + len(self._unchecked)

    # --- requests ---

    def generate(self, request: Generate) -> None:
        """A new attempt: encode its prompt and submit it. One that is older than the attempt here
        is ignored."""
        if self._is_stale(request):
            return
        self._forget(request.rid)
        if request.timeout_ms:
            self._deadlines[request.rid] = deadline_of(request.timeout_ms, self._clock())
        if self.roster is None or not self.roster.max_model_len:
            self._refuse(
                request, Refused("no worker is ready yet: the model is still loading", status=503)
            )
            return
        result = self._encodings.encode(request, limit_of(request, self.roster.max_model_len))
        if result is not None:
            self._admit(request, result)

    def encoded(self, task: EncodingTask) -> bool:
        """A text comes back from `offload`: submit one of the requests that wait for it. False when
        none does any more."""
        request = self._encodings.take(task)
        if request is not None and task.result is not None:
            self._admit(request, task.result)
        return request is not None

    def grammar_settled(self, grammar: Grammar) -> None:
        """It has been found out whether `grammar` is one: the requests that wait for that go on."""
        waiting = [entry for entry in self._unchecked.values() if entry[0].grammar == grammar]
        for request, encoded in waiting:
            del self._unchecked[request.rid]
            self._submit(request, encoded)

    def cancel(self, message: Cancel) -> None:
        """The scheduler ends what it has; what is still being encoded ends here."""
        for rid, attempt in message.requests:
            request = self._waiting(rid)
            if request is not None and request.attempt <= attempt:
                self._forget(rid)
                end = End(request.handle, request.attempt, Finish.CANCELLED)
                self._outgoing_to(request.reply_to).ended.append(end)
        self.to_scheduler.append(message)

    def not_sent(self, message: Submit | Cancel | Park) -> None:
        """The scheduler's queue is full. A cancellation may be lost: its request has ended here, or
        ends with the scheduler; so may a Park, which comes again."""
        stream = self._streams.get(message.handle) if isinstance(message, Submit) else None
        if stream is not None:
            text = "the scheduler does not take requests; try again later"
            self._end(stream, stream.refused(text, 503, 1))

    def _is_stale(self, request: Generate) -> bool:
        present = self._by_rid.get(request.rid) or self._waiting(request.rid)
        return present is not None and present.attempt >= request.attempt

    def _waiting(self, rid: bytes) -> Generate | None:
        """A request that has not been submitted yet."""
        unchecked = self._unchecked.get(rid)
        return unchecked[0] if unchecked else self._encodings.waiting(rid)

    def _all_waiting(self) -> list[Generate]:
        return [
            *self._encodings.all_waiting(),
            *(request for request, _ in self._unchecked.values()),
        ]

    def _admit(self, request: Generate, result: Encoded | Refused) -> None:
        """The prompt is known, or why there is none."""
        try:
            if isinstance(result, Refused):
                raise result
            if self._answers is not None:
                opens_reasoning = result.opens_reasoning
                request = self._answers.with_grammar(request, opens_reasoning)
        except (Refused, UnsupportedAnswer) as refusal:
            self._refuse(request, as_refused(refusal))
            return
        self._submit(request, result)

    def _submit(self, request: Generate, result: Encoded) -> None:
        try:
            if self.roster is None:
                raise Refused("the scheduler is gone", status=503)
            prompt = truncated(request, result.prompt, self.roster.max_model_len)
            sampling = check(request, result._replace(prompt=prompt), self.roster)
            _check_output(request.output, self._decoding.size)
            if not self._is_checked(request, self.roster):
                self._unchecked[request.rid] = request, result
                return
            left_ms = self._time_left_ms(request)
        except Refused as refusal:
            self._refuse(request, refusal)
            return
        stream = self._open(request, prompt, result.opens_reasoning)
        if stream.stop_string is not None:  # the output so far ends with it
            self._end(stream, stream.stopped())
            return
        self.to_scheduler.append(
            Submit(
                request.rid,
                request.attempt,
                stream.handle,
                self._inbox,
                prompt,
                request.output,
                sampling,
                request.priority,
                request.cache_salt,
                request.kind,
                request.model,
                request.adapter,
                request.grammar,
                request.worker_deaths,
                left_ms,
            )
        )

    def _time_left_ms(self, request: Generate) -> int:
        """As in Submit. Raises Refused when the request's time is over."""
        deadline = self._deadlines.pop(request.rid, NO_DEADLINE)
        now = self._clock()
        if deadline <= now:
            raise Refused(
                f"the request's time of {request.timeout_ms} ms was over before its prompt was encoded",
                status=TIMEOUT_STATUS,
            )
        return timeout_ms(deadline, now)

    def _is_checked(self, request: Generate, roster: Roster) -> bool:
        """Whether it is known that the request's grammar is one. Raises Refused."""
        if request.grammar is None:
            return True
        wrong = self._grammar_outcome(request.grammar, roster.vocab_size, roster.eos_token_ids)
        if wrong:
            raise Refused(f"the grammar is not supported: {wrong}", request.grammar.param)
        return wrong is not None

    def _open(self, request: Generate, prompt: bytes, opens_reasoning: bool) -> Stream:
        options = request.text
        parsing = self._answers.parser(request, opens_reasoning) if self._answers else None
        decoder = self._decoding.start(
            silent=not options.detokenize,
            skip_special=options.skip_special_tokens and parsing is None,
            spaces_between_special=options.spaces_between_special_tokens,
            at_start=self._decoding.begins_text(np.frombuffer(prompt, np.int32)),
        )
        outgoing = self._outgoing_to(request.reply_to)
        handle = next(self._handles)
        if parsing is None:
            stream = Stream(request, handle, prompt, decoder, outgoing)
        else:
            stream = ParsedStream(request, handle, prompt, decoder, outgoing, parsing)
        if request.output:
            stream.replay(np.frombuffer(request.output, np.int32).tolist())
        self._streams[stream.handle] = self._by_rid[request.rid] = stream
        return stream

    def _refuse(self, request: Generate, refusal: Refused) -> None:
        self._deadlines.pop(request.rid, None)
        end = End(
            request.handle,
            request.attempt,
            Finish.REFUSED,
            status=refusal.status,
            message=refusal.message,
            param=refusal.param,
            retry_after_s=1 if refusal.status == 503 else 0,
        )
        self._outgoing_to(request.reply_to).ended.append(end)

    # --- results ---

    def tokens(self, batch: list[Tokens]) -> None:
        """All Tokens messages of a drain. If the columns of one do not fit each other, any stream
        may miss tokens: all are lost."""
        for message in batch:
            for placed in message.placed:
                self._placed(placed)
        self._lose(
            pass_prompts(batch, self._streams, self._decoding),
            "log-probabilities were damaged on the way to the tokenizer",
        )
        try:
            columns = columns_of(batch, self._decoding.size)
            entries = entries_of(batch, self._decoding)
        except ValueError as error:
            log.error(
                "dropped %d Tokens message(s) and all %d streams: %s",
                len(batch),
                len(self._streams),
                error,
            )
            self.lose_streams("a step's result was damaged on the way to the tokenizer")
            return
        ended = [end for message in batch for end in message.ended]
        self._hide_stop_tokens(ended, columns.handles, columns.positions)
        stopped, lost = fill(self._streams, columns, entries)
        for stream in stopped:
            self._end(stream, stream.stopped())
            self.to_scheduler.append(Cancel(((stream.rid, stream.attempt),)))
        self._lose(lost, "tokens were lost on the way to the tokenizer")
        for end in ended:
            self._ended(end)

    def _placed(self, placed: Placed) -> None:
        stream = self._streams.get(placed.handle)
        if stream is not None:
            stream.outgoing.started.append(stream.started(placed.cached_tokens))

    def _hide_stop_tokens(self, ended: list[End], handles: list[int], positions: list[int]) -> None:
        """The last token of a stream that ends by a stop token is that token: it counts, and has no
        text. Of several rows of one stream, the last one decides."""
        stops = {end.handle for end in ended if end.finish is Finish.STOP}
        if not stops:
            return
        for handle, position in zip(handles, positions, strict=True):
            stream = self._streams.get(handle)
            if handle in stops and stream is not None and not stream.includes_stop:
                stream.hide_from(position)

    def _ended(self, end: End) -> None:
        stream = self._streams.get(end.handle)
        if stream is None:
            return
        if end.finish in (Finish.STOP, Finish.LENGTH):
            stream.send_rest()
            if stream.stop_string is not None:
                self._end(stream, stream.stopped())
                return
        self._end(stream, stream.ended(end))

    def lose_streams(self, message: str) -> None:
        """Every stream may miss tokens: their owners send them again."""
        self._lose(list(self._streams.values()), message)

    def fail(self, request: Generate) -> None:
        """The request could not be handled, by a fault of this program."""
        self._forget(request.rid)
        self._refuse(request, Refused("the request could not be handled", status=500))

    def _lose(self, streams: Iterable[Stream], message: str) -> None:
        """The scheduler may still compute them: their owners need not send them again, and may be
        gone."""
        lost = list(streams)
        for stream in lost:
            self._end(stream, stream.lost(message))
        if lost:
            self.to_scheduler.append(Cancel(tuple((stream.rid, stream.attempt) for stream in lost)))

    def _end(self, stream: Stream, end: End) -> None:
        stream.outgoing.ended.append(end)
        self._forget(stream.rid)

    # --- the other services ---

    def on_roster(self, roster: Roster, new_epoch: bool) -> set[str]:
        """The newest roster. Returns the inboxes of frontends that are gone; their requests are
        cancelled."""
        self.roster = roster
        self._decoding.grow(roster.vocab_size)
        frontends = {
            peer.inbox for peer in roster.peers if peer.role is Role.FRONTEND and peer.inbox
        }
        # A new scheduler has not heard from everyone yet: a frontend that its first roster does not
        # list may well be alive.
        gone = set[str]() if new_epoch else self.frontends - frontends
        self.frontends = frontends
        if new_epoch:
            self._lose_former_epochs(roster.epoch)
        for inbox in gone:
            self.drop_frontend(inbox)
        return gone

    def lose_all(self, message: str) -> None:
        """Every request may miss tokens, or is one that the scheduler knows nothing of. Owners that
        know it have sent their requests elsewhere, and the others hear of it now."""
        self.lose_streams(message)
        for request in self._all_waiting():
            end = End(request.handle, request.attempt, Finish.LOST, message=message)
            self._outgoing_to(request.reply_to).ended.append(end)
            self._forget(request.rid)

    def drop_frontend(self, inbox: str) -> None:
        """Cancel the requests of the frontend with this inbox: it is gone, or reads nothing."""
        orphans = [stream for stream in self._streams.values() if stream.reply_to == inbox]
        if orphans:
            self.to_scheduler.append(
                Cancel(tuple((stream.rid, stream.attempt) for stream in orphans))
            )
        for stream in orphans:
            self._forget(stream.rid)
        for request in self._all_waiting():
            if request.reply_to == inbox:
                self._forget(request.rid)
        self.outgoing.pop(inbox, None)

    def _lose_former_epochs(self, epoch: int) -> None:
        """What the former scheduler had is gone. A frontend that heard of the new one first has
        resubmitted already, and which of the two schedulers has that attempt cannot be known here.
        So each frontend is told: it is necessary for those that have not heard, and harmless for
        the others."""
        former = [
            stream for stream in self._streams.values() if epoch_of(stream.execution) != epoch
        ]
        self._lose(former, "the scheduler was replaced")

    def _forget(self, rid: bytes) -> None:
        self._encodings.forget(rid)
        self._unchecked.pop(rid, None)
        self._deadlines.pop(rid, None)
        stream = self._by_rid.pop(rid, None)
        if stream is not None:
            self._streams.pop(stream.handle, None)

    def _outgoing_to(self, inbox: str) -> OutgoingDeltas:
        outgoing = self.outgoing.get(inbox)
        if outgoing is None:
            outgoing = self.outgoing[inbox] = OutgoingDeltas()
        return outgoing


def as_refused(error: Refused | UnsupportedAnswer) -> Refused:
    """The refusal of what no grammar can be made of."""
    return error if isinstance(error, Refused) else Refused(str(error), error.param)


def _check_output(output: bytes, vocab_size: int) -> None:
    if output and (len(output) % 4 or np.frombuffer(output, np.uint32).max() >= vocab_size):
        raise Refused(
            "the output so far, sent with a resubmission, has values that are no token ids"
        )


def encode(
    encoder: Encoder, text: Text, cancelled: Callable[[], bool] = lambda: False
) -> Encoded | Refused:
    """The text as token ids, or why it has none; safe in any thread."""
    try:
        return encoder.encode_all(
            text.prompt, text.add_special_tokens, text.bad_words, text.limit, cancelled
        )
    except Refused as refusal:
        return refusal
    except Cancelled:
        return Refused("the request was cancelled while its prompt was encoded", status=503)
    except Exception as error:
        # The tokenizers library raises bare Exception; one prompt must not end the service.
        log.exception("a prompt could not be encoded")
        return Refused(f"the prompt could not be encoded ({type(error).__name__})", status=500)
