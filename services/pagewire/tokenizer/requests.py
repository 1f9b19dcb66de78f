"""The requests of this tokenizer: which attempts live, what becomes of the messages about them. No
sockets, no threads, no clock.

Messages go in through the methods; what is to be sent collects in `to_scheduler` and `mails` until
the service sends it, once a drain.
"""

import logging
from collections.abc import Callable
from itertools import count

import numpy as np
from msgspec.structs import replace
from pagewire_protocol.columns import epoch_of
from pagewire_protocol.messages import (
    Cancel,
    End,
    Finish,
    Generate,
    Placed,
    Role,
    Roster,
    Started,
    Submit,
    Tokens,
)

from .decode import Decoding
from .encode import LONG, Encoded, Encoder, Refused, check, truncated, work_of
from .rows import columns_of, entries_of, fill, pass_prompts
from .stream import Mail, Stream

log = logging.getLogger("pagewire.tokenizer")


class Requests:
    def __init__(
        self, encoder: Encoder, decoding: Decoding, inbox: str, offload: Callable[[Generate], None]
    ) -> None:
        """`inbox`: where the scheduler sends results. `offload` encodes a long prompt elsewhere and
        later hands it to `encoded`."""
        self.to_scheduler: list[Submit | Cancel] = []
        self.mails: dict[str, Mail] = {}
        self.roster: Roster | None = None
        self._encoder, self._decoding, self._inbox, self._offload = (
            encoder,
            decoding,
            inbox,
            offload,
        )
        self._streams: dict[int, Stream] = {}
        self._by_rid: dict[bytes, Stream] = {}
        self._encoding: dict[bytes, Generate] = {}
        self._handles = count()
        self.frontends: set[str] = set()
        """Inboxes."""

    def __len__(self) -> int:
        return len(self._streams) + len(self._encoding)

    # --- requests
    #   ----------------------------------------------------------------------------------------------------

    def generate(self, request: Generate) -> None:
        if self._is_stale(request):
            return
        self._forget(request.rid)
        if self.roster is None or not self.roster.max_model_len:
            self._refuse(
                request, Refused("no worker is ready yet: the model is still loading", status=503)
            )
        elif work_of(request) > LONG:
            self._encoding[request.rid] = request
            self._offload(request)
        else:
            self._admit(request, encode(self._encoder, request))

    def encoded(self, request: Generate, result: Encoded | Refused) -> None:
        """A prompt comes back from `offload`. It may have been cancelled or replaced meanwhile."""
        if self._encoding.get(request.rid) is request:
            del self._encoding[request.rid]
            self._admit(request, result)

    def cancel(self, message: Cancel) -> None:
        """The scheduler ends what it has; what is still being encoded ends here."""
        for rid, attempt in message.requests:
            request = self._encoding.get(rid)
            if request is not None and request.attempt <= attempt:
                del self._encoding[rid]
                self._mail(request.reply_to).ended.append(
                    End(request.handle, request.attempt, Finish.CANCELLED)
                )
        self.to_scheduler.append(message)

    def unsent(self, message: Submit | Cancel) -> None:
        """The scheduler's queue is full. A cancellation is lost without harm: what it meant has
        ended here, or ends with the scheduler."""
        stream = self._streams.get(message.handle) if isinstance(message, Submit) else None
        if stream is not None:
            text = "the scheduler does not take requests; try again later"
            self._end(
                stream,
                End(0, stream.attempt, Finish.REFUSED, status=503, message=text, retry_after_s=1),
            )

    def _is_stale(self, request: Generate) -> bool:
        known = self._by_rid.get(request.rid) or self._encoding.get(request.rid)
        return known is not None and known.attempt >= request.attempt

    def _admit(self, request: Generate, result: Encoded | Refused) -> None:
        try:
            if isinstance(result, Refused):
                raise result
            if self.roster is None:
                raise Refused("the scheduler is gone", status=503)
            prompt = truncated(request, result.prompt, self.roster.max_model_len)
            sampling = check(request, result._replace(prompt=prompt), self.roster)
            _check_output(request.output, self._decoding.size)
        except Refused as refusal:
            self._refuse(request, refusal)
            return
        stream = self._open(request, prompt)
        if stream.found is not None:
            self._end(stream, End(0, stream.attempt, Finish.STOP, stream.found))
            return
        numbers = request.rid, request.attempt, stream.handle
        self.to_scheduler.append(
            Submit(
                *numbers,
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
            )
        )

    def _open(self, request: Generate, prompt: bytes) -> Stream:
        options = request.text
        decoder = self._decoding.start(
            silent=not options.detokenize,
            skip_special=options.skip_special_tokens,
            spaces_between_special=options.spaces_between_special_tokens,
            at_start=self._decoding.is_start(np.frombuffer(prompt, np.int32).tolist())
            if self._decoding.lead
            else False,
        )
        stream = Stream(request, next(self._handles), prompt, decoder, self._mail(request.reply_to))
        if request.output:
            stream.replay(np.frombuffer(request.output, np.int32).tolist())
        self._streams[stream.handle] = self._by_rid[request.rid] = stream
        return stream

    def _refuse(self, request: Generate, refusal: Refused) -> None:
        end = End(
            request.handle,
            request.attempt,
            Finish.REFUSED,
            status=refusal.status,
            message=refusal.message,
            param=refusal.param,
        )
        retry = 1 if refusal.status == 503 else 0
        self._mail(request.reply_to).ended.append(replace(end, retry_after_s=retry))

    # --- results
    #   -----------------------------------------------------------------------------------------------------

    def tokens(self, batch: list[Tokens]) -> None:
        """All Tokens messages of a drain. If one contradicts itself, what it said cannot be known:
        all streams are lost."""
        for placed in [placed for message in batch for placed in message.placed]:
            self._placed(placed)
        self._lose(
            pass_prompts(batch, self._streams, self._decoding),
            "log-probabilities were damaged on the way to the tokenizer",
        )
        try:
            columns, entries = (
                columns_of(batch, self._decoding.size),
                entries_of(batch, self._decoding),
            )
        except ValueError as error:
            log.error(
                "dropped %d Tokens message(s) and all %d streams: %s",
                len(batch),
                len(self._streams),
                error,
            )
            self._lose(
                list(self._streams.values()),
                "a step's result was damaged on the way to the tokenizer",
            )
            return
        ended = [end for message in batch for end in message.ended]
        self._mute(ended, columns.handles, columns.positions)
        met, lost = fill(self._streams, columns, entries)
        for stream in met:
            self._end(stream, End(0, stream.attempt, Finish.STOP, stream.found))
            self.to_scheduler.append(Cancel(((stream.rid, stream.attempt),)))
        self._lose(lost, "tokens were lost on the way to the tokenizer")
        for end in ended:
            self._ended(end)

    def _placed(self, placed: Placed) -> None:
        stream = self._streams.get(placed.handle)
        if stream is not None:
            stream.mail.started.append(
                Started(
                    stream.owner,
                    stream.attempt,
                    stream.prompt_tokens,
                    placed.cached_tokens,
                    stream.prompt_ids,
                )
            )

    def _mute(self, ended: list[End], handles: list[int], positions: list[int]) -> None:
        """The last token of a stream that ends by a stop token is that token: it counts, and has no
        text."""
        stops = {end.handle for end in ended if end.finish is Finish.STOP}
        for handle, position in zip(handles, positions, strict=True) if stops else ():
            stream = self._streams.get(handle)
            if handle in stops and stream is not None and not stream.include_stop:
                stream.muted_from, stream.careful, stream.always_careful = position, True, True

    def _ended(self, end: End) -> None:
        stream = self._streams.get(end.handle)
        if stream is None:
            return
        if end.finish in (Finish.STOP, Finish.LENGTH):
            rest = stream.finish()
            if rest:
                stream.mail.add_text(stream, rest)
            if stream.found is not None:
                end = End(0, stream.attempt, Finish.STOP, stream.found)
        self._end(stream, end)

    def _lose(self, streams: list[Stream], message: str) -> None:
        for stream in streams:
            self._end(stream, End(0, stream.attempt, Finish.LOST, message=message))

    def _end(self, stream: Stream, end: End) -> None:
        stream.mail.ended.append(replace(end, handle=stream.owner, attempt=stream.attempt))
        self._forget(stream.rid)

    # --- who is there
    #   ------------------------------------------------------------------------------------------------

    def joined(self, roster: Roster, new_epoch: bool) -> set[str]:
        """The newest roster. Returns the inboxes of frontends that are gone, whose requests are
        cancelled with them."""
        self.roster = roster
        self._decoding.grow(roster.vocab_size)
        frontends = {peer.inbox for peer in roster.peers if peer.role is Role.FRONTEND}
        # A new scheduler does not know everyone yet: absence from its first rosters says nothing.
        gone = set[str]() if new_epoch else self.frontends - frontends
        self.frontends = frontends
        if new_epoch:
            self._start_over(roster.epoch)
        for inbox in gone:
            self.drop_owner(inbox)
        return gone

    def drop_owner(self, inbox: str) -> None:
        """Nobody wants the results that would go to `inbox`."""
        orphans = [stream for stream in self._streams.values() if stream.reply_to == inbox]
        if orphans:
            self.to_scheduler.append(
                Cancel(tuple((stream.rid, stream.attempt) for stream in orphans))
            )
        for stream in orphans:
            self._forget(stream.rid)
        for request in [
            request for request in self._encoding.values() if request.reply_to == inbox
        ]:
            del self._encoding[request.rid]
        self.mails.pop(inbox, None)

    def _start_over(self, epoch: int) -> None:
        """What the old scheduler had is gone. An owner that learnt of the new one first has
        resubmitted already, and which scheduler has that attempt cannot be known here: telling each
        owner is harmless where it knows and necessary where it does not."""
        old = [stream for stream in self._streams.values() if epoch_of(stream.execution) != epoch]
        self._lose(old, "the scheduler was replaced")

    def _forget(self, rid: bytes) -> None:
        self._encoding.pop(rid, None)
        stream = self._by_rid.pop(rid, None)
        if stream is not None:
            self._streams.pop(stream.handle, None)

    def _mail(self, inbox: str) -> Mail:
        mail = self.mails.get(inbox)
        if mail is None:
            mail = self.mails[inbox] = Mail()
        return mail


def _check_output(output: bytes, vocab_size: int) -> None:
    if output and (len(output) % 4 or np.frombuffer(output, np.uint32).max() >= vocab_size):
        raise Refused("the output so far, sent with a resubmission, holds what are no token ids")


def encode(encoder: Encoder, request: Generate) -> Encoded | Refused:
    try:
        return encoder.encode_request(request)
    except Refused as refusal:
        return refusal
    except (
        Exception
    ) as error:  # the tokenizers library raises bare Exception; one prompt must not end the service
        log.exception("a prompt could not be encoded")
        return Refused(f"the prompt could not be encoded ({type(error).__name__})", status=500)
