"""TrainerCLI: LightningCLI with our model, our data, and what every run has."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import lazy_instance
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_trainer import lock
from lightning_trainer.callbacks import (
    HuggingFaceExport,
    PredictionWriter,
    PreviewCallback,
    RunCheckpoint,
    RunProgress,
    SelfCheck,
    StatusFile,
    StepValidation,
    TrainLog,
    callbacks_of,
)
from lightning_trainer.checkpoints import about
from lightning_trainer.data import ChatDataModule
from lightning_trainer.engine.checkpoint_io import DirectoryCheckpointIO
from lightning_trainer.engine.config.config_file import ConfigError
from lightning_trainer.engine.config.parser import ConfigParser
from lightning_trainer.engine.empty_hooks import pass_over_empty_hooks
from lightning_trainer.engine.launcher import leave_sigterm_to_us, use_rank_launcher
from lightning_trainer.engine.logger import RunLogger
from lightning_trainer.engine.run_directory import RunDirectory, check_unchanged, rank
from lightning_trainer.engine.run_record import RunRecord
from lightning_trainer.model import CausalLMModule
from lightning_trainer.precision import SingleDtypePrecision
from lightning_trainer.precision.single_dtype import DTYPES, DtypeError, refusal
from lightning_trainer.pretrained import check_tokenizer_fits, load_config
from lightning_trainer.preview import GrpcPreviewBackend, LocalPreviewBackend, PreviewBackend
from lightning_trainer.rpc.security import parse_address
from lightning_trainer.types import InputError

TRAINER_DEFAULTS: dict[str, Any] = {
    "precision": "bf16-true",
    "default_root_dir": "outputs/run",
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}

DEFAULT_CALLBACKS = [PreviewCallback, StatusFile, HuggingFaceExport]


class TrainerCLI(LightningCLI):
    """Parses the configuration and builds everything; `run` runs the command. Building leaves no trace on disk.

    Args:
        args: Command line without the program's name, or a configuration as nested dicts.

    Raises:
        ConfigError: Something is wrong that shows before training begins.

    Attributes:
        run_directory: Where the run is kept.
        resumed_from: The checkpoint the run goes on from, if any.
    """

    def __init__(self, args: list[str] | dict[str, Any] | None = None) -> None:
        self.resumed_from: Path | None = None
        self._record: RunRecord | None = None
        with self.config_errors():
            super().__init__(
                CausalLMModule,
                ChatDataModule,
                parser_class=ConfigParser,
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=42,
                save_config_callback=None,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_kwargs={"prog": "lightning-trainer"},
                args=args,
            )

    @property
    def began(self) -> bool:
        """Whether training has started."""
        return self._record is not None and self._record.began

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: LightningCLI calls it from its constructor."""

    def run(self) -> None:
        """Run the command.

        Raises:
            ConfigError: Something is wrong that only model and data together show.
        """
        plugin: Any = self.trainer.precision_plugin
        with self.config_errors(), self._directory():
            if self.model.quantization is not None:  # a GPU that is missing is named before the data is tokenised
                self.model.quantization.config(plugin.dtype)
            super()._run_subcommand(str(self.subcommand))

    @contextmanager
    def config_errors(self) -> Iterator[None]:
        """What is wrong with the configuration becomes a ConfigError that says in which file and line it stands."""
        try:
            yield
        except InputError as error:
            raise ConfigError(self._located(error)) from error
        except DtypeError as error:
            if self.began:
                raise
            raise ConfigError(str(error)) from error
        except (MisconfigurationException, ValueError) as error:
            if self.began or not _is_from_lightning(error):
                raise
            raise ConfigError(str(error)) from error  # what Lightning refuses only when it sees model and data

    def _located(self, error: InputError) -> str:
        """The message, behind the file, line and key it is about."""
        if error.key is None:
            return str(error)
        command = getattr(self, "subcommand", None) or ""
        place = self.parser.place_of(f"{command}.{error.key}") if isinstance(self.parser, ConfigParser) else ""
        return ": ".join([*([place] if place else []), error.key, str(error)])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run has besides model, data and trainer."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(StepValidation, "validation")
        parser.add_lightning_class_args(PredictionWriter, "prediction")
        parser.add_subclass_arguments(PreviewBackend, "preview_backend", default=lazy_instance(LocalPreviewBackend))
        parser.add_argument(
            "--self_check", type=bool, default=True, help="Look at real examples and the model before the first step."
        )
        parser.add_argument("--description", type=str, default="", help="What the run is for; kept in manifest.json.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Move an old run in the directory aside.")
        parser.add_argument(
            "--allow-changed",
            nargs="+",
            type=str,
            default=[],
            help="What may differ from the run that is resumed: data, tokenizer, template, profile, lock.",
        )
        parser.set_defaults(
            {
                "trainer.callbacks": [_named(cls) for cls in DEFAULT_CALLBACKS],
                "data.profile": _named(ChatDataModule.DEFAULT_PROFILE),
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As LightningCLI's, which warns where `sys.argv` holds words too."""
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)
        self.subcommand = self.config["subcommand"]
        seed = self._value("seed_everything")
        if isinstance(seed, int) and not 0 <= seed < 1 << 32:
            raise InputError(f"must be at least 0 and below 2**32, not {seed}", key="seed_everything")

    def _parse_ckpt_path(self) -> None:
        """Nothing: what the user writes wins over what a checkpoint remembers."""

    def before_instantiate_classes(self) -> None:
        """Find the run directory and the checkpoint, before anything large is loaded."""
        self.run_directory = RunDirectory(self._value("trainer.default_root_dir"))
        self.resumed_from = self.run_directory.resolve_checkpoint(self._value("ckpt_path"))
        self._recorded = {} if self.resumed_from is None else about(self.resumed_from).get("run") or {}
        self._run_id = str(self._recorded.get("id") or uuid.uuid4().hex)
        if self.subcommand == "fit":
            self.run_directory.check_writable()

    def check_directory(self) -> None:
        """Refuse a directory that holds another run, unless the run may move it aside.

        Raises:
            InputError: See above.
        """
        if self._is_taken() and not self._value("overwrite"):
            self.run_directory.refuse()

    @contextmanager
    def _directory(self) -> Iterator[None]:
        """The run's directory, for this process alone; an old run there is moved aside, where that is asked for."""
        if self.subcommand != "fit" or rank() != 0 or self._value("trainer.fast_dev_run"):
            yield
            return
        self.check_directory()
        if self._is_taken():
            with self.run_directory.held():
                self.run_directory.move_aside()
        with self.run_directory.held():
            yield

    def _is_taken(self) -> bool:
        """Whether the directory holds a run that this one does not go on with."""
        if self._value("trainer.fast_dev_run") or not self.run_directory.holds_a_run():
            return False
        if self.resumed_from is None:
            return not (self._value("ckpt_path") == "auto" and self.run_directory.has_no_checkpoint())
        return self.resumed_from.resolve().parent != self.run_directory.checkpoints.resolve()

    def _value(self, key: str) -> Any:
        return self.config[str(self.subcommand)].get(key)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, with our precision, checkpoints, logger and callbacks."""
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        precision = str(config.pop("precision"))
        if precision not in DTYPES:
            raise InputError(refusal(precision), key="trainer.precision")
        if config["use_distributed_sampler"]:
            raise InputError(
                "must stay false: the data module gives every rank its own part of one planned order",
                key="trainer.use_distributed_sampler",
            )
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        config["plugins"] = [*plugins, SingleDtypePrecision(precision), DirectoryCheckpointIO()]  # type: ignore[arg-type]
        for key, least in (("accumulate_grad_batches", 1), ("gradient_clip_val", 0)):
            if config[key] is not None and config[key] < least:
                raise InputError(f"must be at least {least}, not {config[key]}", key=f"trainer.{key}")
        if config["overfit_batches"]:
            raise InputError(
                "is not supported: the order of rows is planned anew for every epoch; give a small file instead",
                key="trainer.overfit_batches",
            )
        config["logger"] = self._logger(config.get("logger"))
        if config["max_epochs"] is None and config["max_steps"] == -1 and config["max_time"] is None:
            config["max_epochs"] = 1
        callbacks = self._callbacks(config)
        try:
            trainer = self._instantiate_trainer({**config, "callbacks": callbacks}, [])
        except (MisconfigurationException, ValueError) as error:
            raise InputError(str(error), key="trainer") from error
        pass_over_empty_hooks(trainer)
        use_rank_launcher(trainer)
        leave_sigterm_to_us(trainer)
        return trainer

    def _logger(self, given: Any) -> Any:
        if given in (None, True):
            given = RunLogger(str(self.run_directory.path / "tensorboard"))
        loggers = given if isinstance(given, list) else [given]
        if self.subcommand != "fit":  # the run's curves are those of its training
            return [logger for logger in loggers if logger and not isinstance(logger, RunLogger)] or False
        for logger in loggers:
            if isinstance(logger, RunLogger):
                logger.resume_from(0 if self.resumed_from is None else int(about(self.resumed_from)["global_step"]))
        return given

    def _callbacks(self, config: dict[str, Any]) -> list[Callback]:
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        self._share_backend(given)
        for callback in given:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                # Beside ours, not among them.
                callback.dirpath = str(self.run_directory.checkpoints / type(callback).__name__)
        always = [self._get(self.config_init, key) for key in ("validation", "checkpoint", "prediction")]
        checks = [SelfCheck()] if self._value("self_check") else []
        description = str(self._value("description"))
        self._record = RunRecord(self.run_directory, self.resolved_config, description, self._run_id)
        has_bar = config["enable_progress_bar"] is False or any(isinstance(c, ProgressBar) for c in given)
        bar = [] if has_bar or self.subcommand != "fit" else [RunProgress()]
        return [*checks, TrainLog(), *given, *bar, *always, self._record]

    def _share_backend(self, callbacks: list[Callback]) -> None:
        names = [callback.name for callback in callbacks if isinstance(callback, PreviewCallback)]
        if len(set(names)) < len(names):
            raise InputError(
                f"two PreviewCallbacks are named {max(names, key=names.count)!r}, and their curves would be one: give "
                "one of them another `name`",
                key="trainer.callbacks",
            )
        backend = self._get(self.config_init, "preview_backend")
        for callback in callbacks:
            if getattr(callback, "backend", backend) is None:
                callback.backend = backend  # type: ignore[attr-defined]
            if isinstance(own := getattr(callback, "backend", None), PreviewBackend):
                own.run_id = self._run_id
        _refuse_same_worker([getattr(callback, "backend", None) for callback in callbacks])

    def after_instantiate_classes(self) -> None:
        """Give the data module what belongs to the run; refuse to go on with other data, before it is tokenised."""
        self.datamodule.default_seed = int(self._value("seed_everything") or 0)
        self.datamodule.run_date = self._recorded.get("date", self.datamodule.run_date)
        self.datamodule.check_files()
        self.datamodule.tokenizer = self.model.tokenizer
        facts = lock.facts_of_config(load_config(self.model.pretrained))
        check_tokenizer_fits(self.model.tokenizer, facts.vocab_size)
        if self.subcommand == "fit" and self.resumed_from is not None:
            old = self._recorded.get("fingerprints", {})
            check_unchanged(old, self.datamodule.fingerprints(), self._value("allow_changed"))
        self._check_lock(facts)

    def _check_lock(self, facts: lock.ModelIdentity) -> None:
        recorded = self._recorded.get("lock")
        if recorded and "lock" not in (self._value("allow_changed") or []):
            # A run that was begun under a lock keeps it, whether the configuration still has it or not.
            self.model.locked = self.model.locked or lock.Lock(**recorded)
            lock.check_resumed(recorded, self.model.locked)
        if self.model.locked is not None:
            lock.check_model(self.model.locked, facts)
            lock.check_length(self.model.locked, self.datamodule.max_length)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = self.resumed_from
        if subcommand == "predict":
            kwargs["return_predictions"] = False
        elif subcommand != "fit":
            kwargs["verbose"] = False  # `summary` says it
        return kwargs

    def resolved_config(self) -> str:
        """The whole configuration as YAML, which runs again as it is."""
        parser, config = self._parser(self.subcommand), self.config[str(self.subcommand)].clone()
        # How to go on is this start's business, not the run's.
        for key in ("ckpt_path", "config", "overwrite", "allow_changed"):
            config.pop(key, None)
        text: str = parser.dump(config, skip_none=False, skip_validation=True)
        return text

    def summary(self) -> str:
        """The last lines: of `fit` what was learned, where the run is, how to look at it; else the metrics."""
        trainer: Any = self.trainer
        if not trainer.is_global_zero:
            return ""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.subcommand != "fit":
            return "\n".join(f"{name} {value:.6g}" for name, value in metrics.items())
        return "\n".join([self._learned(metrics), f"run: {self.run_directory.path}", *self._made()])

    def _learned(self, metrics: dict[str, float]) -> str:
        trainer: Any = self.trainer
        for log in callbacks_of(trainer, TrainLog):
            metrics.update(log.last)
        parts = [f"{name} {metrics[name]:.4f}" for name in ("train/loss", "val/loss") if name in metrics]
        previews = [callback.pass_rate for callback in callbacks_of(trainer, PreviewCallback)]
        parts += [f"preview/pass_rate {rate:.3f}" for rate in previews if rate is not None]
        return f"{trainer.global_step} optimizer steps: {', '.join(parts)}"

    def _made(self) -> list[str]:
        exports = [callback.written for callback in callbacks_of(self.trainer, HuggingFaceExport)]
        curves = [Path(logger.log_dir) for logger in self.trainer.loggers if isinstance(logger, TensorBoardLogger)]
        return [
            *(f"model: {path}" for path in exports if path is not None),
            *(f"curves: tensorboard --logdir {path}" for path in curves),
        ]


def _named(cls: type) -> dict[str, str]:
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}"}


def _is_from_lightning(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("lightning.")


def _refuse_same_worker(backends: list[Any]) -> None:
    """One run is one to a worker: two backends would take its weights from each other."""
    remote = list(dict.fromkeys(backend for backend in backends if isinstance(backend, GrpcPreviewBackend)))
    targets = [parse_address(backend.address).target for backend in remote]
    twice = next((target for target in targets if targets.count(target) > 1), None)
    if twice is not None:
        raise InputError(
            f"two preview backends of this run are one worker, {twice}: give callbacks no `backend` of their own, then "
            "they share the run's",
            key="trainer.callbacks",
        )
