"""Who calls whom inside a cluster: one table, and what each process knows to prove who it is.

    token (owner of the cluster alone) -> mint(token, caller) -> Identity (one process)

The cluster's token never leaves the process that owns the cluster. Every other process is given an
Identity: credentials of its own role, one per service, and digests by which it recognises everybody
else's. A digest proves nothing to others, and a credential is good for one service alone, so a
worker that was taken over can repeat neither its callers' credentials elsewhere nor make up those
of another role.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pdserve.errors import ConfigError, PdserveError, PermissionDenied, Unauthenticated
from pdserve.rpc.tls import InternalTls

_SCHEME = "Bearer "


class Caller(enum.StrEnum):
    """A role that opens internal calls. A mixed worker calls as a decode worker."""

    SUPERVISOR = "supervisor"
    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"
    # Whoever holds the cluster's token itself: tools and tests.
    OPERATOR = "operator"
    # Whoever holds the credential of the admin service, and nothing else.
    ADMIN = "admin"


Policy = Mapping[str, frozenset[Caller]]

_WATCHERS = frozenset({Caller.ROUTER, Caller.SUPERVISOR, Caller.OPERATOR})
_OPERATOR = frozenset({Caller.OPERATOR})
_OWNERS = frozenset({Caller.SUPERVISOR, Caller.OPERATOR})
_ADMIN = frozenset({Caller.ADMIN})

# Every internal method; one that is missing here is refused to everybody.
POLICY: Policy = {
    "/pdserve.v1.Membership/SetWorkers": frozenset({Caller.SUPERVISOR}),
    "/pdserve.v1.Membership/InFlight": frozenset({Caller.SUPERVISOR}),
    "/pdserve.v1.Decode/Session": frozenset({Caller.ROUTER}),
    "/pdserve.v1.Prefill/Run": frozenset({Caller.DECODE}),
    "/pdserve.v1.Worker/Describe": _WATCHERS,
    "/pdserve.v1.Worker/Watch": _WATCHERS,
    "/pdserve.v1.Worker/Drain": _OWNERS,
    "/pdserve.v1.Worker/CheckIdle": _OPERATOR,
    "/pdserve.v1.Worker/Flush": _OWNERS,
    "/pdserve.v1.Worker/ArmFault": _OPERATOR,
    "/pdserve.v1.Logging/SetLevel": _OWNERS,
    "/pdserve.v1.Admin/GetPools": _ADMIN,
    "/pdserve.v1.Admin/DrainWorker": _ADMIN,
    "/pdserve.v1.Admin/UndrainWorker": _ADMIN,
    "/pdserve.v1.Admin/RemoveWorker": _ADMIN,
    "/pdserve.v1.Admin/AddWorkers": _ADMIN,
    "/pdserve.v1.Admin/Resize": _ADMIN,
    "/pdserve.v1.Admin/FlushTiers": _ADMIN,
    "/pdserve.v1.Admin/SetLogLevel": _ADMIN,
}


@dataclass(frozen=True, slots=True)
class Identity:
    """What one process of the cluster knows."""

    caller: Caller
    # service -> what this process presents there; hex
    credentials: Mapping[str, str] = field(repr=False)
    # service -> caller -> SHA-256 of that caller's credential; hex
    digests: Mapping[str, Mapping[Caller, str]]
    # Proves membership in the transfers' handshake; empty for those who move no blocks.
    transfer_token: str = field(default="", repr=False)
    tls: InternalTls | None = None

    def header(self, method: str) -> str:
        """The authorization header of a call of ``/service/method``."""
        return _SCHEME + self.credentials.get(service_of(method), "")

    def judge(self, header: str | bytes, method: str, policy: Policy = POLICY) -> None:
        """Raises Unauthenticated for a stranger, PermissionDenied for the wrong role."""
        raw = header if isinstance(header, bytes) else header.encode()
        digest = hashlib.sha256(raw.removeprefix(_SCHEME.encode())).hexdigest()
        known: Caller | None = None
        for caller, expected in self.digests.get(service_of(method), {}).items():
            # Each is compared, so that the time tells nothing.
            if hmac.compare_digest(digest, expected):
                known = caller
        if known is None:
            raise Unauthenticated("this call needs a credential of the cluster")
        if known not in policy.get(method, frozenset()):
            raise PermissionDenied(f"a caller of role {known} may not call {method}")


def service_of(method: str) -> str:
    """``/package.Service/Method`` -> ``package.Service``."""
    return method.removeprefix("/").partition("/")[0]


def mint(
    token: str, caller: Caller, *, tls: InternalTls | None = None, policy: Policy = POLICY
) -> Identity:
    """The identity of a process of role ``caller``. ConfigError for a token that is empty."""
    if not token:
        raise ConfigError("the cluster's token is empty")
    services = sorted({service_of(method) for method in policy})
    moves_blocks = caller in (Caller.PREFILL, Caller.DECODE)
    return Identity(
        caller=caller,
        credentials={service: _derive(token, f"{caller}/{service}") for service in services},
        digests={
            service: {
                other: hashlib.sha256(_derive(token, f"{other}/{service}").encode()).hexdigest()
                for other in Caller
            }
            for service in services
        },
        transfer_token=_derive(token, "kv-transfer") if moves_blocks else "",
        tls=tls,
    )


_ADMIN_SERVICE = "pdserve.v1.Admin"


def admin_caller(secret: str, *, tls: InternalTls | None = None) -> Identity:
    """Who calls the admin service, and nothing else, by a secret of its own."""
    credential = _derive(secret, f"{Caller.ADMIN}/{_ADMIN_SERVICE}")
    return Identity(Caller.ADMIN, {_ADMIN_SERVICE: credential}, {}, tls=tls)


def taking_admin(identity: Identity, caller: Identity) -> Identity:
    """``identity`` as it recognises that caller of the admin service and no other."""
    credential = caller.credentials[_ADMIN_SERVICE]
    digest = hashlib.sha256(credential.encode()).hexdigest()
    known = {_ADMIN_SERVICE: {Caller.ADMIN: digest}}
    return replace(identity, digests={**identity.digests, **known})


def _derive(token: str, purpose: str) -> str:
    return hmac.digest(token.encode(), f"pdserve:{purpose}".encode(), hashlib.sha256).hex()


def identity_to_dict(identity: Identity) -> dict[str, Any]:
    """Nested dicts and texts that JSON can hold; they are secret."""
    tls = identity.tls
    return {
        "caller": identity.caller.value,
        "credentials": dict(identity.credentials),
        "digests": {
            service: {caller.value: digest for caller, digest in known.items()}
            for service, known in identity.digests.items()
        },
        "transfer_token": identity.transfer_token,
        "tls": None if tls is None else [tls.ca, tls.cert, tls.key, tls.name],
    }


def identity_from_dict(data: Any) -> Identity:
    """The inverse of identity_to_dict. ConfigError for anything else."""
    try:
        tls = data["tls"]
        identity = Identity(
            caller=Caller(data["caller"]),
            credentials=_texts(data["credentials"]),
            digests={
                service: {Caller(caller): digest for caller, digest in _texts(known).items()}
                for service, known in data["digests"].items()
            },
            transfer_token=_text(data["transfer_token"]),
            tls=None if tls is None else InternalTls(*(_text(part) for part in tls)),
        )
    except (KeyError, TypeError, ValueError, AttributeError, PdserveError) as error:
        raise ConfigError("this is no identity of a process of the cluster") from error
    return identity


def _texts(data: Mapping[str, Any]) -> dict[str, str]:
    return {_text(key): _text(value) for key, value in data.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is expected")
    return value
