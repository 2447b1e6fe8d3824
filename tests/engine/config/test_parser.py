"""Faults in files and on the command line, told with place, expectation and nearest name; good configs untouched."""

from __future__ import annotations

import shlex
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerCallable, OptimizerCallable

from lightning_trainer.engine.config.config_file import ConfigError
from lightning_trainer.engine.config.parser import ConfigParser

pytestmark = pytest.mark.filterwarnings(  # LightningCLI 2.6 calls what jsonargparse 4.5x renames
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)


@dataclass
class ToyLora:
    rank: int = 8
    alpha: float = 16.0
    target: str | list[str] = "all"


@dataclass
class ToyLock:
    vocab: int
    name: str | None = None


class ToyProfile:
    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix


class ToyPlain(ToyProfile):
    def __init__(self, width: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width


class ToyFancy(ToyProfile):
    def __init__(self, glow: float, parts: list[str] | None = None) -> None:
        super().__init__()
        self.glow, self.parts = glow, parts


class ToyNote(Callback):
    def __init__(self, every: int = 5, text: str = "x", profile: ToyProfile | None = None) -> None:
        self.every, self.text, self.profile = every, text, profile


class ToyDefault(Callback):
    def __init__(self, pace: int = 1) -> None:
        self.pace = pace


class ToyModule(LightningModule):
    def __init__(
        self,
        pretrained: str,
        lr: float = 1e-3,
        on_long_row: Literal["drop", "truncate", "raise"] = "drop",
        size: ToyLora = ToyLora(),  # noqa: B008 - jsonargparse turns it into keys
        lora: ToyLora | None = None,
        locked: ToyLock | None = None,
        profile: ToyProfile | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: dict[str, float] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        sources: list[ToyLora] | None = None,
        total_steps: int = 0,
    ) -> None:
        super().__init__()
        self.lr, self.lora, self.size, self.profile, self.optimizer = lr, lora, size, profile, optimizer


class ToyData(LightningDataModule):
    def __init__(self, path: str | list[str] = "a", max_length: int = 5, fraction: float | None = None) -> None:
        super().__init__()
        self.path, self.max_length = path, max_length


class ToyCLI(LightningCLI):
    def __init__(self, args: Any) -> None:
        super().__init__(
            ToyModule,
            ToyData,
            args=args,
            parser_class=ConfigParser,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=False,
            trainer_defaults={"logger": False, "accelerator": "cpu", "enable_checkpointing": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_subclass_arguments(ToyProfile, "backend", default={"class_path": f"{__name__}.ToyPlain"})
        parser.add_lightning_class_args(ToyNote, "checkpoint")
        parser.set_defaults({"trainer.callbacks": [{"class_path": f"{__name__}.ToyDefault"}]})
        parser.link_arguments("trainer.max_steps", "model.total_steps")

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is trained."""


Parse = Callable[..., Namespace]
Fault = Callable[..., str]


@pytest.fixture(scope="module")
def parser() -> LightningArgumentParser:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-trainer"])
        return ToyCLI(["fit", "--model.pretrained", "x"]).parser


@pytest.fixture
def parse(parser: LightningArgumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Parses `fit` with YAML texts as 0.yaml, 1.yaml, … and further words; gives what `fit` would run with."""
    monkeypatch.chdir(tmp_path)

    def run(*texts: str, words: str = "") -> Namespace:
        argv = ["fit"]
        for number, text in enumerate(texts):
            Path(f"{number}.yaml").write_text(text)
            argv += ["--config", f"{number}.yaml"]
        return parser.parse_args(argv + shlex.split(words)).fit  # type: ignore[no-any-return]

    return run


@pytest.fixture
def fault(parse: Parse) -> Fault:
    """What the user reads for a config that starts with a good line, so that faults begin on line 2."""

    def run(text: str = "", words: str = "") -> str:
        with pytest.raises(ConfigError) as caught:
            parse(f"model: {{pretrained: x}}\n{text}", words=words)
        return str(caught.value)

    return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: {lr: 3}", "0.yaml:2:1: modle: no such key; did you mean model?"),
        ("modle: {}", "0.yaml:2:1: modle: no such key; did you mean model?"),
        ("data: {max_lenght: 3}", "0.yaml:2:8: data.max_lenght: no such key; did you mean data.max_length?"),
        ("data: {extra: {}}", "0.yaml:2:8: data.extra: no such key; valid here: path, max_length, fraction"),
        ("data: {pretrained: x}", "0.yaml:2:8: data.pretrained: no such key; did you mean model.pretrained?"),
        ("max_length: 3", "0.yaml:2:1: max_length: no such key; did you mean data.max_length?"),
        ("checkpoint: {evry: 3}", "0.yaml:2:14: checkpoint.evry: no such key; did you mean checkpoint.every?"),
        ("data:", "0.yaml:2:1: data: expected keys below it (path, max_length, fraction), found null"),
        ("data: 3", "0.yaml:2:1: data: expected keys below it (path, max_length, fraction), found 3 (int)"),
        ("3: x", "0.yaml:2:1: 3: YAML reads this key as 3 (int); put it in quotes"),
        (
            "data: {path+: [b], max_length+: 3}",
            "0.yaml:2:20: data.max_length+: no such key; did you mean data.max_length?",
        ),
    ],
)
def test_unknown_keys(fault: Fault, text: str, expected: str) -> None:
    assert fault(text) == expected


def test_a_misspelt_name_is_looked_for_elsewhere(parse: Parse) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("model:\n  pretrained: x\n  max_lenght: 3\n")
    assert str(caught.value) == "0.yaml:3:3: model.max_lenght: no such key; did you mean data.max_length?"


def test_a_linked_key_is_refused_in_a_file(parse: Parse) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("model: {pretrained: x, total_steps: 3}")
    expected = "model.total_steps: this is computed from trainer.max_steps; set that instead"
    assert str(caught.value) == f"0.yaml:1:24: {expected}"


def test_every_fault_is_told_in_the_order_of_the_files(parse: Parse) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("model: {lrr: 3}\ndata: {max_length: x}\n", "data: {fraction: x}", words="--model.lr y")
    assert str(caught.value).splitlines() == [
        "0.yaml:1:9: model.lrr: no such key; did you mean model.lr?",
        "0.yaml:2:8: data.max_length: expected int, found 'x' (str)",
        "1.yaml:1:8: data.fraction: expected float or null, found 'x' (str)",
        "command line: --model.lr: expected float, found 'y' (str)",
    ]


def test_many_faults_are_counted(fault: Fault) -> None:
    lines = fault("".join(f"key{n}: 3\n" for n in range(9))).splitlines()
    assert lines[0] == "9 faults; the first 5:"
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {max_length: null}", "0.yaml:2:8: data.max_length: expected int, found null"),
        ("data: {max_length: 5.0}", "0.yaml:2:8: data.max_length: expected int, found 5.0 (float)"),
        ("data: {max_length: [3]}", "0.yaml:2:8: data.max_length: expected int, found a list of 1"),
        (
            "data: {fraction: {a: 1}}",
            "0.yaml:2:8: data.fraction: expected float or null, found a mapping with the keys a",
        ),
        (
            "data: {path: 3}",
            "0.yaml:2:8: data.path: expected str or list of str, found 3 (int); put text in quotes: '3'",
        ),
        ("data: {path: [a, null]}", "0.yaml:2:18: data.path.1: expected str, found null"),
        ("trainer: {max_steps: x}", "0.yaml:2:11: trainer.max_steps: expected int, found 'x' (str)"),
    ],
)
def test_values_of_the_wrong_type(fault: Fault, text: str, expected: str) -> None:
    assert fault(text) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("lr: abc", "lr: expected float, found 'abc' (str)"),
        (
            "on_long_row: dropp",
            "on_long_row: expected one of: drop, truncate, raise, found 'dropp' (str); did you mean drop?",
        ),
        (
            "on_long_row: off",
            "on_long_row: expected one of: drop, truncate, raise, found false (bool); "
            "YAML reads on, off, yes and no as true and false: put the text in quotes",
        ),
        ("lora: 3", "lora: expected a ToyLora or null, found 3 (int)"),
        ("size: null", "size: expected keys below it (rank, alpha, target), found null"),
        ("betas: [1]", "betas: expected list of 2 (float, float), found a list of 1"),
        ("optimizer: null", "optimizer: expected an Optimizer, found null"),
        ("optimizer: 3", "optimizer: expected an Optimizer, found 3 (int)"),
    ],
)
def test_values_of_the_model(parse: Parse, value: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"model:\n  pretrained: x\n  {value}\n")
    assert str(caught.value) == f"0.yaml:3:3: model.{expected}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("lora: {rank: null}", "10: model.lora.rank: expected int, found null"),
        ("lora: {rnk: 3}", "10: model.lora.rnk: ToyLora has no parameter 'rnk'; did you mean model.lora.rank?"),
        (
            "lora: {nothing: {}}",
            "10: model.lora.nothing: ToyLora has no parameter 'nothing'; valid here: rank, alpha, target",
        ),
        ("size: {rank: null}", "10: model.size.rank: expected int, found null"),
        ("size: {rnk: {}}", "10: model.size.rnk: no such key; did you mean model.size.rank?"),
        ("sources: [{rank: x}]", "14: model.sources.0.rank: expected int, found 'x' (str)"),
        ("weights: {a: b}", "13: model.weights.a: expected float, found 'b' (str)"),
        ("betas: [1, x]", "14: model.betas.1: expected float, found 'x' (str)"),
        ("locked: {name: a}", "3: model.locked: ToyLock needs the parameter vocab (int)"),
    ],
)
def test_values_inside_values(parse: Parse, value: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"model:\n  pretrained: x\n  {value}\n")
    assert str(caught.value) == f"0.yaml:3:{expected}"


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("{class_path: ToyNoet}", "0.class_path: no class 'ToyNoet', expected a Callback; did you mean ToyNote?"),
        (
            "{class_path: lightning.pytorch.callbacks.Timr}",
            "0.class_path: no class 'lightning.pytorch.callbacks.Timr' (lightning.pytorch.callbacks has no 'Timr'), "
            "expected a Callback; did you mean lightning.pytorch.callbacks.Timer?",
        ),
        (
            "{class_path: lightnin.pytorch.callbacks.Timer}",
            "0.class_path: no class 'lightnin.pytorch.callbacks.Timer' (no module lightnin), "
            "expected a Callback; did you mean lightning.pytorch.callbacks.Timer?",
        ),
        ("{class_path: torch.nn.Linear}", "0.class_path: torch.nn.Linear is not a Callback"),
        ("{class_path: 3}", "0.class_path: expected the name of a class, found 3 (int)"),
        (
            "{clas_path: ToyNote}",
            "0.clas_path: Callback has no parameter 'clas_path'; did you mean trainer.callbacks.0.class_path?",
        ),
        ("{class_path: ToyNote, init_arg: {}}", "0.init_arg: no such key; did you mean init_args?"),
        ("{class_path: ToyNote, every: 3}", "0.every: no such key; did you mean init_args.every?"),
        ("{class_path: ToyNote, init_args: }", "0.init_args: expected the parameters of the class, found null"),
        ("{class_path: ToyNote, init_args: {every: null}}", "0.init_args.every: expected int, found null"),
        (
            "{class_path: ToyNote, init_args: {evry: 3}}",
            "0.init_args.evry: ToyNote has no parameter 'evry'; did you mean trainer.callbacks.0.init_args.every?",
        ),
        (
            "{class_path: EarlyStopping, init_args: {monitor: x, patiense: 3}}",
            "0.init_args.patiense: EarlyStopping has no parameter 'patiense'; "
            "did you mean trainer.callbacks.0.init_args.patience?",
        ),
        ("{class_path: EarlyStopping}", "0.class_path: EarlyStopping needs the parameter monitor (str)"),
        (
            "{class_path: ToyNote, init_args: {profile: {class_path: ToyPlain, init_args: {width: null}}}}",
            "0.init_args.profile.init_args.width: expected int, found null",
        ),
        (
            "{class_path: ToyNote, init_args: {profile: {class_path: ToyPlain, init_args: {prefx: a}}}}",
            "0.init_args.profile.init_args.prefx: ToyPlain has no parameter 'prefx'; "
            "did you mean trainer.callbacks.0.init_args.profile.init_args.prefix?",
        ),
    ],
)
def test_callbacks(fault: Fault, item: str, expected: str) -> None:
    place, _, told = fault(f"trainer:\n  callbacks:\n  - {item}\n").partition(": trainer.callbacks.")
    assert told == expected
    assert place.startswith("0.yaml:4:")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("AdmW", "optimizer: no class 'AdmW', expected an Optimizer; did you mean AdamW?"),
        (
            "torch.optim.AdmW",
            "optimizer: no class 'torch.optim.AdmW' (torch.optim has no 'AdmW'), expected an Optimizer; "
            "did you mean torch.optim.AdamW?",
        ),
        (
            "{class_path: SGD, init_args: {momentun: 3}}",
            "optimizer.init_args.momentun: SGD has no parameter 'momentun'; "
            "did you mean model.optimizer.init_args.momentum?",
        ),
        ("{class_path: SGD, init_args: {momentum: null}}", "optimizer.init_args.momentum: expected float, found null"),
        (
            "{class_path: AdamW, init_args: {lr: abc}}",
            "optimizer.init_args.lr: expected float or a Tensor, found 'abc' (str)",
        ),
        (
            "{weight_decy: 1}",
            "optimizer.weight_decy: AdamW has no parameter 'weight_decy'; did you mean model.optimizer.weight_decay?",
        ),
    ],
)
def test_optimizers(parse: Parse, value: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"model:\n  pretrained: x\n  optimizer: {value}\n")
    place, _, told = str(caught.value).partition(": model.")
    assert told == expected
    assert place.startswith("0.yaml:3:")


