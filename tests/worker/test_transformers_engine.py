"""A real model behind a real server: answers are those of the trainer's own model, token for token."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_thread import RunningWorker, StockClient, answers_of, refused, running_worker

from lightning_trainer.adapters import LoraSettings, adapted_layers, put_in
from lightning_trainer.generation import generate
from lightning_trainer.pretrained import load_model
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.layout import base_digest, identity_of, layout_of, model_tensors, raw_bytes
from lightning_trainer.rpc.messages import to_wire
from lightning_trainer.types import (
    PROMPTS_PER_BATCH,
    AfterSequence,
    ForbidTokens,
    PreviewRequest,
    SamplingParams,
    TokenPenalty,
)
from lightning_trainer.worker.engine import TransformersEngine

PROMPTS = ((5, 6, 7), (11, 12, 13, 14, 15, 16, 17), (301,))
GREEDY = SamplingParams(max_new_tokens=12, temperature=0, stop_token_ids=(2,))
SAMPLED = SamplingParams(max_new_tokens=12, temperature=1.3, top_p=0.95, top_k=50, seed=7, stop_token_ids=(2,))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def worker(tiny_model_dir: Path) -> Iterator[RunningWorker]:
    with running_worker(lambda: TransformersEngine(tiny_model_dir, torch.float32, CPU)) as running:
        yield running


@pytest.fixture
def client(worker: RunningWorker, request: Any) -> Iterator[StockClient]:
    worker.host.resident.lease._until = float("-inf")  # what another test held is over
    with StockClient(worker.address, run_id=request.node.name) as made:
        yield made


def trained(tiny_model_dir: Path, lora: LoraSettings | None = None, seed: int = 3) -> Any:
    """A model whose weights are no longer those on disk, and its adapters if it has any."""
    model = load_model(str(tiny_model_dir), torch.float32)
    adapter = None if lora is None else put_in(model, lora, "base")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters() if adapter is None else adapter.tensors().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, adapter


def values(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: bytes(raw_bytes(tensor)) for name, tensor in sorted(tensors.items())}


def requests(*rules: Any) -> list[PreviewRequest]:
    return [PreviewRequest(prompt_ids=ids, rules=rules) for ids in PROMPTS]


def local(model: Any, sampling: SamplingParams, *rules: Any) -> list[list[int]]:
    return [list(answer.token_ids) for answer in generate(model, requests(*rules), sampling)]


def remote(client: StockClient, ref: Any, sampling: SamplingParams, *rules: Any) -> list[list[int]]:
    message = to_wire("1", requests(*rules), sampling, pb.WeightsSelector(exact=ref))
    return answers_of(client.generate(message), len(PROMPTS))


def push_model(client: StockClient, model: Any, seq: int = 1) -> pb.WeightsRef:
    tensors = model_tensors(model)
    return client.push(layout_of(tensors), values(tensors), seq, identity=identity_of(model))


def spec_of(model: Any, lora: LoraSettings) -> pb.AdapterSpec:
    names = [name for name, _ in adapted_layers(model)]
    saved = [name for name, module in model.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"]
    return pb.AdapterSpec(
        rank=lora.rank,
        alpha=lora.alpha,
        target_modules=names,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        modules_to_save=saved if lora.modules_to_save else [],
        fp32=lora.dtype == "fp32",
    )


def push_adapter(client: StockClient, model: Any, adapter: Any, seq: int = 1) -> pb.WeightsRef:
    tensors = dict(sorted(adapter.tensors().items()))
    identity = identity_of(model, base_digest(model))
    about = {"identity": identity, "kind": pb.UPDATE_KIND_ADAPTER, "adapter": spec_of(model, adapter.settings)}
    return client.push(layout_of(tensors), values(tensors), seq, **about)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_after_a_full_push_are_the_trainers(
    client: StockClient, tiny_model_dir: Path, sampling: SamplingParams
) -> None:
    model, _ = trained(tiny_model_dir)
    untrained = load_model(str(tiny_model_dir), torch.float32)
    answers = remote(client, push_model(client, model), sampling)
    assert answers == local(model, sampling) != local(untrained, sampling)


LORAS = {
    "lora": LoraSettings(rank=4, alpha=8),
    "rslora": LoraSettings(rank=4, alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "dora": LoraSettings(rank=4, alpha=8, use_dora=True),
    "fp32 and embeddings": LoraSettings(rank=2, alpha=4, dtype="fp32", modules_to_save=["embed_tokens"]),
}


@pytest.mark.parametrize("kind", LORAS)
def test_answers_after_an_adapter_push_are_the_trainers(client: StockClient, tiny_model_dir: Path, kind: str) -> None:
    model, adapter = trained(tiny_model_dir, LORAS[kind])
    ref = push_adapter(client, model, adapter)
    base = load_model(str(tiny_model_dir), torch.float32)
    assert remote(client, ref, GREEDY) == local(model, GREEDY) != local(base, GREEDY)
    assert remote(client, ref, SAMPLED) == local(model, SAMPLED)
    with torch.no_grad():
        next(iter(adapter.tensors().values())).mul_(-3)
    assert remote(client, push_adapter(client, model, adapter, seq=2), SAMPLED) == local(model, SAMPLED)


def test_a_full_push_after_adapters_finds_the_model_without_them(client: StockClient, tiny_model_dir: Path) -> None:
    with_adapters, adapter = trained(tiny_model_dir, LORAS["lora"])
    push_adapter(client, with_adapters, adapter)
    model, _ = trained(tiny_model_dir, seed=9)
    assert remote(client, push_model(client, model, seq=2), GREEDY) == local(model, GREEDY)


def test_rules_act_as_they_do_locally(client: StockClient, tiny_model_dir: Path) -> None:
    model, _ = trained(tiny_model_dir)
    ref = push_model(client, model)
    first = local(model, GREEDY)[0][0]
    rules = (
        ForbidTokens((first,)),
        TokenPenalty((9, 10), 3.5),
        AfterSequence(((first,),), 1.0, 2.0, 50.0, exempt_ids=(2,)),
    )
    answers = remote(client, ref, GREEDY, *rules)
    assert answers == local(model, GREEDY, *rules)
    assert first not in answers[0]


def test_weights_that_are_not_finite_are_said_so_and_the_next_are_fine(
    client: StockClient, tiny_model_dir: Path
) -> None:
    model, _ = trained(tiny_model_dir)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    ref = push_model(client, model)
    events = client.generate(client.request(PROMPTS, 5, ref))
    assert [e.prompt_done.reason for e in events if e.HasField("prompt_done")] == [pb.FINISH_REASON_NON_FINITE] * 3
    assert not any(event.HasField("delta") for event in events)
    model, _ = trained(tiny_model_dir)
    assert remote(client, push_model(client, model, seq=2), GREEDY) == local(model, GREEDY)


def test_a_model_unlike_the_workers_is_refused_by_name(client: StockClient, tiny_model_dir: Path) -> None:
    model, adapter = trained(tiny_model_dir, LORAS["lora"])
    tensors = dict(sorted(adapter.tensors().items()))
    wrong = identity_of(model, hashlib.sha256(b"another base").digest())
    about = {"kind": pb.UPDATE_KIND_ADAPTER, "adapter": spec_of(model, adapter.settings)}
    for identity, field in [
        (wrong, "frozen_base_sha256"),
        (identity_of(model), "frozen_base_sha256"),
        (identity_of(model.to(torch.bfloat16)), "dtype"),
    ]:
        target = client.ref(values(tensors), 1)
        request = client.begin_request(layout_of(tensors), values(tensors), target, "u", identity=identity, **about)
        with pytest.raises(Exception, match=field):
            client.begin(request)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0},
        {"rank": 1025},
        {"alpha": float("inf")},
        {"alpha": float("nan")},
        {"alpha": 0.5},
        {"target_modules": []},
        {"target_modules": ["q_proj"]},
        {"target_modules": [".*"]},
        {"modules_to_save": ["../../etc/passwd"]},
        {"target_modules": ["model.norm"]},
    ],
    ids=str,
)
def test_adapters_that_fit_no_layer_are_refused(
    client: StockClient, tiny_model_dir: Path, change: dict[str, Any]
) -> None:
    model, adapter = trained(tiny_model_dir, LORAS["lora"])
    tensors = dict(sorted(adapter.tensors().items()))
    spec = spec_of(model, adapter.settings)
    for name, value in change.items():
        spec.ClearField(name)
        spec.MergeFrom(pb.AdapterSpec(**{name: value}))
    identity = identity_of(model, base_digest(model))
    about = {"identity": identity, "kind": pb.UPDATE_KIND_ADAPTER, "adapter": spec}
    request = client.begin_request(layout_of(tensors), values(tensors), client.ref(values(tensors), 1), "u", **about)
    assert refused(lambda: client.begin(request))[0] == "INVALID_ARGUMENT"
    assert client.ask([[1]], 3)  # and the worker goes on


def test_a_directory_without_weights_waits_for_a_full_push(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    with (
        running_worker(lambda: TransformersEngine(tmp_path, None, CPU)) as bare,
        StockClient(bare.address) as client,
    ):
        service = "lightning_trainer.preview.v1.Preview"
        assert not client.serving(service)
        assert refused(lambda: client.ask([[1]], 3)) == ("FAILED_PRECONDITION", "WEIGHTS_NOT_RESIDENT")
        with_adapters, adapter = trained(tiny_model_dir, LORAS["lora"])
        assert refused(lambda: push_adapter(client, with_adapters, adapter))[1] == "IDENTITY_MISMATCH"
        model, _ = trained(tiny_model_dir)
        ref = push_model(client, model)
        assert client.serving(service)
        assert remote(client, ref, GREEDY) == local(model, GREEDY)


def test_only_what_changed_is_needed(client: StockClient, tiny_model_dir: Path) -> None:
    model, _ = trained(tiny_model_dir)
    push_model(client, model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    tensors = model_tensors(model)
    layout = layout_of(tensors)
    target = client.ref(values(tensors), 2)
    begun = client.begin(client.begin_request(layout, values(tensors), target, "second", identity=identity_of(model)))
    assert [layout[n].name for n in begun.needed] == ["model.layers.0.mlp.up_proj.weight"]


def test_the_hook_sees_every_token_and_changes_none(tiny_model_dir: Path) -> None:
    model, _ = trained(tiny_model_dir)
    asked = [PreviewRequest(prompt_ids=(5 + k, 9)) for k in range(PROMPTS_PER_BATCH + 2)]
    for sampling in (replace(GREEDY, stop_token_ids=()), replace(SAMPLED, stop_token_ids=())):
        seen: list[tuple[int, list[int]]] = []
        answers = generate(model, asked, sampling, lambda first, tokens, seen=seen: seen.append((first, tokens)))
        assert answers_equal(answers, generate(model, asked, sampling))
        assert [first for first, _ in seen] == [0] * 12 + [PROMPTS_PER_BATCH] * 12
        rows = [[tokens[row] for first, tokens in seen if first == 0] for row in range(PROMPTS_PER_BATCH)]
        rows += [[tokens[row] for first, tokens in seen if first == PROMPTS_PER_BATCH] for row in range(2)]
        assert rows == [list(answer.token_ids) for answer in answers]


def answers_equal(first: Any, second: Any) -> bool:
    return [(a.token_ids, a.finish_reason) for a in first] == [(a.token_ids, a.finish_reason) for a in second]


def test_the_hook_ends_a_generation_by_raising_and_leaves_the_model_as_it_was(tiny_model_dir: Path) -> None:
    model, _ = trained(tiny_model_dir)
    model.train()
    seen = []

    def on_step(first: int, tokens: list[int]) -> None:
        seen.append(tokens)
        if len(seen) == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError):
        generate(model, requests(), replace(GREEDY, stop_token_ids=()), on_step)
    assert (len(seen), model.training, model.config.use_cache) == (3, True, False)


def test_the_hook_marks_rows_that_are_not_finite(tiny_model_dir: Path) -> None:
    model, _ = trained(tiny_model_dir)
    with torch.no_grad():
        model.get_input_embeddings().weight[301] = float("nan")
    seen: list[list[int]] = []
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.ones(384, 32))  # not the broken one
    generate(model, requests(), replace(GREEDY, stop_token_ids=()), lambda first, tokens: seen.append(tokens))
    assert {tokens[2] for tokens in seen} == {-1}
    assert all(token >= 0 for tokens in seen for token in tokens[:2])
