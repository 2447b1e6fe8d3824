"""CausalLMModule under a real Trainer: the update is that of the whole optimizer step, however it is cut up."""

import copy
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_trainer import pretrained
from lightning_trainer.adapters import LoraSettings
from lightning_trainer.data.collate import Collator
from lightning_trainer.data.sampler import Layout, plan_epoch
from lightning_trainer.model import CausalLMModule, CompensatedAdamW, WarmupConstant, attention
from lightning_trainer.precision import SingleDtypePrecision
from lightning_trainer.types import Batch, InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

LR = 0.5


def token_rows(count: int) -> list[Any]:
    """Rows of unequal lengths, from one trained token to all but the first."""
    rng = np.random.default_rng(7)
    rows = []
    for number in range(count):
        length = int(rng.integers(4, 24))
        first = length - 1 if number % 3 == 0 else int(rng.integers(1, length))
        marks = (np.arange(length) >= first).astype(np.uint8)
        rows.append((rng.integers(0, 384, length).astype(np.int32), marks))
    return rows


class Planned(lightning.LightningDataModule):
    """Batches over `windows`: for each optimizer step a list of micro-batches of row numbers."""

    def __init__(self, rows: list[Any], windows: list[list[list[int]]], packing: bool = True) -> None:
        super().__init__()
        self.packing, self.batches = packing, []
        self.collate = Collator(rows, packing, pad_id=0)  # type: ignore[arg-type]
        for window in windows:
            trained = sum(int(rows[i][1].sum()) for micro in window for i in micro)
            self.batches += [self.collate(np.array(micro), trained) for micro in window]

    def train_dataloader(self) -> Any:
        return _Batches(self.batches)

    val_dataloader = train_dataloader

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)


class _Batches:
    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Watch(lightning.Callback):
    """What the optimizer is given, before and after clipping, and the nats of each step."""

    def __init__(self) -> None:
        self.raw: list[dict[str, torch.Tensor]] = []
        self.stepped: list[dict[str, torch.Tensor]] = []
        self.nats: list[float] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.raw.append({n: p.grad.clone() for n, p in pl_module.model.named_parameters()})

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def note(*_: Any) -> None:
            self.stepped.append({n: p.grad.clone() for n, p in pl_module.model.named_parameters()})

        trainer.optimizers[0].register_step_pre_hook(note)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.nats.append(pl_module.step_nats.item())
            self.norms.append(trainer.precision_plugin.grad_norm.item())


def make_trainer(tmp_path: Path, *callbacks: Any, precision: Any = "32-true", **kwargs: Any) -> lightning.Trainer:
    return lightning.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "max_epochs": 1,
            "plugins": [SingleDtypePrecision(precision)],
            "default_root_dir": tmp_path,
            "callbacks": list(callbacks),
            **kwargs,
        }
    )


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR)


def still(params: Any) -> torch.optim.Optimizer:
    """Steps that move nothing: every one has the same weights beneath it."""
    return torch.optim.SGD(params, lr=0.0)


def flat(optimizer: Any) -> WarmupConstant:
    return WarmupConstant(optimizer, warmup_steps=0)


def fit(
    tmp_path: Path, model_dir: Path, data: Planned, accumulate: int, optimizer: Any = sgd, **kwargs: Any
) -> tuple[Any, Watch]:
    options = {k: kwargs.pop(k) for k in ("loss", "gradient_checkpointing") if k in kwargs}
    module = CausalLMModule(str(model_dir), optimizer=optimizer, lr_scheduler=flat, **options)
    watch = Watch()
    make_trainer(tmp_path, watch, accumulate_grad_batches=accumulate, **kwargs).fit(module, data)
    return module, watch


