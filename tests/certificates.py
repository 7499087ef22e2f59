"""An authority and certificates of a test's own, made with openssl."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="SKIPPED: needs openssl to make certificates"
)
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Pair:
    cert: Path
    key: Path


def authority(folder: Path, name: str = "authority") -> Pair:
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    _openssl("req", "-x509", *_KEY, "-days", "2", "-subj", f"/CN={name}", *_files(pair))
    return pair


def issue(issuer: Pair, folder: Path, name: str, names: str) -> Pair:
    """``names``: as subjectAltName has them, ``DNS:...`` or ``IP:...``."""
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    request, extra = folder / f"{name}.csr", folder / f"{name}.ext"
    extra.write_text(f"subjectAltName={names}\n")
    _openssl(
        "req", "-new", *_KEY, "-subj", f"/CN={name}", "-keyout", str(pair.key), "-out", str(request)
    )
    _openssl(
        *("x509", "-req", "-in", str(request), "-days", "2", "-extfile", str(extra)),
        *("-CA", str(issuer.cert), "-CAkey", str(issuer.key), "-CAcreateserial"),
        *("-out", str(pair.cert)),
    )
    return pair


def _files(pair: Pair) -> tuple[str, ...]:
    return ("-keyout", str(pair.key), "-out", str(pair.cert))


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)
