"""The typed Python client of a pdserve cluster, over gRPC.

    from pdserve.client import Client
    with Client("127.0.0.1:50051") as client:
        for chunk in client.stream("Once upon a time", max_tokens=32):
            print(chunk.text, end="")

A stream outlives a restart of the router: the client mints the request's id and seed, keeps the
tokens that came, and resumes after them, so nothing is lost and nothing comes twice.
"""

from pdserve.client.aio import AsyncClient
from pdserve.client.options import ClientOptions, SamplingOptions
from pdserve.client.sync import Client
from pdserve.client.types import Answer, Chunk, Message, ModelInfo, Prompt

__all__ = [
    "Answer",
    "AsyncClient",
    "Chunk",
    "Client",
    "ClientOptions",
    "Message",
    "ModelInfo",
    "Prompt",
    "SamplingOptions",
]