def test_parameters_the_caller_passes_are_not_asked_for_nor_accepted(parse: Parse) -> None:
    step_lr = "model: {pretrained: x, lr_scheduler: {class_path: StepLR, init_args: {%s}}}"
    parse(step_lr % "step_size: 3")
    with pytest.raises(ConfigError, match=r"StepLR has no parameter 'optimizer'; valid here: step_size, gamma"):
        parse(step_lr % "step_size: 3, optimizer: x")
    with pytest.raises(
        ConfigError, match=r"model.lr_scheduler.class_path: StepLR needs the parameter step_size \(int\)$"
    ):
        parse(step_lr % "gamma: 3")


def test_an_abstract_base_needs_a_class_path(fault: Fault) -> None:
    told = fault("trainer: {logger: {clss_path: CSVLogger}}")
    expected = "expected a Logger or list of a Logger or bool or null; did you mean class_path instead of clss_path?"
    assert told == f"0.yaml:2:11: trainer.logger: class_path is missing; {expected}"


def test_an_abstract_class_is_refused(fault: Fault) -> None:
    told = fault("trainer: {logger: {class_path: lightning.pytorch.loggers.logger.Logger}}")
    assert "lightning.pytorch.loggers.logger.Logger is abstract; name one of its subclasses: " in told


