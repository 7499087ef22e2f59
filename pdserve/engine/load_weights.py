"""From a model folder's files to a model with its weights, in one pass over each file.

    headers checked -> threads begin to read the files in order (file_order.py)
      -> meanwhile the model is built over empty tensors, which the files will fill
      -> tensors land (landing.py), hashed on the way
      -> each complete tensor is put where the model wants it; a linear layer is packed at once
      -> everything filled -> ReadModel

The empty tensors take no memory until they are written. A model whose tensors the library itself
converts (experts that are merged, ...) is read first and built then, which takes the memory of its
weights twice for a while. One that does not hold our tensors for another reason (some are tied by
their values) is found out only once it is built: its files are read again from the start.
transformers' own loader on the same folder is the reference (tests/engine/test_load_weights.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from transformers import conversion_mapping
from transformers.core_model_loading import WeightConverter

from pdserve.engine.file_order import FileOrderReader, plan_windows, windows_ahead
from pdserve.engine.landing import HostLanding, Landing, StagedLanding, final_dtype
from pdserve.engine.linear import LinearPacker
from pdserve.engine.quiet import LOADING_ERRORS, first_line, quiet_transformers
from pdserve.engine.safetensors_file import Shard, StoredTensor
from pdserve.engine.weights import read_shards
from pdserve.errors import BadWeights, ModelRefused


@dataclass(frozen=True, slots=True)
class ReadModel:
    model: Any
    revision: str  # 32 hexadecimal digits over the files' names, sizes and content


def read_model(
    path: Path, config: Any, dtype: torch.dtype, device: torch.device, packer: LinearPacker | None
) -> ReadModel:
    """``packer``: for models on the CPU; None packs nothing. ModelRefused (mostly BadWeights)."""
    try:
        shards = read_shards(path)
        read = None
        if not _is_converted(path, config, shards):
            read = _read_while_building(path, config, dtype, device, shards, packer)
        # By now nothing of that try is held any more.
        return read or _read_then_build(path, config, dtype, device, shards, packer)
    except OSError as error:
        raise BadWeights(f"{path} cannot be read: {first_line(error)}") from error


def _is_converted(path: Path, config: Any, shards: Sequence[Shard]) -> bool:
    """Whether the library makes other tensors of some of these. A hint: ``_places`` decides."""
    kind, own = _class_of(path, config)
    names = [tensor.name for shard in shards for tensor in shard.tensors]
    rules_of: Any = conversion_mapping.get_checkpoint_conversion_mapping
    rules = rules_of(kind.__name__) or rules_of(own.model_type) or ()
    return any(
        isinstance(rule, WeightConverter) and any(map(rule.compiled_sources.search, names))
        for rule in rules
    )


@dataclass(frozen=True, slots=True)
class EmptyModel:
    """A model over tensors that nobody has written: they take no memory."""

    model: Any
    tensors: Mapping[str, torch.Tensor]  # that it was built over

    def unfilled(self) -> list[str]:
        """What the model still holds of them."""
        unwritten = {tensor.data_ptr() for tensor in self.tensors.values()}
        held = self.model.state_dict().items()
        return [name for name, tensor in held if tensor.data_ptr() in unwritten]


def empty_model(path: Path, config: Any, dtype: torch.dtype) -> EmptyModel | None:
    """For weights that come from elsewhere; of the files the headers alone are read.

    None: the model does not simply hold the files' tensors. OSError, ModelRefused.
    """
    shards = read_shards(path)
    if _is_converted(path, config, shards):
        return None
    tensors = _empty([tensor for shard in shards for tensor in shard.tensors], dtype)
    model = _build(path, config, dtype, tensors)
    return None if _places(model, tensors) is None else EmptyModel(model, tensors)


def _read_while_building(
    path: Path,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    shards: Sequence[Shard],
    packer: LinearPacker | None,
) -> ReadModel | None:
    """None: the model does not simply hold the files' tensors."""
    finals = _empty([tensor for shard in shards for tensor in shard.tensors], dtype)
    with _reading(shards, finals, device, packer is not None) as (reader, landing):
        model = _build(path, config, dtype, finals)
        places = _places(model, finals)
        finals.clear()
        if places is None:
            return None
        filling = _Filling(model, places, packer)
        revision = _read(shards, reader, landing, filling.put)
        return ReadModel(model.to(device), revision)


@contextmanager
def _reading(
    shards: Sequence[Shard], finals: Mapping[str, torch.Tensor], device: torch.device, packs: bool
) -> Iterator[tuple[FileOrderReader, Landing]]:
    """The files' reader, at work, and where it reads to."""
    stored = [tensor for shard in shards for tensor in shard.tensors]
    tensors = [finals[one.name] for one in stored]
    windows, ahead = plan_windows(shards), windows_ahead(shards)
    landing: Landing
    if device.type == "cpu":
        landing = HostLanding(stored, tensors)
        if not packs and landing.direct:
            ahead = len(windows)  # what is read early lies where it will stay
    else:
        landing = StagedLanding(stored, [tensor.dtype for tensor in tensors], device, ahead)
    del tensors  # the landing lets each go as soon as it is complete
    with FileOrderReader(shards, windows, landing.room, ahead) as reader:
        yield reader, landing


