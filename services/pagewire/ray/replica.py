"""The deployment whose replicas are whole stacks. A replica starts its stack, says how it is, and
passes requests on to it; Ray decides how many replicas there are, and on which nodes."""

import contextlib
import logging
import os
from collections.abc import AsyncGenerator
from typing import NoReturn

from ray import serve

from .arguments import new_parser, parse
from .forwarding import ForwardedRequest, Head
from .local_stack import LocalStack

log = logging.getLogger("ray.serve")


def end_process(reason: str) -> NoReturn:
    """End this replica because its stack is gone for good. Ray then sends it nothing more at once,
    where a failed health check would take half a minute."""
    log.error("the stack is gone, so this replica ends: %s", reason)
    logging.shutdown()
    os._exit(1)


class Stack:
    """A deployment's class: Ray makes one in each replica's process."""

    async def __init__(self, stack_flags: list[str]) -> None:
        """`stack_flags`: those of `pagewire serve`. Returns when the stack serves. Raises
        StackFailed, hub.ModelNotFound, or ValueError for a flag."""
        self._stack = LocalStack(parse(new_parser(), stack_flags), log.info, end_process)
        try:
            await self._stack.start()
        except BaseException:
            await self._stack.close()
            raise

    async def answer(self, request: ForwardedRequest) -> AsyncGenerator[Head | bytes, None]:
        """As LocalStack.answer. A cancelled call closes the connection, which cancels the request
        in the stack."""
        async with contextlib.aclosing(self._stack.answer(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def metrics(self) -> tuple[str, str]:
        """The replica's name, and the stack's page of metrics."""
        request = ForwardedRequest("GET", "/metrics", (), b"")
        pieces = [
            piece.chunk if isinstance(piece, Head) else piece
            async for piece in self.answer(request)
        ]
        return serve.get_replica_context().replica_id.unique_id, b"".join(pieces).decode()

    async def check_health(self) -> None:
        """Ray calls this every `health_check_period_s` and replaces a replica where it raises again
        and again. Raises StackFailed."""
        await self._stack.check_health()

    def __del__(self) -> None:
        """Ray calls this when the replica's last request has ended, before it ends the process."""
        if hasattr(self, "_stack"):
            self._stack.stop()
