"""Adapters in a model: what is trained, in which dtype, what is saved, and that peft and transformers load it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_trainer import pretrained
from lightning_trainer.adapters import Adapter, LoraSettings, put_in
from lightning_trainer.data.collate import Collator
from lightning_trainer.model import CausalLMModule, WarmupConstant, attention, loss, objective, probe
from lightning_trainer.precision import DtypeError, SingleDtypePrecision
from lightning_trainer.precision.audit import ADAPTERS, PACKED_BASE, exceptions, wrong_weights
from lightning_trainer.pretrained import QuantizationSettings
from lightning_trainer.types import Batch, InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # asked for by plain peft
]

IDS = torch.arange(12)[None]

Build = Callable[..., tuple[Any, Adapter]]


@pytest.fixture
def build(tiny_model_dir: Path) -> Build:
    """A model with adapters that add something."""

    def make(of: torch.dtype = torch.float32, directory: Path | None = None, **settings: Any) -> tuple[Any, Adapter]:
        attention.register()
        base = str(directory or tiny_model_dir)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = pretrained.load_model(base, of)
            adapter = put_in(model, LoraSettings(**{"rank": 4, "alpha": 8, **settings}), base)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval(), adapter

    return make


@pytest.fixture(scope="module")
def untied_dir(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Path:
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("untied")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=False)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rank": 0}, "model.lora.rank"),
        ({"alpha": 0}, "model.lora.alpha"),
        ({"dropout": 1.0}, "model.lora.dropout"),
        ({"target_modules": []}, "model.lora.target_modules"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], key: str, tiny_model_dir: Path) -> None:
    with pytest.raises(InputError) as caught:
        CausalLMModule(str(tiny_model_dir), lora=LoraSettings(**settings))
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"lora": LoraSettings(), "from_scratch": True}, "model.from_scratch"),
        ({"quantization": QuantizationSettings()}, "model.quantization"),
    ],
)
def test_what_cannot_go_together_is_refused(arguments: dict[str, Any], key: str, tiny_model_dir: Path) -> None:
    with pytest.raises(InputError) as caught:
        CausalLMModule(str(tiny_model_dir), **arguments)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "has no layer 'v_porj'; it has embed_tokens, q_proj"),
        ({"modules_to_save": ["embeddings"]}, "has no layer 'embeddings'"),
        ({"target_modules": "q_proj"}, r"write a list: \[q_proj\]"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"modules_to_save: \[embed_tokens\]"),
        ({"target_modules": r".*(q_proj|lm_head)"}, "share their weights"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_names_that_fit_no_layer_or_part_tied_ones_are_refused(
    settings: dict[str, Any], message: str, build: Build
) -> None:
    with pytest.raises(InputError, match=message):
        build(**settings)


def test_only_adapters_are_trained(build: Build) -> None:
    model, adapter = build()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7  # A and B, 2 layers, q k v o gate up down
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    # q: 32 -> 32, k and v: 32 -> 16, o: 32 -> 32, gate and up: 32 -> 48, down: 48 -> 32
    assert pretrained.count_parameters(model)[0] == 2 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    assert adapter.layers == 14


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_have_the_dtype_of_the_run(build: Build, dora: bool) -> None:
    model, _ = build(torch.bfloat16, use_dora=dora)
    assert wrong_weights(model, torch.bfloat16) == []
    assert {b.dtype for n, b in model.named_buffers() if n.endswith("inv_freq")} == {torch.float32}
    assert ADAPTERS not in exceptions(torch.bfloat16)


def test_fp32_adapters_are_the_one_mix_and_only_by_name(build: Build) -> None:
    model, _ = build(torch.bfloat16, use_dora=True, dtype="fp32", modules_to_save=["norm"])
    adapters = [n for n, p in model.named_parameters() if p.dtype == torch.float32]
    assert len(adapters) == 3 * 14
    assert wrong_weights(model, torch.bfloat16, torch.float32) == []
    assert len(wrong_weights(model, torch.bfloat16)) == len(adapters)
    model.model.layers[0].self_attn.q_proj.lora_A.bfloat16()  # an adapter that is not what was asked for
    model.model.norm.float()  # a mix that nobody named
    assert sorted(wrong_weights(model, torch.bfloat16, torch.float32)) == [
        "param model.layers.0.self_attn.q_proj.lora_A.default.weight: torch.bfloat16",
        "param model.norm.modules_to_save.default.weight: torch.float32",
        "param model.norm.original_module.weight: torch.float32",
    ]
    assert exceptions(torch.bfloat16, torch.float32)[ADAPTERS] == "fp32"
    assert exceptions(torch.float32, None, packed_base=True) == {PACKED_BASE: "uint8"}


SAVED = [
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"use_dora": True}),
    (torch.float32, {"modules_to_save": ["embed_tokens"]}),
    (torch.bfloat16, {"modules_to_save": ["lm_head", "norm"], "target_modules": ["q_proj"]}),
    (torch.float32, {"use_rslora": True, "target_modules": r".*\.[qv]_proj"}),
]


@pytest.mark.parametrize(("dtype", "settings"), SAVED)
def test_what_is_saved_loads_in_peft_and_transformers(
    dtype: torch.dtype, settings: dict[str, Any], build: Build, tmp_path: Path, tiny_model_dir: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, adapter = build(dtype, **settings)
    adapter.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(tiny_model_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype)
    in_peft = PeftModel.from_pretrained(base, str(tmp_path), autocast_adapter_dtype=False)
    in_transformers = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for loaded in (in_peft, in_transformers):
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_fp32_adapters_load_in_peft(build: Build, tmp_path: Path, tiny_model_dir: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, adapter = build(torch.bfloat16, dtype="fp32")
    adapter.save(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    assert torch.equal(PeftModel.from_pretrained(base, str(tmp_path))(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["embed_tokens"]}])
def test_loading_gives_back_what_was_saved(settings: dict[str, Any], build: Build, tmp_path: Path) -> None:
    model, adapter = build(**settings)
    before = model(IDS).logits
    adapter.save(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert not torch.equal(model(IDS).logits, before)
    adapter.load(tmp_path, "ckpt_path")
    assert torch.equal(model(IDS).logits, before)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(Q), f"missing: {Q}"),
        (lambda t: t.update({"more": torch.zeros(1)}), "left over: more"),
        (lambda t: t.update({Q: torch.zeros(4, 7)}), f"{Q}: was (4, 7), is (4, 32)"),
        (lambda t: t.update({Q: t[Q].bfloat16()}), f"{Q}: was torch.bfloat16, is torch.float32"),
    ],
)
def test_no_name_is_missed_silently(change: Any, said: str, build: Build, tmp_path: Path) -> None:
    _, adapter = build()
    adapter.save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError) as caught:
        adapter.load(tmp_path, "ckpt_path")
    assert said in str(caught.value)


def test_other_settings_and_another_base_are_refused(build: Build, tmp_path: Path, untied_dir: Path) -> None:
    _, adapter = build()
    digest = adapter.base_digest()
    adapter.save(tmp_path)
    for settings, said in (({"alpha": 16}, "alpha: was 8, is 16"), ({"rank": 8}, "rank: was 4, is 8")):
        with pytest.raises(InputError, match=said):
            build(**settings)[1].resume(tmp_path, digest)
    _, again = build()
    again.resume(tmp_path, digest)
    other, changed = build()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.base_layer.weight[0, 0] += 1e-6
    with pytest.raises(InputError, match="are not those the adapters were trained on"):
        changed.resume(tmp_path, digest)
    assert build(torch.bfloat16)[1].base_digest() != digest


def _batch(lengths: tuple[int, ...] = (7, 9)) -> dict[str, Any]:
    return {
        "input_ids": torch.arange(sum(lengths))[None] % 384,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "attention_mask": None,
        "examples": attention.Examples(lengths),
        "use_cache": False,
    }


def test_packed_examples_stay_apart_and_the_loss_is_chunked(build: Build) -> None:
    model, _ = build(use_dora=True)
    model.set_attn_implementation(attention.PACKED)
    probe.refuse_leaks(model)
    assert objective.why_not_chunked(model) is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_copy_of_the_output_layer_is_chunked_right(tied: bool, build: Build, untied_dir: Path) -> None:
    layers = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    model, _ = build(directory=None if tied else untied_dir, modules_to_save=layers)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert objective.why_not_chunked(model) is None
    targets, grads = torch.arange(12), []
    head = objective.output_layer(model)
    for chunked in (True, False):
        model.zero_grad()
        if chunked:
            nats = loss.nats_chunked(model.base_model(IDS).last_hidden_state[0], head.weight, head.bias, targets)
        else:
            nats = loss.nats_from_logits(model(IDS).logits[0], targets)
        nats.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert len(grads[0]) == 28 + len(layers)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-5, rtol=1e-4)


def test_an_adapter_on_the_output_layer_takes_the_full_loss_by_name(build: Build, untied_dir: Path) -> None:
    model, _ = build(directory=untied_dir, target_modules=["q_proj", "lm_head"])
    assert objective.why_not_chunked(model) == "its output layer has an adapter"


@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "dropout": 0.1}])
def test_gradient_checkpointing_changes_no_gradient(settings: dict[str, Any], build: Build) -> None:
    model, _ = build(**settings)
    model.set_attn_implementation(attention.PACKED)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train().zero_grad()
        torch.manual_seed(3)
        model(**_batch()).logits.square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(grad.abs().max() > 0 for grad in grads[0].values())
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}])
def test_merged_weights_are_the_model_without_adapters(
    settings: dict[str, Any], build: Build, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model, adapter = build(**settings)
    pretrained.save_weights(adapter.merged(), model, tokenizer, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert merged.config.use_cache
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)


def test_merging_in_bf16_rounds_once(build: Build) -> None:
    model, adapter = build(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    layer = model.model.layers[1].mlp.up_proj
    a, b = (part["default"].weight.float() for part in (layer.lora_A, layer.lora_B))
    exact = layer.base_layer.weight.float() + (b @ a) * 2  # alpha / rank
    assert torch.equal(adapter.merged()["model.layers.1.mlp.up_proj.weight"], exact.bfloat16())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_quantised_base_is_refused_where_it_cannot_be(tiny_model_dir: Path) -> None:
    with pytest.raises(InputError, match="a CUDA device") as caught:
        pretrained.load_model(str(tiny_model_dir), torch.bfloat16, quantization=QuantizationSettings())
    assert caught.value.key == "model.quantization"
    assert QuantizationSettings(double=False).bytes_a_weight() == 0.5 + 4 / 64
    assert QuantizationSettings().bytes_a_weight() == pytest.approx(0.5 + 0.127 / 8, abs=1e-4)  # the QLoRA paper, §3


class Planned(lightning.LightningDataModule):
    """Two micro-batches to an optimizer step, six steps."""

    packing = True

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(7)
        lengths = rng.integers(4, 24, 36)
        self.rows: list[Any] = [
            (rng.integers(0, 384, n).astype(np.int32), (np.arange(n) > 1).astype(np.uint8)) for n in lengths
        ]
        collate = Collator(self.rows, True, pad_id=0)  # type: ignore[arg-type]
        self.steps = [list(range(start, start + 6)) for start in range(0, 36, 6)]
        self.batches = [
            collate(np.array(micro), sum(int(self.rows[i][1].sum()) for i in step))
            for step in self.steps
            for micro in (step[:2], step[2:])
        ]

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    val_dataloader = train_dataloader

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)


class Watch(lightning.Callback):
    """The adapters as training begins, and the gradients of each step."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.grads: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.adapter.save(self.directory)
        self.frozen = {n: p.clone() for n, p in pl_module.model.named_parameters() if not p.requires_grad}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.grads.append({n: p.grad.clone() for n, p in pl_module.model.named_parameters() if p.requires_grad})
        self.optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}


