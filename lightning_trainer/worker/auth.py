"""Who may call: those that show the token, asked before anything they send is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from lightning_trainer.rpc.security import same_token

OPEN = "/grpc.health.v1.Health/Check"
"""Answers without a token whether the process is up, and nothing else: the name of the service must be empty."""

SCHEME = "Bearer "


class TokenGate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Ends calls that do not show the token, of any kind, known methods or not.

    Args:
        token: What they must show, as `authorization: Bearer TOKEN`, once.
    """

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """The method, or one that refuses."""
        if self._shown(handler_call_details.invocation_metadata):
            return await continuation(handler_call_details)
        if handler_call_details.method == OPEN:
            return _only_of_the_process(await continuation(handler_call_details))
        # Streams both ways, whatever the method is: a unary one would have its request read first.
        return grpc.stream_stream_rpc_method_handler(_deny)

    def _shown(self, metadata: Any) -> bool:
        given = [str(value) for key, value in metadata or () if key == "authorization"]
        if len(given) != 1 or not given[0].startswith(SCHEME):
            return False
        return same_token(given[0].removeprefix(SCHEME), self._token)


async def _deny(request_iterator: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")


def _only_of_the_process(handler: Any) -> Any:
    async def check(request: Any, context: Any) -> Any:
        if request.service:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")
        return await handler.unary_unary(request, context)

    return grpc.unary_unary_rpc_method_handler(
        check, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
    )
