"""TLS faults (28): none connects, none falls back to plaintext, and each says what is likely to be wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import make_ca, make_certificate, make_expired
from remote_rig import ask, bound, collect, fake_for, right, set_weights
from worker_thread import running_worker

from lightning_trainer import pretrained
from lightning_trainer.preview import Prompter
from lightning_trainer.profiles.plain import Plain


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    return pretrained.load_model(str(tiny_model_dir), torch.float32)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("certificates")
    return {
        "ca": make_ca(folder),
        "other": make_ca(folder, "other"),
        "good": make_certificate(folder),
        "elsewhere": make_certificate(folder, name="elsewhere", alt="DNS:elsewhere.example"),
        "expired": make_expired(folder),
        None: None,
    }


@pytest.fixture
def prompter(tokenizer: Any) -> Prompter:
    return Prompter(Plain(), tokenizer)


def test_28_with_the_right_ca_and_a_token_all_is_well(
    model: Any, prompter: Prompter, certificates: Any, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("k" * 40)
    token.chmod(0o600)
    with (
        running_worker(fake_for(model), tls=certificates["good"], token="k" * 40) as worker,
        bound(worker.address, prompter, model, ca=certificates["ca"], token_file=token) as backend,
    ):
        assert backend.state == "connected"
        weights = set_weights(model, 1)
        ask(backend, 1)
        assert right(collect(backend)[0], 1, weights, prompter)


@pytest.mark.parametrize(
    ("server", "ca", "words"),
    [
        ("good", "other", "not of the CA"),
        ("elsewhere", "ca", "not for this host name"),
        ("expired", "ca", "not valid at this time"),
        (None, "ca", "one side has TLS and the other has not"),
        ("good", None, "it has TLS and `ca` is not set"),
    ],
    ids=["wrong-ca", "wrong-name", "expired", "worker-without", "trainer-without"],
)
def test_28_each_fault_says_its_cause(
    model: Any, prompter: Prompter, certificates: Any, server: Any, ca: Any, words: str
) -> None:
    engine = fake_for(model)
    with (
        running_worker(engine, tls=certificates[server]) as worker,
        bound(worker.address, prompter, model, ca=certificates[ca]) as backend,
    ):
        assert backend.state == "lost"
        [line] = backend.notices()
        assert words in line
        ask(backend, 1)
        assert words in str(collect(backend)[0].error_message)
        assert engine.applied == []
