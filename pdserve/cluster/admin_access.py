"""How a command reaches a cluster's admin service: one private file, ``admin.json``.

The owner of the cluster writes it (0600) into the state folder when the service listens, and
removes it with its run. It holds the address and the credential of the admin role, which is good
for that service alone and, unless security.cluster_token_file is set, for this run alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pdserve.errors import ConfigError
from pdserve.rpc.identity import Identity, identity_from_dict, identity_to_dict


@dataclass(frozen=True, slots=True)
class AdminAccess:
    address: str  # host:port
    identity: Identity


def access_text(access: AdminAccess) -> bytes:
    data = {"address": access.address, "identity": identity_to_dict(access.identity)}
    return json.dumps(data).encode()


def read_access(path: Path) -> AdminAccess:
    """ConfigError names the file."""
    try:
        data = json.loads(path.expanduser().read_bytes())
        return AdminAccess(str(data["address"]), identity_from_dict(data["identity"]))
    except OSError as error:
        raise ConfigError(f"admin credential {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the admin.json of a cluster") from error
