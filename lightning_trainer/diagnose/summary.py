"""What both renderings of a view say in words."""

from __future__ import annotations

from typing import Any

from lightning_trainer.diagnose.inspect_rows import MOST_SCANNED, View
from lightning_trainer.diagnose.layout import MicroBatch

KINDS = {"bad": "unusable", "too_long": "over max_length", "too_short": "under min_length"}


def about_setting(view: View) -> str:
    """What made the rows what they are."""
    setting = view.setting
    prompt = "with a system prompt" if setting.system_prompt else "no system prompt of the profile or the configuration"
    least = f", min_length {setting.min_length}" if setting.min_length else ""
    return (
        f"profile {setting.profile}, {prompt}; tokenizer {setting.tokenizer}; loss on {setting.loss_on}; "
        f"max_length {setting.max_length}{least}"
    )


def about_rows(view: View) -> str:
    """How many rows there are to see, and why not more."""
    text = f"{counted(view.found, 'usable row')} of {view.scanned} read"
    if view.found < view.asked:
        why = "the training split has no more" if view.exhausted else f"no more than {MOST_SCANNED} are read"
        text += f", {view.asked} asked for: {why}"
    return text


def about_batch(view: View, batch: MicroBatch) -> str:
    """Shape and contents of a micro-batch."""
    lines, width = batch.shape
    padding = "" if batch.packed else f", {batch.padding} of {lines * width} tokens padding"
    return f"{lines} x {width} tokens, {counted(len(batch.placed), 'example')}, {batch.labels} labels{padding}"


def about_plan(view: View) -> str:
    """How these micro-batches differ from the run's."""
    setting = view.setting
    shuffled = ", shuffled" if setting.shuffle else ""
    if setting.packing:
        return (
            f"a micro-batch is one long row of up to {counted(setting.batch_size, 'pack')}; packs only decide which "
            f"examples share it. The run packs a whole epoch{shuffled}; here only the examples above are packed, in "
            "their order"
        )
    order = "the run shuffles, here the rows keep their order" if setting.shuffle else "rows keep their order"
    return f"a micro-batch is up to {counted(setting.batch_size, 'row')}; {order}"


def extent(view: View, batch: MicroBatch, pack: int) -> str:
    """How full a pack is."""
    used, most = filled(batch, pack), view.setting.max_length
    free = f"; the {most - used} left free are not computed" if used < most else ""
    return f"pack {pack + 1}: {used} of {most} tokens{free}"


def filled(batch: MicroBatch, pack: int) -> int:
    """Tokens in a pack."""
    return sum(placed.length for placed in batch.placed if placed.pack == pack)


def agreement(batch: MicroBatch) -> str:
    """What was checked of a batch, and whether it holds."""
    if batch.faults:
        return "the batch is wrong: see the lines marked !!"
    lengths = ", ".join(map(str, batch.example_lengths))
    return (
        f"checked: example_lengths {lengths}; positions restart at 0 in each; {batch.labels} labels = {batch.targets} "
        "predict_at and targets, all within their example; labels decode to what is shown as trained"
    )


def about_drops(view: View) -> str:
    """How many rows were left out on the way, by reason."""
    if not view.drop_counts:
        return "left out on the way: nothing"
    return "left out on the way: " + ", ".join(f"{count} {KINDS[kind]}" for kind, count in view.drop_counts.items())


def about_whole(whole: dict[str, Any]) -> str:
    """Totals of the whole split."""
    return "whole training split, as it was tokenised: " + ", ".join(f"{value} {name}" for name, value in totals(whole))


def totals(whole: dict[str, Any]) -> list[tuple[str, int]]:
    """Name and value of each total that says something."""
    names = {"read": "rows read", "kept": "kept", "rows": "examples", "tokens": "tokens", "trained_tokens": "trained"}
    maybe = {"truncated": "truncated", **KINDS, "duplicates": "duplicates"}
    always = [(name, int(whole[key])) for key, name in names.items()]
    lengths = whole["lengths"]
    spread = [("median length", int(lengths["p50"])), ("longest", int(lengths["p100"]))] if lengths else []
    return [*always, *((name, int(whole[key])) for key, name in maybe.items() if whole[key]), *spread]


def counted(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
