"""One split: which rows belong to it, and what its profile makes of them."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from lightning_trainer.data.encode import LossOn
from lightning_trainer.data.render import Conversation
from lightning_trainer.data.rows import BadRow, RawRow, Source, read
from lightning_trainer.profiles import row_forms
from lightning_trainer.profiles.base import accepted_keywords

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_trainer.profiles import DataProfile

STORE_FORMAT = 1
"""Part of every cache key: raised when the meaning of stored tokens changes."""

SystemPromptMode = Literal["prepend", "replace"]
OnLongRow = Literal["drop", "truncate", "raise"]
OnBadRow = Literal["quarantine", "raise"]


@dataclass(frozen=True)
class Share:
    """Which rows of the files belong to a split: those whose hash lies in [low, high) of 2**64."""

    low: int = 0
    high: int = 2**64

    def holds(self, place: int) -> bool:
        """Whether a row at `place` belongs."""
        return self.low <= place < self.high


def place_of(identity: int, seed: int) -> int:
    """A row's place in [0, 2**64): a function of its content and the seed, not of where it stands."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{identity}".encode()).digest()[:8], "big")


def validation_bound(files: list[Source], seed: int, fraction: float, max_rows: int) -> int:
    """Rows whose place lies below this are the validation split: `fraction` of them, at most `max_rows`."""
    rows = (row for source in files for row in read(source) if isinstance(row, RawRow))
    bound = int(fraction * 2**64)
    lowest: set[int] = set()  # of many millions of places those that still count
    for row in rows:
        place = place_of(row.identity, seed)
        if place < bound:
            lowest.add(place)
        if len(lowest) > 2 * max_rows + 2:
            lowest = set(sorted(lowest)[: max_rows + 1])
            bound = max(lowest)
    return sorted(lowest)[max_rows] if len(lowest) > max_rows else bound


def remembered_bound(folder: Path, files: list[Source], seed: int, fraction: float, max_rows: int, keep: bool) -> int:
    """`validation_bound`, which reads every row, made once for these files.

    Args:
        folder: Where it is remembered.
        keep: Whether it is written there, should it not be there yet.
    """
    key = [STORE_FORMAT, [(source.name, source.digest()) for source in files], seed, fraction, max_rows]
    path = folder / f"bound-{_sha(json.dumps(key))[:40]}.json"
    try:
        return int(json.loads(path.read_text(encoding="ascii")))
    except (OSError, ValueError, TypeError):  # not there yet, or of somebody else
        bound = validation_bound(files, seed, fraction, max_rows)
    if keep:
        with suppress(OSError):  # a cache that others filled may be read-only; then the rows are read each time
            folder.mkdir(parents=True, exist_ok=True)
            tmp = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
            tmp.write_text(json.dumps(bound), encoding="ascii")
            os.replace(tmp, path)
    return bound


class LateRandom(random.Random):
    """`random.Random(seed())`, seeded when the first number is drawn: most profiles draw none."""

    def __init__(self, seed: Callable[[], str]) -> None:
        self._late_seed = seed

    def __getattr__(self, name: str) -> Any:
        if name == "gauss_next":
            return _begun(self).gauss_next
        raise AttributeError(name)

    def __reduce__(self) -> Any:
        return _begun(self).__reduce__()

    def random(self) -> float:
        """See random.Random; so for those below."""
        return float(_begun(self).random())

    def getrandbits(self, k: int, /) -> int:  # noqa: D102
        return int(_begun(self).getrandbits(k))

    def getstate(self) -> tuple[Any, ...]:  # noqa: D102
        return tuple(_begun(self).getstate())

    def seed(self, *given: Any, **named: Any) -> None:  # noqa: D102
        _begun(self).seed(*given, **named)

    def setstate(self, state: tuple[Any, ...]) -> None:  # noqa: D102
        _begun(self).setstate(state)


def _begun(late: random.Random) -> Any:
    """The generator as what it says it is, from here on."""
    late_seed = vars(late).pop("_late_seed", None)
    if late_seed is not None:
        late.__class__ = random.Random
        late.seed(late_seed())
    return late


