"""The same weights and the same requests here and by a worker: the same tokens, or how near they came.

On devices of one type, answers of LocalPreviewBackend and of `serve` are equal, sampled ones too. Devices of two types
round otherwise: there a greedy answer may part from the other, and the gap between the two tokens' logits says whether
rounding is to blame.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import Row
from preview_rig import START_SECONDS, Numbers, bound, nudge, save_model, served
from worker_thread import StockClient

from lightning_trainer import LocalPreviewBackend
from lightning_trainer.generation import first_difference, generate
from lightning_trainer.preview import PreviewBackend
from lightning_trainer.types import PreviewRequest, SamplingParams

VOCABULARY, TOKENS, SEED = 384, 48, 11

GREEDY = SamplingParams(max_new_tokens=TOKENS, temperature=0.0)
SAMPLED = SamplingParams(max_new_tokens=TOKENS, temperature=1.0, top_p=0.95, seed=SEED)


def run(quick: bool) -> list[Row]:
    """The table."""
    torch.set_num_threads(1)
    prompts = prompts_of(20 if quick else 40)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Weights wide apart: answers wander instead of repeating one token.
        model = save_model(folder, initializer_range=0.4, tie_word_embeddings=False)
        rows = same_device(folder, model, prompts, "cpu")
        if not torch.cuda.is_available():
            return [*rows, *two_kinds(folder, prompts, "bf16", "cpu", "no CUDA here: fp32 and bf16 on the CPU instead")]
        rows += same_device(folder, model.to("cuda"), prompts, "cuda")
        return [*rows, *two_kinds(folder, prompts, "fp32", "cuda", "fp32 on the CPU and on CUDA")]


def prompts_of(count: int) -> list[PreviewRequest]:
    """Of 1 to 40 tokens; more than one batch of them, unless there are few."""
    rng = random.Random(SEED)
    lengths = [rng.randint(1, 40) for _ in range(count)]
    ids = [tuple(rng.randrange(VOCABULARY) for _ in range(length)) for length in lengths]
    return [PreviewRequest(each, prompt_id=str(number)) for number, each in enumerate(ids)]


def same_device(folder: Path, model: Any, prompts: list[PreviewRequest], device: str) -> list[Row]:
    """Share of answers that are equal, greedy and sampled, by weights that are not those of the disk."""
    with served(folder, "--dtype", "fp32", "--device", device) as (address, _), bound(address, model) as remote:
        local = LocalPreviewBackend()
        local.bind(Numbers(), model)
        nudge(model)
        found = [
            (name, equal_share(_texts(local, prompts, sampling), _texts(remote, prompts, sampling)))
            for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED))
        ]
    note = f"of {len(prompts)} answers of {TOKENS} tokens"
    return [
        Row(f"equal here and by serve, {name}, {device}", (share,), at_least=1.0, note=note) for name, share in found
    ]


def _texts(backend: PreviewBackend, prompts: list[PreviewRequest], sampling: SamplingParams) -> list[str]:
    backend.submit(prompts, sampling, step=1)
    backend.settle()
    results = backend.collect(timeout=START_SECONDS)
    errors = {result.error_message for result in results if not result.success}
    if errors or len(results) != len(prompts):
        raise RuntimeError(f"{len(results)} of {len(prompts)} answers came: {errors}")
    return [result.text for result in results]


def equal_share(ours: list[Any], theirs: list[Any]) -> float:
    """Of answers, in order."""
    return statistics.fmean(a == b for a, b in zip(ours, theirs, strict=True))


def two_kinds(folder: Path, prompts: list[PreviewRequest], dtype: str, device: str, note: str) -> list[Row]:
    """Greedy answers of the CPU in fp32, and of a worker that rounds otherwise; both hold the numbers of `dtype`."""
    from transformers import AutoModelForCausalLM

    held = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=held)
    rounded.save_pretrained(folder / "rounded")
    model = rounded.float()
    ours = [list(answer.token_ids) for answer in generate(model, prompts, GREEDY)]
    with (
        served(folder / "rounded", "--dtype", dtype, "--device", device) as (address, _),
        StockClient(address, seconds=START_SECONDS) as client,
    ):
        theirs = [client.ask([request.prompt_ids], TOKENS)[0] for request in prompts]
    found = [
        first_difference(model, request.prompt_ids, a, b) for request, a, b in zip(prompts, ours, theirs, strict=True)
    ]
    apart = [difference for difference in found if difference is not None]
    share = (equal_share(ours, theirs),)
    if not apart:
        return [Row("equal answers of two kinds, greedy", share, note=note)]
    first = f"first: token {apart[0][0]}, {apart[0][1]} here, {apart[0][2]} there"
    return [
        Row("equal answers of two kinds, greedy", share, note=note),
        Row("  first token that differs", tuple(float(place) for place, *_ in apart), note=f"of {TOKENS}; {first}"),
        Row("  gap of the two logits there", tuple(gap for *_, gap in apart), note=f"{_spread(model, prompts)}"),
    ]


def _spread(model: Any, prompts: list[PreviewRequest]) -> str:
    """What a gap is to be compared with."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompts[0].prompt_ids])).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    return (
        f"logits spread by {float(logits.std()):.2g}; after the first prompt the best two are {best - second:.2g} apart"
    )