def _train(tmp_path: Path, model: Path, precision: Any = "32-true", **arguments: Any) -> tuple[CausalLMModule, Watch]:
    module = CausalLMModule(
        str(model),
        optimizer=arguments.pop("optimizer", lambda params: torch.optim.SGD(params, lr=0.5)),
        lr_scheduler=lambda optimizer: WarmupConstant(optimizer, warmup_steps=0),
        **arguments,
    )
    watch = Watch(tmp_path / "start")
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        max_epochs=1,
        accumulate_grad_batches=2,
        plugins=[SingleDtypePrecision(precision)],
        default_root_dir=tmp_path,
        callbacks=[watch],
    )
    trainer.fit(module, Planned())
    return module, watch


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_those_of_a_bare_loop_around_peft(dora: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module, watch = _train(tmp_path, tiny_model_dir, lora=LoraSettings(rank=4, alpha=8, use_dora=dora))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = PeftModel.from_pretrained(base, str(tmp_path / "start"), is_trainable=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    data = Planned()
    for step, grads in zip(data.steps, watch.grads, strict=True):
        optimizer.zero_grad()
        rows = [data.rows[i] for i in step]
        for ids, marks in rows:  # one at a time, in transformers' own loss
            tokens = torch.from_numpy(ids).long()[None]
            labels = tokens.masked_fill(torch.from_numpy(marks)[None] == 0, -100)
            (model(tokens, labels=labels).loss * int(marks.sum())).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= sum(int(marks.sum()) for _, marks in rows)
        found = {n: p.grad for n, p in base.named_parameters() if p.requires_grad}
        assert found.keys() == grads.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grads[name], grad, atol=1e-6, rtol=1e-5)
        optimizer.step()
    assert max(grad.abs().max() for grad in watch.grads[-1].values()) > 1e-3
    trained = dict(module.causal_lm.named_parameters())
    assert all(torch.equal(trained[name], value) for name, value in watch.frozen.items())
    assert watch.optimized == {id(p) for p in module.parameters() if p.requires_grad}


def test_new_tokens_move_and_stay_tied(tiny_model_dir: Path, tmp_path: Path) -> None:
    lora = LoraSettings(rank=4, modules_to_save=["embed_tokens"])
    module, watch = _train(tmp_path, tiny_model_dir, lora=lora)
    model: Any = module.causal_lm
    assert module.objective.name == "chunked"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not torch.equal(model.get_input_embeddings().weight, model.get_input_embeddings().original_module.weight)
    trained = dict(model.named_parameters())
    assert all(torch.equal(trained[name], value) for name, value in watch.frozen.items())


@pytest.mark.filterwarnings("error:.*rounds bf16 weights")
def test_fp32_adapters_keep_fp32_gradients_and_moments_on_a_bf16_base(tiny_model_dir: Path, tmp_path: Path) -> None:
    lora = LoraSettings(rank=4, dtype="fp32", dropout=0.1)
    optimizer = lambda params: torch.optim.AdamW(params, lr=1e-3)  # noqa: E731 - rounds nothing in fp32
    module, watch = _train(tmp_path, tiny_model_dir, "bf16-true", lora=lora, optimizer=optimizer)
    assert {grad.dtype for grad in watch.grads[-1].values()} == {torch.float32}
    state = module.trainer.optimizers[0].state.values()
    assert {entry["exp_avg"].dtype for entry in state} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_mix_that_is_not_named_ends_the_start(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalLMModule, "adapter_dtype", None)
    with pytest.raises(DtypeError, match="lora_A"):
        _train(tmp_path, tiny_model_dir, "bf16-true", lora=LoraSettings(rank=4, dtype="fp32"))
