"""Owns the life of everything one cluster consists of on this machine; the only importer of Ray."""

import os

# The processes that this one starts are forked. gRPC's own handlers of a fork, of no use since
# another program takes over at once, now and then abort the child before that. Read when gRPC,
# Ray's own included, is first used.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
