"""A soak on one page: what was run on which machine, figures as they came out, every failure."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.soak.chaos import strikes
from tests.soak.long_forms import LongForm
from tests.soak.phases import Result
from tests.soak.streams import Outcome

FAILURES_SHOWN = 20
TEXT_SHOWN = 300


@dataclass(frozen=True)
class Run:
    """What the figures are of, and as many of them as there are by now."""

    command: str
    seed: int
    scale: float
    cluster: str = ""
    cases: int = 0
    confirmed: int = 0
    results: Sequence[Result] = ()
    long_forms: Sequence[LongForm] = ()

    @property
    def held(self) -> bool:
        return not any(result.broken for result in self.results) and all(
            form.ending == "passed" for form in self.long_forms
        )


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if "model name" in line), "?")
    memory = Path("/proc/meminfo").read_text().split()[1]
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores ({model}), {int(memory) / 2**20:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )


def revision() -> str:
    asked = ["git", "describe", "--always", "--dirty"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False)
    return said.stdout.strip() or "unknown"


def write(run: Run, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.date.today():%Y-%m-%d}-{name}.md"
    path.write_text(page(run))
    return path


def page(run: Run) -> str:
    lines = [
        f"# Soak of {datetime.date.today():%Y-%m-%d}: {'held' if run.held else 'did not hold'}",
        "",
        f"- Command: `{run.command}` (scale {run.scale:g} of the full length)",
        f"- Seed: {run.seed}",
        f"- Revision: {revision()}",
        f"- Machine: {machine()}",
        *(load_page(run) if run.results else ()),
        *(long_page(run.long_forms) if run.long_forms else ()),
    ]
    return "\n".join(lines) + "\n"


def load_page(run: Run) -> list[str]:
    return [
        f"- Cluster: {run.cluster}",
        f"- Oracle: {run.cases} (prompt, parameters), answered when calm; the {run.confirmed}"
        " greedy ones equal transformers' own answer",
        "",
        "| phase | load | s | requests | finished | cancelled | not as promised | per s |"
        " first token p50 / p99 / longest | longest gap | continued | faults | quiet after |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(row(result) for result in run.results),
        "",
        "Seconds throughout. *Not as promised*: lost, another answer, a gap, a repeat or a second"
        " ending. *Continued*: finished requests that moved to other workers on their way."
        " *Quiet after*: until every block was free or cached, and sockets, threads and"
        " shared memory were back to calm.",
        "",
        "## What the router counted",
        "",
        *(f"- {result.name}: {counters(result)}" for result in run.results),
        "",
        "## Failures",
        "",
        *failures(run.results),
        "",
        "## Fault log",
        "",
        *(f"- {result.name}: {fault_log(result)}" for result in run.results if result.faults),
    ]


def long_page(forms: Sequence[LongForm]) -> list[str]:
    return [
        "",
        "## Long forms of tests",
        "",
        "Each on a cluster, a Redis or sockets of its own; PDSERVE_LONG=1.",
        "",
        "| test | ended | s | said |",
        "|---|---|---|---|",
        *(
            f"| {form.name} | {form.ending} | {form.seconds:.0f} | {escaped(form.said)} |"
            for form in forms
        ),
    ]


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def row(result: Result) -> str:
    outcomes, endings = result.outcomes, result.endings
    first = sorted(o.first_s for o in outcomes if o.first_s)
    struck = strikes(result.faults)
    quiet = f"{result.leftovers.seconds:.1f}" if not result.leftovers.left else "never"
    cells = [
        result.name,
        result.load,
        f"{result.seconds:.0f}",
        str(len(outcomes)),
        str(endings["finished"]),
        str(endings["cancelled"]),
        str(sum(bool(o.wrong) for o in outcomes)),
        f"{len(outcomes) / result.seconds:.1f}",
        f"{share(first, 0.5):.2f} / {share(first, 0.99):.2f} / {share(first, 1.0):.2f}",
        f"{max((o.gap_s for o in outcomes), default=0):.2f}",
        str(sum(o.resumes > 0 for o in outcomes)),
        str(struck),
        quiet,
    ]
    return f"| {' | '.join(cells)} |"


def share(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def counters(result: Result) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(result.counters.items()))


def failures(results: Sequence[Result]) -> list[str]:
    lines = []
    for result in results:
        lines += [
            f"- {result.name}: {said[:TEXT_SHOWN]}" for said in result.broken[:FAILURES_SHOWN]
        ]
        if len(result.broken) > FAILURES_SHOWN:
            lines.append(f"- {result.name}: {len(result.broken) - FAILURES_SHOWN} more")
    return lines or ["None."]


def fault_log(result: Result) -> str:
    return "; ".join(f"{fault.at - result.began:.1f} s {fault.what}" for fault in result.faults)


def slowest(outcomes: Sequence[Outcome]) -> Outcome:
    return max(outcomes, key=lambda o: o.ended - o.began)
