"""The status file: where a run stands, as one JSON object that another process may read at any moment.

It is replaced, never written into. Heartbeat, pid and start time tell a killed run from one whose step takes long.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_trainer.types import InputError

Ending = Literal["paused", "completed", "crashed"]
Status = Literal["idle", "training", Ending]

FIELDS = {
    "status": "idle, training, paused, completed or crashed",
    "current_step": "optimizer steps completed",
    "total_steps": "optimizer steps of the whole run; null where it has no end",
    "epoch": "of that step, from 0",
    "loss": "of that step, nats per trained token; with several ranks, the one logged last",
    "learning_rate": "that step was made with",
    "tokens_per_sec": "logged last, tokens not trained on included",
    "validation_loss": "of the newest validation, nats per trained token",
    "val_train_gap": "validation_loss minus the loss of the last step before that validation",
    "current_prompt": "of the newest preview, as are the next three",
    "golden_answer": "null where the row has none",
    "model_answer": "never cut",
    "answer_matches": "whether it passed its check; null where there was none",
    "recent_examples": "the newest previews, oldest first",
    "total_evals": "previews of the whole run",
    "total_correct": "those of them that passed their check",
    "accuracy_percent": "100 * total_correct / total_evals",
    "model_name": "as in the configuration",
    "max_output_tokens": "most tokens of a preview",
    "context_window": "most tokens of a training row",
    "error_message": "why the run crashed",
    "error_type": "class of the exception; Killed where a reader found the process gone",
    "timestamp": "unix seconds of the last update",
    "heartbeat": "unix seconds at which the process last showed that it lives",
    "pid": "of the training process",
    "hostname": "of its machine",
    "pid_namespace": "of that pid: containers may share a hostname",
    "process_started": "clock ticks from boot to the start of the process; null without /proc",
}
"""Every name a status file holds, and what it means; null until known."""

_OWN = {"timestamp", "heartbeat", "pid", "hostname", "pid_namespace", "process_started"}


class TrainingStatusWriter:
    """Keeps one status file; any thread may call it.

    What an earlier attempt of the run left there is kept, but for its error. A failed write is told once through
    `logging` and tried again at the next update.

    Args:
        status_file: Its folder is made when needed.
        max_output_tokens: Recorded as it is; no text is cut.
        context_window: Recorded as it is.
        model_name: Recorded as it is; empty leaves it to the run.
    """

    def __init__(
        self, status_file: str | Path, max_output_tokens: int = 2048, context_window: int = 4096, model_name: str = ""
    ) -> None:
        self.path, self.model_name = Path(status_file), model_name
        self._about: dict[str, Any] = {"max_output_tokens": max_output_tokens, "context_window": context_window}
        self._about |= {"model_name": model_name} if model_name else {}
        self._state: dict[str, Any] = {}
        self._finished = self._told = False
        self._lock = threading.RLock()  # reentrant: a signal handler may call in the middle of a write

    @property
    def state(self) -> dict[str, Any]:
        """A copy of what is written; empty before the first update."""
        with self._lock:
            return dict(self._state)

    def update(self, **fields: Any) -> None:
        """Merge fields into the state and write it; the first update also makes the status `training`.

        Raises:
            TypeError: A name that is not in `FIELDS`, or a value that JSON has no form for.
            ValueError: A status there is not.
        """
        self._merge(fields, finished=False)

    def finish(self, status: Ending, **fields: Any) -> None:
        """Write the last state; fields not given stay as they are. Raises as `update` does."""
        self._merge({**fields, "status": status}, finished=True)

    def beat(self) -> None:
        """Show that the process lives, between the first update and the end; the rest stays."""
        with self._lock:
            if self._state and not self._finished:
                self._state["heartbeat"] = time.time()
                self._write()

    def _merge(self, fields: dict[str, Any], finished: bool) -> None:
        _check(fields, get_args(Ending if finished else Status))
        plain = _plain(fields)
        with self._lock:
            if not self._state:
                self._begin()
            if plain.get("status") == "training":
                self._state.update(error_message=None, error_type=None)
            now = time.time()
            self._state.update(plain, timestamp=now, heartbeat=now)
            self._finished = finished
            self._write()

    def _begin(self) -> None:
        process = {"pid": os.getpid(), "hostname": socket.gethostname(), "pid_namespace": _pid_namespace()}
        process["process_started"] = _process_started(os.getpid())
        new = {"status": "training", "error_message": None, "error_type": None, **self._about, **process}
        self._state = {**dict.fromkeys(FIELDS), **self._earlier(), **new}
        with suppress(OSError, ValueError):  # another process was faster; a name that is not ours
            self._remove_leftovers()

    def _earlier(self) -> dict[str, Any]:
        try:
            return dict(_plain(_parse(self.path)))
        except InputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                logging.getLogger(__name__).warning("the status begins anew: %s", error)
            return {}

    def _remove_leftovers(self) -> None:
        for path in self.path.parent.glob(f".{self.path.name}.tmp-*"):
            pid, _, host = path.name.rpartition(".tmp-")[2].split("-", 2)
            killed = host == socket.gethostname() and _runs(int(pid), None) is False
            if killed or time.time() - path.stat().st_mtime > 60:  # seconds; no write takes so long
                path.unlink(missing_ok=True)

    def _write(self) -> None:
        data = json.dumps(self._state, ensure_ascii=False, allow_nan=False, indent=1)
        tmp = self.path.with_name(f".{self.path.name}.tmp-{os.getpid()}-{id(self)}-{socket.gethostname()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tmp.open("wb") as file:
                file.write(data.encode("utf-8", "backslashreplace"))  # a lone surrogate: so its JSON form
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, self.path)
        except OSError as error:
            if not self._told:
                logging.getLogger(__name__).warning("%s cannot be written; the run goes on: %s", self.path, error)
            self._told = True
        finally:
            with suppress(OSError):
                tmp.unlink(missing_ok=True)  # after the rename there is none


class Heartbeat(threading.Thread):
    """Beats for a writer every few `seconds`, from `start` on, so that a long step is not taken for a dead run."""

    def __init__(self, writer: TrainingStatusWriter, seconds: float = 5.0) -> None:
        super().__init__(name="status heartbeat", daemon=True)
        self.writer, self.seconds = writer, seconds
        self._over = threading.Event()

    def run(self) -> None:
        """Beat until `stop`."""
        while not self._over.wait(self.seconds):
            self.writer.beat()

    def stop(self) -> None:
        """Beat no more. Waits for a beat in progress, but not for ever: the disk may hang."""
        self._over.set()
        if self.is_alive():
            self.join(timeout=self.seconds)


class TrainingStatusReader:
    """Reads a status file and looks whether its process still lives.

    Args:
        stale_after: Seconds without a heartbeat that mean death where no pid can: another host or container, no /proc.
    """

    def __init__(self, status_file: str | Path, stale_after: float = 60.0) -> None:
        self.path, self.stale_after = Path(status_file), stale_after

    def read(self) -> dict[str, Any]:
        """What the file says, and `alive`, `is_training` and `seconds_since_heartbeat`.

        A run that says `training` and whose process is gone is given as `crashed`, with the error_type `Killed`.

        Raises:
            InputError: There is no such file, or it is no status file.
        """
        state = self._state()
        if state["status"] == "training" and not state["alive"]:
            state = self._state()  # it may have ended between the read and the look: its last word stands there now
        if state["status"] == "training" and not state["alive"]:
            state.update(status="crashed", error_type="Killed", error_message=_killed_message(state))
        return {**state, "is_training": state["status"] == "training"}

    def _state(self) -> dict[str, Any]:
        state = {**dict.fromkeys(FIELDS), **_parse(self.path)}
        age = max(0.0, time.time() - state["heartbeat"])
        here = state["hostname"] == socket.gethostname() and state["pid_namespace"] in (None, _pid_namespace())
        runs = _runs(state["pid"], state["process_started"]) if here else None
        return {**state, "alive": age <= self.stale_after if runs is None else runs, "seconds_since_heartbeat": age}


def describe(state: dict[str, Any]) -> str:
    """What `TrainingStatusReader.read` returned, as aligned lines for a terminal; unknown things are left out."""
    error = ": ".join(filter(None, (state["error_type"], state["error_message"])))
    evals = f"{state['total_correct']} of {state['total_evals']} passed" if state["total_evals"] else None
    lines = [
        ("status", state["status"], "{}"),
        ("model", state["model_name"], "{}"),
        ("step", _progress(state), "{}"),
        ("epoch", state["epoch"], "{}"),
        ("loss", state["loss"], "{:.4f}"),
        ("validation loss", state["validation_loss"], "{:.4f}"),
        ("learning rate", state["learning_rate"], "{:.3g}"),
        ("tokens/s", state["tokens_per_sec"], "{:,.0f}"),
        ("previews", evals, "{}"),
        ("last update", time.time() - state["timestamp"], "{:.0f} s ago"),
        ("error", error or None, "{}"),
    ]
    return "\n".join(f"{name:<16}{form.format(value)}" for name, value, form in lines if value is not None)


def _progress(state: dict[str, Any]) -> str | None:
    step, total = state["current_step"], state["total_steps"]
    return f"{step} of {total} ({step / total:.1%})" if step is not None and total else step


def _check(fields: dict[str, Any], statuses: tuple[str, ...]) -> None:
    for name in fields:
        if name not in FIELDS or name in _OWN:
            near = difflib.get_close_matches(name, FIELDS.keys() - _OWN, n=1, cutoff=0.0)[0]
            raise TypeError(f"the status has no field {name!r} to be set; the nearest is {near!r}")
    if "status" in fields and fields["status"] not in statuses:
        raise ValueError(f"the status cannot become {fields['status']!r}; choose from {', '.join(statuses)}")


def _plain(value: Any) -> Any:
    """A copy in JSON's own types; NaN and infinities, which JSON lacks, as null."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if value is not None and not isinstance(value, (str, int, float)):
        raise TypeError(f"a {type(value).__name__} has no form in JSON: {value!r}")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"no status file at {str(path)!r} ({error.strerror}); StatusFile makes it in a run") from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} is no status file: it is not JSON: {error}") from error
    known = isinstance(state, dict) and state.get("status") in get_args(Status)
    if known and all(isinstance(state.get(name), (int, float)) for name in ("pid", "heartbeat", "timestamp")):
        return dict(state)
    raise InputError(f"{str(path)!r} is no status file: no status known here, or no pid, heartbeat or timestamp")


def _killed_message(state: dict[str, Any]) -> str:
    at = f"{datetime.fromtimestamp(state['heartbeat']):%Y-%m-%d %H:%M:%S}, {state['seconds_since_heartbeat']:.0f} s ago"
    gone = f"process {state['pid']} on {state['hostname']} is gone and left no word"
    return f"{gone}; last step {_progress(state)}, last heartbeat {at}"


def _pid_namespace() -> str | None:
    link = Path("/proc/self/ns/pid")
    return str(link.readlink()) if link.is_symlink() else None


def _runs(pid: int, started: int | None) -> bool | None:
    """Whether that very process runs; None without /proc. A pid is used again, but not with the same start."""
    here, found = _process_started(os.getpid()), _process_started(pid)
    return None if here is None else found is not None and started in (None, found)


def _process_started(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None where there is none, or only a zombie, or no /proc."""
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *rest = stat.rpartition(")")[2].split()  # the name before it may hold blanks and brackets
        return None if state in "ZX" else int(rest[18])
    return None
