"""The router as a process of its own: its start file, its one line, a request, and its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from router_harness import drive, prefill, serving, settings, until
from scripted_worker import MODEL, TOKEN, VOCAB, ScriptedWorker, answer

from pdserve.errors import ConfigError, ProtocolError, Unauthenticated
from pdserve.rpc import convert
from pdserve.rpc.channels import from_rpc_error, make_channel
from pdserve.rpc.identity import Caller, mint
from pdserve.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from router.boot import RouterBoot
from router.boot_file import read_boot, write_boot
from router.registry import Registry
from router.server import serve


@pytest.fixture
def boot(tmp_path: Path) -> RouterBoot:
    model = tmp_path / "model"
    model.mkdir()
    shape = {"vocab_size": VOCAB, "max_position_embeddings": MODEL.max_model_len}
    (model / "config.json").write_text(json.dumps(shape))
    return RouterBoot(
        config=settings(http_port=0, grpc_port=0, skip_handoff_tokens=0),
        model_path=str(model),
        served_name="tiny",
        identity=mint(TOKEN, Caller.ROUTER),
        hash_key=b"h" * 32,
        run_dir=str(tmp_path),
    )


def test_the_start_file_is_private_and_comes_back_whole(boot: RouterBoot, tmp_path: Path) -> None:
    path = tmp_path / "boot.json"
    path.write_text("from a former start, readable by all")
    path.chmod(0o644)
    write_boot(path, boot)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_boot(path) == boot
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "boot.json"}


@pytest.mark.parametrize(
    "change",
    [
        {"hash_key": "zz"},
        {"hash_key": "00"},
        {"identity": {"caller": "king"}},
        {"config": []},
        {"config": {"router": {"policy": "dice"}}},
        {"extra": 1},
    ],
)
def test_a_damaged_start_file_is_one_clear_error(
    boot: RouterBoot, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "boot.json"
    write_boot(path, boot)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError):
        read_boot(path)
    for text in ("", "[]", "{}", "{"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"boot\.json"):
            read_boot(path)
    with pytest.raises(ConfigError):
        read_boot(tmp_path / "absent.json")


def test_the_router_never_imports_torch_ray_or_the_workers_rooms() -> None:
    program = (
        "import sys, router.server, router.__main__\n"
        "bad = {'torch', 'transformers', 'ray', 'kv_transfer', 'prefill_worker', 'decode_worker'}\n"
        "loaded = bad & {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == 0


class RouterProcess:
    """One router; its line on standard output is read before anything else."""

    def __init__(self, boot: RouterBoot, folder: Path) -> None:
        path = folder / "boot.json"
        write_boot(path, boot)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "router", str(path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    async def addresses(self) -> dict[str, str]:
        assert self.process.stdout is not None
        line = await asyncio.to_thread(self.process.stdout.readline)
        return json.loads(line)

    async def exit_status(self) -> int:
        return await asyncio.to_thread(self.process.wait, 20)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


async def set_workers(address: str, token: str, *workers: ScriptedWorker) -> None:
    request = worker_pb2.SetWorkersRequest(
        workers=[convert.worker_facts_to_proto(worker.facts) for worker in workers]
    )
    async with make_channel(address, mint(token, Caller.SUPERVISOR)) as channel:
        await worker_pb2_grpc.MembershipStub(channel).SetWorkers(request)


def status_of(address: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{address}/ready", timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


async def ready(address: str) -> None:
    while await asyncio.to_thread(status_of, address) != 200:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def generate(address: str, prompt: list[int], count: int) -> tuple[list[int], Any]:
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=inference_pb2.SamplingParams(max_tokens=count, temperature=0),
    )
    got: list[int] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        async for response in stub.Generate(request):
            assert response.offset == len(got)
            got += response.token_ids
    return got, response.usage


def test_a_whole_life(boot: RouterBoot, tmp_path: Path) -> None:
    async def story(router: RouterProcess) -> None:
        addresses = await router.addresses()
        assert set(addresses) == {"http", "grpc", "internal"}
        assert await asyncio.to_thread(status_of, addresses["http"]) == 503
        worker, reader = ScriptedWorker("d0"), prefill()
        async with serving(worker, reader):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await set_workers(addresses["internal"], "guess", worker, reader)
            assert isinstance(from_rpc_error(caught.value), Unauthenticated)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await set_workers(addresses["internal"], TOKEN, worker, reader, worker)
            assert isinstance(from_rpc_error(caught.value), ProtocolError)
            await set_workers(addresses["internal"], TOKEN, worker, reader)
            await ready(addresses["http"])
            assert worker.starts[0].prefill.worker_id == "p0", "proven with a hand-off"

            got, usage = await generate(addresses["grpc"], [5, 6, 7], 9)
            assert got == answer([5, 6, 7], 9)
            assert (usage.prefill_worker, usage.decode_worker) == ("p0", "d0")

            # A request that runs when the signal comes is answered to its end.
            worker.token_delay_s = 0.1
            before = len(worker.starts)
            running = asyncio.create_task(generate(addresses["grpc"], [5, 6, 7], 9))
            await until(lambda: len(worker.starts) > before)
            router.process.send_signal(signal.SIGTERM)
            assert (await running)[0] == answer([5, 6, 7], 9)
            assert await router.exit_status() == 0

    router = RouterProcess(boot, tmp_path)
    try:
        drive(lambda: story(router))
    finally:
        router.end()


def test_a_second_signal_cuts_the_drain_short(boot: RouterBoot, tmp_path: Path) -> None:
    async def story(router: RouterProcess) -> None:
        addresses = await router.addresses()
        worker = ScriptedWorker("d0")
        async with serving(worker):
            await set_workers(addresses["internal"], TOKEN, worker)
            await ready(addresses["http"])
            worker.token_delay_s = 60
            before = len(worker.starts)
            running = asyncio.create_task(generate(addresses["grpc"], [5, 6, 7], 9))
            await until(lambda: len(worker.starts) > before)
            router.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.5)
            assert router.process.poll() is None, "it drains"
            router.process.send_signal(signal.SIGINT)
            async with asyncio.timeout(10):
                assert await router.exit_status() == 0
            with pytest.raises(grpc.aio.AioRpcError, match="the router is stopping"):
                await running

    router = RouterProcess(boot, tmp_path)
    try:
        drive(lambda: story(router))
    finally:
        router.end()


def test_a_part_that_breaks_ends_the_router(boot: RouterBoot, monkeypatch) -> None:
    def break_down(_self: Registry) -> None:
        raise RuntimeError("no clock")

    monkeypatch.setattr(Registry, "tick", break_down)
    with pytest.raises(RuntimeError, match="no clock"):
        drive(lambda: serve(boot, lambda _addresses: None))


def test_an_address_in_use_is_one_line_and_status_2(boot: RouterBoot, tmp_path: Path) -> None:
    async def story(first: RouterProcess) -> None:
        taken = (await first.addresses())["internal"]
        second = RouterProcess(replace(boot, internal_address=taken), tmp_path)
        try:
            assert await second.exit_status() == 2
        finally:
            second.end()

    first = RouterProcess(boot, tmp_path)
    try:
        drive(lambda: story(first))
    finally:
        first.end()