def test_two_classes_of_one_name_need_their_modules(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = []
    for name in ("toy_left", "toy_right"):
        module = types.ModuleType(name)
        module.ToyTwin = type("ToyTwin", (ToyProfile,), {"__module__": name})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        twins.append(module)
    expected = "several classes are called ToyTwin; give one of toy_left.ToyTwin, toy_right.ToyTwin"
    assert fault("backend: ToyTwin") == f"0.yaml:2:1: backend: {expected}"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--model.lrr 3", "--model.lrr: no such option; did you mean --model.lr?"),
        ("--modle.lr 3", "--modle.lr: no such option; did you mean --model.lr?"),
        ("--model.max_length 3", "--model.max_length: no such option; did you mean --data.max_length?"),
        ("--lr 3", "--lr: no such option; did you mean --model.lr?"),
        ("--data.max_len 3", "--data.max_len: no such option; did you mean --data.max_length?"),
        ("--data.max_length 5.5", "--data.max_length: expected int, found 5.5 (float)"),
        ("--data.max_length=null", "--data.max_length: expected int, found null"),
        ("--data.max_length", "--data.max_length: expected a value after it"),
        ("--data.max_length --model.lr 3", "--data.max_length: expected a value after it"),
        ("--model.lr -1e-3", "--model.lr: expected a value; write one that begins with '-' as --model.lr=-VALUE"),
        ("--model.lr.x 3", "--model.lr.x: no such option; did you mean --model.lr?"),
        ("-x", "-x: no such option"),
        ("stray", "unexpected 'stray'; options begin with --"),
        ("--config nothing.yaml", "--config nothing.yaml: no such file"),
        ("--model.lora.rnk 3", "--model.lora.rnk: ToyLora has no parameter 'rnk'; did you mean --model.lora.rank?"),
        ("--model.lora.rank null", "--model.lora.rank: expected int, found null"),
        (
            "--model.optimizer.lrr 3",
            "--model.optimizer.lrr: AdamW has no parameter 'lrr'; did you mean --model.optimizer.lr?",
        ),
        (
            "--trainer.callbacks+=ToyNoet",
            "--trainer.callbacks+: no class 'ToyNoet', expected a Callback; did you mean ToyNote?",
        ),
        (
            "--trainer.callbacks+=ToyNote --trainer.callbacks.evry=3",
            "--trainer.callbacks.evry: ToyNote has no parameter 'evry'; did you mean --trainer.callbacks.every?",
        ),
        (
            "--backend ToyFncy --backend.glow 3",
            "--backend: no class 'ToyFncy', expected a ToyProfile; did you mean ToyFancy?",
        ),
        ("--backend ToyFancy", "--backend: ToyFancy needs the parameter glow (float)"),
        ("--backend.wdth 3", "--backend.wdth: ToyPlain has no parameter 'wdth'; did you mean --backend.width?"),
        (
            "--trainer.precision 17-true",
            "--trainer.precision: expected one of: 64, 32, 16, transformer-engine, transformer-engine-float16, "
            "16-true, 16-mixed, bf16-true, bf16-mixed, 32-true, 64-true, bf16 or null, found '17-true' (str); "
            "did you mean 16-true?",
        ),
    ],
)  # fmt: skip
def test_command_line(fault: Fault, words: str, expected: str) -> None:
    assert fault(words=words) == f"command line: {expected}"


