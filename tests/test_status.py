"""The status file: valid at every instant, merged, and honest about a process that is gone."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_trainer import status
from lightning_trainer.status import FIELDS, Heartbeat, TrainingStatusReader, TrainingStatusWriter, describe
from lightning_trainer.types import InputError

WRITE_FOR_EVER = """
import sys
from lightning_trainer.status import TrainingStatusWriter
writer = TrainingStatusWriter(sys.argv[1], model_name=sys.argv[2])
step = 0
while True:
    step += 1
    writer.update(current_step=step, total_steps=10**6, recent_examples=["x" * 4000] * 5)
    if step == 1:
        print("began", flush=True)
"""

POLL = """
import json, sys
print("began", flush=True)
reads, steps, state = 0, [0], {"status": "training"}
while state["status"] == "training":
    with open(sys.argv[1], "rb") as file:
        state = json.loads(file.read())
    reads += 1
    if state["current_step"] != steps[-1]:
        steps.append(state["current_step"])
assert steps == sorted(steps) and steps[-1] == 400, steps
print(reads, len(steps))
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "status.json"


@pytest.fixture
def start() -> Iterator[Start]:
    """Processes that write until they are killed; each has written once when it is returned."""
    running: list[subprocess.Popen[str]] = []

    def begin(path: Path, name: str = "child") -> subprocess.Popen[str]:
        words = [sys.executable, "-c", WRITE_FOR_EVER, str(path), name]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "began\n"
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def content(path: Path) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    return state


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**content(path), **changes}))


def leftovers(path: Path) -> list[Path]:
    return [found for found in path.parent.iterdir() if found != path]


def test_all_fields_are_there_from_the_first_update(path: Path) -> None:
    before = time.time()
    TrainingStatusWriter(path, max_output_tokens=7, context_window=9, model_name="tiny").update(current_step=3)
    found = content(path)
    assert list(found) == list(FIELDS)
    assert (found["status"], found["current_step"], found["model_name"]) == ("training", 3, "tiny")
    assert (found["max_output_tokens"], found["context_window"], found["pid"]) == (7, 9, os.getpid())
    assert before <= found["timestamp"] == found["heartbeat"] <= time.time()
    assert found["loss"] is found["error_message"] is found["recent_examples"] is None
    assert leftovers(path) == []


def test_an_update_merges(path: Path) -> None:
    writer = TrainingStatusWriter(path)
    writer.update(current_step=1, total_evals=4, recent_examples=[{"prompt": "a"}])
    writer.update(current_step=2, loss=0.5)
    found = content(path)
    assert (found["current_step"], found["loss"], found["total_evals"]) == (2, 0.5, 4)
    assert found["recent_examples"] == [{"prompt": "a"}]


@pytest.mark.parametrize("ending", ["completed", "crashed", "paused"])
def test_an_end_keeps_what_was_there_and_the_next_attempt_goes_on_with_it(ending: Any, path: Path) -> None:
    first = TrainingStatusWriter(path, model_name="tiny")
    first.update(current_step=5, total_evals=4, recent_examples=[1, 2])
    first.finish(ending, error_type="OSError", error_message="the disk")
    ended = content(path)
    assert (ended["status"], ended["current_step"], ended["recent_examples"]) == (ending, 5, [1, 2])
    assert ended["error_type"] == "OSError"

    first.beat()
    assert content(path) == ended

    TrainingStatusWriter(path).update(loss=1.0)
    resumed = content(path)
    assert (resumed["status"], resumed["total_evals"], resumed["model_name"]) == ("training", 4, "tiny")
    assert resumed["error_type"] is resumed["error_message"] is None


def test_the_same_writer_begins_again_without_the_old_error(path: Path) -> None:
    writer = TrainingStatusWriter(path)
    writer.finish("crashed", error_type="E", error_message="m")
    writer.update(current_step=1)
    assert (content(path)["status"], content(path)["error_type"]) == ("crashed", "E")
    writer.update(status="training")
    assert (content(path)["status"], content(path)["error_type"]) == ("training", None)


