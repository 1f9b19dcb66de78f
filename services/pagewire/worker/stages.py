"""What pipeline stages have in common, whatever they compute on: messages between them, and the first
stage's steps under way.

Every rank applies every step to slots of its own, in the same order. The first stage turns tokens
into hidden states and hands them on; the last one samples, and sends what it sampled back to the
first, which answers the scheduler and goes on with it. Stages compute different steps at a time: a
step waits only for tokens of its own rows. Stages that do not sample know how many tokens there are,
not which.
"""

import queue
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace
from pagewire_kernels.communicator import CommunicatorFailed, PointToPoint
from pagewire_protocol.columns import Incarnation
from pagewire_protocol.messages import Step, StepResult

from .models.decoder import Decoder
from .models.fallback import FallbackDecoder
from .step.grammar_masks import GrammarMasks, Keys
from .step.slots import Ints, Slots

MESSAGE_BYTES: Final = 4096
"""Of the first tensor of a message: one is enough for the tokens of a step."""
LENGTH: Final = struct.Struct("=Q")

Learned = Callable[[Ints, npt.NDArray[np.int32]], None]
"""Is told the tokens [S] that slots [S] have got."""


def send_message(link: PointToPoint, data: bytes) -> None:
    """Bytes of any length, in one tensor or two. Raises CommunicatorFailed."""
    room = MESSAGE_BYTES - LENGTH.size
    first = bytearray(LENGTH.pack(len(data)) + data[:room])
    first.extend(bytes(MESSAGE_BYTES - len(first)))
    link.send(torch.frombuffer(first, dtype=torch.uint8))
    if len(data) > room:
        link.send(torch.frombuffer(bytearray(data[room:]), dtype=torch.uint8))


def recv_message(link: PointToPoint) -> bytes:
    """What `send_message` sent. Raises CommunicatorFailed."""
    first = torch.empty(MESSAGE_BYTES, dtype=torch.uint8)
    link.recv(first)
    received = first.numpy().tobytes()
    (length,) = LENGTH.unpack_from(received)
    data = received[LENGTH.size : LENGTH.size + length]
    if len(data) < length:
        rest = torch.empty(length - len(data), dtype=torch.uint8)
        link.recv(rest)
        data += rest.numpy().tobytes()
    return data


class StagedStep:
    """The handle of a step that later stages compute. slots [S]: those that get a token, which goes
    to positions [S]; admissions [S]: which request of its slot each of them is; keys [S]: their
    grammars' streams. number: of the steps with rows, from 1."""

    def __init__(
        self,
        collect: Callable[[], None],
        step: Step,
        number: int,
        slots: Ints,
        positions: Ints,
        admissions: Ints,
        keys: Keys,
    ) -> None:
        """`collect`: takes in results that have arrived."""
        self._collect = collect
        self.step = step
        self.number = number
        self.slots = slots
        self.positions = positions
        self.admissions = admissions
        self.keys = keys
        self.answer: StepResult | None = None

    def done(self) -> bool:
        """See StepHandle. Raises CommunicatorFailed."""
        if self.answer is None:
            self._collect()
        return self.answer is not None

    def result(self) -> StepResult:
        """See StepHandle."""
        assert self.answer is not None
        return self.answer


