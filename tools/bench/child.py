"""A measurement in a process of its own: what it imports and holds is its own, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent
_CALL = (
    "import sys, json; from importlib import import_module; module, name, args = sys.argv[1:];"
    "found = getattr(import_module(module), name)(*json.loads(args)); print('\\n' + json.dumps(found))"
)


def call(module: str, function: str, *args: Any) -> Any:
    """What a function of a module of this folder returns in a new process; plain values in and out.

    Raises:
        RuntimeError: It failed; with the last it said.
    """
    words = [sys.executable, "-c", _CALL, module, function, json.dumps(args)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"{module}.{function}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    """Of every child: one thread, no network, and this folder's modules and ours to import."""
    paths = [str(HERE), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(paths)}


class Resident(threading.Thread):
    """`with Resident() as memory:` the most memory this process held in the block, mapped files not among it.

    Attributes:
        before: Bytes at the beginning.
        most: Bytes at the peak, to some milliseconds.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = 0
        self._over = threading.Event()

    def __enter__(self) -> Resident:
        self.before = self.most = resident_bytes()
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self.join()
        self.most = max(self.most, resident_bytes())

    def run(self) -> None:
        """Look every few milliseconds."""
        while not self._over.is_set():
            self.most = max(self.most, resident_bytes())
            time.sleep(0.003)


def resident_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
