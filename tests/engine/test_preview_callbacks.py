"""Several preview callbacks in one run, and callbacks that put other weights into the model between them."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_rig import fake_for
from worker_thread import running_worker

from lightning_trainer import pretrained
from lightning_trainer.cli import main
from lightning_trainer.worker.engine import TransformersEngine

PLAIN = {"class_path": "PreviewCallback", "init_args": {"every_n_steps": 2, "num_prompts": 2, "max_new_tokens": 4}}
GREEDY = {
    "class_path": "PreviewCallback",
    "init_args": {"name": "greedy", "every_n_steps": 4, "prompts": ["hello"], "max_new_tokens": 4, "temperature": 0.0},
}


def test_two_share_one_worker_and_each_has_its_answers(
    job: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path, lines: Any, scalars: Any, capsys: Any
) -> None:
    engine = fake_for(pretrained.load_model(str(tiny_model_dir), torch.float32))
    config = job(trainer={"callbacks": [PLAIN, GREEDY, "planted.Slow"], "max_steps": 10, "max_epochs": -1})
    remote = ["--preview_backend", "GrpcPreviewBackend", "--preview_backend.preflight", "require"]
    with running_worker(engine) as worker:
        assert main(["fit", "--config", str(config), *remote, "--preview_backend.address", worker.address]) == 0
    answers = lines(tmp_path / "run" / "previews.jsonl")
    assert all(answer["success"] and answer["weights_step"] == answer["step"] for answer in answers)
    assert {(a["step"], a["prompt_id"]) for a in answers} == {
        *((step, f"val-{n}") for step in (2, 4, 6, 8, 10) for n in (0, 1)),
        *((step, "greedy/0") for step in (4, 8, 10)),
    }
    assert len(answers) == 13
    for step in (4, 8, 10):  # the fake's tokens tell the weights: both had the same
        assert len({answer["text"] for answer in answers if answer["step"] == step}) == 1
    found = scalars(tmp_path / "run")
    assert [step for step, _ in found["preview/weights_step"]] == [2, 4, 6, 8, 10]
    assert [step for step, _ in found["greedy/weights_step"]] == [4, 8, 10]
    assert found["preview/dropped"][-1][1] == found["greedy/dropped"][-1][1] == 0
    assert "step 8 (greedy): previews by the weights of step 8" in capsys.readouterr().out


def test_two_of_one_name_are_refused(job: Callable[..., Path], capsys: Any) -> None:
    config = job(trainer={"callbacks": [PLAIN, PLAIN]})
    assert main(["fit", "--config", str(config)]) == 2
    assert "two PreviewCallbacks are named 'preview'" in capsys.readouterr().err


def test_a_resumed_run_goes_on_with_the_state_of_each(job: Callable[..., Path], tmp_path: Path, lines: Any) -> None:
    config = job(trainer={"callbacks": [PLAIN, GREEDY], "max_steps": 4, "max_epochs": -1})
    assert main(["fit", "--config", str(config)]) == 0
    assert main(["fit", "--config", str(config), "--ckpt_path", "last", "--trainer.max_steps", "6"]) == 0
    steps = [(answer["step"], answer["prompt_id"]) for answer in lines(tmp_path / "run" / "previews.jsonl")]
    assert len(steps) == len(set(steps))
    assert [step for step, prompt in steps if prompt == "greedy/0"] == [4, 6]


@pytest.mark.filterwarnings("ignore:You.re using the WeightAveraging callback:UserWarning")
@pytest.mark.parametrize("first", [True, False])
def test_averages_take_the_place_of_weights_after_these_were_copied(
    first: bool, job: Callable[..., Path], tmp_path: Path, lines: Any
) -> None:
    average = {"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.5}}
    preview = {**PLAIN, "init_args": {**PLAIN["init_args"], "backend": "planted.CopiesLate"}}
    callbacks = [average, preview] if first else [preview, average]
    config = job(trainer={"callbacks": callbacks, "max_steps": 6, "max_epochs": -1}, validation={"every_n_steps": 2})
    assert main(["fit", "--config", str(config)]) == 0
    answers = lines(tmp_path / "run" / "previews.jsonl")
    assert json.dumps([(a["step"], a["success"]) for a in answers]) == json.dumps(
        [(step, True) for step in (2, 4, 6) for _ in range(2)]
    )


@pytest.mark.parametrize("same", [True, False])
def test_the_base_of_adapters_is_compared_before_anything_is_sent(
    same: bool, job: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    model = pretrained.load_model(str(tiny_model_dir), torch.float32)
    if not same:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5
    pretrained.save_pretrained(model, pretrained.load_tokenizer(str(tiny_model_dir)), tmp_path / "base")
    config = job(model={"lora": {"rank": 2, "target_modules": ["q_proj"]}}, trainer={"callbacks": [PLAIN]})
    make = lambda: TransformersEngine(tmp_path / "base", torch.float32, torch.device("cpu"))  # noqa: E731
    with running_worker(make) as worker:
        remote = ["--preview_backend", "GrpcPreviewBackend", "--preview_backend.address", worker.address]
        assert main(["check", "--config", str(config), *remote]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("answers and holds the same model" in said) == same
        assert ("another than the one in training: frozen_base_sha256 differ" in said) == (not same)
        status = main(["fit", "--config", str(config), *remote, "--preview_backend.preflight", "require"])
        assert status == (0 if same else 2)
        assert ("frozen_base_sha256 differ" in capsys.readouterr().err) == (not same)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature must be 0 (greedy)"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"seed": -1}, "seed must lie in [0, 2**63)"),
        ({"prompts": []}, "must be at least 1, not 0"),
        ({"name": "a b"}, "must be one word"),
    ],
)
def test_what_no_preview_can_be_made_with_is_refused_at_once(
    settings: dict[str, Any], words: str, job: Callable[..., Path], capsys: Any
) -> None:
    config = job(trainer={"callbacks": [{"class_path": "PreviewCallback", "init_args": settings}]})
    assert main(["fit", "--config", str(config)]) == 2
    assert words in capsys.readouterr().err


def test_a_worker_that_the_run_has_already_is_not_a_callbacks_own(job: Callable[..., Path], capsys: Any) -> None:
    grpc = {"class_path": "GrpcPreviewBackend", "init_args": {"address": "127.0.0.1:1"}}
    own = {**GREEDY, "init_args": {**GREEDY["init_args"], "backend": grpc}}
    config = job(trainer={"callbacks": [PLAIN, own]}, preview_backend=grpc)
    assert main(["fit", "--config", str(config)]) == 2
    assert "are one worker, 127.0.0.1:1" in capsys.readouterr().err
    other = {**PLAIN, "init_args": {**PLAIN["init_args"], "backend": grpc}}
    config = job(trainer={"callbacks": [other, own]})
    assert main(["fit", "--config", str(config)]) == 2
    assert "are one worker, 127.0.0.1:1" in capsys.readouterr().err


def test_a_full_disk_costs_lines_and_nothing_else(
    job: Callable[..., Path], tmp_path: Path, lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_trainer.callbacks import preview

    append, calls = preview._append, []

    def full(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        append(path, data)

    monkeypatch.setattr(preview, "_append", full)
    config = job(trainer={"callbacks": [PLAIN], "max_steps": 8, "max_epochs": -1})
    with pytest.warns(UserWarning, match=r"previews.jsonl cannot be written: No space left on device"):
        assert main(["fit", "--config", str(config)]) == 0
    assert [line["step"] for line in lines(tmp_path / "run" / "previews.jsonl")] == [2, 2, 8, 8]


def test_lines_are_added_whole_or_not_at_all(tmp_path: Path) -> None:
    from lightning_trainer.callbacks.preview import _append

    path = tmp_path / "lines"
    path.write_bytes(b"one\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            _append(path, b"two\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"one\n"
    _append(path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"
