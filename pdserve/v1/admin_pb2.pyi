from pdserve.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SetLevelRequest(_message.Message):
    __slots__ = ("level",)
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    level: str
    def __init__(self, level: _Optional[str] = ...) -> None: ...

class SetLevelResponse(_message.Message):
    __slots__ = ("before",)
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    before: str
    def __init__(self, before: _Optional[str] = ...) -> None: ...

class PoolState(_message.Message):
    __slots__ = ("role", "size", "min", "max", "workers")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    role: _worker_pb2.WorkerRole
    size: int
    min: int
    max: int
    workers: _containers.RepeatedCompositeFieldContainer[MemberState]
    def __init__(self, role: _Optional[_Union[_worker_pb2.WorkerRole, str]] = ..., size: _Optional[int] = ..., min: _Optional[int] = ..., max: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[MemberState, _Mapping]]] = ...) -> None: ...

class MemberState(_message.Message):
    __slots__ = ("id", "present", "drained")
    ID_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    id: str
    present: bool
    drained: bool
    def __init__(self, id: _Optional[str] = ..., present: _Optional[bool] = ..., drained: _Optional[bool] = ...) -> None: ...

class GetPoolsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPoolsResponse(_message.Message):
    __slots__ = ("pools", "under_way")
    POOLS_FIELD_NUMBER: _ClassVar[int]
    UNDER_WAY_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[PoolState]
    under_way: str
    def __init__(self, pools: _Optional[_Iterable[_Union[PoolState, _Mapping]]] = ..., under_way: _Optional[str] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker", "drain_s")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    worker: str
    drain_s: float
    def __init__(self, worker: _Optional[str] = ..., drain_s: _Optional[float] = ...) -> None: ...

class Drained(_message.Message):
    __slots__ = ("worker", "finished", "handed_over", "seconds")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    finished: int
    handed_over: int
    seconds: float
    def __init__(self, worker: _Optional[str] = ..., finished: _Optional[int] = ..., handed_over: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ("drained",)
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    drained: Drained
    def __init__(self, drained: _Optional[_Union[Drained, _Mapping]] = ...) -> None: ...

class UndrainWorkerRequest(_message.Message):
    __slots__ = ("worker",)
    WORKER_FIELD_NUMBER: _ClassVar[int]
    worker: str
    def __init__(self, worker: _Optional[str] = ...) -> None: ...

class UndrainWorkerResponse(_message.Message):
    __slots__ = ("was_drained",)
    WAS_DRAINED_FIELD_NUMBER: _ClassVar[int]
    was_drained: bool
    def __init__(self, was_drained: _Optional[bool] = ...) -> None: ...

class RemoveWorkerRequest(_message.Message):
    __slots__ = ("worker", "drain_s")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    worker: str
    drain_s: float
    def __init__(self, worker: _Optional[str] = ..., drain_s: _Optional[float] = ...) -> None: ...

class AddWorkersRequest(_message.Message):
    __slots__ = ("role", "count")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    role: _worker_pb2.WorkerRole
    count: int
    def __init__(self, role: _Optional[_Union[_worker_pb2.WorkerRole, str]] = ..., count: _Optional[int] = ...) -> None: ...

class PoolSize(_message.Message):
    __slots__ = ("role", "size")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    role: _worker_pb2.WorkerRole
    size: int
    def __init__(self, role: _Optional[_Union[_worker_pb2.WorkerRole, str]] = ..., size: _Optional[int] = ...) -> None: ...

class ResizeRequest(_message.Message):
    __slots__ = ("pools", "drain_s")
    POOLS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[PoolSize]
    drain_s: float
    def __init__(self, pools: _Optional[_Iterable[_Union[PoolSize, _Mapping]]] = ..., drain_s: _Optional[float] = ...) -> None: ...

class ResizeResponse(_message.Message):
    __slots__ = ("added", "removed", "pools")
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    added: _containers.RepeatedScalarFieldContainer[str]
    removed: _containers.RepeatedCompositeFieldContainer[Drained]
    pools: _containers.RepeatedCompositeFieldContainer[PoolState]
    def __init__(self, added: _Optional[_Iterable[str]] = ..., removed: _Optional[_Iterable[_Union[Drained, _Mapping]]] = ..., pools: _Optional[_Iterable[_Union[PoolState, _Mapping]]] = ...) -> None: ...

class FlushTiersRequest(_message.Message):
    __slots__ = ("tiers",)
    TIERS_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tiers: _Optional[_Iterable[str]] = ...) -> None: ...

class FlushedWorker(_message.Message):
    __slots__ = ("worker", "tiers", "error")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    worker: str
    tiers: _containers.RepeatedCompositeFieldContainer[_worker_pb2.FlushedTier]
    error: str
    def __init__(self, worker: _Optional[str] = ..., tiers: _Optional[_Iterable[_Union[_worker_pb2.FlushedTier, _Mapping]]] = ..., error: _Optional[str] = ...) -> None: ...

class FlushTiersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[FlushedWorker]
    def __init__(self, workers: _Optional[_Iterable[_Union[FlushedWorker, _Mapping]]] = ...) -> None: ...

class SetLogLevelRequest(_message.Message):
    __slots__ = ("level", "target")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    level: str
    target: str
    def __init__(self, level: _Optional[str] = ..., target: _Optional[str] = ...) -> None: ...

class LevelSet(_message.Message):
    __slots__ = ("target", "before", "error")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    target: str
    before: str
    error: str
    def __init__(self, target: _Optional[str] = ..., before: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class SetLogLevelResponse(_message.Message):
    __slots__ = ("targets",)
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    targets: _containers.RepeatedCompositeFieldContainer[LevelSet]
    def __init__(self, targets: _Optional[_Iterable[_Union[LevelSet, _Mapping]]] = ...) -> None: ...
