"""Grammar masks of a model over several ranks: rank 0 has the matcher process and decides which
rows of a step can be sampled; the others are told, with the masks. All of them sample every row, so
a row that is late on one must be late on all.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ...config import ModelConfig
from ...grammar.messages import mask_words
from ..rank_link import Follower, Leader, Link
from .grammar_masks import Bools, GrammarMasks, Ints
from .matched_stream import Stream

MakeMasks = Callable[[int, ModelConfig, int, tuple[int, ...]], GrammarMasks]
"""As GrammarMasks."""


class Decision(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Of the rows of one step: ready bool [R]; failed bool [slots]; slots int64 [M], those whose
    masks come along; masks uint32 [M, words]."""

    ready: bytes
    failed: bytes
    slots: bytes
    masks: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Decision)


def maker(link: Link | None) -> MakeMasks:
    """What a runner of this rank makes its masks with."""
    if link is None:
        return GrammarMasks
    if isinstance(link, Leader):
        leader = link
        return lambda *arguments: LeadingMasks(leader, *arguments)
    follower = link
    return lambda *arguments: FollowingMasks(follower, *arguments)


class LeadingMasks(GrammarMasks):
    """Rank 0's."""

    def __init__(self, leader: Leader, *arguments: Any, **options: Any) -> None:
        """arguments, options: those of GrammarMasks."""
        super().__init__(*arguments, **options)
        self._leader = leader

    def allow_runs(self, most: int) -> int:
        """None: the other ranks would have to hear of them before each step."""
        return 0

    def ready(
        self, slots: Ints, positions: Ints, computed: Callable[[], bool] | None = None
    ) -> Bools:
        """See GrammarMasks; the other ranks are told."""
        ready = super().ready(slots, positions, computed)
        concerned = self.concerns(slots)
        if concerned.any():
            masked = slots[concerned & ready & ~self.failed(slots)].astype(np.int64)
            masks = self.rows(masked) if len(masked) else np.zeros(0, np.uint32)
            decision = Decision(
                ready.tobytes(), self._failed.tobytes(), masked.tobytes(), masks.tobytes()
            )
            self._leader.masks(_encoder.encode(decision))
        return ready


class FollowingMasks(GrammarMasks):
    """Those of any other rank, which has no matcher process."""

    def __init__(
        self,
        follower: Follower,
        count: int,
        model: ModelConfig,
        vocab_size: int,
        eos: tuple[int, ...],
    ) -> None:
        super().__init__(count, model, vocab_size, eos)
        self._follower = follower
        self._masks = np.zeros((count, mask_words(vocab_size)), np.uint32)
        """By slot."""

    def ready(
        self, slots: Ints, positions: Ints, computed: Callable[[], bool] | None = None
    ) -> Bools:
        """What rank 0 decided."""
        if not self.concerns(slots).any():
            return np.ones(len(slots), np.bool_)
        decision = _decoder.decode(self._follower.masks())
        self._failed[:] = np.frombuffer(decision.failed, np.bool_)
        masked = np.frombuffer(decision.slots, np.int64)
        masks = np.frombuffer(decision.masks, np.uint32)
        masks = masks.reshape(len(masked), self._masks.shape[1])
        self._masks[masked] = masks
        self.mirror.write(masked, masks)
        return np.frombuffer(decision.ready, np.bool_)

    def rows(self, slots: Ints) -> NDArray[np.uint32]:
        """See GrammarMasks."""
        return self._masks[slots]

    def allow_runs(self, most: int) -> int:
        """As rank 0."""
        return 0

    def _match(self, stream: Stream) -> None:
        """Rank 0 does."""

    def _open_again(self, slots: Ints) -> None:
        """Rank 0 does."""
