from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_BF16: _ClassVar[DType]
    DTYPE_F16: _ClassVar[DType]
    DTYPE_F32: _ClassVar[DType]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_EOS: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_NON_FINITE: _ClassVar[FinishReason]

class UpdateKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPDATE_KIND_UNSPECIFIED: _ClassVar[UpdateKind]
    UPDATE_KIND_MODEL: _ClassVar[UpdateKind]
    UPDATE_KIND_ADAPTER: _ClassVar[UpdateKind]

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_RAW: _ClassVar[Encoding]
DTYPE_UNSPECIFIED: DType
DTYPE_BF16: DType
DTYPE_F16: DType
DTYPE_F32: DType
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_EOS: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_NON_FINITE: FinishReason
UPDATE_KIND_UNSPECIFIED: UpdateKind
UPDATE_KIND_MODEL: UpdateKind
UPDATE_KIND_ADAPTER: UpdateKind
ENCODING_UNSPECIFIED: Encoding
ENCODING_RAW: Encoding

class ModelIdentity(_message.Message):
    __slots__ = ("architecture", "dtype", "vocab_size", "config_sha256", "layout_sha256", "frozen_base_sha256", "total_bytes")
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_SHA256_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_SHA256_FIELD_NUMBER: _ClassVar[int]
    FROZEN_BASE_SHA256_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    architecture: str
    dtype: DType
    vocab_size: int
    config_sha256: bytes
    layout_sha256: bytes
    frozen_base_sha256: bytes
    total_bytes: int
    def __init__(self, architecture: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., vocab_size: _Optional[int] = ..., config_sha256: _Optional[bytes] = ..., layout_sha256: _Optional[bytes] = ..., frozen_base_sha256: _Optional[bytes] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class WeightsRef(_message.Message):
    __slots__ = ("run_id", "global_step", "publish_seq", "content_sha256")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_STEP_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_SEQ_FIELD_NUMBER: _ClassVar[int]
    CONTENT_SHA256_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    global_step: int
    publish_seq: int
    content_sha256: bytes
    def __init__(self, run_id: _Optional[str] = ..., global_step: _Optional[int] = ..., publish_seq: _Optional[int] = ..., content_sha256: _Optional[bytes] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("wire_minor", "worker_version", "worker_instance_id", "identity", "limits", "rule_kinds", "encodings", "engine", "resident", "update_kinds")
    WIRE_MINOR_FIELD_NUMBER: _ClassVar[int]
    WORKER_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    RULE_KINDS_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_KINDS_FIELD_NUMBER: _ClassVar[int]
    wire_minor: int
    worker_version: str
    worker_instance_id: str
    identity: ModelIdentity
    limits: Limits
    rule_kinds: _containers.RepeatedScalarFieldContainer[str]
    encodings: _containers.RepeatedScalarFieldContainer[Encoding]
    engine: str
    resident: WeightsRef
    update_kinds: _containers.RepeatedScalarFieldContainer[UpdateKind]
    def __init__(self, wire_minor: _Optional[int] = ..., worker_version: _Optional[str] = ..., worker_instance_id: _Optional[str] = ..., identity: _Optional[_Union[ModelIdentity, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., rule_kinds: _Optional[_Iterable[str]] = ..., encodings: _Optional[_Iterable[_Union[Encoding, str]]] = ..., engine: _Optional[str] = ..., resident: _Optional[_Union[WeightsRef, _Mapping]] = ..., update_kinds: _Optional[_Iterable[_Union[UpdateKind, str]]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_prompts_per_request", "max_prompt_tokens", "max_new_tokens", "max_total_tokens", "max_queue_depth", "max_chunk_bytes", "max_manifest_tensors", "max_update_bytes", "max_message_bytes")
    MAX_PROMPTS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MANIFEST_TENSORS_FIELD_NUMBER: _ClassVar[int]
    MAX_UPDATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_prompts_per_request: int
    max_prompt_tokens: int
    max_new_tokens: int
    max_total_tokens: int
    max_queue_depth: int
    max_chunk_bytes: int
    max_manifest_tensors: int
    max_update_bytes: int
    max_message_bytes: int
    def __init__(self, max_prompts_per_request: _Optional[int] = ..., max_prompt_tokens: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., max_total_tokens: _Optional[int] = ..., max_queue_depth: _Optional[int] = ..., max_chunk_bytes: _Optional[int] = ..., max_manifest_tensors: _Optional[int] = ..., max_update_bytes: _Optional[int] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("tokens", "prompt_id", "rules")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ID_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    tokens: TokenIds
    prompt_id: str
    rules: _containers.RepeatedCompositeFieldContainer[LogitsRule]
    def __init__(self, tokens: _Optional[_Union[TokenIds, _Mapping]] = ..., prompt_id: _Optional[str] = ..., rules: _Optional[_Iterable[_Union[LogitsRule, _Mapping]]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("greedy", "temperature", "top_p", "top_k", "seed")
    GREEDY_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    greedy: bool
    temperature: float
    top_p: float
    top_k: int
    seed: int
    def __init__(self, greedy: _Optional[bool] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class Stopping(_message.Message):
    __slots__ = ("max_new_tokens", "stop_token_ids")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, max_new_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class LogitsRule(_message.Message):
    __slots__ = ("label", "token_penalty", "after_sequence", "forbid", "repetition")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_PENALTY_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FORBID_FIELD_NUMBER: _ClassVar[int]
    REPETITION_FIELD_NUMBER: _ClassVar[int]
    label: str
    token_penalty: TokenPenalty
    after_sequence: AfterSequence
    forbid: ForbidTokens
    repetition: RepetitionPenalty
    def __init__(self, label: _Optional[str] = ..., token_penalty: _Optional[_Union[TokenPenalty, _Mapping]] = ..., after_sequence: _Optional[_Union[AfterSequence, _Mapping]] = ..., forbid: _Optional[_Union[ForbidTokens, _Mapping]] = ..., repetition: _Optional[_Union[RepetitionPenalty, _Mapping]] = ...) -> None: ...

class TokenPenalty(_message.Message):
    __slots__ = ("token_ids", "penalty", "schedule")
    class Window(_message.Message):
        __slots__ = ("steps", "multiplier")
        STEPS_FIELD_NUMBER: _ClassVar[int]
        MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
        steps: int
        multiplier: float
        def __init__(self, steps: _Optional[int] = ..., multiplier: _Optional[float] = ...) -> None: ...
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PENALTY_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    penalty: float
    schedule: _containers.RepeatedCompositeFieldContainer[TokenPenalty.Window]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., penalty: _Optional[float] = ..., schedule: _Optional[_Iterable[_Union[TokenPenalty.Window, _Mapping]]] = ...) -> None: ...

class AfterSequence(_message.Message):
    __slots__ = ("triggers", "base_penalty", "growth", "max_penalty", "exempt_ids", "exempt_bonus")
    TRIGGERS_FIELD_NUMBER: _ClassVar[int]
    BASE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    GROWTH_FIELD_NUMBER: _ClassVar[int]
    MAX_PENALTY_FIELD_NUMBER: _ClassVar[int]
    EXEMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    EXEMPT_BONUS_FIELD_NUMBER: _ClassVar[int]
    triggers: _containers.RepeatedCompositeFieldContainer[TokenIds]
    base_penalty: float
    growth: float
    max_penalty: float
    exempt_ids: _containers.RepeatedScalarFieldContainer[int]
    exempt_bonus: float
    def __init__(self, triggers: _Optional[_Iterable[_Union[TokenIds, _Mapping]]] = ..., base_penalty: _Optional[float] = ..., growth: _Optional[float] = ..., max_penalty: _Optional[float] = ..., exempt_ids: _Optional[_Iterable[int]] = ..., exempt_bonus: _Optional[float] = ...) -> None: ...

class ForbidTokens(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class RepetitionPenalty(_message.Message):
    __slots__ = ("penalty", "window")
    PENALTY_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    penalty: float
    window: int
    def __init__(self, penalty: _Optional[float] = ..., window: _Optional[int] = ...) -> None: ...

class WeightsSelector(_message.Message):
    __slots__ = ("exact", "any_resident")
    EXACT_FIELD_NUMBER: _ClassVar[int]
    ANY_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    exact: WeightsRef
    any_resident: bool
    def __init__(self, exact: _Optional[_Union[WeightsRef, _Mapping]] = ..., any_resident: _Optional[bool] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "weights", "prompts", "sampling", "stopping", "stream_every_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    STREAM_EVERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    weights: WeightsSelector
    prompts: _containers.RepeatedCompositeFieldContainer[Prompt]
    sampling: Sampling
    stopping: Stopping
    stream_every_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., weights: _Optional[_Union[WeightsSelector, _Mapping]] = ..., prompts: _Optional[_Iterable[_Union[Prompt, _Mapping]]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., stopping: _Optional[_Union[Stopping, _Mapping]] = ..., stream_every_tokens: _Optional[int] = ...) -> None: ...

class GenerateEvent(_message.Message):
    __slots__ = ("event_seq", "queued", "started", "delta", "prompt_done", "finished")
    EVENT_SEQ_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    PROMPT_DONE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    event_seq: int
    queued: Queued
    started: Started
    delta: Delta
    prompt_done: PromptDone
    finished: Finished
    def __init__(self, event_seq: _Optional[int] = ..., queued: _Optional[_Union[Queued, _Mapping]] = ..., started: _Optional[_Union[Started, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., prompt_done: _Optional[_Union[PromptDone, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: int
    def __init__(self, position: _Optional[int] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("weights", "prompt_token_counts")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    weights: WeightsRef
    prompt_token_counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, weights: _Optional[_Union[WeightsRef, _Mapping]] = ..., prompt_token_counts: _Optional[_Iterable[int]] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("prompt_index", "first_token_index", "token_ids")
    PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    prompt_index: int
    first_token_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, prompt_index: _Optional[int] = ..., first_token_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class PromptDone(_message.Message):
    __slots__ = ("prompt_index", "reason", "generated_tokens")
    PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_index: int
    reason: FinishReason
    generated_tokens: int
    def __init__(self, prompt_index: _Optional[int] = ..., reason: _Optional[_Union[FinishReason, str]] = ..., generated_tokens: _Optional[int] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("weights", "queue_micros", "decode_micros", "total_generated_tokens", "output_sha256")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MICROS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MICROS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_SHA256_FIELD_NUMBER: _ClassVar[int]
    weights: WeightsRef
    queue_micros: int
    decode_micros: int
    total_generated_tokens: int
    output_sha256: bytes
    def __init__(self, weights: _Optional[_Union[WeightsRef, _Mapping]] = ..., queue_micros: _Optional[int] = ..., decode_micros: _Optional[int] = ..., total_generated_tokens: _Optional[int] = ..., output_sha256: _Optional[bytes] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("state", "resident", "lease_run_id", "lease_remaining_millis", "queue_depth", "inflight", "device_bytes_free", "device_bytes_total", "counters", "uptime_millis")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[GetStatusResponse.State]
        STATE_LOADING: _ClassVar[GetStatusResponse.State]
        STATE_READY: _ClassVar[GetStatusResponse.State]
        STATE_APPLYING: _ClassVar[GetStatusResponse.State]
        STATE_POISONED: _ClassVar[GetStatusResponse.State]
        STATE_DRAINING: _ClassVar[GetStatusResponse.State]
    STATE_UNSPECIFIED: GetStatusResponse.State
    STATE_LOADING: GetStatusResponse.State
    STATE_READY: GetStatusResponse.State
    STATE_APPLYING: GetStatusResponse.State
    STATE_POISONED: GetStatusResponse.State
    STATE_DRAINING: GetStatusResponse.State
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    LEASE_RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_REMAINING_MILLIS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    INFLIGHT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FREE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_MILLIS_FIELD_NUMBER: _ClassVar[int]
    state: GetStatusResponse.State
    resident: WeightsRef
    lease_run_id: str
    lease_remaining_millis: int
    queue_depth: int
    inflight: int
    device_bytes_free: int
    device_bytes_total: int
    counters: _containers.ScalarMap[str, int]
    uptime_millis: int
    def __init__(self, state: _Optional[_Union[GetStatusResponse.State, str]] = ..., resident: _Optional[_Union[WeightsRef, _Mapping]] = ..., lease_run_id: _Optional[str] = ..., lease_remaining_millis: _Optional[int] = ..., queue_depth: _Optional[int] = ..., inflight: _Optional[int] = ..., device_bytes_free: _Optional[int] = ..., device_bytes_total: _Optional[int] = ..., counters: _Optional[_Mapping[str, int]] = ..., uptime_millis: _Optional[int] = ...) -> None: ...

class TensorEntry(_message.Message):
    __slots__ = ("name", "dtype", "shape", "nbytes", "sha256", "encoding", "encoded_nbytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    ENCODED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    nbytes: int
    sha256: bytes
    encoding: Encoding
    encoded_nbytes: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., nbytes: _Optional[int] = ..., sha256: _Optional[bytes] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., encoded_nbytes: _Optional[int] = ...) -> None: ...

class AdapterSpec(_message.Message):
    __slots__ = ("rank", "alpha", "use_rslora", "target_modules", "use_dora", "modules_to_save", "fp32")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    USE_RSLORA_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    USE_DORA_FIELD_NUMBER: _ClassVar[int]
    MODULES_TO_SAVE_FIELD_NUMBER: _ClassVar[int]
    FP32_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    use_rslora: bool
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    use_dora: bool
    modules_to_save: _containers.RepeatedScalarFieldContainer[str]
    fp32: bool
    def __init__(self, rank: _Optional[int] = ..., alpha: _Optional[float] = ..., use_rslora: _Optional[bool] = ..., target_modules: _Optional[_Iterable[str]] = ..., use_dora: _Optional[bool] = ..., modules_to_save: _Optional[_Iterable[str]] = ..., fp32: _Optional[bool] = ...) -> None: ...

class BeginRequest(_message.Message):
    __slots__ = ("update_id", "wire_minor", "identity", "kind", "target", "tensors", "adapter")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    WIRE_MINOR_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    wire_minor: int
    identity: ModelIdentity
    kind: UpdateKind
    target: WeightsRef
    tensors: _containers.RepeatedCompositeFieldContainer[TensorEntry]
    adapter: AdapterSpec
    def __init__(self, update_id: _Optional[str] = ..., wire_minor: _Optional[int] = ..., identity: _Optional[_Union[ModelIdentity, _Mapping]] = ..., kind: _Optional[_Union[UpdateKind, str]] = ..., target: _Optional[_Union[WeightsRef, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[TensorEntry, _Mapping]]] = ..., adapter: _Optional[_Union[AdapterSpec, _Mapping]] = ...) -> None: ...

class BeginResponse(_message.Message):
    __slots__ = ("worker_instance_id", "fencing_token", "needed", "resume_offset", "already_resident", "chunk_bytes")
    WORKER_INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NEEDED_FIELD_NUMBER: _ClassVar[int]
    RESUME_OFFSET_FIELD_NUMBER: _ClassVar[int]
    ALREADY_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    worker_instance_id: str
    fencing_token: int
    needed: _containers.RepeatedScalarFieldContainer[int]
    resume_offset: int
    already_resident: bool
    chunk_bytes: int
    def __init__(self, worker_instance_id: _Optional[str] = ..., fencing_token: _Optional[int] = ..., needed: _Optional[_Iterable[int]] = ..., resume_offset: _Optional[int] = ..., already_resident: _Optional[bool] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class UploadChunk(_message.Message):
    __slots__ = ("update_id", "fencing_token", "offset", "data")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    fencing_token: int
    offset: int
    data: bytes
    def __init__(self, update_id: _Optional[str] = ..., fencing_token: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadResponse(_message.Message):
    __slots__ = ("cursor",)
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    cursor: int
    def __init__(self, cursor: _Optional[int] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("update_id", "fencing_token", "target")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    fencing_token: int
    target: WeightsRef
    def __init__(self, update_id: _Optional[str] = ..., fencing_token: _Optional[int] = ..., target: _Optional[_Union[WeightsRef, _Mapping]] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("resident", "verify_micros", "drain_micros", "apply_micros")
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    VERIFY_MICROS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_MICROS_FIELD_NUMBER: _ClassVar[int]
    APPLY_MICROS_FIELD_NUMBER: _ClassVar[int]
    resident: WeightsRef
    verify_micros: int
    drain_micros: int
    apply_micros: int
    def __init__(self, resident: _Optional[_Union[WeightsRef, _Mapping]] = ..., verify_micros: _Optional[int] = ..., drain_micros: _Optional[int] = ..., apply_micros: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("update_id", "fencing_token")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    fencing_token: int
    def __init__(self, update_id: _Optional[str] = ..., fencing_token: _Optional[int] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("fencing_token",)
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    fencing_token: int
    def __init__(self, fencing_token: _Optional[int] = ...) -> None: ...

class LeaseResponse(_message.Message):
    __slots__ = ("remaining_millis",)
    REMAINING_MILLIS_FIELD_NUMBER: _ClassVar[int]
    remaining_millis: int
    def __init__(self, remaining_millis: _Optional[int] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("reason", "fields", "retry_after_millis")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[ErrorDetail.Reason]
        REASON_WEIGHTS_NOT_RESIDENT: _ClassVar[ErrorDetail.Reason]
        REASON_IDENTITY_MISMATCH: _ClassVar[ErrorDetail.Reason]
        REASON_LEASE_HELD: _ClassVar[ErrorDetail.Reason]
        REASON_FENCED: _ClassVar[ErrorDetail.Reason]
        REASON_QUEUE_FULL: _ClassVar[ErrorDetail.Reason]
        REASON_PROMPT_TOO_LONG: _ClassVar[ErrorDetail.Reason]
        REASON_TOKEN_BUDGET: _ClassVar[ErrorDetail.Reason]
        REASON_UNKNOWN_RULE: _ClassVar[ErrorDetail.Reason]
        REASON_WIRE_VERSION: _ClassVar[ErrorDetail.Reason]
        REASON_MANIFEST_INVALID: _ClassVar[ErrorDetail.Reason]
        REASON_DIGEST_MISMATCH: _ClassVar[ErrorDetail.Reason]
        REASON_OUT_OF_MEMORY: _ClassVar[ErrorDetail.Reason]
        REASON_POISONED: _ClassVar[ErrorDetail.Reason]
        REASON_STALE_PUBLISH: _ClassVar[ErrorDetail.Reason]
        REASON_TOKEN_OUT_OF_VOCAB: _ClassVar[ErrorDetail.Reason]
        REASON_INVALID_ARGUMENT: _ClassVar[ErrorDetail.Reason]
        REASON_UNAVAILABLE: _ClassVar[ErrorDetail.Reason]
    REASON_UNSPECIFIED: ErrorDetail.Reason
    REASON_WEIGHTS_NOT_RESIDENT: ErrorDetail.Reason
    REASON_IDENTITY_MISMATCH: ErrorDetail.Reason
    REASON_LEASE_HELD: ErrorDetail.Reason
    REASON_FENCED: ErrorDetail.Reason
    REASON_QUEUE_FULL: ErrorDetail.Reason
    REASON_PROMPT_TOO_LONG: ErrorDetail.Reason
    REASON_TOKEN_BUDGET: ErrorDetail.Reason
    REASON_UNKNOWN_RULE: ErrorDetail.Reason
    REASON_WIRE_VERSION: ErrorDetail.Reason
    REASON_MANIFEST_INVALID: ErrorDetail.Reason
    REASON_DIGEST_MISMATCH: ErrorDetail.Reason
    REASON_OUT_OF_MEMORY: ErrorDetail.Reason
    REASON_POISONED: ErrorDetail.Reason
    REASON_STALE_PUBLISH: ErrorDetail.Reason
    REASON_TOKEN_OUT_OF_VOCAB: ErrorDetail.Reason
    REASON_INVALID_ARGUMENT: ErrorDetail.Reason
    REASON_UNAVAILABLE: ErrorDetail.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MILLIS_FIELD_NUMBER: _ClassVar[int]
    reason: ErrorDetail.Reason
    fields: _containers.RepeatedScalarFieldContainer[str]
    retry_after_millis: int
    def __init__(self, reason: _Optional[_Union[ErrorDetail.Reason, str]] = ..., fields: _Optional[_Iterable[str]] = ..., retry_after_millis: _Optional[int] = ...) -> None: ...
