"""From options to a result: builds the workload, asks the server, runs, shows, writes."""

from __future__ import annotations

import dataclasses
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pdserve.bench import result, server, table, traces, workload
from pdserve.bench.caller import Target
from pdserve.bench.load import Plan, run_all
from pdserve.bench.prompts import TokenRange
from pdserve.bench.provenance import made_now
from pdserve.bench.samples import Outcome, Run
from pdserve.bench.summary import Slo, summarize
from pdserve.bench.workload import Request
from pdserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for on the command line; kept with the result as it is."""

    trace: str | None = None
    rate: float | None = None  # requests/s; None: 1, or the trace's own times
    speed: float = 1.0
    scale: float = 1.0
    requests: int | None = None  # None: 64, or the whole trace
    input_tokens: int = 256
    output_tokens: int = 64
    prompt_ids: str = "1000:30000"
    concurrency: int | None = None
    repeats: int = 1
    warmup: int = 1
    seed: int = 0
    slo_ttft_ms: float | None = None
    slo_itl_ms: float | None = None
    timeout_s: float = 600.0
    model: str | None = None
    plain: bool = False

    def __post_init__(self) -> None:
        """ConfigError."""
        least = {"requests": 1, "input_tokens": 1, "output_tokens": 1, "concurrency": 1}
        least |= {"repeats": 1, "warmup": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least {low}")
        for name in ("slo_ttft_ms", "slo_itl_ms", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                option = name.replace("_", "-").removesuffix("-s")
                raise ConfigError(f"--{option} {value:g}: expected more than 0")
        if self.trace is None and (self.scale != 1 or self.speed != 1):
            raise ConfigError("--scale and --speed change a trace: give one with --trace")
        if self.rate is not None and self.speed != 1:
            raise ConfigError("--rate replaces the trace's times; --speed would change them")

    def kept(self) -> dict[str, Any]:
        """As JSON can hold it, which has no infinity."""
        rate = "inf" if self.rate == float("inf") else self.rate
        return dataclasses.asdict(self) | {"rate": rate}


@dataclass(frozen=True, slots=True)
class Front:
    """The server, and how to be let in."""

    url: str
    api_key: str = ""
    tls: ssl.SSLContext | None = None


def build(options: Options) -> tuple[Request, ...]:
    """The requests of one repeat, in the order in which they are due. ConfigError."""
    if options.trace is None:
        return workload.uniform(
            64 if options.requests is None else options.requests,
            1.0 if options.rate is None else options.rate,
            options.input_tokens,
            options.output_tokens,
            options.seed,
        )
    requests: Sequence[Request] = traces.read(options.trace, options.requests)
    requests = sorted(requests, key=lambda request: request.due_s)
    if options.scale != 1:
        requests = workload.scaled(requests, options.scale)
    if options.rate is not None:
        return workload.at_rate(requests, options.rate, options.seed)
    return workload.at_speed(requests, options.speed)


async def run(options: Options, front: Front, path: Path | None, console: Console) -> bool:
    """Whether any request was answered. PdserveError."""
    plan = Plan(
        requests=build(options),
        ids=TokenRange.parse(options.prompt_ids),
        seed=options.seed,
        repeats=options.repeats,
        warmup=options.warmup,
        concurrency=options.concurrency,
    )
    slo = Slo(options.slo_ttft_ms, options.slo_itl_ms)
    url = server.base_url(front.url)
    made = made_now()
    async with server.open_session(front.api_key, front.tls) as session:
        served = await server.ask(session, url, options.model)
        console.print(f"{served.model} at {url}", markup=False, highlight=False)
        for line in _notes(options, plan, served):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        target = Target(url, served.model, options.plain, options.timeout_s)
        runs = await run_all(session, target, plan, _progress(options.repeats))
    summary = summarize(runs, slo, options.seed)
    table.show(console, summary, slo, options.repeats)
    path = result.default_path(made) if path is None else path
    result.write(
        path, result.document(made, {"url": url}, served, options.kept(), plan, slo, runs, summary)
    )
    console.print(f"written to {path}", markup=False, highlight=False, soft_wrap=True)
    return summary.outcomes[Outcome.ANSWERED.value] > 0


def _notes(options: Options, plan: Plan, served: server.Served) -> list[str]:
    """What a reader of the figures has to know of the workload."""
    shape = result.describe(plan.requests)
    notes = [
        f"{shape['requests']} requests in {shape['duration_s']:.1f} s, x {options.repeats}; "
        f"prompts of {shape['prompt_tokens_mean']:.0f} tokens on average, "
        f"at most {shape['prompt_tokens_max']}; answers of {shape['output_tokens_mean']:.0f}; "
        f"{shape['shared_blocks']:.1%} of the prompts' blocks were asked for before"
    ]
    if options.scale != 1:
        notes.append(f"lengths of the trace are scaled to {options.scale:g} of what was recorded")
    if options.speed != 1:
        notes.append(f"the trace runs at {options.speed:g} times its speed")
    if options.trace is not None and options.rate is not None:
        notes.append(f"Poisson arrivals at {options.rate:g}/s replace the trace's own times")
    if served.context is not None:
        over = sum(
            request.prompt_tokens + request.output_tokens > served.context
            for request in plan.requests
        )
        if over:
            notes.append(
                f"{over} of them exceed the server's {served.context} tokens and will be refused; "
                "--scale shrinks a trace"
            )
    return notes


def _progress(repeats: int) -> Callable[[int, Run], None]:
    """A line a repeat, on standard error: standard output is for the figures."""

    def done(repeat: int, run: Run) -> None:
        answered = sum(sample.outcome is Outcome.ANSWERED for sample in run.samples)
        print(
            f"repeat {repeat + 1} of {repeats}: {answered} of {len(run.samples)} answered "
            f"in {run.wall_s:.1f} s",
            file=sys.stderr,
        )

    return done
