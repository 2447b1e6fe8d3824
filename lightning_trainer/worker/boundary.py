"""Where calls end: what a method raises becomes the status of the call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

import grpc

from lightning_trainer.rpc.errors import Refusal
from lightning_trainer.worker.host import log_fault

Method = Callable[[Any, Any, Any], Awaitable[Any]]


def answered(method: Method) -> Method:
    """End the call as a Refusal says; with INTERNAL, and no text, on anything else.

    The object whose method it is has a `host`.
    """

    @wraps(method)
    async def call(self: Any, request: Any, context: Any) -> Any:
        try:
            return await method(self, request, context)
        except Refusal as refusal:
            self.host.counters["refused_total"] += 1
            await context.abort(grpc.StatusCode[refusal.code], str(refusal), refusal.metadata())
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError:  # what a write to a client that has gone raises
            self.host.counters["clients_gone_total"] += 1
        except Exception as error:  # the boundary to the network: the worker goes on, the client learns no text
            self.host.counters["faults_total"] += 1
            log_fault(method.__name__, error)
            self.host.suspect_device()
            await context.abort(grpc.StatusCode.INTERNAL, f"{method.__name__} failed: {type(error).__name__}")

    return call
