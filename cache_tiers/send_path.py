"""Gives Redis what it is to hold, from copies that are set aside for it.

    set_aside (the writer's thread) -> post -> sender thread: what Redis lacks, piece by piece
    forget, clear                   -> post -> after all that was posted before

Rows of copies are given back as their pieces are sent. When pieces go is in cache_tiers/pace.py.
A key that could not be deleted is deleted again when Redis answers; until then it stays fenced.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from cache_tiers.aside import Aside
from cache_tiers.fence import ForgetFence
from cache_tiers.pace import Pace
from cache_tiers.redis_tier import RedisTier
from cache_tiers.spans import Spans
from cache_tiers.workers import Workers
from cache_tiers.write_jobs import Clearing, Deletion, Send, WriteLimits
from pdserve.errors import TierError
from pdserve.types import BlockKey, Tier

IDLE_S = 2.0
_UNDELETED_MAX = 65536


class SendPath:
    """Thread-safe. Owns the copies and the thread that sends them."""

    def __init__(
        self,
        redis: RedisTier,
        fence: ForgetFence,
        aside: Aside,
        limits: WriteLimits,
        computing: Callable[[], bool],
    ) -> None:
        """``computing``: whether an engine does now, on the cores that send to Redis."""
        self._redis = redis
        self._fence = fence
        self._aside = aside
        self._patience_s = limits.patience_s
        self._piece = min(max(1, limits.piece_bytes // aside.span_bytes), redis.batch_blocks)
        self._pace = Pace(limits.pause_s, computing, lambda: aside.scarce)
        self._lock = threading.Lock()
        self._unsent = 0
        self._undeleted: dict[BlockKey, None] = {}  # the sender thread's own, oldest first
        self._jobs: Workers[Send | Deletion | Clearing] = Workers(
            "tier-send", 1, self._handle, idle=self._tend, idle_s=IDLE_S
        )

    def set_aside(self, keys: Sequence[BlockKey], spans: Spans) -> Send | None:
        """One copy of as many leading blocks as there is room for."""
        refused = self._redis.refuses_writes()
        rows = [] if refused else self._aside.take(len(keys))
        self._pace.room_taken()
        self._count_unsent(len(keys) - len(rows))
        try:
            spans.read({i: self._aside.row(row) for i, row in enumerate(rows)})
        except BaseException:
            self._count_unsent(len(rows))
            self._aside.give_back(rows)
            raise
        due = time.monotonic() + self._patience_s
        return Send(tuple(keys[: len(rows)]), tuple(rows), due) if rows else None

    def post(self, job: Send | Deletion | Clearing) -> bool:
        """False after ``stop``: the job was not taken; a ``Send`` is counted as unsent then."""
        pressing = not isinstance(job, Send)
        if pressing:
            self._pace.press()
        taken = self._jobs.post(job)
        if not taken:
            if pressing:
                self._pace.release()
            self._drop(job)
        return taken

    def wait_idle(self, deadline: float) -> bool:
        return self._jobs.wait_idle(deadline)

    def hurry(self) -> None:
        """From now on nothing is sent slowly."""
        self._pace.end()

    @property
    def unsent_blocks(self) -> int:
        with self._lock:
            return self._unsent

    @property
    def waiting_blocks(self) -> int:
        return self._aside.taken

    @property
    def undeleted_keys(self) -> int:
        return len(self._undeleted)

    @property
    def failures(self) -> int:
        return self._jobs.failures

    def stop(self) -> list[Send | Deletion | Clearing]:
        """Takes nothing more; returns what was not begun. Its copies will not be sent."""
        self._pace.end()
        left_over = self._jobs.stop()
        for job in left_over:
            self._drop(job)
        return left_over

    def join(self, deadline: float) -> None:
        self._jobs.join(deadline)
        self._aside.close()

    # ---- the sender's thread ---------------------------------------------------------------------

    def _handle(self, job: Send | Deletion | Clearing) -> None:
        if isinstance(job, Send):
            self._put(job)
            return
        try:
            if isinstance(job, Deletion):
                self._delete(job.keys)
            else:
                self._clear(job)
        finally:
            self._pace.release()

    def _clear(self, job: Clearing) -> None:
        try:
            job.blocks[Tier.REDIS] = self._redis.clear()
        except TierError as error:
            job.fail(error)
        else:
            job.ended.set()

    def _put(self, job: Send) -> None:
        waiting = dict(zip(job.rows, job.keys, strict=True))  # whose rows were not given back
        try:
            held = self._redis.contains(job.keys)
            needless = [
                row
                for (row, key), is_held in zip(waiting.items(), held, strict=True)
                if not self._wants(key, is_held)
            ]
            self._give_back(waiting, needless)
            while waiting:
                slowly = self._pace.wait_slowly(job.due)
                rows = list(waiting)[: self._piece if slowly else self._redis.batch_blocks]
                # Asked again: what was forgotten meanwhile need not wait for its deletion.
                piece = [row for row in rows if self._wants(waiting[row], False)]
                if piece:
                    keys = [waiting[row] for row in piece]
                    self._redis.put(keys, [self._aside.row(row).data for row in piece])
                    self._pace.sent()
                    self._deleted([key for key in keys if key in self._undeleted])
                self._give_back(waiting, rows)
        except TierError:
            return  # counted by the link; degraded() tells
        finally:
            # Something is left where it broke.
            self._count_unsent(sum(self._wants(key, False) for key in waiting.values()))
            self._give_back(waiting, list(waiting))
        if self._undeleted:
            self._delete(())

    def _give_back(self, waiting: dict[int, BlockKey], rows: Sequence[int]) -> None:
        for row in rows:
            del waiting[row]
        self._aside.give_back(rows)

    def _wants(self, key: BlockKey, is_held: bool) -> bool:
        if key in self._undeleted:
            return True  # a new value replaces the suspect one
        return not is_held and not self._fence.is_fenced(key)

    def _delete(self, keys: Sequence[BlockKey]) -> None:
        """Deletes ``keys`` and all that could not be deleted before; keeps what fails again."""
        repeated = [key for key in keys if key in self._undeleted]
        self._undeleted.update(dict.fromkeys(keys))
        self._fence.end(repeated)  # one entry of ours stands for one fence
        try:
            self._redis.delete(list(self._undeleted))
        except TierError:
            surplus = list(self._undeleted)[: max(0, len(self._undeleted) - _UNDELETED_MAX)]
            self._deleted(surplus)
        else:
            self._deleted(list(self._undeleted))

    def _deleted(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            del self._undeleted[key]
        self._fence.end(keys)

    def _tend(self) -> None:
        """With nothing to send: sees whether Redis lives and takes writes; repeats what failed."""
        try:
            self._redis.ping()
            if self._redis.writes_in_doubt():
                self._redis.try_write()
        except TierError:
            return  # counted; degraded() tells
        if self._undeleted:
            self._delete(())

    # ---- counting --------------------------------------------------------------------------------

    def _drop(self, job: Send | Deletion | Clearing) -> None:
        if isinstance(job, Send):
            self._count_unsent(len(job.keys))
            self._aside.give_back(job.rows)

    def _count_unsent(self, blocks: int) -> None:
        with self._lock:
            self._unsent += blocks
