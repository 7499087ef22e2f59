"""A gRPC probe as the kubelet does it: ``python health_probe.py HOST:PORT``; 0 when it serves."""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

with grpc.insecure_channel(sys.argv[1]) as channel:
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=5
        )
    except grpc.RpcError:
        sys.exit(1)
sys.exit(0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1)
