"""One copy of packed weights for all workers of a host: the same model, whatever becomes of it.

The reference is always the model as it is loaded without such a file.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pdserve.engine import kept_weights, model, shared_weights
from pdserve.engine.compiler import sole_builder
from pdserve.engine.kept_weights import KeptUnusable, open_kept, write_kept
from pdserve.engine.model import LoadedModel, load_model
from pdserve.engine.quantized import Quantization
from pdserve.engine.quantized_linear import QuantizedLinear
from pdserve.engine.tiles import TiledLinear, tiles_work
from pdserve.types import Numerics
from tests.engine.model_world import CPU, kernel
from tests.engine.test_fused import folder_of, run_steps
from tests.engine.test_load_weights import COMMON, CONFIGS, checkpoint

pytestmark = pytest.mark.skipif(
    not tiles_work(kernel()), reason="layers are not packed for our kernels on this processor"
)
TIED = "llama, 6 heads of 64 under 2, tied"
BIASES = "qwen2, biases"


@pytest.fixture(autouse=True)
def _worth_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_weights, "LEAST_BYTES", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of the test's own, to be changed."""
    return Path(shutil.copytree(folder_of(TIED), tmp_path / "model"))


def load(
    folder: Path, shared: Path | None, quantization: Quantization = Quantization.NONE
) -> LoadedModel:
    return load_model(
        folder,
        dtype="bfloat16",
        numerics=Numerics.FAST,
        device=CPU,
        quantization=quantization,
        library=kernel(),
        shared=shared,
    )


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a model was read from its own files."""
    times: list[int] = []
    read_model = model.read_model

    def read(*args: Any) -> Any:
        times.append(1)
        return read_model(*args)

    monkeypatch.setattr(model, "read_model", read)
    return times


def is_mapped(loaded: LoadedModel, file: Path) -> bool:
    """Whether each weight lies in a mapping of that file."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            begin, _, end = line.split()[0].partition("-")
            ranges.append((int(begin, 16), int(end, 16)))
    own = [tensor for _, tensor in loaded.model.named_parameters()]
    own += [
        m.packed for m in loaded.model.modules() if isinstance(m, TiledLinear | QuantizedLinear)
    ]
    return all(any(a <= tensor.data_ptr() < b for a, b in ranges) for tensor in own)


def same(found: LoadedModel, expected: LoadedModel) -> None:
    assert found.identity == expected.identity
    assert found.weights_bytes == expected.weights_bytes
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    mine, theirs = run_steps(found, seed), run_steps(expected, seed)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def kept_in(shared: Path) -> list[Path]:
    return sorted(shared.glob("*.safetensors"))