def reference(model: Any, rows: list[Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of nats over rows, one at a time, and the gradient of (nats / trained tokens): transformers alone."""
    model.zero_grad()
    nats, trained = torch.zeros(()), 0
    for ids, marks in rows:
        labels = torch.tensor([int(i) if m else -100 for i, m in zip(ids, marks, strict=True)])[None]
        mean = model(input_ids=torch.from_numpy(ids).long()[None], labels=labels, use_cache=False).loss
        nats, trained = nats + mean * int(marks.sum()), trained + int(marks.sum())
    (nats / trained).backward()
    return nats.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@st.composite
def any_rows(draw: st.DrawFn) -> list[Any]:
    """Token rows of up to 20 tokens, trained at one or more places, the first excepted."""
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        marks = [0, *draw(st.lists(st.integers(0, 1), min_size=1, max_size=19))]
        marks[draw(st.integers(1, len(marks) - 1))] = 1
        ids = draw(st.lists(st.integers(0, 383), min_size=len(marks), max_size=len(marks)))
        rows.append((np.array(ids, dtype=np.int32), np.array(marks, dtype=np.uint8)))
    return rows


@given(
    rows=any_rows(),
    batch_size=st.integers(1, 3),
    accumulate=st.integers(1, 4),
    ranks=st.integers(1, 3),
    pack_to=st.sampled_from([None, 20, 45]),
    loss=st.sampled_from(["chunked", "full"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_packs_and_splits_train_like_one_row_after_the_other(
    tmp_path: Path,
    tiny_model_dir: Path,
    rows: list[Any],
    batch_size: int,
    accumulate: int,
    ranks: int,
    pack_to: int | None,
    loss: str,
    seed: int,
) -> None:
    """Loss and gradient of every optimizer step; a rank's share is one more micro-batch here."""
    lengths = np.array([len(ids) for ids, _ in rows])
    trained = np.array([int(marks.sum()) for _, marks in rows])
    plan = plan_epoch(lengths, trained, Layout(batch_size, accumulate, ranks, pack_to, seed=seed), epoch=0)
    shares = [plan.examples(batch, rank) for batch in range(len(plan)) for rank in range(ranks)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(rows)))
    steps = [shares[first : first + accumulate * ranks] for first in range(0, len(shares), accumulate * ranks)]
    data = Planned(rows, [], packing=pack_to is not None)
    data.batches = [data.collate(share, plan.step_tokens(n // ranks)) for n, share in enumerate(shares)]
    _, watch = fit(tmp_path, tiny_model_dir, data, accumulate * ranks, optimizer=still, loss=loss)
    plain = pretrained.load_model(str(tiny_model_dir), torch.float32)
    for step, nats, got in zip(steps, watch.nats, watch.raw, strict=True):
        wanted, gradient = reference(plain, [rows[i] for i in np.concatenate(step).astype(int)])
        assert nats == pytest.approx(float(wanted), rel=1e-5)
        close(got, gradient)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("loss", ["chunked", "full"])
def test_two_micro_batches_of_4_are_one_of_8(tmp_path: Path, tiny_model_dir: Path, loss: str, packing: bool) -> None:
    rows = token_rows(8)
    counts = [int(marks.sum()) for _, marks in rows]
    assert sum(counts[:4]) != sum(counts[4:])
    runs = {}
    for name, window, accumulate in (("one", [list(range(8))], 1), ("two", [[0, 1, 2, 3], [4, 5, 6, 7]], 2)):
        data = Planned(rows, [window], packing)
        runs[name] = fit(tmp_path, tiny_model_dir, data, accumulate, loss=loss)
    plain = pretrained.load_model(str(tiny_model_dir), torch.float32)
    nats, grads = reference(plain, rows)
    for module, watch in runs.values():
        assert len(watch.raw) == 1
        assert watch.nats[0] == pytest.approx(nats.item(), rel=1e-6)
        close(watch.raw[0], grads)
        for (name, p), start in zip(module.model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), start.detach() - LR * grads[name], rtol=1e-4, atol=1e-6)


def test_a_short_last_window_is_divided_by_its_own_tokens(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = token_rows(7)
    windows = [[[0, 1], [2, 3]], [[4, 5, 6]]]  # the second optimizer step has one micro-batch of two
    _, watch = fit(tmp_path, tiny_model_dir, Planned(rows, windows), accumulate=2)
    assert len(watch.raw) == 2
    plain = pretrained.load_model(str(tiny_model_dir), torch.float32)
    for step, numbers in enumerate(([0, 1, 2, 3], [4, 5, 6])):
        nats, grads = reference(plain, [rows[i] for i in numbers])
        assert watch.nats[step] == pytest.approx(nats.item(), rel=1e-5)
        close(watch.raw[step], grads)
        with torch.no_grad():
            for name, p in plain.named_parameters():
                p -= LR * grads[name]


def test_clipping_sees_the_whole_steps_gradient(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows, limit = token_rows(8), 1e-2
    data = Planned(rows, [[[0, 1, 2], [3, 4], [5, 6, 7]]])
    _, watch = fit(tmp_path, tiny_model_dir, data, accumulate=3, gradient_clip_val=limit)
    _, grads = reference(pretrained.load_model(str(tiny_model_dir), torch.float32), rows)
    norm = torch.cat([g.flatten() for g in grads.values()]).norm().item()
    assert norm > limit
    assert watch.norms[0] == pytest.approx(norm, rel=1e-5)
    clipped = {name: grad * (limit / norm) for name, grad in grads.items()}
    for name, grad in clipped.items():
        torch.testing.assert_close(watch.stepped[0][name], grad, rtol=1e-3, atol=1e-8)


def test_gradient_checkpointing_changes_no_number(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = token_rows(4)
    runs = [
        fit(tmp_path, tiny_model_dir, Planned(rows, [[[0, 1, 2, 3]]]), 1, gradient_checkpointing=on)[1]
        for on in (False, True)
    ]
    close(runs[0].raw[0], runs[1].raw[0])


def test_a_micro_batch_without_targets_changes_nothing(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = token_rows(3)
    silent = (rows[2][0], np.zeros_like(rows[2][1]))
    _, watch = fit(tmp_path, tiny_model_dir, Planned([*rows[:2], silent], [[[0, 1], [2]]]), accumulate=2)
    _, grads = reference(pretrained.load_model(str(tiny_model_dir), torch.float32), rows[:2])
    close(watch.raw[0], grads)


def test_packed_training_takes_our_attention_and_padded_sdpa(tmp_path: Path, tiny_model_dir: Path) -> None:
    for packing, want in ((True, attention.PACKED), (False, "sdpa")):
        module, _ = fit(tmp_path, tiny_model_dir, Planned(token_rows(2), [[[0, 1]]], packing), 1)
        assert module.model.config._attn_implementation == want


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_the_model_is_made_on_the_host(tmp_path: Path, tiny_model_dir: Path, lora: LoraSettings | None) -> None:
    """Lightning calls this within the device's context, for which `meta` stands here."""
    module = CausalLMModule(str(tiny_model_dir), lora=lora)
    module.trainer = make_trainer(tmp_path)
    with torch.device("meta"):
        module.configure_model()
    assert {tensor.device.type for tensor in (*module.parameters(), *module.causal_lm.buffers())} == {"cpu"}


@pytest.fixture
def gemma2_dir(tmp_path: Path, tokenizer: Any) -> Path:
    config = transformers.Gemma2Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    directory = tmp_path / "gemma2"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("packing", [True, False])
def test_a_model_that_takes_neither_ours_nor_sdpa_is_trained_eager(
    packing: bool, tmp_path: Path, gemma2_dir: Path
) -> None:
    """Soft-capped scores: eager masks keep packed examples apart, which the probe has asked."""
    module, _ = fit(tmp_path, gemma2_dir, Planned(token_rows(2), [[[0, 1]]], packing), 1, loss="full")
    assert module.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("loss", ["chunked", "full"])
def test_validation_is_the_mean_over_all_tokens(tmp_path: Path, tiny_model_dir: Path, loss: Any, packing: bool) -> None:
    rows = token_rows(6)
    data = Planned(rows, [[[0, 1, 2, 3]], [[4, 5]]], packing)
    module = CausalLMModule(str(tiny_model_dir), loss=loss)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.validate(module, data, verbose=False)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    plain = pretrained.load_model(str(tiny_model_dir), torch.float32).eval()
    nats, right, trained = 0.0, 0, 0
    with torch.no_grad():
        for ids, marks in rows:
            tokens = torch.from_numpy(ids).long()
            log_probs = plain(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
            for place in np.flatnonzero(marks):
                nats -= log_probs[place - 1, tokens[place]].item()
                right += int(log_probs[place - 1].argmax()) == int(tokens[place])
                trained += 1
    assert metrics["val/loss"] == pytest.approx(nats / trained, rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(np.exp(nats / trained), rel=1e-4)
    assert metrics["val/token_accuracy"] == pytest.approx(right / trained)


def test_validate_returns_its_metrics(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = Planned(token_rows(2), [[[0, 1]]])
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    (metrics,) = trainer.validate(CausalLMModule(str(tiny_model_dir)), data, verbose=False)
    assert "val/loss" in metrics


def test_the_schedule_is_stepped_once_per_optimizer_step_and_told_their_number(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    schedules: list[WarmupConstant] = []

    def remember(optimizer: Any) -> WarmupConstant:
        schedules.append(WarmupConstant(optimizer, warmup_steps=1))
        return schedules[-1]

    rows = token_rows(5)
    windows = [[[0], [1]], [[2], [3]], [[4]]]
    module = CausalLMModule(str(tiny_model_dir), optimizer=sgd, lr_scheduler=remember)
    make_trainer(tmp_path, accumulate_grad_batches=2).fit(module, Planned(rows, windows))
    assert schedules[0].total_steps == 3
    assert schedules[0].last_epoch == 3


def test_a_missing_model_directory_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "qwen3-tiny").mkdir()
    module = CausalLMModule(str(tmp_path / "qwen3-tinny"))
    with pytest.raises(InputError, match=r"there is no model directory .*qwen3-tinny.*did you mean .*qwen3-tiny'") as e:
        make_trainer(tmp_path).fit(module, Planned(token_rows(1), [[[0]]]))
    assert e.value.key == "model.pretrained"


def test_a_file_is_no_model_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is a file; give the directory that holds config.json"):
        pretrained.resolve_pretrained(str(tmp_path / "config.json"), "model.pretrained")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path, tiny_config: Any, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    largest = max(tokenizer.get_vocab().values())
    AutoModelForCausalLM.from_config(tiny_config(vocab_size=largest), dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    module = CausalLMModule(str(tmp_path))
    with pytest.raises(InputError, match=f"largest token id is {largest}, the model's embedding has {largest} rows"):
        make_trainer(tmp_path).fit(module, Planned(token_rows(1), [[[0]]]))


def test_weights_that_are_missing_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model_dir, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"do not fit the model: .*missing_keys.*model\.norm\.weight"):
        pretrained.load_model(str(tmp_path / "m"), torch.float32)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_other_optimizers_are_refused_under_fp16(tmp_path: Path, tiny_model_dir: Path, optimizer: Any) -> None:
    module = CausalLMModule(str(tiny_model_dir), optimizer=lambda p: optimizer(p, lr=1e-3))
    with pytest.raises(InputError, match="CompensatedAdamW") as caught:
        make_trainer(tmp_path, precision="16-true").fit(module, Planned(token_rows(1), [[[0]]]))
    assert caught.value.key == "model.optimizer"


def test_a_plain_optimizer_under_bf16_is_warned_of(tmp_path: Path, tiny_model_dir: Path) -> None:
    module = CausalLMModule(str(tiny_model_dir), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    with pytest.warns(UserWarning, match="AdamW rounds bf16 weights to nearest"):
        make_trainer(tmp_path, precision="bf16-true").fit(module, Planned(token_rows(1), [[[0]]]))


@pytest.mark.parametrize("kwargs", [{"plugins": []}, {"plugins": [], "precision": "32-true"}])
def test_a_stock_precision_is_refused(tmp_path: Path, tiny_model_dir: Path, kwargs: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, **kwargs)
    with pytest.raises(InputError, match=r"Trainer\(plugins=\[SingleDtypePrecision\('bf16-true'\)\]\)") as caught:
        trainer.fit(CausalLMModule(str(tiny_model_dir)), Planned(token_rows(1), [[[0]]]))
    assert caught.value.key == "trainer.precision"


def test_arguments_an_optimizer_refuses_are_the_users_to_put_right(tmp_path: Path, tiny_model_dir: Path) -> None:
    module = CausalLMModule(str(tiny_model_dir), optimizer=lambda p: torch.optim.SGD(p, lr=-1.0))
    with pytest.raises(InputError, match="Invalid learning rate") as caught:
        make_trainer(tmp_path).fit(module, Planned(token_rows(1), [[[0]]]))
    assert caught.value.key == "model.optimizer"


def test_a_run_without_an_end_is_refused_in_words(tmp_path: Path, tiny_model_dir: Path) -> None:
    """max_epochs -1 has no number of steps a cosine could end at."""
    module = CausalLMModule(str(tiny_model_dir))
    with pytest.raises(InputError, match="max_steps"):
        make_trainer(tmp_path, max_epochs=-1).fit(module, Planned(token_rows(1), [[[0]]]))


def test_a_leaking_model_is_refused_before_the_first_step(tmp_path: Path, tokenizer: Any) -> None:
    config = transformers.GptOssConfig(
        vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    watch = Watch()
    module = CausalLMModule(str(tmp_path / "m"), attn_implementation="eager")
    with pytest.raises(InputError, match="data.packing: false"):
        make_trainer(tmp_path, watch).fit(module, Planned(token_rows(2), [[[0, 1]]]))
    assert watch.raw == []


def test_inputs_are_not_changed(tiny_model_dir: Path) -> None:
    module = CausalLMModule(str(tiny_model_dir))
    module.model = pretrained.load_model(str(tiny_model_dir), torch.float32)
    batch = Planned(token_rows(3), [[[0, 1, 2]]], packing=False).batches[0]
    before = copy.deepcopy(vars(batch))
    module.nats(batch)
    for name, value in vars(batch).items():
        assert torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name]


def test_one_rank_that_cannot_use_the_kernel_keeps_all_from_it(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, bool]] = []

    def another_cannot(strategy: Any, decision: bool, all: bool = True) -> bool:
        asked.append((decision, all))
        return False

    monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.reduce_boolean_decision", another_cannot)
    monkeypatch.setattr(CompensatedAdamW, "kernel_works", lambda self: True)
    module = CausalLMModule(str(tiny_model_dir), optimizer=CompensatedAdamW, lr_scheduler=flat)
    trainer = make_trainer(tmp_path, precision="bf16-true")
    with pytest.warns(UserWarning, match="another rank cannot use it"):
        trainer.fit(module, Planned(token_rows(2), [[[0, 1]]]))
    assert (True, True) in asked
    assert not trainer.optimizers[0].kernel  # type: ignore[attr-defined]
