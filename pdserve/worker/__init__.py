"""What workers of every role share: the engine's bridge to asyncio, the gRPC shell, heartbeats."""
