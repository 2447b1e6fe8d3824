"""`check`: the config doctor."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from lightning_trainer.callbacks import PreviewCallback, callbacks_of
from lightning_trainer.diagnose.check import Finding, examine
from lightning_trainer.diagnose.check_model import base_model, empty_model, run_dtype
from lightning_trainer.engine.run import quiet_stack
from lightning_trainer.engine.trainer_cli import TrainerCLI
from lightning_trainer.types import InputError


def run(command: str, words: list[str]) -> int:
    """Print the report; 0, 1 with warnings under --strict, 2 with errors."""
    parser = argparse.ArgumentParser(
        prog=f"lightning-trainer {command}",
        description="What `fit` would do with this configuration, and what looks wrong. Nothing is trained or written; "
        "no weights are loaded, unless a preview worker's are to be compared with them. Other options are those "
        "of `fit`.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.add_argument("--strict", action="store_true", help="exit status 1 where there are warnings")
    given, rest = parser.parse_known_args(words)
    with quiet_stack():
        cli = TrainerCLI(["fit", *rest])
        with cli.config_errors():
            report = examine(cli.model, cli.datamodule, cli.trainer)
            answers, unanswered = _previews(cli)
        found = sorted([*_directory_findings(cli), *unanswered, *report.findings], key=lambda finding: finding.severity)
        report = replace(report, findings=tuple(found), previews=answers)
    print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) if given.json else report.as_text())
    severities = {finding.severity for finding in report.findings}
    if "error" in severities:
        return 2
    return 1 if severities and given.strict else 0


def _previews(cli: TrainerCLI) -> tuple[str, list[Finding]]:
    """What answers previews, and what would not."""
    backends = [c.backend for c in callbacks_of(cli.trainer, PreviewCallback) if c.backend is not None]
    answers: list[str] = []
    findings: list[Finding] = []
    load_base = None if cli.model.lora is None else lambda: base_model(cli.model, run_dtype(cli.trainer))
    for backend in dict.fromkeys(backends):
        model: Any = empty_model(cli.model, run_dtype(cli.trainer), cli.datamodule.packing)
        model.is_quantized = cli.model.quantization is not None  # which the empty one is not
        answer, fault = backend.examine(model, load_base)
        answers += [answer] if answer else []
        findings += [Finding("warning", "preview_backend", fault)] if fault else []
    return "; ".join(answers), findings


def _directory_findings(cli: TrainerCLI) -> list[Finding]:
    try:
        cli.check_directory()
    except InputError as error:
        return [Finding("error", error.key or "", str(error))]
    return []
