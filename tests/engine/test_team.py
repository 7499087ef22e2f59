"""Threads that go through a step together: every piece once, and no core for whoever waits long."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from pdserve.engine.compiler import find_compiler, run_compiler
from pdserve.engine.native import FOLDER

# Prints the sum of all pieces' numbers, and the seconds of processor that waiting cost.
PROGRAM = """
#include "team.h"
#include <cstdio>
#include <ctime>
#include <unistd.h>

static double used() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return now.tv_sec + now.tv_nsec * 1e-9;
}

int main() {
  std::atomic<int64_t> sum{0};
  with_team(4, nullptr, [&](Team& team, bool) {
    int64_t stage = 0;
    for (int n = 0; n < 3000; ++n) team.share(stage, 7, [&](int64_t i) { sum += i; });
  });
  const double before = used();
  with_team(4, nullptr, [&](Team& team, bool) {
    int64_t stage = 0;
    for (int n = 0; n < 5; ++n) team.share(stage, 1, [&](int64_t) { usleep(200000); });
  });
  std::printf("%lld %f", static_cast<long long>(sum), used() - before);
}
"""


def test_who_waits_for_a_thread_that_is_held_up_sleeps(tmp_path: Path) -> None:
    source, program = tmp_path / "team.cpp", tmp_path / "team"
    source.write_text(PROGRAM)
    flags = ("-O2", "-std=c++17", "-fopenmp", f"-I{FOLDER}", str(source), "-o", str(program))
    run_compiler([*find_compiler(), *flags])
    # OpenMP's own barriers, at both ends, are not what is looked at.
    done = subprocess.run(
        [program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )
    total, waited = done.stdout.split()
    assert int(total) == 3000 * sum(range(7))
    assert float(waited) < 0.2, "three threads waited for a second"