def test_a_beat_changes_the_heartbeat_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TrainingStatusWriter(path)
    writer.beat()
    assert not path.exists()
    writer.update(current_step=1)
    before = content(path)
    monkeypatch.setattr(status.time, "time", lambda: before["heartbeat"] + 9)
    writer.beat()
    assert content(path) == {**before, "heartbeat": before["heartbeat"] + 9}


def test_a_heartbeat_thread_beats_until_it_is_stopped(path: Path) -> None:
    writer = TrainingStatusWriter(path)
    writer.update()
    first = content(path)["heartbeat"]
    heart = Heartbeat(writer, seconds=0.01)
    heart.stop()
    heart = Heartbeat(writer, seconds=0.01)
    heart.start()
    deadline = time.monotonic() + 10
    while content(path)["heartbeat"] == first and time.monotonic() < deadline:
        pass
    heart.stop()
    assert not heart.is_alive()
    last = content(path)["heartbeat"]
    assert last > first
    assert content(path)["timestamp"] == first


def test_what_json_has_no_form_for_becomes_null_or_is_refused(path: Path) -> None:
    writer = TrainingStatusWriter(path)
    given = [{"a": math.nan, "b": (math.inf, 1.5)}]
    writer.update(loss=math.nan, learning_rate=-math.inf, recent_examples=given)
    found = content(path)
    assert found["loss"] is found["learning_rate"] is None
    assert found["recent_examples"] == [{"a": None, "b": [None, 1.5]}]
    assert given[0]["b"] == (math.inf, 1.5)
    with pytest.raises(TypeError, match="a set has no form in JSON"):
        writer.update(loss=1.0, recent_examples={1})
    assert content(path) == found


@pytest.mark.parametrize("text", ["\ud800 lone", 'emoji 😀 \x00 \u2028 "quoted" \\', "long " * 50_000])
def test_texts_come_back_as_they_were(text: str, path: Path) -> None:
    TrainingStatusWriter(path, max_output_tokens=1).update(model_answer=text, recent_examples=[{"prompt": text}])
    found = TrainingStatusReader(path).read()
    assert found["model_answer"] == found["recent_examples"][0]["prompt"] == text


def test_unknown_names_and_statuses_are_refused_before_anything_is_written(path: Path) -> None:
    writer = TrainingStatusWriter(path)
    with pytest.raises(TypeError, match="no field 'curent_step' to be set; the nearest is 'current_step'"):
        writer.update(curent_step=1)
    with pytest.raises(TypeError, match="no field 'pid' to be set"):
        writer.update(pid=1)
    with pytest.raises(ValueError, match="cannot become 'done'; choose from idle, training, paused"):
        writer.update(status="done")
    with pytest.raises(ValueError, match="cannot become 'training'; choose from paused, completed, crashed"):
        writer.finish("training")  # type: ignore[arg-type]
    assert not path.exists()