class StepsUnderWay:
    """The first stage's steps that later stages compute, and which tokens are still to come."""

    def __init__(
        self,
        slots: Slots,
        masks: GrammarMasks,
        results: PointToPoint | None,
        incarnation: Incarnation,
        learned: Learned = lambda slots, tokens: None,
    ) -> None:
        """results: from the last stage. `learned` hears of tokens, after the slots have them."""
        self.receiver = ResultReceiver(results)
        self._decode = msgspec.msgpack.Decoder(StepResult).decode
        self._slots = slots
        self._masks = masks
        self._incarnation = incarnation
        self._learned = learned
        self._launched = 0
        self._waiting: deque[StagedStep] = deque()
        self._admissions = np.zeros(slots.count, np.int64)
        """How many requests each slot has had: a token that comes late is not for the next one."""
        self._awaited = np.zeros(slots.count, np.int64)
        """The step that each slot's last token comes from; 0: it came with the request."""

    def clear(self) -> None:
        """Every request is forgotten. Results of steps under way still come."""
        self._admissions += 1

    def admit(self, step: Step) -> None:
        """Slots get the requests that `step` brings."""
        for admission in step.admit:
            if admission.slot < len(self._awaited):
                self._admissions[admission.slot] += 1
                self._awaited[admission.slot] = 0

    def add(self, step: Step, slots: Ints) -> StagedStep:
        """`step`, which brings `slots` [S] a token that is counted as there, is on its way."""
        self._launched += 1
        self._awaited[slots] = self._launched
        handle = StagedStep(
            self.collect,
            step,
            self._launched,
            slots,
            self._slots.num_tokens[slots] - 1,
            self._admissions[slots],
            self._masks.keys(slots),
        )
        self._waiting.append(handle)
        self.receiver.expect()
        return handle

    def wait_for(self, slots: Ints) -> None:
        """Until the last tokens of `slots`, of which there are some, are there. Raises
        CommunicatorFailed."""
        number = int(self._awaited[slots].max())
        while self._waiting and self._waiting[0].number <= number:
            data = self.receiver.take(wait=True)
            assert data is not None
            self._take_in(data)

    def collect(self) -> None:
        """Take in the results that have arrived. Raises CommunicatorFailed."""
        while self._waiting and (data := self.receiver.take(wait=False)) is not None:
            self._take_in(data)

    def _take_in(self, data: bytes) -> None:
        """The result of the oldest step under way. Raises CommunicatorFailed where it is another's."""
        handle = self._waiting.popleft()
        result = self._decode(data)
        tokens: npt.NDArray[np.int32] = np.frombuffer(result.tokens, np.int32)
        if result.n != handle.step.n or len(tokens) != len(handle.slots):
            raise CommunicatorFailed(
                f"the last pipeline stage answered step {result.n} with {len(tokens)} tokens where "
                f"step {handle.step.n} was to bring {len(handle.slots)}"
            )
        current = self._admissions[handle.slots] == handle.admissions
        slots = handle.slots[current]
        self._slots.tokens[slots, handle.positions[current]] = tokens[current]
        self._learned(slots, tokens[current])
        self._masks.append(handle.keys, tokens)
        handle.answer = replace(result, incarnation=self._incarnation)


class ResultReceiver:
    """Receives what the last stage sends, in a thread: whoever waits for a step must hear of other
    things too. Knows bytes."""

    def __init__(self, link: PointToPoint | None) -> None:
        assert link is not None
        self._link = link
        self.wake: Callable[[], None] = lambda: None
        """Called by the thread when a result has arrived, or none will."""
        self._expected = threading.Semaphore(0)
        self._arrived: queue.SimpleQueue[bytes | CommunicatorFailed] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="results", daemon=True).start()

    def expect(self) -> None:
        """One more result will come."""
        self._expected.release()

    def take(self, wait: bool) -> bytes | None:
        """The next result; None where it is not there yet, without `wait`. Raises
        CommunicatorFailed."""
        try:
            arrived = self._arrived.get(wait)
        except queue.Empty:
            return None
        if isinstance(arrived, CommunicatorFailed):
            raise arrived
        return arrived

    def _run(self) -> None:
        # A link fails where nothing comes for long, so it is only asked while something is due.
        while True:
            self._expected.acquire()
            try:
                arrived: bytes | CommunicatorFailed = recv_message(self._link)
            except CommunicatorFailed as error:
                arrived = error
            self._arrived.put(arrived)
            self.wake()
            if isinstance(arrived, CommunicatorFailed):
                return


def decoder_of(decoder: Decoder | FallbackDecoder) -> Decoder:
    """Of a stage: models that run through transformers have none."""
    assert isinstance(decoder, Decoder)
    return decoder
