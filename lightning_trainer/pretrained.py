"""The only place that loads or saves a model or a tokenizer. Trainer and worker share it."""

from __future__ import annotations

import copy
import difflib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_trainer.types import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def resolve_pretrained(name: str, key: str) -> str:
    """`name` as transformers takes it: an existing directory, or a Hub id.

    Raises:
        InputError: It reads like a path and is not there, or is a file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise InputError(f"{name!r} is a file; give the directory that holds config.json", key=key)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.parent.is_dir():
        raise InputError(f"there is no model directory {name!r}{_nearest(path)}", key=key)
    return name


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1)
    return f"; did you mean {str(path.parent / names[0])!r}?" if names else ""


def adapter_base(pretrained: str) -> str | None:
    """The model that the adapter in a local directory belongs to; None where there is no adapter."""
    path = Path(pretrained).expanduser() / "adapter_config.json"
    if not path.is_file() or path.with_name("config.json").exists():  # a whole model with an adapter beside it
        return None
    return str(json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path"))


@dataclass(frozen=True)
class QuantizationSettings:
    """A frozen base of 4 bits a weight, under adapters (QLoRA); CUDA and bitsandbytes are needed.

    Args:
        bits: Of a weight of the linear layers, the output layer's excepted.
        type: How 16 values are spread: nf4 as a normal distribution's, fp4 as floating point.
        double: Quantise the scales too: 0.4 bits a weight less.
    """

    bits: Literal[4] = 4
    type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True

    def bytes_a_weight(self) -> float:
        """With the scales: one of fp32 for 64 weights, or one of 8 bits and one of fp32 for 256 of those."""
        return self.bits / 8 + (1 / 64 + 4 / (64 * 256) if self.double else 4 / 64)

    def config(self, dtype: torch.dtype) -> Any:
        """What transformers takes; computes in `dtype`.

        Raises:
            InputError: There is no CUDA, or no bitsandbytes.
        """
        import torch
        from transformers import BitsAndBytesConfig
        from transformers.utils.import_utils import is_bitsandbytes_available

        missing = [] if torch.cuda.is_available() else ["a CUDA device (torch.cuda.is_available() is False)"]
        missing += [] if is_bitsandbytes_available() else ["bitsandbytes (pip install bitsandbytes)"]
        if missing:
            raise InputError(
                f"a {self.bits}-bit base needs {' and '.join(missing)}, missing here; without it, set "
                "model.quantization: null (model.lora alone keeps the base in the run's dtype)",
                key="model.quantization",
            )
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.type,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=dtype,
        )


def load_config(pretrained: str) -> PretrainedConfig:
    """The model's configuration, its KV cache switched off; for an adapter's directory, its base's.

    Raises:
        InputError: `pretrained` is not there or holds no configuration.
    """
    from transformers import AutoConfig

    source = resolve_pretrained(adapter_base(pretrained) or pretrained, "model.pretrained")
    config: PretrainedConfig
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"no model configuration at {pretrained!r}: {error}", key="model.pretrained") from error
    # A cache switches the detection of packed rows off: examples would see each other, silently.
    config.use_cache = False
    return config


def load_tokenizer(name: str, key: str = "model.tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token (the end-of-text token where it has none of its own).

    Raises:
        InputError: There is no tokenizer at `name`.
    """
    from transformers import AutoTokenizer

    source = resolve_pretrained(name, key)
    tokenizer: PreTrainedTokenizerBase
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer at {name!r}: {error}", key=key) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    pretrained: str,
    dtype: torch.dtype,
    *,
    from_scratch: bool = False,
    attn_implementation: str | None = None,
    quantization: QuantizationSettings | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The model, built in `dtype` (never cast afterwards: that would round rotary frequencies and fp32 modules).

    Args:
        pretrained: Directory or Hub id; for an adapter's directory its base is loaded, without it.
        dtype: Of every parameter, except those the architecture declares must stay fp32.
        from_scratch: Random weights from the configuration; takes its randomness from torch's global generator.
        attn_implementation: A name of transformers' attention interface; None leaves the choice to the architecture.
        quantization: Pack the linear layers' weights, once loaded.
        device: Where a quantised model is packed.

    Raises:
        InputError: There is no model at `pretrained`, or weights are missing or of other shapes.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(pretrained)
    if not from_scratch:
        packed: dict[str, Any] = {}
        if quantization is not None:
            packed = {"quantization_config": quantization.config(dtype), "device_map": {"": device}}
        return _load_weights(pretrained, config, dtype, attn_implementation, **packed)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    except (ValueError, ImportError) as error:
        raise InputError(str(error), key="model.attn_implementation") from error
    except KeyError as error:
        if error.args != (attn_implementation,):
            raise
        raise _unknown_attention(config, attn_implementation) from error
    return model


