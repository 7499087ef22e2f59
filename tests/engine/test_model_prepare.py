"""From a model's name to a folder: the embedded model is converted once and answers; bad names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from pdserve.config import DEFAULT_MODEL, ModelConfig
from pdserve.engine import embedded
from pdserve.engine.convert import convert_gguf
from pdserve.engine.dtypes import resolve_dtype
from pdserve.engine.model import load_model
from pdserve.engine.progress import Progress
from pdserve.engine.quantized import Quantization
from pdserve.engine.resolve import PreparedModel, prepare_model
from pdserve.errors import ConfigError
from pdserve.types import Numerics
from tests.engine.model_world import CPU, drive, family_folder, kernel, running

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
COUNT = 12

# Two of these at once must convert once and find the same folder.
PREPARE = """
import sys
from pathlib import Path
from pdserve.config import ModelConfig
from pdserve.engine.resolve import prepare_model
print(prepare_model(ModelConfig(), Path(sys.argv[1]), lambda p: print(p.text)).path)
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, converted by two processes that start together."""
    cache = tmp_path_factory.mktemp("models")
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(cache)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    told = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert [error for _, error in told] == ["", ""], "no bar and no advice of a library"
    said = [output.splitlines() for output, _ in told]
    assert said[0][-1] == said[1][-1]
    steps = [line for lines in said for line in lines[:-1]]
    assert sorted(steps) == [
        "reading the tokenizer",
        "reading the weights",
        "waiting for another process that converts this model",
        "writing safetensors",
    ]
    left = {file.name for file in cache.iterdir()}
    folder = Path(said[0][-1])
    assert left == {folder.name, folder.name + ".lock"}
    return folder


def test_all_its_own_blocks_are_taken_by_int4_weights(smollm2: Path) -> None:
    model = load_model(
        smollm2,
        dtype="bfloat16",
        numerics=Numerics.FAST,
        device=CPU,
        quantization=Quantization.INT4,
        max_model_len=64,
        library=kernel(),
    )
    blocks = 30 * 7 + 1
    told = f"int4 in {blocks} linear layers, {blocks} of {blocks} from the file's own blocks"
    assert told in model.weights_note


def test_the_folder_has_all_that_a_server_needs(smollm2: Path) -> None:
    names = {file.name for file in smollm2.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["dtype"], config["max_position_embeddings"]) == ("bfloat16", 8192)
    assert "quantization_config" not in config
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    assert tokenizer.model_max_length == 8192


def test_a_second_start_finds_the_folder_at_once(smollm2: Path) -> None:
    steps: list[Progress] = []
    found = prepare_model(ModelConfig(), smollm2.parent, steps.append)
    assert found == PreparedModel(smollm2, DEFAULT_MODEL)
    assert steps == []


@pytest.mark.parametrize("numerics", list(Numerics))
def test_it_knows_the_capital_of_france(smollm2: Path, numerics: Numerics) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    dtype = resolve_dtype(ModelConfig(numerics=numerics.value))
    loaded = load_model(smollm2, dtype=dtype, numerics=numerics, device=CPU)
    with running(loaded, 16, 8, kernel()) as runner:
        (track,) = drive(runner, [prompt], COUNT, 16, (20,))
    answer = tokenizer.decode(track.generated)
    print(answer)
    assert "Paris" in answer
    if numerics is Numerics.EXACT:
        oracle = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        out = oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=COUNT,
            min_new_tokens=COUNT,
            do_sample=False,
        )
        end = track.generated.index(2) if 2 in track.generated else COUNT
        assert track.generated[:end] == out[0, len(prompt) :].tolist()[:end]


# Not even the file's own size fits; or the converted weights alone do not.
@pytest.mark.parametrize("size", ["50m", "150m"])
def test_a_full_disk_is_one_clear_line(size: str, tmp_path: Path) -> None:
    """A small disk: a memory file system in a mount namespace of the child's own."""
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this machine allows no mount namespace")
    child = 'mount -t tmpfs -o size="$1" none "$2" && exec "$3" -c "$4" "$2"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", child, "sh", size, str(tmp_path), sys.executable, PREPARE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "pdserve.errors.ConfigError: the disk is full: the converted model does not fit into "
        f"{tmp_path}"
    )


def test_no_permission_is_one_clear_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    model = embedded.find_embedded(DEFAULT_MODEL)
    assert model is not None
    with pytest.raises(ConfigError, match="cannot be written into"):
        convert_gguf(model.gguf, blocked / "models" / "x", lambda _: None)
    if os.getuid() == 0:
        cache = Path("/proc/pdserve-models")  # not even root may write there
    else:
        cache = tmp_path / "locked"
        cache.mkdir(mode=0o500)
    with pytest.raises(ConfigError, match=r"no permission|cannot be written"):
        convert_gguf(model.gguf, cache / "x", lambda _: None)


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    cache = tmp_path / "cache"
    with pytest.raises(ConfigError, match=r"broken\.gguf cannot be read"):
        convert_gguf(tmp_path / "broken.gguf", cache / "model", lambda _: None)
    assert [file.name for file in cache.iterdir()] == ["model.lock"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/no/such/folder", "there is no model folder /no/such/folder"),
        ("./nowhere", "there is no model folder ./nowhere"),
        ("a/b/c", "there is no model folder a/b/c"),
        ("what is this?", "neither a folder nor a hub id"),
        ("", "neither a folder nor a hub id"),
    ],
)
def test_bad_names(path: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")) as caught:
        prepare_model(ModelConfig(path=path), tmp_path, lambda _: None)
    assert caught.value.param == "model.path"


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from pdserve.config import ModelConfig\n"
        "from pdserve.engine.resolve import prepare_model\n"
        "prepare_model(ModelConfig(path='nobody/nothing'), Path('.'), print)\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stderr.strip().splitlines()[-1] == (
        "pdserve.errors.ConfigError: nobody/nothing is no folder here, and the model hub cannot "
        "be reached"
    )


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = family_folder("llama")
    found = prepare_model(ModelConfig(path=str(folder)), tmp_path, lambda _: None)
    assert found == PreparedModel(folder.resolve(), folder.name)
    named = ModelConfig(path=str(folder) + "/", served_name="mine")
    assert prepare_model(named, tmp_path, lambda _: None).served_name == "mine"
    with pytest.raises(ConfigError, match=r"no config\.json"):
        prepare_model(ModelConfig(path=str(tmp_path)), tmp_path, lambda _: None)


def test_finding_a_ready_model_needs_no_torch(smollm2: Path) -> None:
    code = PREPARE + "\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code, str(smollm2.parent)], check=False)
    assert done.returncode == 0


def test_dtypes() -> None:
    assert resolve_dtype(ModelConfig()) == "bfloat16"
    assert resolve_dtype(ModelConfig(numerics="exact")) == "float32"
    assert resolve_dtype(ModelConfig(numerics="exact", dtype="float64")) == "float64"
    assert resolve_dtype(ModelConfig(dtype="float32")) == "float32"
    with pytest.raises(ConfigError, match="exact needs"):
        resolve_dtype(ModelConfig(numerics="exact", dtype="bfloat16"))
