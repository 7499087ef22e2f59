#!/bin/bash
# Everything that a GPU has to show, in one go: the contract tests that need one, then decode,
# prefill and hand-off beside what the card itself does, and transformers' continuous batching.
# Needs neither Ray nor Redis. PYTHON picks the interpreter. Exits with 3 where nothing was measured.
cd "$(dirname "$0")/.." || exit 1
if [ -z "$PYTHON" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
exec "$PYTHON" -m bench.gpu "$@"