def _unknown_attention(config: PretrainedConfig, name: str | None) -> InputError:
    return InputError(
        f"{config.model_type} does not take attention {name!r}; sdpa or eager may do", key="model.attn_implementation"
    )


def _load_weights(
    pretrained: str, config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None, **packed: Any
) -> PreTrainedModel:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    source = resolve_pretrained(adapter_base(pretrained) or pretrained, "model.pretrained")
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                **packed,
            )
    except KeyError as error:
        if error.args != (attn_implementation,):
            raise
        raise _unknown_attention(config, attn_implementation) from error
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"no weights could be loaded from {pretrained!r} (model.from_scratch: true takes random ones): {error}",
            key="model.pretrained",
        ) from error
    model: PreTrainedModel
    report: dict[str, Any]
    model, report = loaded
    problems = {name: report.get(name) for name in ("missing_keys", "mismatched_keys") if report.get(name)}
    if problems:
        raise InputError(f"the weights at {pretrained!r} do not fit the model: {problems}", key="model.pretrained")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and load reports: what is wrong is raised."""
    from transformers.utils import logging as hf_logging

    logger = logging.getLogger("transformers")
    level = logger.level
    hf_logging.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        hf_logging.enable_progress_bar()


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse a tokenizer with more tokens than the embedding has rows.

    Raises:
        InputError: Some token id would fall outside the embedding matrix.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise InputError(
            f"the tokenizer's largest token id is {largest}, the model's embedding has {rows} rows (ids 0 to "
            f"{rows - 1}): tokenizer and model do not belong together",
            key="model.tokenizer",
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the embedding matrix: token ids lie below it."""
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0])


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(trained, all) parameters, tied ones once; a packed byte counts as the two weights that it holds."""
    counts = [
        (2 * p.numel() * p.element_size() if type(p).__name__ == "Params4bit" else p.numel(), p.requires_grad)
        for p in model.parameters()
    ]
    return sum(count for count, is_trained in counts if is_trained), sum(count for count, _ in counts)


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write what `from_pretrained` reads: config, safetensors, generation config, tokenizer.

    The KV cache, switched off while training, is on in what is written.
    """
    model.config.use_cache = True
    try:
        with _quiet():
            model.save_pretrained(directory)
    finally:
        model.config.use_cache = False
    tokenizer.save_pretrained(str(directory))


def save_weights(
    weights: dict[str, Tensor], like: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """The same of a model that is not there: other weights for the architecture of `like`.

    Args:
        weights: Under the names of a `state_dict()`, all of them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(like.config)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=like.dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = like.generation_config
    save_pretrained(model, tokenizer, directory)


def load_state_dict(directory: Path, model: PreTrainedModel) -> dict[str, Any]:
    """The weights saved in `directory`, under the names of `model.state_dict()`, tied copies included.

    They are read as any user would read them, so that renaming and tying done by the architecture are undone right.
    """
    dtype = next(model.parameters()).dtype
    saved = _load_weights(str(directory), model.config, dtype, None)
    return dict(saved.state_dict())
