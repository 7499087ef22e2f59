"""How a command reaches a cluster's admin service: one private file, ``admin.json``.

The owner of the cluster writes it (0600) into the state folder when the service listens, and
removes it with its run. It holds the address and the credential of the admin role, which is good
for that service alone and, unless security.cluster_token_file is set, for this run alone. From
elsewhere, the secret of admin.token_file and an address do the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pdserve.cluster.run_dir import read_token
from pdserve.errors import ConfigError
from pdserve.rpc.identity import (
    Identity,
    admin_caller,
    identity_from_dict,
    identity_to_dict,
)


@dataclass(frozen=True, slots=True)
class AdminAccess:
    address: str  # host:port
    identity: Identity


def access_text(access: AdminAccess) -> bytes:
    data = {"address": access.address, "identity": identity_to_dict(access.identity)}
    return json.dumps(data).encode()


def read_access(path: Path) -> AdminAccess:
    """Of an admin.json, or of a file with the secret of admin.token_file, which has no address.

    ConfigError names the file.
    """
    try:
        raw = path.expanduser().read_bytes()
        if not raw.lstrip().startswith(b"{"):
            return AdminAccess("", admin_caller(read_token(str(path), "--token-file")))
        data = json.loads(raw)
        return AdminAccess(str(data["address"]), identity_from_dict(data["identity"]))
    except OSError as error:
        raise ConfigError(f"admin credential {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the admin.json of a cluster") from error
