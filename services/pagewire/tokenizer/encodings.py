"""Texts on their way to token ids: each is encoded once, however many requests have it, and a long
one in a thread. No sockets, no threads of its own.

The choices of one HTTP request are requests with equal texts, and arrive together. Requests of
different cache salts share nothing here either: how soon an answer comes would tell one holder of
a key what another one has sent.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

from pagewire_protocol.messages import Generate, Prompt

from .encode import LONG, Encoded, Limit, Refused, work_of

KEPT_BYTES: Final = 16 << 20
"""Of texts and their token ids that are kept for the next request with the same text."""
ENTRY_BYTES: Final = 512
"""What an entry takes beside its text and ids."""


class Text(NamedTuple):
    """All that decides what a request's text becomes."""

    prompt: Prompt
    add_special_tokens: bool
    bad_words: tuple[str, ...]
    cache_salt: str
    limit: Limit


class EncodingTask:
    """A long text that a thread encodes, and the requests that wait for it, by rid."""

    __slots__ = ("cancelled", "result", "size", "text", "waiting")

    def __init__(self, text: Text, size: int) -> None:
        """size: characters to be encoded."""
        self.text = text
        self.size = size
        self.waiting: dict[bytes, Generate] = {}
        self.result: Encoded | Refused | None = None
        """Set by the thread."""
        self.cancelled = False
        """Nobody waits any more: a thread that has begun may stop."""


class Encodings:
    """What texts became, and what is being encoded. Used by the loop's thread alone.

    `encode` makes token ids of a text, here and now. `offload` has a thread do it; the task then
    comes back to `take`.
    """

    def __init__(
        self,
        encode: Callable[[Text], Encoded | Refused],
        offload: Callable[[EncodingTask], None],
    ) -> None:
        self._encode = encode
        self._offload = offload
        self._kept: OrderedDict[Text, tuple[Encoded | Refused, int]] = OrderedDict()
        self._kept_bytes = 0
        self._tasks: dict[Text, EncodingTask] = {}
        self._by_rid: dict[bytes, EncodingTask] = {}

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._by_rid)

    def encode(self, request: Generate, limit: Limit) -> Encoded | Refused | None:
        """What the request's text is as token ids; None where a thread has yet to encode it."""
        if request.prompt.ids is not None and not request.text.bad_words:
            return self._encode(_text_of(request, limit))
        text = _text_of(request, limit)
        entry = self._kept.get(text)
        if entry is not None:
            self._kept.move_to_end(text)
            return entry[0]
        task = self._tasks.get(text)
        if task is None:
            size = work_of(request)
            if size <= LONG:
                result = self._encode(text)
                self._keep(text, result, size)
                return result
            task = self._tasks[text] = EncodingTask(text, size)
            self._offload(task)
        task.waiting[request.rid] = request
        self._by_rid[request.rid] = task
        return None

    def take(self, task: EncodingTask) -> Generate | None:
        """One of the requests that wait for a task that a thread is done with; None: no more."""
        if task.waiting:
            rid = next(iter(task.waiting))
            del self._by_rid[rid]
            return task.waiting.pop(rid)
        if self._tasks.get(task.text) is task:
            del self._tasks[task.text]
            if task.result is not None:
                self._keep(task.text, task.result, task.size)
        return None

    def waiting(self, rid: bytes) -> Generate | None:
        """The request with this rid, if it waits."""
        task = self._by_rid.get(rid)
        return None if task is None else task.waiting[rid]

    def all_waiting(self) -> list[Generate]:
        """Every request that waits."""
        return [task.waiting[rid] for rid, task in self._by_rid.items()]

    def forget(self, rid: bytes) -> Generate | None:
        """The request waits no longer. Where nobody else does, its text need not be encoded."""
        task = self._by_rid.pop(rid, None)
        if task is None:
            return None
        request = task.waiting.pop(rid)
        if not task.waiting and task.result is None:
            task.cancelled = True
            del self._tasks[task.text]
        return request

    def _keep(self, text: Text, result: Encoded | Refused, size: int) -> None:
        taken = ENTRY_BYTES + size
        if isinstance(result, Encoded):
            taken += len(result.prompt) + sum(map(len, result.bad_words))
        if taken > KEPT_BYTES // 4:
            return
        self._kept[text] = result, taken
        self._kept_bytes += taken
        while self._kept_bytes > KEPT_BYTES:
            _, (_, freed) = self._kept.popitem(last=False)
            self._kept_bytes -= freed


def _text_of(request: Generate, limit: Limit) -> Text:
    return Text(
        request.prompt,
        request.add_special_tokens,
        request.text.bad_words,
        request.cache_salt,
        limit,
    )