def test_a_write_that_fails_is_told_once_and_made_up_for(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = TrainingStatusWriter(path)
    writer.update(current_step=1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(status.os, "replace", full)
        writer.update(current_step=2)
        writer.beat()
        writer.update(total_evals=3)
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    assert content(path)["current_step"] == 1
    assert leftovers(path) == []
    writer.beat()
    assert (content(path)["current_step"], content(path)["total_evals"]) == (2, 3)


def test_a_folder_that_cannot_be_made_does_not_raise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    TrainingStatusWriter(tmp_path / "file" / "status.json").update(current_step=1)
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("text", ["", '{"status": "trai', "[1]", '{"status": "training"}', "\udc80"])
def test_a_damaged_file_is_replaced_and_told(text: str, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    TrainingStatusWriter(path).update(current_step=1)
    assert content(path)["current_step"] == 1
    assert "begins anew" in caplog.text


def test_a_file_of_fewer_fields_is_read_and_gone_on_with(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"status": "paused", "pid": 1, "heartbeat": 5, "timestamp": 5, "total_evals": 2}')
    assert TrainingStatusReader(path).read()["loss"] is None
    TrainingStatusWriter(path).update()
    assert set(content(path)) == set(FIELDS)
    assert content(path)["total_evals"] == 2


def test_a_reader_never_sees_anything_but_a_whole_status(path: Path) -> None:
    writer = TrainingStatusWriter(path)
    writer.update(current_step=0)
    polling = subprocess.Popen([sys.executable, "-c", POLL, str(path)], stdout=subprocess.PIPE, text=True)
    assert polling.stdout is not None
    assert polling.stdout.readline() == "began\n"
    heart = Heartbeat(writer, seconds=0.001)
    heart.start()
    for step in range(1, 401):
        writer.update(current_step=step, recent_examples=["x" * (step * 37 % 5000)])
    heart.stop()
    writer.finish("completed")
    told, _ = polling.communicate(timeout=10)
    reads, different = map(int, told.split())
    assert reads > 1000
    assert different > 10


def test_a_killed_writer_leaves_a_valid_file_and_is_told_dead(path: Path, start: Start) -> None:
    reader = TrainingStatusReader(path)
    for moment in range(5):
        process = start(path)
        alive = reader.read()
        assert (alive["is_training"], alive["alive"], alive["pid"]) == (True, True, process.pid)
        time.sleep(0.0037 * moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        last = content(path)
        found = reader.read()
        assert (found["status"], found["is_training"], found["alive"]) == ("crashed", False, False)
        assert found["error_type"] == "Killed"
        assert f"process {process.pid} on " in found["error_message"]
        assert f"last step {last['current_step']} of 1000000" in found["error_message"]
        assert last["status"] == "training"
    TrainingStatusWriter(path).update()
    assert leftovers(path) == []


def test_leftovers_of_killed_processes_alone_are_removed(path: Path, start: Start) -> None:
    dead = start(path)
    dead.kill()
    dead.wait()
    TrainingStatusWriter(path).update()
    host = status.socket.gethostname()
    young = path.with_name(f".{path.name}.tmp-{dead.pid}-5-elsewhere")
    old = path.with_name(f".{path.name}.tmp-{os.getpid()}-5-{host}")
    killed = path.with_name(f".{path.name}.tmp-{dead.pid}-5-{host}")
    mine = path.with_name(f".{path.name}.tmp-{os.getpid()}-6-{host}")
    other = path.with_name(f".other.tmp-{dead.pid}-5-{host}")
    for file in (young, old, killed, mine, other):
        file.write_text("{")
    os.utime(old, (0, 0))
    TrainingStatusWriter(path).update()
    assert set(leftovers(path)) == {young, mine, other}


def test_two_processes_on_one_file_leave_it_whole(path: Path, start: Start) -> None:
    processes = {start(path, name).pid: name for name in ("first", "second")}
    seen = set()
    deadline = time.monotonic() + 10
    while len(seen) < 2 and time.monotonic() < deadline:
        found = content(path)
        assert processes[found["pid"]] == found["model_name"]
        seen.add(found["pid"])
    assert len(seen) == 2


def test_a_pid_that_another_process_has_now_is_not_the_run(path: Path) -> None:
    TrainingStatusWriter(path).update(current_step=4)
    reader = TrainingStatusReader(path)
    assert reader.read()["is_training"]
    rewrite(path, process_started=content(path)["process_started"] - 1)
    assert (reader.read()["status"], reader.read()["error_type"]) == ("crashed", "Killed")


def test_a_zombie_is_gone(path: Path, start: Start) -> None:
    process = start(path)
    process.kill()
    stat = Path(f"/proc/{process.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)
    assert TrainingStatusReader(path).read()["error_type"] == "Killed"


def test_a_long_step_is_not_a_dead_run(path: Path) -> None:
    TrainingStatusWriter(path).update(current_step=4)
    rewrite(path, heartbeat=time.time() - 3600)
    found = TrainingStatusReader(path).read()
    assert found["is_training"]
    assert found["seconds_since_heartbeat"] == pytest.approx(3600, abs=10)


@pytest.mark.parametrize("elsewhere", [{"hostname": "another"}, {"pid_namespace": "pid:[1]"}])
def test_a_process_that_cannot_be_looked_up_is_judged_by_its_heartbeat(elsewhere: dict[str, str], path: Path) -> None:
    TrainingStatusWriter(path).update(current_step=4)
    reader = TrainingStatusReader(path, stale_after=60)
    rewrite(path, pid=2**22 + 1, heartbeat=time.time() - 50, **elsewhere)
    assert reader.read()["is_training"]
    rewrite(path, heartbeat=time.time() - 70)
    assert reader.read()["error_type"] == "Killed"


def test_without_proc_the_heartbeat_decides(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_process_started", lambda pid: None)
    TrainingStatusWriter(path).update()
    assert content(path)["process_started"] is None
    assert TrainingStatusReader(path).read()["is_training"]
    assert TrainingStatusReader(path, stale_after=-1).read()["error_type"] == "Killed"


def test_a_run_that_ends_while_it_is_looked_at_is_not_killed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TrainingStatusWriter(path)
    writer.update(current_step=4)
    parse = status._parse

    def late(path: Path) -> dict[str, Any]:
        state = parse(path)
        writer.finish("completed")
        return state

    monkeypatch.setattr(status, "_runs", lambda pid, started: False)
    monkeypatch.setattr(status, "_parse", late)
    assert TrainingStatusReader(path).read()["status"] == "completed"


@pytest.mark.parametrize("ending", ["completed", "crashed", "paused", "idle"])
def test_a_run_that_said_how_it_ended_is_believed(ending: str, path: Path) -> None:
    TrainingStatusWriter(path).update(status=ending)
    rewrite(path, process_started=1)
    found = TrainingStatusReader(path).read()
    assert (found["status"], found["alive"], found["is_training"], found["error_type"]) == (ending, False, False, None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, r"no status file at '.*status\.json' \(No such file or directory\); StatusFile makes it in a run"),
        ("{", "is no status file: it is not JSON: "),
        ("3", "no status known here"),
        ('{"status": "ready", "pid": 1, "heartbeat": 1, "timestamp": 1}', "no status known here"),
        ('{"status": "training", "pid": 1, "timestamp": 1}', "or no pid, heartbeat or timestamp"),
    ],
)
def test_a_reader_says_why_it_cannot(text: str | None, told: str, path: Path) -> None:
    if text is not None:
        path.parent.mkdir()
        path.write_text(text)
    with pytest.raises(InputError, match=told):
        TrainingStatusReader(path).read()


def test_a_description_holds_what_is_known(path: Path) -> None:
    writer = TrainingStatusWriter(path, model_name="tiny")
    writer.update(current_step=30, total_steps=120, loss=1.23456, learning_rate=1e-5)
    reader = TrainingStatusReader(path)
    told = describe(reader.read()).splitlines()
    assert told[:5] == [
        "status          training",
        "model           tiny",
        "step            30 of 120 (25.0%)",
        "loss            1.2346",
        "learning rate   1e-05",
    ]
    assert told[5].startswith("last update     ")
    assert len(told) == 6
    fields = {"epoch": 0, "validation_loss": 2.0, "tokens_per_sec": 12345.6, "total_evals": 8, "total_correct": 6}
    writer.finish("crashed", error_type="OSError", error_message="the disk", total_steps=None, **fields)
    rewrite(path, timestamp=time.time() - 12)
    assert describe(reader.read()) == "\n".join(
        [
            "status          crashed",
            "model           tiny",
            "step            30",
            "epoch           0",
            "loss            1.2346",
            "validation loss 2.0000",
            "learning rate   1e-05",
            "tokens/s        12,346",
            "previews        6 of 8 passed",
            "last update     12 s ago",
            "error           OSError: the disk",
        ]
    )


def test_neither_torch_nor_lightning_is_imported() -> None:
    code = "import sys, lightning_trainer.status; assert not {'torch', 'lightning'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
