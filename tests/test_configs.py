"""Every YAML that is shipped, and what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_trainer.cli import main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_parses_and_opens_with_its_command(path: Path, capsys: Any) -> None:
    assert path.read_text(encoding="utf-8").startswith(f"# lightning-trainer fit --config {path.relative_to(ROOT)}")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(path), "--print_config"])
    assert end.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["pretrained"]


def test_the_real_config_trains_on_a_tiny_model(
    tiny_model_dir: Path, tmp_path: Path, chat_rows: Any, write_rows: Any
) -> None:
    path = write_rows(chat_rows(60))
    words = ["--model.pretrained", str(tiny_model_dir), "--data.train_path", str(path), "--data.max_length", "256"]
    words += ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    words += ["--trainer.accumulate_grad_batches", "1", "--data.val_fraction", "0.2"]
    assert main(["fit", "--config", str(ROOT / "configs/sft_bf16.yaml"), *words]) == 0
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


def test_the_quickstart_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(ROOT)
    words = ["--trainer.max_steps", "6", "--trainer.val_check_interval", "3", "--trainer.default_root_dir"]
    assert main(["fit", "--config", "configs/quickstart.yaml", *words, str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "preview/pass_rate" in out
    assert out.splitlines()[-1] == f"curves: tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}"
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    AutoTokenizer.from_pretrained(tmp_path / "run" / "export")


def test_no_validation_problem_of_the_quickstart_stands_in_its_training_rows() -> None:
    def problems(name: str) -> set[tuple[str, ...]]:
        text = (ROOT / "configs" / "quickstart" / name).read_text(encoding="utf-8")
        found = re.findall(r"<<ANS_START>> \((\w+) (\d+) (\d+)\)", text)
        return {(op, *sorted((a, b))) for op, a, b in found}

    assert len(problems("val.jsonl")) >= 64
    assert not problems("val.jsonl") & problems("train.jsonl")


def test_the_quickstart_assets_are_what_the_tool_makes(tmp_path: Path) -> None:
    tool = ROOT / "tools" / "make_quickstart_assets.py"
    subprocess.run([sys.executable, str(tool), "--out", str(tmp_path)], check=True, capture_output=True)
    for path in (ROOT / "configs" / "quickstart").rglob("*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(ROOT / "configs" / "quickstart")).read_bytes() == path.read_bytes()


def _commands() -> list[str]:
    blocks = re.findall(r"^    (lightning-trainer .*)$", README, flags=re.MULTILINE)
    found = [line.partition(" #")[0].strip() for line in blocks]
    return [line for line in found if not line.startswith("lightning-trainer serve")]  # which test_readme_previews runs


def test_the_readmes_commands_run(
    tiny_model_dir: Path, tmp_path: Path, chat_rows: Any, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's own YAML, profile and commands, on a tiny model."""
    write_rows(chat_rows(60), "chats.jsonl")
    write_rows(chat_rows(4), "questions.jsonl")
    for name, block in re.findall(r"```yaml\n# (\w+\.yaml)\n(.*?)```", README, flags=re.DOTALL):
        (tmp_path / name).write_text(block.replace("Qwen/Qwen3-0.6B", str(tiny_model_dir)), encoding="utf-8")
    profile, script = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "my_package.py").write_text(profile, encoding="utf-8")
    _run_script(script, tiny_model_dir, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    commands = _commands()
    assert len(commands) == 12
    for command in commands:
        words = command.split()[1:]
        if words[0] == "verify-resume":  # three processes: tests/engine/test_verify_resume.py
            continue
        if words[0] in ("inspect", "check", "status", "convert"):
            assert main(words) == 0, command
            continue
        resumed = "--ckpt_path" in words
        small = ["--trainer.accelerator", "cpu", "--data.max_length", "256", "--data.batch_size", "2"]
        small += ["--data.val_fraction", "0.2"]
        small += ["--trainer.limit_train_batches", "4"]
        small += ["--trainer.max_epochs", "2"] if resumed else []
        small += ["--overwrite", "true"] if words[0] == "fit" and not resumed else []
        small += ["--prediction.max_new_tokens", "4"] if words[0] == "predict" else []
        assert main([*words, *small]) == 0, command


def _run_script(script: str, model: Path, directory: Path) -> None:
    """The README's Python, on a tiny model and in few steps; its job is left as job.json."""
    small = (
        "config.environment.dataloader_num_workers, config.hyperparams.max_steps = 0, 1\n"
        "config.monitoring.preview_max_tokens, config.hyperparams.gradient_accumulation = 4, 1\n"
        'import json\nopen("job.json", "w").write(json.dumps(config.to_dict()))\n'
    )
    script = script.replace("models/mine", str(model)).replace("151936", "384")
    code = script.replace("result = ", f"{small}result = ")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=directory, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("True 1 "), done.stdout


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, lightning_trainer.cli as c\n"
        "c.main(['--help'])\n"
        "print(sorted({'torch', 'lightning'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "fit" in done.stdout


def test_a_missing_config_is_answered_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys, lightning_trainer.cli as c\n"
        "status = c.main(['fit', '--config', 'nowhere.yaml'])\n"
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "2 False"