@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize("name", [TIED, BIASES])
def test_the_first_makes_it_and_the_next_map_it(
    name: str, quantization: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(folder_of(name), None, quantization)
    times = counting(monkeypatch)
    first = load(folder_of(name), tmp_path / "w", quantization)
    second = load(folder_of(name), tmp_path / "w", quantization)
    assert len(times) == 1
    (file,) = kept_in(tmp_path / "w")
    for loaded in (first, second):
        same(loaded, expected)
        assert is_mapped(loaded, file), "it has a copy of its own"
        assert loaded.weights_mapped
        assert str(file) in loaded.weights_note
    assert not is_mapped(expected, file)
    assert not expected.weights_mapped
    tied = name == TIED and quantization is Quantization.NONE
    embeddings = second.model.get_input_embeddings().weight
    assert not tied or embeddings.shape[0] == second.vocab_size


def test_whatever_is_damaged_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared = tmp_path / "w"
    expected = load(folder_of(TIED), None)
    load(folder_of(TIED), shared)
    times = counting(monkeypatch)
    (file,) = kept_in(shared)
    whole = file.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    damaged: list[bytes] = [b"", whole[:5], whole[: head + 99], whole + b"x"]
    for at in (draw.randrange(head, len(whole)), len(whole) - 1, head):
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
    for number, content in enumerate(damaged):
        # As a new file: those who have mapped the old one keep it.
        (tmp_path / "next").write_bytes(content)
        os.replace(tmp_path / "next", file)
        with caplog.at_level(logging.WARNING):
            same(load(folder_of(TIED), shared), expected)
        assert len(times) == 1 + number, "damaged weights were believed"
        assert "because" in caplog.text
        caplog.clear()
        assert file.read_bytes() == whole
    assert len(times) == len(damaged)


def test_no_header_that_was_tampered_with_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "w"
    load(folder_of(TIED), shared)
    (file,) = kept_in(shared)
    whole = file.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:head])
    kept = json.loads(header["__metadata__"]["kept"])
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    changed = []
    for _ in range(100):
        at = draw.randrange(8, len(whole[:head].rstrip()))
        changed.append(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
    for metadata in (
        None,
        [],
        {"kept": 5},
        {"kept": "[" * 10**5},
        {**header["__metadata__"], "kept": json.dumps({**kept, "notes": {"packed_bytes": 1e999}})},
    ):
        text = json.dumps({**header, "__metadata__": metadata}).encode()
        text += b" " * (-(8 + len(text)) % 64)
        changed.append(len(text).to_bytes(8, "little") + text + whole[head:])
    for content in changed:
        (tmp_path / "next").write_bytes(content)
        os.replace(tmp_path / "next", file)
        with pytest.raises(KeptUnusable):
            open_kept(file)
    times = counting(monkeypatch)
    same(load(folder_of(TIED), shared), load(folder_of(TIED), None))
    assert len(times) == 2
    assert file.read_bytes() == whole


def test_a_file_of_another_model_is_not_taken_for_this_one_s(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a script that restores a cache under wrong names does."""
    shared = tmp_path / "w"
    load(folder, shared)
    (right,) = kept_in(shared)
    load(change(folder), tmp_path / "other")
    (wrong,) = kept_in(tmp_path / "other")
    for file in (right, tmp_path / "w" / wrong.name):
        file.unlink(missing_ok=True)
    shutil.copy(tmp_path / "other" / wrong.name, right)
    with pytest.raises(KeptUnusable, match="made for another"):
        open_kept(right)
    shutil.copy(right, shared / wrong.name)
    open_kept(shared / wrong.name)


def change(folder: Path) -> Path:
    """The weights of one layer, in place; the file's size and times stay, as far as one can."""
    file = folder / "model.safetensors"
    before, tensors = file.stat(), load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file({**tensors, name: tensors[name] + 1}, folder / "changed", metadata={"format": "pt"})
    file.write_bytes((folder / "changed").read_bytes())
    (folder / "changed").unlink()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_ino) == (before.st_size, before.st_ino)
    return folder


def test_a_changed_model_is_another_file_and_the_old_one_goes(folder: Path, tmp_path: Path) -> None:
    shared = tmp_path / "w"
    load(folder, shared)
    (before,) = kept_in(shared)
    change(folder)
    same(load(folder, shared), load(folder, None))
    (after,) = kept_in(shared)
    assert after != before


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    shared = tmp_path / "w"
    shared.mkdir()
    (shared / "model.safetensors").write_bytes(b"somebody's")
    (shared / "download.part").write_bytes(b"somebody's")
    (shared / "a folder.safetensors").mkdir()
    os.utime(shared / "download.part", (0, 0))
    left = shared / "kept-abc.part"
    left.write_bytes(b"of a writer that was killed")
    os.utime(left, (0, 0))
    (shared / "kept-new.part").write_bytes(b"of one that writes")
    load(folder_of(TIED), shared)
    assert not left.exists()
    others = {file.name for file in shared.iterdir()}
    assert others > {"model.safetensors", "download.part", "a folder.safetensors", "kept-new.part"}


def test_who_loses_patience_makes_its_own_and_takes_what_came_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_weights, "PATIENCE_S", 0.2)
    shared = tmp_path / "w"
    times = counting(monkeypatch)
    shared.mkdir()
    recipe = shared_weights.Recipe(folder_of(TIED), None, Quantization.NONE, kernel())
    with sole_builder(shared, name=recipe.family.rstrip("-")):  # by somebody who stands still
        first = load(folder_of(TIED), shared)
    assert len(times) == 1
    (file,) = kept_in(shared)
    assert is_mapped(first, file)


