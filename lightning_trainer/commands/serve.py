"""`serve`: the preview worker, which answers prompts with the weights that a trainer sends it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_trainer.rpc.limits import Limits
from lightning_trainer.rpc.security import check_exposure, parse_address, read_token
from lightning_trainer.types import InputError

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def run(command: str, words: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; then the exit status is 0. It is 1 where the device fails."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own log is for its developers; we say what matters
    given = _parser(command).parse_args(words)
    address = parse_address(given.listen, key="listen")
    if (given.tls_cert is None) != (given.tls_key is None):
        raise InputError("--tls-cert and --tls-key go together")
    tls = None if given.tls_cert is None else (given.tls_cert, given.tls_key)
    token = None if given.token_file is None else read_token(given.token_file, key="token-file")
    check_exposure(address, tls is not None, token is not None, given.insecure_lan, key="listen")
    if not (given.pretrained / "config.json").is_file():
        raise InputError(f"{str(given.pretrained)!r} holds no config.json: give the directory of a model")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return _serve(given, address, tls, token)


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"lightning-trainer {command}",
        description="Answer previews on this machine's device. The trainer sends the weights; prompts and answers are "
        "token ids.",
    )
    parser.add_argument("--pretrained", type=Path, required=True, metavar="DIR", help="the model that is fine-tuned")
    parser.add_argument(
        "--listen",
        default="127.0.0.1:8765",
        metavar="ADDRESS",
        help="HOST:PORT, [IPv6]:PORT or unix:PATH; port 0 lets the system choose (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the run (default: bf16 on cuda, else the model's own)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its key, PEM")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="callers must show what it holds")
    parser.add_argument("--insecure-lan", action="store_true", help="listen beyond this machine without TLS or token")
    limits = Limits()
    for name, what in (("max_prompt_tokens", "a prompt"), ("max_new_tokens", "an answer")):
        words = f"most tokens of {what} (default: %(default)s)"
        flag, default = f"--{name.replace('_', '-')}", getattr(limits, name)
        parser.add_argument(flag, type=_positive, default=default, metavar="N", help=words)
    parser.add_argument("--threads", type=_positive, metavar="N", help="that torch computes with on a CPU")
    return parser


def _serve(given: Any, address: Any, tls: tuple[Path, Path] | None, token: str | None) -> int:
    import torch

    from lightning_trainer.worker.engine import Engine, TransformersEngine
    from lightning_trainer.worker.host import DeviceLost
    from lightning_trainer.worker.server import Serving, serve

    device, dtype = _device(given.device), None

    def make_engine() -> Engine:
        return TransformersEngine(given.pretrained, dtype, device)

    def on_ready(target: str) -> None:
        print(f"listening on {target} ({given.pretrained}, {device})", flush=True)

    dtype = _dtype(given.dtype, device)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.insecure_lan and not address.is_loopback:
        print(f"WARNING: whoever reaches {address.target} can read and replace what this worker holds", file=sys.stderr)
    limits = Limits(max_prompt_tokens=given.max_prompt_tokens, max_new_tokens=given.max_new_tokens)
    try:
        ended = asyncio.run(serve(Serving(address, tls, token, limits), make_engine, on_ready))
    except DeviceLost as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # tidying up would call the device
    if not ended:
        sys.stdout.flush()
        os._exit(0)  # a kernel hangs: Python would wait for it
    return 0


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device (torch.cuda.is_available() is False)", key="device")
    there = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(there if name == "auto" else name)


def _dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    import torch

    if name is None:
        return torch.bfloat16 if device.type == "cuda" else None
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype
