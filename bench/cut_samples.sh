#!/bin/sh
# Cuts the samples that ship in pdserve/bench/samples from the whole traces:
#   bench/cut_samples.sh conversation_trace.jsonl AzureLLMInferenceTrace_code.csv
set -eu
samples=$(dirname "$0")/../pdserve/bench/samples
head -n 200 "$1" > "$samples/mooncake_sample.jsonl"
head -n 301 "$2" | tr -d '\r' > "$samples/azure_sample.csv"