WORKER = """
import json, sys
from pathlib import Path
import torch
from pdserve.engine import model
from pdserve.engine.native import load_native
from pdserve.types import Numerics
def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
read, times = model.read_model, []
def counted(*args):
    times.append(1)
    return read(*args)
model.read_model = counted
library = load_native(Path(sys.argv[2])).kernels
before = own()
loaded = model.load_model(Path(sys.argv[1]), dtype="bfloat16", numerics=Numerics.FAST,
    device=torch.device("cpu"), library=library, shared=Path(sys.argv[3]) if sys.argv[3:] else None)
print(json.dumps({"own": (own() - before) / loaded.weights_bytes, "made": len(times)}))
"""


def test_of_two_that_start_at_once_one_makes_it_and_neither_holds_a_copy(tmp_path: Path) -> None:
    """Processes, as workers are: what each takes of memory that nobody shares."""
    sizes = {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 4096}
    config = transformers.LlamaConfig(**COMMON | sizes | {"num_hidden_layers": 4})
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    empty.to(torch.bfloat16).to_empty(device=CPU).save_pretrained(tmp_path / "model")

    def start(*shared: Path) -> subprocess.Popen[str]:
        kernels = Path(kernel()._name).parent
        words = [sys.executable, "-c", WORKER, tmp_path / "model", kernels, *shared]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    def end(process: subprocess.Popen[str]) -> dict[str, float]:
        out, _ = process.communicate(timeout=120)
        print(out)
        return dict(json.loads(out))

    alone = end(start())
    both = [end(process) for process in (start(tmp_path / "w"), start(tmp_path / "w"))]
    assert alone["own"] > 0.9
    assert sum(one["made"] for one in both) == 1
    assert all(one["own"] < 0.3 for one in both)


@pytest.mark.parametrize("why", ["no folder", "no room", "others write it", "small"])
def test_who_cannot_share_has_a_copy_of_its_own(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "w"
    if why == "no folder":
        shared.write_text("a file")
    elif why == "no room":
        monkeypatch.setattr(kept_weights, "_SPARE_DISK", 2**60)
    elif why == "small":
        monkeypatch.setattr(shared_weights, "LEAST_BYTES", 2**30)
    else:
        load(folder_of(TIED), shared)
        (file,) = kept_in(shared)
        file.chmod(0o666)
    times = counting(monkeypatch)
    loaded = load(folder_of(TIED), shared)
    assert len(times) == 1
    same(loaded, load(folder_of(TIED), None))
    if why == "others write it":
        assert is_mapped(loaded, file), "the file was not made anew"
        assert file.stat().st_mode & 0o777 == 0o600
    else:
        assert "of this worker's own" in loaded.weights_note
        assert not loaded.weights_mapped
        assert not shared.is_dir() or not kept_in(shared)


def test_a_model_that_the_library_converts_is_not_shared(tmp_path: Path) -> None:
    """Experts are merged: such a model does not simply hold its files' tensors."""
    loaded = load(checkpoint(tmp_path / "model", CONFIGS["experts"], 7), tmp_path / "w")
    assert "does not simply hold" in loaded.weights_note
    assert kept_in(tmp_path / "w") == []


def test_tensors_of_all_kinds_come_back_as_they_were(tmp_path: Path) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    draw = random.Random(seed)
    tensors = {
        f"t{number}": torch.randint(0, 2, shape).to(dtype)
        for number, dtype in enumerate(
            (torch.bfloat16, torch.float32, torch.float64, torch.float16, torch.int64, torch.int8,
             torch.uint8, torch.bool, torch.int32, torch.int16)
        )
        for shape in [tuple(draw.randrange(1, 70) for _ in range(draw.randrange(4)))]
    }  # fmt: skip
    write_kept(tmp_path / "k", tensors, {"of": "tests"})
    kept = open_kept(tmp_path / "k")
    assert kept.notes == {"of": "tests"}
    assert kept.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert kept.tensors[name].dtype is tensor.dtype
        assert torch.equal(kept.tensors[name], tensor), name
    with pytest.raises(KeptUnusable, match="FileNotFound"):
        open_kept(tmp_path / "none")
