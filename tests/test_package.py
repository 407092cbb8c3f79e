"""The package: what the wheel holds, what the pinned set covers, and that importing it is cheap."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import shapedpo


REPO = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
# What only torch's CUDA builds ask for; the pinned set holds for every build.
CUDA_ONLY = re.compile(r"nvidia-|cuda-|triton$")


@pytest.fixture(scope="module")
def constraints() -> dict[str, str]:
    """Name to version."""
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def test_import_is_cheap():
    heavy = ("torch", "transformers", "trl", "sae_lens", "datasets", "deepspeed", "wandb")
    code = f"import sys, shapedpo, shapedpo.lab\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_public_names_exist():
    for name in shapedpo.__all__:
        assert getattr(shapedpo, name) is not None
    assert set(shapedpo.__all__) <= set(dir(shapedpo))
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = shapedpo.nothing_such


def test_constraints_are_plain_pins():
    for line in (REPO / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line


def test_constraints_cover_every_dependency(constraints):
    """All that the package and its extras need, through every dependency of theirs, is pinned, and within the ranges."""
    extras = PROJECT["optional-dependencies"]
    open_ = [Requirement(line) for line in (*PROJECT["dependencies"], *extras["dev"], *extras["deepspeed"])]
    for requirement in open_:
        version = constraints.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} has no pin"
        assert requirement.specifier.contains(version), f"{requirement} forbids the pinned {version}"
    seen: set[tuple[str, frozenset[str]]] = set()
    while open_:
        requirement = open_.pop()
        name, asked = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, asked) in seen or CUDA_ONLY.match(name):
            continue
        seen.add((name, asked))
        assert name in constraints, f"{name} has no pin"
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:  # an extra that is not installed here
            continue
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *asked)):
                open_.append(need)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy, so that nothing is left in the repository."""
    pytest.importorskip("setuptools", minversion="77.0.3")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, folder)
    for name in ("shapedpo", "tests", "benchmarks"):
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", ".", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_the_whole_package_and_nothing_else(wheel):
    package = {
        str(path.relative_to(REPO))
        for path in (REPO / "shapedpo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == package
    assert "shapedpo/py.typed" in inside
    assert any(name.startswith("shapedpo/lab/assets/") and name.endswith(".safetensors") for name in inside)


def test_wheel_metadata(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = wheel.read(name).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"Version: {shapedpo.__version__}" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    (scripts,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "shapedpo = shapedpo.cli:main" in wheel.read(scripts).decode()