class _Revision:
    """The digest of whole files, fed in file order."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._digest = xxhash.xxh3_128()
        self._shards = shards
        self._entered = 0

    def enter(self, count: int) -> None:
        """The first ``count`` shards have begun."""
        for shard in self._shards[self._entered : count]:
            self._digest.update(f"{shard.path.name}\0{shard.size}\0".encode())
            self._digest.update(shard.head)
        self._entered = max(self._entered, count)

    def update(self, shard: int, views: Sequence[memoryview]) -> None:
        self.enter(shard + 1)
        for view in views:
            self._digest.update(view)

    def hexdigest(self) -> str:
        self.enter(len(self._shards))
        return self._digest.hexdigest()


def _read(
    shards: Sequence[Shard],
    reader: FileOrderReader,
    landing: Landing,
    put: Callable[[int, torch.Tensor], None],
) -> str:
    """Everything is landed and given to ``put(number, tensor)``; the revision."""
    revision = _Revision(shards)
    for window, views in reader:
        revision.update(window.shard, views)
        for number, tensor in landing.land(window):
            put(number, tensor)
    landing.finish()
    return revision.hexdigest()


def _empty(stored: Sequence[StoredTensor], floating: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Unwritten tensors in file order: address space, no memory yet."""
    return {
        one.name: torch.empty(one.shape, dtype=final_dtype(one.dtype, floating)) for one in stored
    }


def _build(path: Path, config: Any, dtype: torch.dtype, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The model over these tensors. BadWeights when they are not exactly those that it needs."""
    kind, own = _class_of(path, config)
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                None,
                config=own,
                state_dict=dict(tensors),
                dtype=dtype,
                attn_implementation="eager",
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are refused below, by their names
                output_loading_info=True,
            )
    except LOADING_ERRORS as error:
        raise BadWeights(f"{path} cannot be loaded: {first_line(error)}") from error
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise BadWeights(
            f"{path}: {len(absent)} weights are missing or of another shape ({absent[0]}, ...)"
        )
    extra = sorted(info["unexpected_keys"])
    if extra:
        raise BadWeights(
            f"{path}: {len(extra)} tensors belong to no part of {type(model).__name__} "
            f"({extra[0]}, ...)"
        )
    return model.eval().requires_grad_(False)


def _class_of(path: Path, config: Any) -> tuple[Any, Any]:
    """The library's own class for a configuration, and the part of the configuration it takes."""
    mapping: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kinds: Any = mapping.get(type(config), None)
    if kinds is None:
        raise ModelRefused(f"{path}: {config.model_type} is no causal language model")
    if isinstance(kinds, list | tuple):
        named = {kind.__name__: kind for kind in kinds}
        wanted = [named[name] for name in config.architectures or () if name in named]
        kind = (wanted or list(kinds))[0]
    else:
        kind = kinds
    text = config.sub_configs.get("text_config")
    return kind, config.get_text_config() if text is kind.config_class and text else config


@dataclass(frozen=True, slots=True)
class _Place:
    owner: torch.nn.Module
    name: str  # of the parameter or buffer


def _places(model: Any, finals: Mapping[str, torch.Tensor]) -> list[list[_Place]] | None:
    """Where the model holds each of the tensors (in several places when they are tied).

    None when the model does not simply hold them: it has weights that are none of them, or a tensor
    that ought to be somewhere is nowhere.
    """
    at: dict[int, list[_Place]] = defaultdict(list)
    saved = {tensor.data_ptr() for tensor in model.state_dict().values()}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None and tensor.data_ptr() in saved:
                    at[tensor.data_ptr()].append(_Place(module, name))
    places = [at.get(final.data_ptr(), []) for final in finals.values()]
    known = set(model.state_dict())
    lost = any(not place and name in known for place, name in zip(places, finals, strict=True))
    ours = {final.data_ptr() for final in finals.values()}
    if lost or not saved <= ours or len(ours) < len(finals):
        return None
    return places


class _Filling:
    """Puts complete tensors into the model; owns the way from a tensor's number to its places."""

    def __init__(
        self, model: Any, places: Sequence[Sequence[_Place]], packer: LinearPacker | None
    ) -> None:
        self._places = list(places)
        self._packer = packer
        self._parents = {
            child: (parent, name)
            for parent in model.modules()
            for name, child in parent.named_children()
        }

    def put(self, number: int, tensor: torch.Tensor) -> None:
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        for place in self._places[number]:
            if place.name in place.owner._buffers:
                place.owner._buffers[place.name] = tensor
            else:
                # One parameter for all places keeps them tied.
                place.owner._parameters[place.name] = parameter
            if self._packer is not None and place.name == "weight":
                parent, name = self._parents.pop(place.owner, (None, ""))
                if parent is not None:
                    self._packer.replace(parent, name)
        self._places[number] = ()  # a packed layer's plain weights are let go


def _read_then_build(
    path: Path,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    shards: Sequence[Shard],
    packer: LinearPacker | None,
) -> ReadModel:
    stored = [tensor for shard in shards for tensor in shard.tensors]
    tensors: dict[str, torch.Tensor] = {}

    def put(number: int, tensor: torch.Tensor) -> None:
        tensors[stored[number].name] = tensor

    with _reading(shards, _empty(stored, None), torch.device("cpu"), False) as (reader, landing):
        revision = _read(shards, reader, landing, put)
    tensors |= {one.name: torch.empty(one.shape) for one in stored if one.nbytes == 0}
    model = _build(path, config, dtype, tensors).to(device)
    if packer is not None:
        packer.replace_all(model)
    return ReadModel(model, revision)
