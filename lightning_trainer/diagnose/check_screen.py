"""The facts of a run as one screen of text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

from lightning_trainer.diagnose.check_findings import Facts, Finding
from lightning_trainer.diagnose.check_run import RunFacts
from lightning_trainer.diagnose.memory import CONTEXT, GIB, Memory

WIDTH = 100
INDENT = 10

ASSUMED = (
    "assumes attention without stored scores and norms in fp32;",
    f"{CONTEXT // GIB} GiB is left for CUDA's context and fragmentation",
)

MIB = 1 << 20

ENDS = {"p0": "min", "p50": "median", "p100": "max"}


def screen(facts: Facts, findings: Sequence[Finding], previews: str = "") -> str:
    """Sections of lines, at most 100 columns wide."""
    sections = {
        "model": _model(facts),
        "data": _data(facts),
        "run": _run(facts),
        "memory": _memory(facts.memory, facts.model.gradient_checkpointing),
        **({"previews": [previews]} if previews else {}),
        "findings": _findings(findings),
    }
    return "\n\n".join(_section(name, lines) for name, lines in sections.items())


def _section(name: str, lines: Iterable[str]) -> str:
    wrapped = [part for line in lines for part in _wrapped(line)]
    return "\n".join(f"{name if not number else '':<{INDENT}}{line}" for number, line in enumerate(wrapped))


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH - INDENT, subsequent_indent="  ")


def _model(facts: Facts) -> Iterator[str]:
    model, settings = facts.model, facts.settings
    yield (
        f"{model.name}, {model.parameters:,} parameters: {model.trainable:,} trained, {model.frozen:,} frozen"
        + (", from random weights" if model.from_scratch else "")
    )
    if model.adapters:
        yield f"{model.adapters}, on a frozen model" + (" of 4 bits" if model.quantized else "")
    why = f" ({model.why_full})" if model.why_full else ""
    compiled = ", layers compiled" if model.compiled else ""
    yield f"{model.precision} ({model.dtype}), attention {model.attention}, loss {model.loss}{why}{compiled}"
    yield f"{settings.optimizer}, lr {settings.lr:g}, {_schedule(facts.run)}"


def _schedule(run: RunFacts) -> str:
    if not run.schedule_steps:
        return run.schedule
    warmup = _count(run.warmup_steps, "warm-up step")
    return f"{run.schedule} over {run.schedule_steps:,} steps, {warmup} among them"


def _data(facts: Facts) -> Iterator[str]:
    train, settings = facts.train, facts.settings
    if not train.exact:
        yield f"about, from the first {train.looked_at:,} of {train.read:,} rows:"
    held_out = "" if facts.val is None else f"; {facts.val.read:,} others held out"
    yield f"{_count(train.read, 'row')} read, {train.kept:,} kept, {train.duplicates:,} duplicates{held_out}"
    yield (
        f"{train.bad:,} bad, {train.too_long:,} over max_length {settings.max_length}, {train.too_short:,} under "
        f"min_length {settings.min_length}, {train.truncated:,} truncated"
    )
    for reason in train.reasons:
        yield f"  bad: {textwrap.shorten(reason, WIDTH - INDENT - 7)}"
    yield "tokens of an example: " + ", ".join(
        f"{ENDS.get(name, name)} {value:,}" for name, value in train.lengths.items()
    )
    trained = train.trained_tokens / max(train.tokens, 1)
    yield f"{train.tokens:,} tokens an epoch, {train.trained_tokens:,} of them trained on ({trained:.1%})"
    yield _layout(facts)


def _layout(facts: Facts) -> str:
    run = facts.run
    if not run.packing:
        return f"{_count(run.rows, 'row')}, padded: {run.fill:.1%} of the batches' places hold tokens"
    packs = _count(run.rows, "pack")
    return f"{facts.train.examples:,} examples in {packs} of {facts.settings.max_length:,} tokens, {run.fill:.1%} full"


def _run(facts: Facts) -> Iterator[str]:
    run = facts.run
    about = "" if run.exact else "about "
    of_rows = _count(run.rows_per_step, "pack" if run.packing else "row")
    yield f"a step: {of_rows}; {run.examples_per_step:,.0f} examples, {run.tokens_per_step:,.0f} tokens on average"
    devices = _count(run.devices, "device")
    yield f"  = batch_size {run.batch_size} x accumulate_grad_batches {run.accumulate} x {devices}"
    batches = _count(run.micro_batches, "micro-batch", "micro-batches")
    yield f"an epoch: {about}{batches}, {_count(run.steps_per_epoch, 'optimizer step')}"
    steps = "no end" if run.steps is None else f"{about}{_count(run.steps, 'optimizer step')}"
    yield f"the run: {steps} ({_limits(run)})"
    yield f"  {_events(run)}"


def _limits(run: RunFacts) -> str:
    limits = [f"max_epochs {run.epochs}"] if run.epochs != -1 else []
    limits += [f"max_steps {run.max_steps}"] if run.max_steps != -1 else []
    limits += [f"max_time {timedelta(seconds=run.max_time)}"] if run.max_time else []
    return ", ".join(limits) or "a callback ends it"


def _events(run: RunFacts) -> str:
    validations = "validations by the clock" if run.validations is None else _count(run.validations, "validation")
    return f"{validations}, {_count(run.checkpoints, 'checkpoint')}, {_count(run.previews, 'preview')}"


def _memory(memory: Memory, checkpointing: bool) -> Iterator[str]:
    yield _bytes("weights", memory.weights)
    yield _bytes("gradients", memory.gradients)
    yield _bytes("optimizer state", memory.moments, memory.note)
    yield _bytes("its update", memory.update, "temporaries, when there are no activations")
    yield _bytes("activations", memory.activations, f"{memory.tokens:,} tokens{_other_way(memory, checkpointing)}")
    yield _bytes("loss", memory.loss)
    yield _bytes("total", memory.total, _verdict(memory))
    yield from ASSUMED


def _other_way(memory: Memory, checkpointing: bool) -> str:
    other = memory.without_checkpointing if checkpointing else memory.with_checkpointing
    word = "without" if checkpointing else "with"
    return "" if other is None else f"; {word} gradient_checkpointing {_size(other)}"


def _verdict(memory: Memory) -> str:
    card = f"{memory.card_name} ({memory.card / GIB:.1f} GiB)"
    return {None: "", True: f"fits {card}", False: f"does not fit {card}"}[memory.fits]


def _bytes(name: str, size: int | None, note: str = "") -> str:
    amount = "not estimated" if size is None else _size(size)
    return f"{name:<15}{amount:>13}  {note}".rstrip()


def _size(size: int) -> str:
    return f"{size / MIB:,.1f} MiB" if size < GIB / 10 else f"{size / GIB:,.2f} GiB"


def _findings(findings: Sequence[Finding]) -> Iterator[str]:
    if not findings:
        yield "none"
    for finding in findings:
        yield f"{finding.severity}: {finding.key}: {finding.message}"


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
