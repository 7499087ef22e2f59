"""Connections follow the registry: sessions open, are kept alive, fenced, and opened again."""

from __future__ import annotations

import asyncio

from router_harness import cluster, collect, core, drive, serving, tokens, until
from scripted_worker import Break, ScriptedWorker, Write, answer, job

from pdserve.types import Role, WorkerState

PROMPT = (1, 2, 3, 4, 5)


def test_an_idle_session_says_that_the_router_lives() -> None:
    worker = ScriptedWorker("d0")

    async def story() -> None:
        async with cluster(worker):
            await until(lambda: worker.keep_alives >= 3)

    drive(story)
    assert worker.starts == [], "it is said without any attempt"


def test_a_session_that_broke_is_opened_again() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Write(2), Break()]])
        async with cluster(worker) as made:
            # Nobody else is there: suspect until the next heartbeat, then the same worker goes on.
            deltas = await collect(made, job(prompt=PROMPT))
            assert tokens(deltas) == answer(PROMPT, 8)
            assert deltas[-1].usage.resumes == 1

    drive(story)


def test_a_worker_that_is_not_there_yet_is_found_when_it_comes() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0")
        facts = await worker.start()
        await worker.kill()
        async with core() as made:
            made.registry.set_workers([facts])
            await until(lambda: made.registry.state(facts) is WorkerState.SUSPECT)
            back = ScriptedWorker("d0", port=worker.port)
            async with serving(back):
                back.facts = facts
                await until(lambda: made.registry.state(facts) is WorkerState.READY)
                assert tokens(await collect(made, job(prompt=PROMPT))) == answer(PROMPT, 8)

    drive(story)


def test_another_process_at_the_address_is_not_taken_for_the_worker() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0")
        async with cluster(worker) as made:
            await worker.kill()
            impostor = ScriptedWorker("d0", port=worker.port)
            async with serving(impostor):
                await until(lambda: made.registry.state(worker.facts) is WorkerState.SUSPECT)
                await asyncio.sleep(0.3)
                assert made.registry.state(worker.facts) is WorkerState.SUSPECT
                await made.join(impostor)
                assert tokens(await collect(made, job(prompt=PROMPT))) == answer(PROMPT, 8)

    drive(story)


def test_prefill_workers_are_watched_without_a_session() -> None:
    async def story() -> None:
        worker = ScriptedWorker("p0", Role.PREFILL)
        async with cluster(worker):
            await asyncio.sleep(0.2)
            assert worker.keep_alives == 0

    drive(story)


def test_decode_workers_are_told_of_a_peer_that_is_gone_and_of_no_other() -> None:
    """Gone is what its owner says, or a new incarnation in its place; silence alone is not."""

    async def story() -> None:
        decodes = [ScriptedWorker("d0"), ScriptedWorker("d1")]
        leaves, silent = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("p1", Role.PREFILL)
        async with cluster(*decodes, leaves, silent) as made:
            silent.beating = False
            await until(lambda: made.registry.state(silent.facts) is WorkerState.SUSPECT)
            assert all(decode.peers_gone == [] for decode in decodes)
            made.registry.set_workers([worker.facts for worker in (*decodes, silent)])
            await until(lambda: all(decode.peers_gone for decode in decodes))
            assert all(decode.peers_gone == [leaves.facts.incarnation] for decode in decodes)
            reborn = ScriptedWorker("p1", Role.PREFILL)
            async with serving(reborn):
                await made.join(*decodes, reborn)
                await until(lambda: all(len(decode.peers_gone) == 2 for decode in decodes))
            assert all(d.peers_gone[1] == silent.facts.incarnation for d in decodes)

    drive(story)


def test_closing_leaves_no_task() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0")
        async with cluster(worker):
            await asyncio.sleep(0.1)
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert not [name for name in names if name.startswith(("session-", "watch-"))]

    drive(story)
