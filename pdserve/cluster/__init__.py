"""Owns the life of everything one cluster consists of on this machine; the only importer of Ray."""

import os

# The processes that this one starts are forked. gRPC's own handlers of a fork, of no use since
# another program takes over at once, now and then abort the child before that. It is read when
# gRPC is imported, and when it (Ray's own as well) is first used: the command line comes here
# first, whoever embeds this has to. Whatever was set before gives way, in children too: whom they
# fork becomes another program at once as well.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
