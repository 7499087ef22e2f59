"""The folders of a cluster, who may use them, and what is written there.

state folder (``~/.cache/pdserve/clusters/<name>``, 0700, outlives runs)
    lock        held (flock) by the one ``pdserve up`` of this name that is alive
    run.json    the run that holds the lock, or the last one, if it was killed
    hash.key    key of the block hashes; made once
    logs/       of this run; logs.previous/ of the one before
    run/        boot files
short folder (``/tmp/pds-<run id>``, 0700, one per run): unix sockets, whose paths must be short

open_run: lock -> end the orphans of a killed run -> remove its folders -> record -> folders
close:    remove the run's folders and record -> unlock
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from pdserve.cluster.orphans import Marked, mark_value, sweep
from pdserve.config import Config
from pdserve.errors import ConfigError

_SHORT_NAME = re.compile(r"pds-[0-9a-f]{12}")
# sun_path holds 107 bytes, and Ray appends some 75 of its own.
_LONGEST_TMP = 16
HASH_KEY_BYTES = 32
MIN_TOKEN_CHARS = 16
FREE_BYTES_MIN = 200 * 2**20
# See admin_access.py.
ADMIN_FILE = "admin.json"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What others on this machine may know of a run."""

    pid: int
    run_id: str
    short_dir: str
    http: str = ""  # base URL, once it listens
    grpc: str = ""
    certificate: str = ""  # PEM file, where the fronts speak TLS
    api_key_file: str = ""  # where callers need a key


@dataclass(slots=True)
class Run:
    """The folders of one run; owns the lock."""

    name: str
    state_dir: Path
    short_dir: Path
    run_id: str
    orphans: tuple[Marked, ...]  # of an earlier run, ended before this one began
    _lock_fd: int

    @property
    def mark(self) -> str:
        return mark_value(self.state_dir, self.run_id)

    @property
    def boot_dir(self) -> Path:
        return self.state_dir / "run"

    @property
    def logs(self) -> Path:
        return self.state_dir / "logs"

    def record(self, **fronts: str) -> None:
        """Writes run.json; ``fronts`` are RunRecord's fields from ``http`` on."""
        record = RunRecord(os.getpid(), self.run_id, str(self.short_dir), **fronts)
        write_private(self.state_dir / "run.json", json.dumps(asdict(record)).encode())

    def close(self) -> None:
        """Forgets the run. Its processes must have ended."""
        shutil.rmtree(self.short_dir, ignore_errors=True)
        shutil.rmtree(self.boot_dir, ignore_errors=True)
        (self.state_dir / "run.json").unlink(missing_ok=True)
        os.close(self._lock_fd)


def state_dir_of(config: Config) -> Path:
    if config.state_dir:
        return Path(config.state_dir).expanduser().resolve()
    return (Path.home() / ".cache" / "pdserve" / "clusters" / config.name).resolve()


def open_run(config: Config) -> Run:
    """Takes the cluster's name on this machine and cleans up after a killed run of it.

    ConfigError when another run of that name is alive, or when the folders cannot be used.
    """
    state_dir = state_dir_of(config)
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock_fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"state folder {state_dir}: {error.strerror}") from error
    try:
        _lock(lock_fd, state_dir, config.name)
        orphans = _clean_up(state_dir)
        run = _fresh_run(config.name, state_dir, orphans, lock_fd)
    except BaseException:
        os.close(lock_fd)
        raise
    return run


def _lock(lock_fd: int, state_dir: Path, name: str) -> None:
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        record = read_record(state_dir)
        who = f" (pid {record.pid}{', ' + record.http if record.http else ''})" if record else ""
        raise ConfigError(
            f"cluster {name!r} already runs{who}: stop it with Ctrl-C there, or give this one "
            "another --name"
        ) from None


def _clean_up(state_dir: Path) -> tuple[Marked, ...]:
    """Ends what a killed run left; the lock says that no live one exists."""
    orphans = sweep(state_dir)
    record = read_record(state_dir)
    if record is not None:
        _remove_short_dir(Path(record.short_dir))
    shutil.rmtree(state_dir / "run", ignore_errors=True)
    (state_dir / ADMIN_FILE).unlink(missing_ok=True)
    return orphans


def _remove_short_dir(path: Path) -> None:
    """Removes a folder that an earlier run recorded, if it looks like one and is ours."""
    if not _SHORT_NAME.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return
    if path.stat().st_uid == os.getuid():
        shutil.rmtree(path, ignore_errors=True)


def _fresh_run(name: str, state_dir: Path, orphans: tuple[Marked, ...], lock_fd: int) -> Run:
    run_id = secrets.token_hex(6)
    tmp = tempfile.gettempdir()
    base = Path(tmp if len(tmp) <= _LONGEST_TMP else "/tmp")  # nosec B108  # noqa: S108  (see _LONGEST_TMP)
    run = Run(name, state_dir, base / f"pds-{run_id}", run_id, orphans, lock_fd)
    for folder in (state_dir, base):
        _check_space(folder)
    try:
        # Recorded before it exists, so that a kill in between leaves nothing unknown.
        run.record()
        run.short_dir.mkdir(mode=0o700)
        run.boot_dir.mkdir(mode=0o700)
        _turn_logs(run.logs)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    return run


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES_MIN:
        raise ConfigError(
            f"disk full: {free // 2**20} MiB free at {folder}, {FREE_BYTES_MIN // 2**20} needed"
        )


def _turn_logs(logs: Path) -> None:
    previous = logs.with_name("logs.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if logs.exists():
        logs.rename(previous)
    logs.mkdir(mode=0o700)


def read_record(state_dir: Path) -> RunRecord | None:
    """The run that was last recorded; None when there is none, or its file is damaged."""
    try:
        data = json.loads((state_dir / "run.json").read_bytes())
        texts = {name: str(data[name]) for name in RunRecord.__slots__ if name != "pid"}
        return RunRecord(pid=int(data["pid"]), **texts)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def write_private(path: Path, data: bytes) -> None:
    """Replaces a file at once; nobody else can read it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    temporary.replace(path)


def cluster_token(config: Config) -> str:
    """The internal calls' token: the configured one, or a new one for this run."""
    if not config.security.cluster_token_file:
        return secrets.token_hex(32)
    return read_token(config.security.cluster_token_file, "security.cluster_token_file")


def read_token(path: str, key: str) -> str:
    """The secret in that file. ConfigError names ``key``, the setting that names the file."""
    token = _read_secret(Path(path), key).strip()
    if not token:
        raise ConfigError(f"{key} = {path!r}: the file is empty")
    if len(token) < MIN_TOKEN_CHARS:
        raise ConfigError(f"{key}: a token of fewer than {MIN_TOKEN_CHARS} characters is a guess")
    return token


def hash_key(config: Config, state_dir: Path) -> bytes:
    """The key of the block hashes; it outlives runs, so that stored blocks stay findable."""
    configured = config.security.hash_key_file
    path = Path(configured) if configured else state_dir / "hash.key"
    if not configured and not path.exists():
        write_private(path, secrets.token_hex(HASH_KEY_BYTES).encode())
    text = _read_secret(path, "security.hash_key_file").strip()
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != HASH_KEY_BYTES:
        raise ConfigError(f"hash key file {path}: expected {2 * HASH_KEY_BYTES} hex digits")
    return key


def _read_secret(path: Path, key: str) -> str:
    try:
        return path.expanduser().read_text(encoding="ascii")
    except OSError as error:
        raise ConfigError(f"{key} = {str(path)!r}: {error.strerror}", param=key) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key} = {str(path)!r}: the file is not ASCII text") from error
