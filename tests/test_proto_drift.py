"""The stubs in pdserve/v1 are what the .proto files say: ``make proto`` was not forgotten."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from tests.source_tree import GENERATED, ROOT

PROTOS = sorted((ROOT / "proto" / "pdserve" / "v1").glob("*.proto"))
# The generators' versions, as they write them into the stubs.
VERSIONS = re.compile(r"^# Protobuf Python Version: .*$|^GRPC_GENERATED_VERSION = .*$", re.M)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stubs generated now, and descriptors.bin."""
    folder = tmp_path_factory.mktemp("stubs")
    outputs = [f"--{kind}={folder}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iproto", *outputs]
    command += [f"--descriptor_set_out={folder}/descriptors.bin"]
    command += [path.relative_to(ROOT).as_posix() for path in PROTOS]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def test_every_proto_has_its_stubs_and_no_stub_is_left_over(fresh: Path) -> None:
    made = {path.name for path in (fresh / "pdserve" / "v1").iterdir()}
    kept = {path.name for path in GENERATED.glob("*_pb2*.py*") if path.is_file()}
    assert len(PROTOS) == 4
    assert made == kept


def test_messages_and_services_are_those_of_the_proto_files(fresh: Path) -> None:
    """Compares meaning, so that it also holds with other versions of the generators."""
    wanted = descriptor_pb2.FileDescriptorSet.FromString((fresh / "descriptors.bin").read_bytes())
    assert len(wanted.file) == len(PROTOS)
    for file in wanted.file:
        stub = importlib.import_module(file.name.removesuffix(".proto").replace("/", ".") + "_pb2")
        kept = descriptor_pb2.FileDescriptorProto()
        stub.DESCRIPTOR.CopyToProto(kept)
        assert without_json_names(kept) == without_json_names(file), f"run make proto: {file.name}"


def without_json_names(
    file: descriptor_pb2.FileDescriptorProto,
) -> descriptor_pb2.FileDescriptorProto:
    """Derived names, which not every way to a descriptor fills in."""

    def clear(message: descriptor_pb2.DescriptorProto) -> None:
        for field in message.field:
            field.ClearField("json_name")
        for nested in message.nested_type:
            clear(nested)

    for message in file.message_type:
        clear(message)
    return file


def test_stubs_are_byte_for_byte_what_the_same_generators_write(fresh: Path) -> None:
    for made in sorted((fresh / "pdserve" / "v1").iterdir()):
        now, then = made.read_text(), (GENERATED / made.name).read_text()
        if VERSIONS.findall(now) != VERSIONS.findall(then):
            pytest.skip("the stubs were made by other versions of the generators")
        assert now == then, f"run make proto: {made.name} differs"


def test_one_command_regenerates_them() -> None:
    done = subprocess.run(
        ["make", "-n", "proto"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "grpc_tools.protoc" in done.stdout
