"""Runs of the command line that start in a moment: a process that has imported everything forks one for each.

Nothing of a run is in that process, so that each starts from the files alone. It has one thread, or it refuses to fork.

    python fork_server.py       one job a line on standard input, one answer a line on standard output
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

KILLED = -signal.SIGKILL

FIRST = (
    "lightning_trainer.commands.train",
    "lightning_trainer.engine.trainer_cli",
    "transformers.models.qwen3.modeling_qwen3",
    "tensorboard.compat.proto.event_pb2",
)
"""Imported at once; whatever else the first run imported, after it."""


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        words: Of the command line.
        log: File for what it prints.
        record: JSONL file to which every micro-batch is added: rows, and the loss of the step that it completes.
        kill_at: SIGKILL at this point of writing a checkpoint, counted from 1; 0 never does.
        in_save: Of which of this run's checkpoints the points are counted, from 1; 0 counts none.
        points: File to which each point's name is added.
        kill_after: Seconds from the start of training after which it is killed.
        setup: `module:function`, called before the run.
        main: `module:function` that takes the words.
        env: Added to the environment.
    """

    words: list[str]
    log: str
    record: str = ""
    kill_at: int = 0
    in_save: int = 0
    points: str = ""
    kill_after: float | None = None
    setup: str = ""
    main: str = "lightning_trainer.cli:main"
    env: dict[str, str] = field(default_factory=dict)


class ForkServer:
    """The client's side."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        )

    def run(self, job: Job) -> int:
        """Exit status; negative: the signal it died of."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(asdict(job)), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the fork server has died; what it said stands above")
        return int(json.loads(answer)["status"])

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        if self._process.stdout is not None:
            self._process.stdout.close()


class Killer:
    """Counts the points of writing one checkpoint, and dies at one of them.

    A point lies before every call that changes the disk or flushes it, and in the middle of each large file.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.count, self.saves, self.active = job, 0, 0, False
        self.owner = (os.getpid(), threading.get_ident())

    def install(self) -> None:
        """Wrap what writes."""
        import torch
        import transformers.modeling_utils as modeling

        from lightning_trainer.callbacks import RunCheckpoint

        sys.addaudithook(self._on_audit)
        os.fsync = self._before(os.fsync, "fsync")  # type: ignore[assignment]
        torch.save = self._torn(torch.save, 1)
        modeling.safe_save_file = self._torn(modeling.safe_save_file, 1)  # type: ignore[attr-defined]
        save = RunCheckpoint.save

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.saves += 1
            self.active = self.saves == self.job.in_save
            done = save(*args, **kwargs)
            self.point("done", "")
            self.active = False
            return done

        RunCheckpoint.save = counted  # type: ignore[method-assign]

    def point(self, event: str, path: Any, before_dying: Callable[[], None] = lambda: None) -> None:
        """One point."""
        if not self.active or self.owner != (os.getpid(), threading.get_ident()):
            return
        self.count += 1
        self.active = False  # what follows is no point
        with open(self.job.points, "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(f"{event} {_role(path)}\n")
        self.active = True
        if self.count == self.job.kill_at:
            self.active = False
            before_dying()
            os.kill(os.getpid(), signal.SIGKILL)

    def _on_audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in ("os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir"):
            self.point(event.removeprefix("os."), args[1] if event == "os.symlink" else args[0])
        elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.point("open", args[0])

    def _before(self, function: Callable[..., Any], event: str) -> Callable[..., Any]:
        def wrapped(descriptor: int) -> Any:
            self.point(event, os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
            return function(descriptor)

        return wrapped

    def _torn(self, function: Callable[..., Any], which: int) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            path = Path(args[which])
            self.point("write", path)
            done = function(*args, **kwargs)
            self.point("half", path, lambda: os.truncate(path, path.stat().st_size // 2))
            return done

        return wrapped


def _role(path: Any) -> str:
    """What a path is, without numbers, so that points of different steps and processes compare."""
    parts = [part.split("=")[0] if part.startswith((".step", "step")) else part for part in Path(str(path)).parts]
    return "/".join(part.split(".tmp-")[0] for part in parts[-2:]) if path else ""


def _add_recorder(job: Job) -> None:
    from lightning.pytorch import Callback

    from lightning_trainer.engine.trainer_cli import TrainerCLI

    class Recorder(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            stepped = not trainer.fit_loop.epoch_loop._should_accumulate()
            loss = float(module.step_nats / batch.step_tokens).hex() if stepped else None
            place = [trainer.current_epoch, batch_idx, trainer.global_step]
            line = json.dumps({"place": place, "rows": batch.row_ids, "loss": loss}) + "\n"
            with open(job.record, "ab", buffering=0) as file:  # noqa: PTH123
                file.write(line.encode())

    original = TrainerCLI._callbacks
    TrainerCLI._callbacks = lambda cli, config: [Recorder(), *original(cli, config)]  # type: ignore[method-assign]


def _named(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _child(job: Job, modules: str) -> int:
    os.setsid()
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    os.environ.update(job.env)
    if job.setup:
        _named(job.setup)()
    if job.record:
        _add_recorder(job)
    if job.in_save:
        Killer(job).install()
    status = int(_named(job.main)(job.words))
    if modules:
        with contextlib.suppress(OSError):  # a run that may write nothing; the next will tell
            Path(f"{modules}.tmp").write_text("\n".join(sys.modules), encoding="utf-8")
            Path(f"{modules}.tmp").rename(modules)
    return status


def _fork(job: Job, modules: str) -> int:
    names = {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    others = names - {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}  # pyarrow's, which minds forks
    if others or threading.active_count() != 1:
        raise RuntimeError(f"a process with threads must not fork: {others}")
    gc.collect()
    gc.freeze()  # the child's collector leaves these objects alone, and their pages shared
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        status = _child(job, modules)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(job: Job, modules: str) -> int:
    pid = _fork(job, modules)
    begun: float | None = None
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if job.kill_after is not None and begun is None and Path(job.record).exists():
            begun = time.monotonic()
        if begun is not None and time.monotonic() - begun > (job.kill_after or 0):
            os.kill(pid, signal.SIGKILL)
            begun = None
            job = Job(job.words, job.log)
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # loader workers, which notice only after seconds
    return os.waitstatus_to_exitcode(status)


def _import_what_it_took(modules: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules.read_text(encoding="utf-8").split():
            if name not in sys.modules and not name.startswith("__"):
                try:
                    importlib.import_module(name)
                except Exception:  # made at run time, or not to be imported by itself
                    continue


def serve(answers: TextIO) -> None:
    """Answer jobs until standard input ends."""
    for name in FIRST:
        importlib.import_module(name)
    modules: Path | None = None
    for line in sys.stdin:
        job = Job(**json.loads(line))
        learn = modules is None and job.main == Job.main
        wanted = Path(f"{job.log}.modules") if learn else None
        status = _run(job, str(wanted or ""))
        if wanted is not None and wanted.exists():
            modules = wanted
            _import_what_it_took(modules)
        print(json.dumps({"status": status}), file=answers, flush=True)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as pipe:
        os.dup2(2, 1)  # nothing but answers goes to the client
        serve(pipe)
