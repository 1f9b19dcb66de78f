"""A model in pipeline stages on CPUs: the runners of ranks that have some of its layers.

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
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace
from pagewire_kernels.communicator import CommunicatorFailed, PointToPoint
from pagewire_protocol.messages import Step, StepResult
from torch import Tensor

from ..load.loader import Loaded
from ..load.rank_agreement import Ranks
from ..models.decoder import Decoder, HiddenStates, LogitsHook
from ..runners import AsyncFromSync, AsyncRunner, CompletedStep, OnCpu, StepHandle
from ..step.apply import StepRows
from ..step.grammar_masks import Keys
from ..step.slots import Ints
from .runner import CpuSteps, Runner, StepTokens

UNKNOWN: Final = -1
"""In place of a token that another stage samples."""
MESSAGE_BYTES: Final = 4096
"""Of the first tensor of a message: one is enough for the tokens of a step."""
LENGTH: Final = struct.Struct("=Q")


def start(*arguments: Any, ranks: Ranks, **options: Any) -> AsyncRunner:
    """The runner of this process, with the arguments of CpuSteps. `ranks` says which layers it has."""
    stage = ranks.stage
    if stage.is_whole:
        return AsyncFromSync(Runner(*arguments, ranks=ranks, **options))
    if stage.is_first:
        return FirstStage(*arguments, ranks=ranks, **options)
    kind = LastStage if stage.is_last else MiddleStage
    return AsyncFromSync(kind(*arguments, ranks=ranks, **options))


class HiddenStatesLink:
    """A connection to a neighbouring stage, for hidden states. A residual goes in float32, whatever
    the model's type: back ends on CPUs keep it so."""

    def __init__(self, link: PointToPoint | None, loaded: Loaded) -> None:
        assert link is not None
        self._link = link
        self._width = loaded.decoder.arch.hidden_size
        self._dtype = loaded.dtype
        self._has_residual = loaded.decoder.arch.block != "post"

    def send(self, hidden: HiddenStates) -> None:
        """Raises CommunicatorFailed."""
        parts = [hidden.x.to(self._dtype)]
        if self._has_residual:
            assert hidden.residual is not None
            parts.insert(0, hidden.residual.float())
        self._link.send(torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]))

    def recv(self, count: int) -> HiddenStates:
        """Of `count` tokens. Raises CommunicatorFailed."""
        shape = (count, self._width)
        size = count * self._width
        wide = size * torch.float32.itemsize if self._has_residual else 0
        received = torch.empty(wide + size * self._dtype.itemsize, dtype=torch.uint8)
        self._link.recv(received)
        x = received[wide:].view(self._dtype).view(shape)
        if not self._has_residual:
            return HiddenStates(x)
        return HiddenStates(x, received[:wide].view(torch.float32).view(shape))


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


class EarlierStage(CpuSteps):
    """What stages before the last one have in common. Arguments are those of CpuSteps."""

    def __init__(self, *arguments: Any, ranks: Ranks, **options: Any) -> None:
        super().__init__(*arguments, ranks=ranks, **options)
        self._decoder = _decoder_of(self._loaded)
        self._following = HiddenStatesLink(ranks.links.following, self._loaded)

    def _hand_on(self, hidden: HiddenStates, tokens: StepTokens) -> None:
        """Through the layers of this stage, and to the next one."""
        loaded = self._loaded
        hidden = self._decoder.run_layers(
            hidden, loaded.cos_sin, self._caches, tokens.batch, self._tick
        )
        self._following.send(hidden)

    def _count_sampled(self, rows: StepRows) -> Ints:
        """The slots that get a token with this step, which is counted as there; those whose masks
        are late get none, and compute their last one again."""
        slots = rows.slots[rows.sampling]
        if self._masks.any and len(slots):
            ready = self._masks.ready(slots, self._slots.num_output_tokens(slots))
            self._slots.hold_back(slots[~ready])
            slots = slots[ready]
        self._slots.append_tokens(slots, np.full(len(slots), UNKNOWN, np.int32))
        return slots


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


