"""PreviewCallback: answers to a few fixed prompts, every so many optimizer steps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_trainer.preview import PreviewBackend, Prompter
from lightning_trainer.types import InputError, PreviewRequest, PreviewResult, SamplingParams

DEFAULT_NAME = "preview"

DURATIONS = ("push_seconds", "push_mb", "generate_seconds")
"""Figures of a backend that are of one preview."""


class PreviewCallback(Callback):
    """Writes previews to TensorBoard and to `previews.jsonl`.

    Args:
        every_n_steps: Optimizer steps between previews; the end of the run has one in any case.
        prompts: What a user says, each a prompt; null takes validation rows, or training rows where there are none.
        num_prompts: How many rows are taken when `prompts` is null.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 is greedy.
        seed: Of the sampling.
        backend: One for this callback alone; null: the run's `preview_backend`.
        name: Of its curves and prompts; a second PreviewCallback of a run needs another.

    Attributes:
        results: The newest previews.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        prompts: list[str] | None = None,
        num_prompts: int = 4,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        seed: int = 0,
        backend: PreviewBackend | None = None,
        name: str = DEFAULT_NAME,
    ) -> None:
        asked = num_prompts if prompts is None else len(prompts)
        for key, value in (("every_n_steps", every_n_steps), ("num_prompts, or the number of prompts,", asked)):
            if value < 1:
                raise InputError(f"PreviewCallback.{key} must be at least 1, not {value}")
        try:
            SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        except ValueError as error:
            raise InputError(f"PreviewCallback.{error}") from error
        self.every_n_steps, self.prompts, self.num_prompts = every_n_steps, prompts, num_prompts
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        if not re.fullmatch(r"[\w.-]{1,64}", name):
            raise InputError(
                f"PreviewCallback.name must be one word of letters, digits, '_', '.' and '-', not {name!r}"
            )
        self.backend, self.name = backend, name
        self.origin = "yaml"
        self.pass_rate: float | None = None
        self.results: list[PreviewResult] = []
        self._requests: list[PreviewRequest] = []
        self._prompt_ids: set[str] = set()
        self._last_step = -1
        self._broken = self._unsettled = self._unwritable = False
        self._failures = 0
        self._stall = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the prompts, through the profile and template that training uses.

        Raises:
            InputError: There is no backend, or a prompt of the YAML cannot be used.
        """
        if self.backend is None:
            raise InputError("PreviewCallback has no backend: give it one, or run it through `fit`")
        self._broken = False
        with self._guard(starting=True):
            module: Any = pl_module
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            prompter = Prompter(data.profile, module.tokenizer, data.rendered_system_prompt(), data.system_prompt_mode)
            if trainer.is_global_zero and not self.backend.is_bound_to(module.causal_lm):
                self.backend.bind(prompter, module.causal_lm, getattr(module, "adapter", None))
            self._tell(trainer)
            self._requests = self._from_yaml(prompter) if self.prompts is not None else self._from_rows(prompter, data)
            self._prompt_ids = {request.prompt_id for request in self._requests}

    def _from_yaml(self, prompter: Prompter) -> list[PreviewRequest]:
        try:
            return [
                prompter.request({"prompt": text}, self._prompt_id(str(i))) for i, text in enumerate(self.prompts or [])
            ]
        except ValueError as error:
            raise InputError(f"PreviewCallback.prompts: {error}") from error

    def _from_rows(self, prompter: Prompter, data: Any) -> list[PreviewRequest]:
        conversations, self.origin = data.conversations(self.num_prompts)
        if self.origin == "train":
            rank_zero_warn("previews show training rows: nothing is held out, so there is no preview/pass_rate")
        requests = []
        for number, conversation in enumerate(conversations):
            try:
                requests.append(prompter.request_of(conversation, self._prompt_id(f"{self.origin}-{number}")))
            except ValueError as error:
                rank_zero_warn(f"{self.origin} row {number} is not previewed: {error}")
        return requests

    def _prompt_id(self, given: str) -> str:
        return given if self.name == DEFAULT_NAME else f"{self.name}/{given}"

    @property
    def state_key(self) -> str:
        """Tells the states of several apart in a checkpoint."""
        return type(self).__qualname__ if self.name == DEFAULT_NAME else f"{type(self).__qualname__}({self.name})"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the previews aside that an earlier attempt wrote after the step this one starts from.

        They are made again, and stand in `previews.old.jsonl` from here on.
        """
        path = self._path(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run and path.exists():  # type: ignore[attr-defined]
            with self._guard():
                _set_aside_after(path, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Preview at a step boundary, when it is time."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        if trainer.global_step % self.every_n_steps == 0:
            self._ask(trainer)
        if self._may_ask(trainer):
            with self._guard():
                self._take(trainer, self._bound().collect())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The weights are about to change."""
        self._settle()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The weights may be about to change: averages of them are validated in their place."""
        self._settle()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same: what averages weights may put the average in."""
        self._settle()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Preview the final weights, and wait for what is under way."""
        self._settle()
        if trainer.global_step and trainer.global_step != self._last_step and self._may_ask(trainer):
            with self._guard():
                self._bound().make_room()
            self._ask(trainer)
        if self._may_ask(trainer):
            with self._guard():
                self._take(trainer, self._bound().finish())
        self._settle()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the model; nothing is waited for."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """The step of the last preview, so that a resumed run does not repeat it, and the failures so far."""
        return {"last_step": self._last_step, "failures": self._failures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the last preview."""
        self._last_step, self._failures = state_dict["last_step"], state_dict.get("failures", 0)

    def _may_ask(self, trainer: Trainer) -> bool:
        return bool(self._requests) and not self._broken and trainer.is_global_zero

    def _bound(self) -> PreviewBackend:
        assert self.backend is not None
        return self.backend

    def _ask(self, trainer: Trainer) -> None:
        """Hand the prompts over, for the weights of this step."""
        if not self._may_ask(trainer):
            return
        step = self._last_step = trainer.global_step
        with self._guard():
            started = time.perf_counter()
            backend = self._bound()
            sampling = backend.prompter.sampling(
                max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed
            )
            self._unsettled = True
            backend.submit([dataclasses.replace(r, step=step) for r in self._requests], sampling, step)
            self._stall = time.perf_counter() - started

    def _settle(self) -> None:
        if not self._unsettled:
            return
        self._unsettled = False
        with self._guard():
            started = time.perf_counter()
            self._bound().settle()
            self._stall += time.perf_counter() - started

    def _take(self, trainer: Trainer, done: list[PreviewResult]) -> None:
        """Show what has come for this callback, one request after the other."""
        self._tell(trainer)
        results = self._bound().claim(done, self._prompt_ids)
        if results:
            self.results = results
        for step, answers in groupby(results, key=lambda result: result.step):
            self._show(trainer, step, list(answers))

    def _tell(self, trainer: Trainer) -> None:
        for line in self._bound().notices():
            trainer.print(line)

    @contextmanager
    def _guard(self, starting: bool = False) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a preview must never end a training run: it is said once, and previews stop
            if starting and isinstance(error, InputError):
                raise  # nothing is lost yet, and the user can put it right
            self._broken = True
            rank_zero_warn(f"previews are off for the rest of this run: {type(error).__name__}: {error}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the model."""
        self._close()

    def _close(self) -> None:
        if self.backend is not None:
            with self._guard():
                self.backend.close()

    def _show(self, trainer: Trainer, step: int, results: Sequence[PreviewResult]) -> None:
        """Log the answers to one request at the step it was made."""
        answered = [result for result in results if result.success and result.weights_step is not None]
        self._failures += any(not result.success and not result.was_skipped for result in results)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write_lines(self._path(trainer), results)
        figures = self._bound().metrics()
        if not answered:  # then its durations are an older preview's
            figures = {name: value for name, value in figures.items() if name not in DURATIONS}
        metrics = {**figures, "stall_ms": 1000 * self._stall, "failures": float(self._failures)}
        if answered:
            weights_step = float(answered[0].weights_step or 0)
            metrics["latency_seconds"] = max(result.generation_time_sec for result in answered)
            metrics["weights_step"] = weights_step
            metrics["age_steps"] = trainer.global_step - weights_step
        if answered and self.origin == "val":
            self.pass_rate = sum(bool(r.check and r.check.passed) for r in answered) / len(answered)
            metrics["pass_rate"] = self.pass_rate
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.name}/{name}": value for name, value in metrics.items()}, step=step)
            if isinstance(logger, TensorBoardLogger):
                for number, result in enumerate(results):
                    logger.experiment.add_text(f"{self.name}/{number}", as_markdown(result, self.origin), step)
        if all(result.was_skipped for result in results):
            return  # why, was said once, when it began
        who = "" if self.name == DEFAULT_NAME else f" ({self.name})"
        trainer.print(f"step {step}{who}: {self._told(answered, results)}")

    def _told(self, answered: Sequence[PreviewResult], results: Sequence[PreviewResult]) -> str:
        if not answered:
            return f"no preview: {results[0].error_message}"
        told = "" if self.pass_rate is None else f", {self.pass_rate:.0%} of {len(answered)} pass"
        return f"previews by the weights of step {answered[0].weights_step}{told}"

    @staticmethod
    def _path(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "previews.jsonl"

    def _write_lines(self, path: Path, results: Sequence[PreviewResult]) -> None:
        lines = []
        for result in results:
            digest = hashlib.sha256(f"{result.prompt}\0{result.text}".encode("utf-8", "surrogatepass")).hexdigest()
            record = {**dataclasses.asdict(result), "origin": self.origin, "content_sha256": digest}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        try:
            _append(path, "".join(lines).encode("utf-8", "surrogatepass"))
        except OSError as error:
            if not self._unwritable:
                rank_zero_warn(f"{path} cannot be written: {error.strerror}; previews go on without it until it can")
            self._unwritable = True
        else:
            self._unwritable = False


def _append(path: Path, data: bytes) -> None:
    """Add whole lines, or none."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


def _set_aside_after(path: Path, step: int) -> None:
    kept: list[str] = []
    later: list[str] = []
    with path.open(encoding="utf-8", newline="\n") as file:  # an answer may hold what only Unicode calls a line's end
        for line in file:
            (kept if _is_up_to(line, step) else later).append(line)
    if not later:
        return
    with path.with_name("previews.old.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(line.rstrip("\n") + "\n" for line in later))
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text("".join(kept), encoding="utf-8")
    tmp.replace(path)


def _is_up_to(line: str, step: int) -> bool:
    """Whether the line is of no later step; one that a kill or a full disk cut short is of none."""
    try:
        return line.endswith("\n") and bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


def as_markdown(result: PreviewResult, origin: str) -> str:
    """One preview as TensorBoard shows it: texts as they are, in fenced blocks."""
    verdict = "no check"
    if result.check is not None:
        words = {True: "right", False: "wrong", None: "not known to be right"}
        verdict = f"{'contract kept' if result.check.ok else 'contract broken'}, {words[result.check.correct]}"
        verdict += f" ({result.check.reason})" if result.check.reason else ""
    parts = [
        f"**weights of step {result.weights_step}** · {origin} row · {result.tokens_generated} tokens, "
        f"{result.finish_reason} · {verdict}",
        _fenced("prompt", result.prompt),
        _fenced("answer", result.text if result.success else f"(failed: {result.error_message})"),
    ]
    if result.golden_answer is not None:
        parts.append(_fenced("golden", result.golden_answer))
    return "\n\n".join(parts)


def _fenced(title: str, text: str) -> str:
    longest = max((len(run) for run in text.replace("\n", " ").split(" ") if set(run) == {"`"}), default=2)
    fence = "`" * max(3, longest + 1)
    return f"{title}\n\n{fence}\n{text}\n{fence}"