def test_a_bad_value_is_blamed_on_the_command_line_though_a_file_sets_the_key(fault: Fault) -> None:
    assert fault("data: {max_length: 3}", "--data.max_length x").startswith("command line: --data.max_length: ")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["fitt"], "command line: no command 'fitt'; did you mean fit?"),
        (["run-it"], "command line: no command 'run-it'; expected one of fit, validate, test, predict"),
        ([], "command line: no command given; expected one of fit, validate, test, predict"),
        (
            ["fit"],
            "command line: model.pretrained: required, and nothing sets it; "
            "give it in a config file or as --model.pretrained VALUE",
        ),
        (["fit", "--print_config=nothing"], 'command line: Invalid option "nothing" for --print_config'),
    ],
)
def test_what_is_missing(parser: LightningArgumentParser, argv: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parser.parse_args(argv)
    assert str(caught.value) == expected


def test_an_error_of_jsonargparse_alone_is_cut_down_to_its_cause(parser: LightningArgumentParser) -> None:
    union = (
        'Parser key "fit.trainer.x":\n  Does not validate against any of the Union subtypes\n  Subtypes: [int, str]\n'
        "  Errors:\n    - Expected a <class 'int'>\n      - Deeper: no such thing\n  Given value type: <class 'str'>"
    )
    with pytest.raises(ConfigError, match=r"^command line: trainer.x: Deeper: no such thing$"):
        parser.error(union)


def test_anchors_aliases_and_merge_keys(parse: Parse) -> None:
    fit = parse("model:\n  pretrained: x\n  lora: &lora {rank: 3}\n  sources: [*lora, {<<: *lora, alpha: 2}]\n")
    assert fit.model.sources[1].as_dict() == {"rank": 3, "alpha": 2.0, "target": "all"}


def test_callbacks_are_appended_from_files_and_command_line(parse: Parse) -> None:
    fit = parse(
        "model: {pretrained: x}\ntrainer: {callbacks: [{class_path: ToyNote}]}",
        "trainer: {callbacks+: [{class_path: EarlyStopping, init_args: {monitor: val/loss}}]}",
        "trainer: {callbacks+: {class_path: Timer}}",
        words="--trainer.callbacks+=ToyNote --trainer.callbacks.every=7 --trainer.callbacks.init_args.text=abc",
    )
    names = [callback.class_path.rpartition(".")[2] for callback in fit.trainer.callbacks]
    assert names == ["ToyNote", "EarlyStopping", "Timer", "ToyNote"]
    assert [fit.trainer.callbacks[-1].init_args[key] for key in ("every", "text")] == [7, "abc"]


def test_the_callbacks_by_default_are_appended_to_and_edited(parse: Parse) -> None:
    fit = parse("model: {pretrained: x}", words="--trainer.callbacks.pace=3 --trainer.callbacks+=ToyNote")
    assert fit.trainer.callbacks[0].init_args.pace == 3
    assert fit.trainer.callbacks[1].class_path.endswith(".ToyNote")
    with pytest.raises(
        ConfigError, match=r"ToyDefault has no parameter 'pacee'; did you mean --trainer.callbacks.pace\?"
    ):
        parse("model: {pretrained: x}", words="--trainer.callbacks.pacee=3")
    with pytest.raises(ConfigError, match=r"Callback has no parameter 'pace'"):
        parse("model: {pretrained: x}\ntrainer: {callbacks: null}", words="--trainer.callbacks.pace=3")


def test_a_later_file_changes_parameters_of_the_class_an_earlier_one_named(parse: Parse) -> None:
    fit = parse(
        "model: {pretrained: x, optimizer: {class_path: SGD, init_args: {lr: 1e-2}}}\nbackend: {class_path: ToyFancy}",
        "backend: {init_args: {glow: 3}}\nmodel: {optimizer: {init_args: {nesterov: true}}}",
        "backend: {parts: [a]}",
    )
    assert (fit.backend.init_args.glow, fit.backend.init_args.parts) == (3.0, ["a"])
    assert (fit.model.optimizer.init_args.lr, fit.model.optimizer.init_args.nesterov) == (0.01, True)


def test_short_names_and_classes_without_parameters(parse: Parse) -> None:
    fit = parse("model: {pretrained: x, profile: ToyPlain, optimizer: SGD}\nbackend: ToyPlain")
    assert fit.model.profile.class_path.endswith(".ToyPlain")
    assert fit.model.optimizer.class_path == "torch.optim.SGD"


@pytest.mark.parametrize(
    "text",
    [
        "model: {lora: null, profile: null, lr_scheduler: null}\ndata: {fraction: null}\ntrainer: {callbacks: null}",
        "trainer: {logger: false, max_time: null, precision: 16-true, strategy: ddp, devices: [0]}",
        "trainer: {logger: [{class_path: CSVLogger, init_args: {save_dir: x}}], max_time: {hours: 1}}",
        "trainer: {strategy: {class_path: DDPStrategy, init_args: {find_unused_parameters: true}}, profiler: simple}",
        "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/loss}}]}",
        "trainer: {callbacks: [{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 1}}}]}",
        "model: {size: {rank: 3}, betas: [0, 1], weights: {a: 1}}\ndata: {path: [a, b], max_length: '5'}",
        "model.lr: 3\nmodel.optimizer.lr: 3",
        "data: {}\nmodel: {}",
        "ckpt_path: null",
    ],
)
def test_accepted(parse: Parse, text: str) -> None:
    parse("model: {pretrained: x}", text)


def test_numbers_with_an_exponent_are_numbers(parse: Parse) -> None:
    assert parse("model: {pretrained: x, lr: 1e-4}").model.lr == 1e-4


def test_accepted_options(parse: Parse) -> None:
    fit = parse(
        "model: {pretrained: x}",
        words="--model.lr=1e-4 --model.lora.rank 3 --model.betas '[0.1, 0.2]' --model.weights.a=1 "
        "--trainer.max_steps -1 --model.optimizer SGD --model.optimizer.lr 1e-2 "
        "--model.on_long_row truncate --trainer.logger false "
        """--model '{"pretrained": y}' --config '{"data": {"max_length": 9}}'""",
    )
    assert (fit.model.pretrained, fit.model.lora.rank) == ("y", 3)
    assert (fit.model.weights, fit.data.max_length) == ({"a": 1.0}, 9)


def test_parts_of_a_config_may_stand_in_files_of_their_own(parse: Parse) -> None:
    Path("optimizer.yaml").write_text("class_path: SGD\ninit_args: {lr: 3}\n")
    Path("data.yaml").write_text("max_length: 7\n")
    fit = parse("model: {pretrained: x, optimizer: optimizer.yaml}\ndata: data.yaml")
    assert (fit.model.optimizer.init_args.lr, fit.data.max_length) == (3.0, 7)


def test_a_file_given_before_the_command_holds_the_command(parser: LightningArgumentParser, tmp_path: Path) -> None:
    config = tmp_path / "all.yaml"
    config.write_text("fit: {model: {pretrained: x}}")
    assert parser.parse_args(["--config", str(config), "fit"]).fit.model.pretrained == "x"
    config.write_text("fit: {model: {pretraind: x}}")
    with pytest.raises(
        ConfigError, match=r"all.yaml:1:15: fit.model.pretraind: .* did you mean fit.model.pretrained\?$"
    ):
        parser.parse_args(["--config", str(config), "fit"])


@pytest.mark.parametrize(
    "words",
    ["", "--trainer.callbacks+=ToyNote --backend ToyFancy --backend.glow 3 --model.optimizer SGD --model.lora.rank 3"],
)
def test_a_printed_config_runs_again(parse: Parse, capsys: pytest.CaptureFixture[str], words: str) -> None:
    direct = parse("model: {pretrained: x}", words=words)
    with pytest.raises(SystemExit) as left:
        parse("model: {pretrained: x}", words=f"{words} --print_config")
    assert left.value.code == 0
    again = parse(capsys.readouterr().out)
    del direct["config"], again["config"]
    assert again == direct


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["fit", "--help"], "--model.pretrained PRETRAINED"),
        (["--help"], "{fit,validate,test,predict}"),
        (["fit", "--trainer.callbacks.help", "ToyNote"], "--trainer.callbacks.every EVERY"),
    ],
)
def test_help(
    parser: LightningArgumentParser, argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parser.parse_args(argv)
    assert left.value.code == 0
    assert expected in capsys.readouterr().out


def test_a_job_given_as_a_mapping(parser: LightningArgumentParser) -> None:
    note = ToyNote()
    job = {"subcommand": "fit", "fit": {"model": {"pretrained": "x"}, "trainer": {"callbacks": [note]}}}
    assert parser.parse_object(job).fit.trainer.callbacks == [note]
    assert job["fit"] == {"model": {"pretrained": "x"}, "trainer": {"callbacks": [note]}}


def test_a_fault_in_a_mapping(parser: LightningArgumentParser) -> None:
    with pytest.raises(ConfigError, match=r"^configuration: fit.model.lrr: no such key; did you mean fit.model.lr\?$"):
        parser.parse_object({"subcommand": "fit", "fit": {"model": {"pretrained": "x", "lrr": 3}}})


def test_a_parameter_missing_in_a_mapping(parser: LightningArgumentParser) -> None:
    with pytest.raises(ConfigError, match=r"^configuration: fit.backend.class_path: ToyFancy needs the parameter glow"):
        parser.parse_object({"subcommand": "fit", "fit": {"backend": {"class_path": "ToyFancy"}}})


def test_places_are_kept_for_faults_found_later(parse: Parse, parser: LightningArgumentParser) -> None:
    parse("model: {pretrained: x}\ndata: {max_length: 3}", "data: {max_length: 4}", words="--model.lr 3")
    assert isinstance(parser, ConfigParser)
    assert parser.place_of("fit.data.max_length") == "1.yaml:1:8"
    assert parser.place_of("fit.model.lr") == "command line"
    assert parser.place_of("fit.data.path") == "1.yaml:1:1"  # nothing sets it: the nearest key above
    assert parser.place_of("fit.trainer.max_steps") == ""


def test_the_whole_cli_builds_what_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-trainer"])
    config = tmp_path / "run.yaml"
    config.write_text("model: {pretrained: x, lora: {rank: 3}, optimizer: {class_path: SGD, init_args: {lr: 0.5}}}")
    cli = ToyCLI(["fit", "--config", str(config), "--trainer.callbacks+=ToyNote", "--trainer.callbacks.every=7"])
    assert cli.model.lora == ToyLora(rank=3)
    assert cli.model.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"] == 0.5
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    assert [callback.every for callback in callbacks if isinstance(callback, ToyNote)] == [7, 5]