class FirstStage(EarlierStage, OnCpu):
    """An AsyncRunner (worker/runners.py): the stage that is given tokens and answers. Arguments are
    those of CpuSteps."""

    def __init__(self, *arguments: Any, ranks: Ranks, **options: Any) -> None:
        super().__init__(*arguments, ranks=ranks, **options)
        self._receiver = ResultReceiver(ranks.links.results)
        self._decode = msgspec.msgpack.Decoder(StepResult).decode
        self._launched = 0
        self._waiting: deque[StagedStep] = deque()
        count = self._slots.count
        self._admissions = np.zeros(count, np.int64)
        """How many requests each slot has had: a token that comes late is not for the next one."""
        self._awaited = np.zeros(count, np.int64)
        """The step that each slot's last token comes from; 0: it came with the request."""

    def notify(self, wake: Callable[[], None]) -> None:
        """See AsyncRunner."""
        self._receiver.wake = wake

    def clear(self) -> None:
        """Forget every request: there is a new scheduler. Results of steps under way still come."""
        super().clear()
        self._admissions += 1

    def launch(self, step: Step) -> StepHandle:
        """See AsyncRunner. Waits for tokens that the step's own rows begin with. Raises
        CommunicatorFailed."""
        self._collect()
        for admission in step.admit:
            if admission.slot < len(self._awaited):
                self._admissions[admission.slot] += 1
                self._awaited[admission.slot] = 0
        rows = self._begin(step)
        if not len(rows.slots):
            return CompletedStep(self._empty_result(step))
        self._wait_for(int(self._awaited[rows.slots].max()))
        with torch.inference_mode():
            tokens = self._prepare(rows)
            self._hand_on(self._decoder.embed(self._ids(tokens), tokens.batch), tokens)
        return self._await(step, self._count_sampled(rows))

    def _await(self, step: Step, slots: Ints) -> StagedStep:
        """`step`, which brings `slots` [S] a token, is on its way."""
        self._launched += 1
        self._awaited[slots] = self._launched
        handle = StagedStep(
            self._collect,
            step,
            self._launched,
            slots,
            self._slots.num_tokens[slots] - 1,
            self._admissions[slots],
            self._masks.keys(slots),
        )
        self._waiting.append(handle)
        self._receiver.expect()
        return handle

    def _wait_for(self, number: int) -> None:
        """Until the result of this step is there, and of those before it."""
        while self._waiting and self._waiting[0].number <= number:
            data = self._receiver.take(wait=True)
            assert data is not None
            self._take_in(data)

    def _collect(self) -> None:
        """Take in the results that have arrived."""
        while self._waiting and (data := self._receiver.take(wait=False)) is not None:
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
        self._slots.tokens[handle.slots[current], handle.positions[current]] = tokens[current]
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


class MiddleStage(EarlierStage):
    """A SyncRunner (worker/runners.py) between two other stages. Arguments are those of CpuSteps."""

    def __init__(self, *arguments: Any, ranks: Ranks, **options: Any) -> None:
        super().__init__(*arguments, ranks=ranks, **options)
        self._previous = HiddenStatesLink(ranks.links.previous, self._loaded)

    def execute(self, step: Step) -> StepResult:
        """This stage's part of a forward pass; the result is empty. Raises BadStep for a step that
        contradicts the slots, and CommunicatorFailed."""
        rows = self._begin(step)
        if len(rows.slots):
            with torch.inference_mode():
                tokens = self._prepare(rows)
                self._hand_on(self._previous.recv(len(tokens.positions)), tokens)
            self._count_sampled(rows)
        return self._empty_result(step)


class LastStage(Runner):
    """A SyncRunner (worker/runners.py): the stage that samples. Arguments are those of CpuSteps."""

    def __init__(self, *arguments: Any, ranks: Ranks, **options: Any) -> None:
        super().__init__(*arguments, ranks=ranks, **options)
        self._decoder = _decoder_of(self._loaded)
        self._previous = HiddenStatesLink(ranks.links.previous, self._loaded)
        assert ranks.links.results is not None
        self._results = ranks.links.results
        self._encode = msgspec.msgpack.Encoder().encode

    def execute(self, step: Step) -> StepResult:
        """The end of a forward pass. Its result goes to the first stage, too. Raises BadStep for a
        step that contradicts the slots, and CommunicatorFailed."""
        rows = self._begin(step)
        result = self._answer(step, rows)
        if len(rows.slots):
            send_message(self._results, self._encode(result))
        return result

    def _logits(self, tokens: StepTokens, wanted: Tensor | None, hook: LogitsHook | None) -> Tensor:
        loaded = self._loaded
        hidden = self._decoder.run_layers(
            self._previous.recv(len(tokens.positions)),
            loaded.cos_sin,
            self._caches,
            tokens.batch,
            self._tick,
        )
        return self._decoder.logits(hidden, tokens.batch, wanted, hook)


def _decoder_of(loaded: Loaded) -> Decoder:
    """Models that run through transformers have no stages."""
    assert isinstance(loaded.decoder, Decoder)
    return loaded.decoder
