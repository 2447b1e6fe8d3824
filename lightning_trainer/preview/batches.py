"""A request as the batches that a worker takes: as many prompts at once, and as long, as it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_trainer.preview.calls import CallFailed
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.types import PROMPTS_PER_BATCH, seed_of_batch


@dataclass(frozen=True)
class Part:
    """One batch of a request.

    Attributes:
        places: Of its prompts, in the whole request.
    """

    request: pb.GenerateRequest
    places: tuple[int, ...]


def parts_of(whole: pb.GenerateRequest, limits: pb.Limits) -> tuple[list[Part], dict[int, str]]:
    """Split a request as `generation.generate` would, and further where a worker takes less.

    Returns:
        (batches, why a prompt is in none of them, by its place).

    Raises:
        CallFailed: No answer may be as long as is asked for, or no prompt fits.
    """
    new = whole.stopping.max_new_tokens
    if new > limits.max_new_tokens:
        text = f"{new} new tokens are asked for, the worker gives at most {limits.max_new_tokens}"
        raise CallFailed.unfit(f"{text}: start it with --max-new-tokens {new}")
    most = min(limits.max_prompt_tokens, limits.max_total_tokens - new)
    lengths = [len(prompt.tokens.ids) for prompt in whole.prompts]
    refused = {
        place: f"the prompt has {length} tokens, the worker takes {most}: start it with --max-prompt-tokens {length}"
        for place, length in enumerate(lengths)
        if length > most
    }
    if len(refused) == len(lengths):
        raise CallFailed.unfit(refused[0])
    parts: list[Part] = []
    for number, start in enumerate(range(0, len(lengths), PROMPTS_PER_BATCH)):
        batch = [p for p in range(start, min(start + PROMPTS_PER_BATCH, len(lengths))) if p not in refused]
        for places in _within(batch, lengths, new, limits):
            parts.append(Part(_part(whole, places, number, len(parts)), places))
    return parts, refused


def _within(places: Sequence[int], lengths: Sequence[int], new: int, limits: pb.Limits) -> Iterator[tuple[int, ...]]:
    """Runs of places that keep the worker's limits."""
    run: list[int] = []
    for place in places:
        longest = max(lengths[p] for p in [*run, place])
        full = len(run) == limits.max_prompts_per_request
        if run and (full or (len(run) + 1) * (longest + new) > limits.max_total_tokens):
            yield tuple(run)
            run = []
        run.append(place)
    if run:
        yield tuple(run)


def _part(whole: pb.GenerateRequest, places: Sequence[int], batch: int, number: int) -> pb.GenerateRequest:
    part = pb.GenerateRequest(
        request_id=f"{whole.request_id}-{number}",
        weights=whole.weights,
        prompts=[whole.prompts[place] for place in places],
        sampling=whole.sampling,
        stopping=whole.stopping,
        stream_every_tokens=whole.stream_every_tokens,
    )
    part.sampling.seed = seed_of_batch(whole.sampling.seed, batch)
    return part
