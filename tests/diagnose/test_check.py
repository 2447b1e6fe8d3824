"""The doctor: what it says of a run is what the run does; what is doubtful, it names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_trainer.adapters import LoraSettings
from lightning_trainer.callbacks import PreviewCallback, RunCheckpoint, StepValidation
from lightning_trainer.data import ChatDataModule
from lightning_trainer.diagnose import check_data
from lightning_trainer.diagnose.check import Report, examine
from lightning_trainer.diagnose.check_findings import Facts, findings
from lightning_trainer.model import CausalLMModule, CompensatedAdamW, WarmupConstant, WarmupCosine
from lightning_trainer.precision import SingleDtypePrecision
from lightning_trainer.profiles import Plain
from lightning_trainer.types import InputError

Parts = tuple[CausalLMModule, ChatDataModule, Trainer]


@pytest.fixture
def parts(tmp_path: Path, tiny_model_dir: Path, chat_rows: Any, write_rows: Any) -> Callable[..., Parts]:
    """The three objects of a small run; keyword arguments go to their sections."""

    def make(
        rows: list[dict[str, Any]] | None = None,
        precision: Any = "32-true",
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        **trainer: Any,
    ) -> Parts:
        module = CausalLMModule(**{"pretrained": str(tiny_model_dir), **(model or {})})
        files = {
            "train_path": str(write_rows(chat_rows(40) if rows is None else rows)),
            "cache_dir": str(tmp_path / "c"),
        }
        defaults = {"profile": Plain(), "max_length": 160, "batch_size": 2, "val_fraction": 0.2}
        datamodule = ChatDataModule(**{**files, **defaults, **(data or {})})
        datamodule.tokenizer = module.tokenizer
        return module, datamodule, _trainer(tmp_path, precision, trainer)

    return make


def _trainer(folder: Path, precision: Any, changes: dict[str, Any]) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    plugins: Any = [SingleDtypePrecision(precision)]
    return Trainer(
        **{**quiet, **defaults, **changes},
        enable_checkpointing=any(isinstance(callback, RunCheckpoint) for callback in changes.get("callbacks", [])),
        plugins=plugins,
        default_root_dir=folder / "run",
    )


class Counter(Callback):
    """Counts what the trainer does."""

    def __init__(self) -> None:
        self.micro_batches = self.validations = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.micro_batches += 1

    def on_validation_end(self, *_: Any) -> None:
        self.validations += 1


def test_adapters_are_counted_beside_what_is_frozen(parts: Callable[..., Parts]) -> None:
    module, data, trainer = parts(precision="bf16-true", model={"lora": LoraSettings(rank=4, alpha=8, dtype="fp32")})
    report = examine(module, data, trainer)
    assert (report.facts.model.trainable, report.facts.model.frozen) == (3712, 27840)
    assert "LoRA of rank 4, alpha 8, in fp32, on a frozen model" in report.as_text()
    assert (report.facts.memory.gradients, report.facts.memory.moments) == (4 * 3712, 8 * 3712)
    with pytest.raises(InputError, match="has no layer 'nothing'"):
        examine(*parts(model={"lora": LoraSettings(target_modules=["nothing"])}))


def _keys(report: Report, severity: str) -> set[str]:
    return {finding.key for finding in report.findings if finding.severity == severity}


@pytest.mark.parametrize(
    ("trainer", "data"),
    [
        ({}, {}),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, {}),
        ({"max_epochs": 2, "accumulate_grad_batches": 3, "val_check_interval": 0.5}, {"packing": False}),
        ({"max_epochs": 2, "max_steps": 7, "accumulate_grad_batches": 2, "val_check_interval": 2}, {"packing": False}),
        ({"max_epochs": -1, "max_steps": 9, "accumulate_grad_batches": 2, "val_check_interval": 3}, {}),
        ({"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 5}, {}),
        ({"max_epochs": 4, "check_val_every_n_epoch": 3, "max_steps": 20}, {"shuffle": False}),
        ({"max_epochs": 2, "limit_train_batches": 5, "accumulate_grad_batches": 2}, {"packing": False}),
        ({"limit_train_batches": 0.5, "accumulate_grad_batches": 2}, {"packing": False}),
        ({"max_epochs": 3, "accumulate_grad_batches": 4, "val_check_interval": 1}, {"packing": False}),
        ({"max_epochs": 3, "accumulate_grad_batches": 3, "every_n_steps": 4}, {"packing": False}),
        ({"limit_val_batches": 0}, {}),
        ({}, {"val_fraction": 0.0}),
    ],
)
def test_the_run_is_what_lightning_makes_of_it(parts: Any, trainer: dict[str, Any], data: dict[str, Any]) -> None:
    trainer, count = dict(trainer), Counter()
    every = trainer.pop("every_n_steps", None)
    module, datamodule, made = parts(data=data, **trainer, callbacks=[count, StepValidation(every)])
    report = examine(module, datamodule, made)
    run = report.facts.run
    assert run.exact
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(module, datamodule=datamodule)
    assert run.steps == made.global_step
    assert run.micro_batches == made.num_training_batches
    assert run.validations == count.validations
    store = datamodule.stores["train"]
    ledger = store.ledger["report"]
    train = report.facts.train
    assert (train.read, train.kept, train.tokens, train.trained_tokens, train.duplicates) == tuple(
        ledger[name] for name in ("read", "kept", "tokens", "trained_tokens", "duplicates")
    )
    assert train.lengths == ledger["lengths"]


def test_counts_by_hand(parts: Any) -> None:
    callbacks = [RunCheckpoint(every_n_train_steps=4), PreviewCallback(every_n_steps=3)]
    report = examine(*parts(data={"packing": False, "val_fraction": 0.0}, max_steps=9, callbacks=callbacks))
    run = report.facts.run
    assert (run.rows, run.micro_batches, run.steps_per_epoch, run.steps) == (40, 20, 20, 9)
    assert (run.rows_per_step, run.examples_per_step) == (2, 2.0)
    assert (run.checkpoints, run.previews, run.validations) == (3, 3, 0)  # 4, 8, 9; 3, 6, 9
    assert (run.schedule, run.schedule_steps, run.warmup_steps) == ("WarmupCosine", 9, 1)


def test_the_model_is_counted_without_its_weights(parts: Any, tiny_model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = examine(*parts()).facts.model
    real = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert model.parameters == model.trainable == sum(p.numel() for p in real.parameters())
    assert (model.name, model.frozen, model.embedding_rows) == ("Qwen3ForCausalLM", 0, 384)
    assert (model.attention, model.loss, model.dtype) == ("lightning_trainer_packed", "chunked", "float32")
    assert examine(*parts(data={"packing": False})).facts.model.attention == "sdpa"


def test_nothing_is_changed(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, data, trainer = parts()
    before, state = sorted(tmp_path.rglob("*")), torch.get_rng_state()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    examine(module, data, trainer)
    scratch.rmdir()  # which only an empty folder takes
    assert sorted(tmp_path.rglob("*")) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert module.model is None
    assert data.stores == {}


def test_many_rows_are_sampled(parts: Any, chat_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_data, "SAMPLE", 100)
    rows = [*chat_rows(990), *chat_rows(10)]
    train = examine(*parts(rows, data={"val_fraction": 0.0})).facts.train
    assert (train.exact, train.looked_at, train.read, train.kept, train.duplicates) == (False, 100, 1000, 1000, 10)
    monkeypatch.setattr(check_data, "SAMPLE", 1000)
    report = examine(*parts(rows, data={"val_fraction": 0.0}))
    exact = report.facts.train
    assert exact.exact
    assert train.tokens == pytest.approx(exact.tokens, rel=0.05)
    assert "about" not in report.as_text()


def test_a_sample_says_so(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_data, "SAMPLE", 10)
    text = examine(*parts(data={"val_fraction": 0.0})).as_text()
    assert "about, from the first 10 of 40 rows" in text


def test_rows_tokenised_already_are_all_counted(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, data, trainer = parts()
    data.prepare_data()
    monkeypatch.setattr(check_data, "SAMPLE", 5)
    train = examine(module, data, trainer).facts.train
    assert (train.exact, train.looked_at, train.stops) == (True, train.read, 1.0)
    assert train.read > 5


@pytest.mark.parametrize("compiled", [False, True])
def test_it_says_whether_layers_will_be_compiled(parts: Any, compiled: bool) -> None:
    report = examine(*parts(model={"compile": compiled}))
    assert report.facts.model.compiled == compiled
    assert ("loss chunked, layers compiled\n" in report.as_text()) == compiled


def test_the_screen_is_one_and_the_json_is_plain(parts: Any, chat_rows: Any) -> None:
    report = examine(*parts([*chat_rows(30), {"messages": []}, {"neither": "nor"}]))
    lines = report.as_text().splitlines()
    assert len(lines) <= 40
    assert max(len(line) for line in lines) <= 100
    assert [line.split()[0] for line in lines if not line.startswith(" ") and line] == [
        "model",
        "data",
        "run",
        "memory",
        "findings",
    ]
    plain = report.as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["findings"][0]["key"] == "data.max_bad_fraction"
    assert plain["train"]["bad"] == 2
    assert len(plain["train"]["reasons"]) == 2


def test_a_sound_run_has_no_findings(parts: Any, chat_rows: Any) -> None:
    report = examine(*parts(chat_rows(100), data={"batch_size": 1}))
    assert report.findings == ()
    assert report.as_text().endswith("findings  none")


@pytest.fixture
def sound(parts: Any, chat_rows: Any) -> Facts:
    """Facts that no rule minds."""
    return examine(*parts(chat_rows(100), data={"batch_size": 1})).facts


def _changed(facts: Facts, changes: dict[str, Any]) -> Facts:
    for path, value in changes.items():
        part, _, name = path.partition(".")
        facts = replace(facts, **{part: replace(getattr(facts, part), **{name: value}) if name else value})
    return facts


BF16, FP16, PLAIN = {"model.precision": "bf16-true"}, {"model.precision": "16-true"}, {"settings.loses_nothing": False}


@pytest.mark.parametrize(
    ("changes", "severity", "key", "words"),
    [
        ({**BF16, **PLAIN, "settings.optimizer": "AdamW"}, "warning", "model.optimizer", "AdamW at lr 2e-05"),
        (FP16, "warning", "trainer.precision", "bf16-true"),
        ({"settings.lr": 2e-3}, "warning", "model.optimizer", "lr 0.002"),
        ({"train.stops": 0.0}, "error", "model.tokenizer", "never learn to stop"),
        ({"train.too_long": 2}, "warning", "data.max_length", "longer than 160"),
        ({"train.too_long": 1, "settings.on_long_row": "raise"}, "error", "data.on_long_row", "1 rows"),
        ({"train.bad": 9}, "error", "data.max_bad_fraction", "more than 0.01"),
        ({"train.bad": 1, "settings.on_bad_row": "raise"}, "error", "data.on_bad_row", "quarantine"),
        ({"train.duplicates": 20}, "warning", "data.train_path", "duplicates"),
        ({"train.trained_tokens": 1}, "warning", "data.loss_on", "0.0% of the tokens"),
        ({"val": None}, "warning", "data.val_fraction", "nothing is held out"),
        ({"run.warmup_steps": 500}, "warning", "model.lr_scheduler", "500 warm-up steps"),
        ({"run.schedule_steps": 5000}, "warning", "model.lr_scheduler", "total_steps 5000"),
        ({"run.steps": 19, "run.schedule_steps": 19}, "warning", "trainer.max_epochs", "only 19"),
        ({"run.steps": 0, "run.schedule_steps": 0}, "error", "trainer.max_epochs", "only 0"),
        ({"run.steps": None, "run.schedule_steps": None}, "error", "trainer.max_steps", "no end"),
        ({"run.packing": False, "run.fill": 0.3}, "warning", "data.packing", "70%"),
        ({"settings.max_length": 4096}, "warning", "data.max_length", "2048 positions"),
        ({"model.embedding_rows": 151_936}, "warning", "model.tokenizer", "151,936 rows"),
        ({"model.has_weights": False}, "error", "model.pretrained", "no weights"),
        ({"memory.total": 30 * 2**30, "memory.card": 24 * 2**30}, "warning", "model.gradient_checkpointing", "30.0"),
    ],
)
def test_each_doubt_has_its_finding(sound: Facts, changes: dict[str, Any], severity: str, key: str, words: str) -> None:
    assert findings(sound) == ()
    found = findings(_changed(sound, changes))
    assert [(f.severity, f.key) for f in found] == [(severity, key)]
    assert words in found[0].message
    assert "\n" not in found[0].message


@pytest.mark.parametrize(
    "changes",
    [
        {"settings.lr": 2e-3, "model.from_scratch": True},
        {"model.has_weights": False, "model.from_scratch": True},
        {"run.schedule_steps": 5000, "run.schedule": "WarmupConstant"},
        PLAIN,  # fp32 loses no update
        {"train.too_long": 2, "settings.on_long_row": "truncate"},
        {"run.fill": 0.3},  # a pack's room costs no computing beyond the last one
        {"memory.total": None, "memory.activations": None},
    ],
)
def test_what_is_no_finding(sound: Facts, changes: dict[str, Any]) -> None:
    assert findings(_changed(sound, changes)) == ()


def test_errors_come_first(sound: Facts) -> None:
    found = findings(_changed(sound, {**FP16, **PLAIN}))
    assert [(f.severity, f.key) for f in found] == [("error", "model.optimizer"), ("warning", "trainer.precision")]


def test_a_long_checkpoint_interval_is_no_finding(parts: Any, chat_rows: Any) -> None:
    callbacks = [RunCheckpoint(every_n_train_steps=10_000)]
    report = examine(*parts(chat_rows(100), data={"batch_size": 1}, callbacks=callbacks))
    assert (report.findings, report.facts.run.checkpoints) == ((), 1)


def test_a_clock_is_named(parts: Any) -> None:
    assert "max_time 2:00:00" in examine(*parts(max_time="00:02:00:00")).as_text()


def test_a_batch_is_no_larger_than_the_data(parts: Any, chat_rows: Any) -> None:
    facts = examine(*parts(chat_rows(6), data={"batch_size": 50, "packing": True})).facts
    assert facts.run.most_tokens == facts.run.rows * facts.settings.max_length


def test_errors_of_real_configurations(parts: Any, tokenizer: Any, tmp_path: Path, tiny_config: Any) -> None:
    tiny_config().save_pretrained(tmp_path / "empty")
    tokenizer.save_pretrained(tmp_path / "empty")
    empty = {"pretrained": str(tmp_path / "empty")}
    assert "model.pretrained" in _keys(examine(*parts(model=empty)), "error")
    assert "data.on_long_row" in _keys(examine(*parts(data={"max_length": 60, "on_long_row": "raise"})), "error")
    assert "trainer.val_check_interval" in _keys(examine(*parts(val_check_interval=999)), "error")
    assert "trainer.limit_val_batches" in _keys(examine(*parts(limit_val_batches=0.01)), "error")
    assert "trainer.max_steps" in _keys(examine(*parts(max_epochs=-1)), "error")


def test_a_template_that_never_closes_a_turn_is_an_error(parts: Any, make_tokenizer: Any) -> None:
    module, data, trainer = parts()
    data.tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    report = examine(module, data, trainer)
    assert report.facts.train.stops == 0
    assert "model.tokenizer" in _keys(report, "error")


def test_optimizer_and_schedule_are_asked(parts: Any) -> None:
    model = {
        "optimizer": lambda params: torch.optim.AdamW(params, lr=3e-4),
        "lr_scheduler": lambda optimizer: WarmupCosine(optimizer, warmup_steps=50, total_steps=900),
    }
    report = examine(*parts(model=model, precision="bf16-true"))
    settings, run = report.facts.settings, report.facts.run
    assert (settings.optimizer, settings.lr, settings.loses_nothing) == ("AdamW", 3e-4, False)
    assert (run.warmup_steps, run.schedule_steps) == (50, 900)
    assert {"model.optimizer", "model.lr_scheduler"} <= _keys(report, "warning")


def test_no_end_is_no_error_with_a_schedule_that_has_its_own(parts: Any) -> None:
    model = {"lr_scheduler": lambda optimizer: WarmupConstant(optimizer, warmup_steps=5, total_steps=100)}
    report = examine(*parts(model=model, max_epochs=-1, max_time="00:00:10:00"))
    assert report.facts.run.steps is None
    assert _keys(report, "error") == set()
    assert "no end" in report.as_text()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": {"pretrained": "/nowhere/at/all"}}, "model.pretrained"),
        ({"data": {"train_path": "/nowhere/rows.jsonl"}}, "data.train_path"),
        ({"rows": [{"messages": []}]}, "data.train_path"),
        ({"model": {"optimizer": lambda p: CompensatedAdamW(p, lr=-1.0)}}, "model.optimizer"),
        ({"model": {"lr_scheduler": lambda o: WarmupCosine(o, warmup_steps=-1)}}, "model.lr_scheduler"),
    ],
)
def test_what_cannot_be_examined_is_refused(parts: Any, changes: Any, key: str) -> None:
    with pytest.raises(InputError) as raised:
        examine(*parts(**changes))
    assert raised.value.key == key


def test_another_precision_plugin_is_refused(parts: Any) -> None:
    module, data, _ = parts()
    with pytest.raises(InputError, match="SingleDtypePrecision"):
        examine(module, data, Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1))
