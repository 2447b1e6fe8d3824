"""GrpcPreviewBackend: answers by a worker on another GPU, while training goes on."""

from __future__ import annotations

import atexit
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from lightning_trainer.preview import preflight
from lightning_trainer.preview.base import PreviewBackend, failed
from lightning_trainer.preview.companion import Companion
from lightning_trainer.preview.dialogue import Deadlines, Setup
from lightning_trainer.preview.exchange import Exchange, Outcome
from lightning_trainer.preview.local import LocalPreviewBackend
from lightning_trainer.preview.mailbox import Counters
from lightning_trainer.preview.prompter import Prompter
from lightning_trainer.preview.publication import Publication, publication_of
from lightning_trainer.preview.snapshot import KEY, Slot, available_bytes, check_room
from lightning_trainer.rpc.security import check_exposure, parse_address, read_file, read_token
from lightning_trainer.types import SKIPPED, InputError, PreviewRequest, PreviewResult, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_trainer.adapters import Adapter


class GrpcPreviewBackend(PreviewBackend):
    """Previews by `lightning-trainer serve` on another GPU or machine.

    Training never waits for it: the weights of the step are copied, and a process of its own sends them. Whatever
    happens to the worker or the network, the run is the same to the last bit.

    Args:
        address: Of the worker: HOST:PORT, [IPv6]:PORT or unix:PATH.
        ca: Certificate of the CA that signed the worker's; null: no TLS, for a worker on this machine or behind a
            tunnel.
        token_file: Holds the worker's token; only you may read it.
        preflight: What happens when the worker does not answer, or holds another model, at the start: warn says so and
            trains, require ends the run before its first step, off does not wait for the answer.
        on_unavailable: What happens to previews while the worker does not answer: skip, or local: the model in
            training answers, which then waits.
        flush_timeout: Seconds the end of the run waits for previews under way, those of all callbacks together.
        insecure_lan: Send prompts, answers and weights over a network without TLS and token.

    Raises:
        InputError: The address cannot be used like this, or a file cannot be read.
    """

    backend_type: ClassVar[str] = "remote"

    def __init__(
        self,
        address: str,
        ca: Path | None = None,
        token_file: Path | None = None,
        preflight: Literal["warn", "require", "off"] = "warn",
        on_unavailable: Literal["skip", "local"] = "skip",
        flush_timeout: float = 10.0,
        insecure_lan: bool = False,
    ) -> None:
        super().__init__()
        key = f"{KEY}.address"
        check_exposure(parse_address(address, key), ca is not None, token_file is not None, insecure_lan, key)
        if not 0 <= flush_timeout <= 3600:
            raise InputError(f"must lie in [0, 3600], not {flush_timeout}", key=f"{KEY}.flush_timeout")
        if importlib.util.find_spec("grpc") is None:
            raise InputError("remote previews need grpcio: pip install grpcio", key=KEY)
        self._token = None if token_file is None else read_token(Path(token_file), f"{KEY}.token_file")
        if ca is not None:
            read_file(Path(ca), "the CA", f"{KEY}.ca")
        self.address, self.ca, self.preflight, self.on_unavailable = address, ca, preflight, on_unavailable
        self.flush_timeout = flush_timeout
        self._deadlines = Deadlines()
        self._available = available_bytes
        self._counters = Counters()
        self._figures: dict[str, float] = {"stall_ms": 0.0}
        self._told: list[str] = []
        self._done: list[PreviewResult] = []
        # Not from 1: a worker that still knows this run from before it was resumed takes only later ones.
        self._sequence = time.time_ns() // 1_000_000
        self._exchange: Exchange | None = None
        self._end_by: float | None = None
        self._said_drops = False
        self._owner = os.getpid()

    def bind(self, prompter: Prompter, model: PreTrainedModel, adapter: Adapter | None = None) -> None:
        """Make room for snapshots, start the dispatcher and hear the worker out.

        Raises:
            InputError: There is too little memory, the weights cannot be sent, or, with `preflight: require`, the
                worker does not answer or holds another model.
        """
        self.close()
        super().bind(prompter, model, adapter)
        self._end_by = None
        publication = publication_of(model, adapter)
        count = 1 if adapter is None else 2  # two models' worth of host memory is a lot, of adapters little
        check_room(count * sum(entry.nbytes for entry in publication.layout), self._available)
        slots: list[Slot] = []
        try:
            for _ in range(count):
                slots.append(Slot(publication.layout, model.device))
            self._exchange = Exchange(publication, slots, self._setup_of(publication, slots))
        except BaseException:
            for slot in slots:
                slot.close()
            super().close()
            raise
        self._owner = os.getpid()
        atexit.register(self.close)
        if self.preflight != "off":
            self._hear_out(self._exchange.companion)

    def _setup_of(self, publication: Publication, slots: Sequence[Slot]) -> Setup:
        return Setup(
            address=self.address,
            ca=None if self.ca is None else str(Path(self.ca).absolute()),
            token=self._token,
            run_id=self.run_id,
            kind=int(publication.kind),
            identity=publication.identity.SerializeToString(),
            adapter=b"" if publication.adapter is None else publication.adapter.SerializeToString(),
            layout=publication.layout,
            slots=tuple(slot.fd for slot in slots),
            deadlines=self._deadlines,
        )

    def _hear_out(self, companion: Companion) -> None:
        why = preflight.why_not(companion, is_required=self.preflight == "require")
        if why and self.preflight == "require":
            self.close()
            raise InputError(f"the preview worker at {self.address} cannot be used: {why}", key=f"{KEY}.address")
        if not companion.state:
            companion.notices.append(f"preview worker {self.address}: {why}; training starts")

    def examine(
        self, model: PreTrainedModel, load_base: Callable[[], PreTrainedModel] | None = None
    ) -> tuple[str, str]:
        """Ask the worker what it holds; nothing is sent."""
        why = preflight.examine(publication_of(model, None), lambda found: self._setup_of(found, []), load_base)
        if why:
            return "", f"the worker at {self.address} cannot be used: {why}"
        return f"the worker at {self.address} answers and holds the same model", ""

    def submit(self, requests: Sequence[PreviewRequest], sampling: SamplingParams, step: int) -> None:
        """Copy the weights and ask for answers by them; returns at once.

        Args:
            requests: Prompts of one batch.
            sampling: For all of them.
            step: Optimizer steps completed.
        """
        exchange = self._bound
        if not requests:
            return
        self._counters.triggered += 1
        self._take(exchange.take_in())
        companion = exchange.companion
        if self.on_unavailable == "local" and companion.state in ("lost", "paused", "off"):
            self._answer_here(requests, sampling, step)
        elif not companion.is_usable:
            self._skip(requests, sampling, companion.why)
        else:
            self._sequence += 1
            self._take(exchange.put(self._sequence, requests, sampling, step))
            self._say_drops()

    def _say_drops(self) -> None:
        if self._counters.dropped and not self._said_drops:
            self._said_drops = True
            self._told.append(
                f"preview worker {self.address}: previews are asked for faster than it answers; some give way to newer "
                "ones, as preview/dropped counts"
            )

    def _skip(self, requests: Sequence[PreviewRequest], sampling: SamplingParams, why: str) -> None:
        self._take([Outcome("skipped", tuple(requests), sampling, why)])

    def _answer_here(self, requests: Sequence[PreviewRequest], sampling: SamplingParams, step: int) -> None:
        local = LocalPreviewBackend()
        local.bind(self.prompter, self.model)
        try:
            local.submit(requests, sampling, step)
        except torch.OutOfMemoryError:  # training has the memory, and keeps it
            self._skip(requests, sampling, "the worker does not answer, and there is no memory to answer here")
            return
        self._done += local.collect()
        self._counters.ok += 1

    def settle(self) -> None:
        """The weights are about to change: what is being copied of them comes before that."""
        if self._exchange is not None:
            self._exchange.settle()

    def collect(self, timeout: float = 0.0) -> list[PreviewResult]:
        """Answers that have come; waits up to `timeout` seconds for the first, if any are under way."""
        if self._exchange is not None:
            self._wait(self._exchange, timeout)
        done, self._done = self._done, []
        return done

    def _wait(self, exchange: Exchange, timeout: float) -> None:
        end = time.monotonic() + timeout
        self._take(exchange.take_in())
        exchange.hand_over(hurry=timeout > 0)
        while not self._done and not exchange.mailbox.is_idle and (left := end - time.monotonic()) > 0:
            self._take(exchange.take_in(min(left, 1.0)))
            exchange.hand_over(hurry=True)

    def make_room(self) -> None:
        """Wait until a preview would not be dropped: what comes now is of the last weights. See `finish`."""
        while self._exchange is not None and self._exchange.mailbox.room() is None and (left := self._left()) > 0:
            self._take(self._exchange.take_in(min(left, 1.0)))

    def _left(self) -> float:
        """Seconds that the end of the run may still wait; they are counted from the first call."""
        if self._end_by is None:
            self._end_by = time.monotonic() + self.flush_timeout
        return self._end_by - time.monotonic()

    def finish(self) -> list[PreviewResult]:
        """Wait for all that is under way; what is not done by then comes as failed.

        Together with `make_room`, and however often they are called, `flush_timeout` seconds at most.
        """
        done = self.collect()
        while self._under_way and (left := self._left()) > 0:
            done += self.collect(left)
        if self._under_way:
            self._take(self._bound.end(f"not done within {self.flush_timeout:g} s of the end of the run"))
        return done + self.collect()

    @property
    def _under_way(self) -> bool:
        return self._exchange is not None and not self._exchange.mailbox.is_idle

    def _take(self, outcomes: Sequence[Outcome]) -> None:
        """Count, and make results of what is to be shown; what gave way to a newer one is only counted."""
        for found in outcomes:
            self._counters.count(found.status)
            if found.status == "ok":
                self._done += self._results(found)
            elif found.status != "dropped":
                why = f"{SKIPPED}{found.why}" if found.status == "skipped" else found.why
                self._done += [failed(request, self.backend_type, why) for request in found.requests]

    def _results(self, found: Outcome) -> list[PreviewResult]:
        answer = found.answer
        return [
            failed(request, self.backend_type, error)
            if error
            else self.prompter.result(
                request,
                tokens,
                reason,
                answer["seconds"],
                self.backend_type,
                weights_step=answer["step"],
                seed=found.sampling.seed,
            )
            for request, tokens, reason, error in zip(
                found.requests, answer["tokens"], answer["reasons"], answer["errors"], strict=True
            )
        ]

    @property
    def _bound(self) -> Exchange:
        if self._exchange is None:
            raise RuntimeError("GrpcPreviewBackend.bind(prompter, model) comes before previews")
        return self._exchange

    @property
    def state(self) -> str:
        """Of the worker: empty (not known), connected, lost, paused or off."""
        return "" if self._exchange is None else self._exchange.companion.state

    def notices(self) -> list[str]:
        """Lines for the console since the last call, one for each change of state."""
        told, self._told = self._told, []
        return told + ([] if self._exchange is None else self._exchange.companion.take_notices())

    @property
    def counters(self) -> dict[str, int]:
        """triggered = ok + failed + dropped + skipped + pending."""
        return self._counters.as_dict()

    def metrics(self) -> dict[str, float]:
        """Durations of the newest preview, and totals."""
        if self._exchange is not None:
            self._figures |= self._exchange.figures
        counters = self._counters
        totals = {"dropped": counters.dropped, "skipped": counters.skipped, "failures": counters.failed}
        return {**self._figures, **{name: float(value) for name, value in totals.items()}}

    def close(self) -> None:
        """End the dispatcher and give the memory back, in bounded time; what is under way is given up."""
        if os.getpid() != self._owner:  # a forked data loader: the dispatcher is its parent's
            return
        atexit.unregister(self.close)
        if self._exchange is not None:
            self._told += self._exchange.companion.take_notices()
            self._take(self._exchange.end("the run ended before the answer came"))
            self._exchange.close()
        self._exchange = None
        super().close()