@dataclass(frozen=True)
class Recipe:
    """Everything the tokens of a split depend on, besides the rows themselves.

    Attributes:
        system_prompt: Already rendered, or None.
    """

    tokenizer: PreTrainedTokenizerBase
    profile: DataProfile
    system_prompt: str | None
    system_prompt_mode: SystemPromptMode
    seed: int
    max_length: int
    min_length: int
    loss_on: LossOn
    on_long_row: OnLongRow

    def key(self) -> dict[str, Any]:
        """The recipe in plain values, tokenizer, template and profile by hash."""
        return {
            "format": STORE_FORMAT,
            **recipe_hashes(self.tokenizer, self.profile),
            "row_forms": _sha(inspect.getsource(row_forms)),
            "system_prompt": self.system_prompt,
            "system_prompt_mode": self.system_prompt_mode,
            "seed": self.seed,
            "max_length": self.max_length,
            "min_length": self.min_length,
            "loss_on": self.loss_on,
            "on_long_row": self.on_long_row,
        }


def recipe_hashes(tokenizer: PreTrainedTokenizerBase, profile: DataProfile) -> dict[str, str]:
    """Hashes of tokenizer, chat template and profile (source and options)."""
    options = json.dumps(vars(profile), sort_keys=True, default=str)
    source = profile.version + "".join(_source_of(cls) for cls in type(profile).__mro__[:-1])
    return {
        "tokenizer": _tokenizer_hash(tokenizer),
        "template": _sha(str(tokenizer.chat_template)),
        "profile": f"{type(profile).__qualname__} {_sha(options + source)}",
    }


_TOKENIZER_HASHES: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[int, str], str]] = WeakKeyDictionary()
"""Of tokenizers as they were: several splits and the run's fingerprint ask, and a vocabulary takes half a second."""


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    state = (len(tokenizer), json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str))
    known = _TOKENIZER_HASHES.get(tokenizer)
    if known is None or known[0] != state:
        known = _TOKENIZER_HASHES[tokenizer] = (state, _sha(_vocabulary(tokenizer) + state[1]))
    return known[1]


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    # Padding and truncation, which stand first, are left out: calling a tokenizer changes them, and no call of ours
    # uses them.
    return str(backend.to_str()).partition('"added_tokens":')[2]


def _source_of(cls: type) -> str:
    """Source of the module a class stands in; of one typed into a notebook, what its functions do."""
    module = inspect.getmodule(cls)
    try:
        return inspect.getsource(module) if module is not None else ""
    except (OSError, TypeError):
        functions = [value.__code__ for value in vars(cls).values() if inspect.isfunction(value)]
        return repr([(code.co_code, code.co_names) for code in functions])


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Split:
    """One split of the data.

    Attributes:
        name: `train`, `val`, `test` or `predict`; part of each row's random key.
        files: Where its rows stand.
        share: The part of the rows that belongs to it.
        counts_unreadable: Whether lines that are no rows at all are this split's to report.
    """

    name: str
    files: list[Source]
    share: Share
    recipe: Recipe
    counts_unreadable: bool = True

    def digest(self) -> str:
        """Hash of rows and recipe: the name of the split's folder in the cache."""
        rows = [source.digest() for source in self.files]
        key = {"split": self.name, "rows": rows, "names": [s.name for s in self.files], "share": vars(self.share)}
        return _sha(json.dumps({**key, **self.recipe.key()}, sort_keys=True))[:40]

    def conversations(self) -> Iterator[tuple[RawRow, Conversation] | BadRow]:
        """Each row of this split as its profile makes it, or why it cannot be used."""
        for source in self.files:
            for row in read(source):
                if isinstance(row, BadRow):
                    if self.counts_unreadable:
                        yield row
                elif self.share.holds(place_of(row.identity, self.recipe.seed)):
                    yield self._transform(row)

    def _transform(self, row: RawRow) -> tuple[RawRow, Conversation] | BadRow:
        recipe = self.recipe
        keywords = accepted_keywords(
            recipe.profile,
            rng=LateRandom(lambda: f"{recipe.seed}:{self.name}:{row.identity}"),
            system_prompt_mode=recipe.system_prompt_mode,
        )
        try:
            conversation = recipe.profile.transform_example(row.data, row.line, recipe.system_prompt, **keywords)
        except ValueError as error:
            return BadRow(row.file, row.line, str(error))
        except Exception as error:  # the profile may be the user's: say which row it broke on, and let it travel
            error.add_note(f"profile {type(recipe.profile).__name__} broke on {row.file}:{row.line}")
            raise
        return row, conversation
