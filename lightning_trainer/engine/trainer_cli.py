"""TrainerCLI: LightningCLI with our model, our data, and what every run has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import lazy_instance
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_trainer.callbacks import HuggingFaceExport, PredictionWriter, PreviewCallback, RunCheckpoint, TrainLog
from lightning_trainer.checkpoints import about
from lightning_trainer.data import ChatDataModule
from lightning_trainer.engine.checkpoint_io import DirectoryCheckpointIO
from lightning_trainer.engine.config.config_file import ConfigError
from lightning_trainer.engine.config.parser import ConfigParser
from lightning_trainer.engine.logger import RunLogger
from lightning_trainer.engine.run_directory import RunDirectory, check_unchanged, environment
from lightning_trainer.model import CausalLMModule
from lightning_trainer.precision import SingleDtypePrecision
from lightning_trainer.precision.single_dtype import DTYPES, refusal
from lightning_trainer.preview import LocalPreviewBackend, PreviewBackend
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

DEFAULT_CALLBACKS = [PreviewCallback, HuggingFaceExport]


class TrainerCLI(LightningCLI):
    """Parses the configuration, builds everything, runs one command.

    Args:
        args: Command line without the program's name, or a configuration as nested dicts.

    Raises:
        ConfigError: Something is wrong that shows before training begins.

    Attributes:
        run: The run directory.
        resumed_from: The checkpoint the run goes on from, if any.
    """

    def __init__(self, args: list[str] | dict[str, Any] | None = None) -> None:
        self.resumed_from: Path | None = None
        try:
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
        except InputError as error:
            raise ConfigError(self._located(error)) from error

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
        parser.add_lightning_class_args(PredictionWriter, "prediction")
        parser.add_subclass_arguments(PreviewBackend, "preview_backend", default=lazy_instance(LocalPreviewBackend))
        parser.add_argument("--overwrite", type=bool, default=False, help="Move an old run in the directory aside.")
        parser.add_argument(
            "--allow-changed",
            nargs="+",
            type=str,
            default=[],
            help="What may differ from the run that is resumed: data, tokenizer, template, profile.",
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

    def _parse_ckpt_path(self) -> None:
        """Nothing: what the user writes wins over what a checkpoint remembers."""

    def before_instantiate_classes(self) -> None:
        """Find the run directory and the checkpoint, before anything large is loaded."""
        self.run = RunDirectory(self._value("trainer.default_root_dir"))
        self.resumed_from = self.run.resolve_checkpoint(self._value("ckpt_path"))
        if self.subcommand == "fit" and self.resumed_from is None and _rank() == 0:
            fresh_start = self._value("ckpt_path") == "auto" and not self.run.checkpoints.exists()
            if not fresh_start:
                self.run.claim(self._value("overwrite"))

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
        config["logger"] = self._logger(config.get("logger"))
        if config["max_epochs"] is None and config["max_steps"] == -1 and config["max_time"] is None:
            config["max_epochs"] = 1
        callbacks = self._callbacks(config)
        try:
            return self._instantiate_trainer({**config, "callbacks": callbacks}, [])
        except MisconfigurationException as error:
            raise InputError(str(error), key="trainer") from error

    def _logger(self, given: Any) -> Any:
        if given not in (None, True):
            return given
        if self.subcommand != "fit":
            return False
        step = None if self.resumed_from is None else int(about(self.resumed_from)["global_step"])
        return RunLogger(self.run.path, step)

    def _callbacks(self, config: dict[str, Any]) -> list[Callback]:
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        self._share_backend(given)
        always = [self._get(self.config_init, key) for key in ("checkpoint", "prediction")]
        return [TrainLog(), *given, *always, RunRecord(self)]

    def _share_backend(self, callbacks: list[Callback]) -> None:
        backend = self._get(self.config_init, "preview_backend")
        for callback in callbacks:
            if getattr(callback, "backend", backend) is None:
                callback.backend = backend  # type: ignore[attr-defined]

    def after_instantiate_classes(self) -> None:
        """Give the data module what belongs to the run; refuse to go on with other data, before it is tokenised."""
        self.datamodule.default_seed = int(self._value("seed_everything") or 0)
        self.datamodule.run_date = self.run.manifest().get("date", self.datamodule.run_date)
        self.datamodule.tokenizer = self.model.tokenizer
        if self.subcommand == "fit" and self.resumed_from is not None:
            old = self.run.manifest().get("fingerprints", {})
            check_unchanged(old, self.datamodule.fingerprints(), self._value("allow_changed"))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = self.resumed_from
        if subcommand == "predict":
            kwargs["return_predictions"] = False
        elif subcommand != "fit":
            kwargs["verbose"] = False  # `summary` says it
        return kwargs

    # -------------------------------------------------------------------------------------------------- what is kept

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
        trainer = self.trainer
        metrics = trainer.callback_metrics
        if not trainer.is_global_zero:
            return ""
        if self.subcommand != "fit":
            return "\n".join(f"{name} {float(value):.6g}" for name, value in metrics.items())
        previews = [c for c in trainer.callbacks if isinstance(c, PreviewCallback) and c.pass_rate is not None]  # type: ignore[attr-defined]
        parts = [f"{name} {float(metrics[name]):.4f}" for name in ("train/loss", "val/loss") if name in metrics]
        parts += [f"preview/pass_rate {callback.pass_rate:.3f}" for callback in previews]
        lines = [f"{trainer.global_step} optimizer steps: " + ", ".join(parts), f"run: {self.run.path}"]
        if (self.run.path / "export").is_dir():
            lines.append(f"model: {self.run.path / 'export'}")
        return "\n".join([*lines, f"curves: tensorboard --logdir {self.run.path / 'tensorboard'}"])


def _named(cls: type) -> dict[str, str]:
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}"}


def _rank() -> int:
    known: Any = rank_zero_only
    return int(getattr(known, "rank", 0) or 0)


class RunRecord(Callback):
    """Writes down what the run is: `manifest.json` and `config.yaml`."""

    def __init__(self, cli: TrainerCLI) -> None:
        self.cli = cli

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run has begun: from here on the directory is taken."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        manifest = self.cli.run.manifest()
        attempt = {**environment(), "from_step": trainer.global_step}
        self.cli.run.write_manifest(
            {
                "date": data.run_date,
                "fingerprints": data.fingerprints(),
                "attempts": [*manifest.get("attempts", []), attempt],
            }
        )
        self.cli.run.save_config(self.cli.resolved_config())
