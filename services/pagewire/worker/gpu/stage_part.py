"""A pipeline stage's part of a forward pass on a GPU, between buffers that captured graphs can read:
hidden states of the stage before come into them, and those of this stage go on to the next one,
outside the graphs.
"""

from typing import Final

import torch
from pagewire_kernels.batch import Batch
from torch import Tensor

from ..load.loader import Loaded
from ..load.rank_agreement import Ranks
from ..models.decoder import HiddenStates, LogitsHook
from ..stages import decoder_of

GRANULARITY: Final = 512
"""Tokens that the buffers are a multiple of: no step is padded beyond the next one."""


class StagePart:
    """The layers of one stage, not the whole model. Steps are run one after the other: `receive`,
    then `run` or a graph of it, then `hand_on` what it gave. Hidden states go over in the model's
    type, in which back ends on GPUs keep the residual too; of padding nothing does."""

    def __init__(self, loaded: Loaded, ranks: Ranks, most_tokens: int) -> None:
        """ranks: which layers these are, and the other stages. most_tokens: of a step."""
        self.ranks = ranks
        self.is_first = ranks.stage.is_first
        self.is_last = ranks.stage.is_last
        self._loaded = loaded
        self._decoder = decoder_of(loaded.decoder)
        arch = self._decoder.arch
        self._has_residual = arch.block != "post"
        self._given: list[Tensor] = []
        """x, and residual where there is one: each [tokens, H]."""
        if not self.is_first:
            size = -(-most_tokens // GRANULARITY) * GRANULARITY
            # what is timed at start is not to go through the same experts
            self._given = [
                torch.randn(size, arch.hidden_size, dtype=loaded.dtype, device=loaded.device)
                for _ in range(1 + self._has_residual)
            ]

    def receive(self, count: int, padded: int) -> None:
        """The hidden states of a step of `count` tokens, which is computed with padding up to
        `padded`. Does nothing in the first stage. Raises CommunicatorFailed."""
        link = self.ranks.links.previous
        if link is None:
            return
        for part in self._given:
            link.recv(part[:count])
            # layers add to the residual in place: what they add to padding is not to pile up
            part[count:padded].zero_()

    def run(self, ids: Tensor | None, batch: Batch) -> HiddenStates:
        """Through the layers that are here, padding included. ids [T] int64: what the first stage
        embeds."""
        loaded = self._loaded
        if self.is_first:
            assert ids is not None
            hidden = self._decoder.embed(ids, batch)
        else:
            hidden = HiddenStates(*(part[: len(batch.positions)] for part in self._given))
        hidden = self._decoder.run_layers(
            hidden, loaded.cos_sin, loaded.caches, batch, lambda: None
        )
        return HiddenStates(
            hidden.x.contiguous(),
            None if hidden.residual is None else hidden.residual.contiguous(),
        )

    def logits(
        self,
        hidden: HiddenStates,
        batch: Batch,
        wanted: Tensor | None,
        hook: LogitsHook | None = None,
    ) -> Tensor:
        """See Decoder.logits; of the last stage."""
        return self._decoder.logits(hidden, batch, wanted, hook)

    def hand_on(self, hidden: HiddenStates | None, count: int) -> None:
        """The first `count` of a step's hidden states [T, H], to the next stage. They may be
        overwritten from now on. Raises CommunicatorFailed."""
        link = self.ranks.links.following
        assert link is not None and hidden is not None
        parts = [hidden.x]
        if self._has_residual:
            assert hidden.residual is not None
            parts.append(hidden.residual)
        for part in parts:
            link.send(part[:count].to(self._loaded.dtype, copy=True))
