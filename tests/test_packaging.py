"""What a user installs is whole: sdist and wheel hold what they should, and the wheel works by itself."""

import itertools
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import tileloss

packaging = pytest.importorskip("packaging.requirements")
pytest.importorskip("build")

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")


def files_below(folder: Path) -> set[str]:
    """The files that the project keeps in a folder, by their paths from the root."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not {"__pycache__", "tileloss.egg-info"} & set(path.parts) and path.name[0] != "."
    }


def package_files() -> set[str]:
    """Every file that belongs into an installed tileloss, by its path there."""
    sources = {path.removeprefix("src/") for path in files_below(ROOT / "src")}
    return sources | {f"tileloss/{path}" for path in files_below(ROOT / "kernels")}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; a failure shows all of it."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=inherited | environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a copy of the checkout, and the wheel built from that sdist alone.

    Whoever imports torch or Triton meanwhile fails: what builds the package need not have them.
    """
    copy = tmp_path_factory.mktemp("checkout") / "tileloss"
    shutil.copytree(ROOT, copy, ignore=NOT_SHIPPED)
    without = tmp_path_factory.mktemp("without")
    for name in ("torch", "triton"):
        (without / f"{name}.py").write_text("raise AssertionError('imported by the build')\n")
    built = tmp_path_factory.mktemp("built")
    run(
        sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", built, copy,
        cwd=built, PYTHONPATH=str(without),
    )  # fmt: skip
    return built


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def requirements(metadata: Message) -> dict[str, list]:
    """What each extra asks for, and under "" what the package itself does."""
    found: dict[str, list] = {extra: [] for extra in ["", *metadata.get_all("Provides-Extra", [])]}
    for requirement in map(packaging.Requirement, metadata.get_all("Requires-Dist", [])):
        extras = [extra for extra in found if extra and f'extra == "{extra}"' in str(requirement.marker)]
        found[extras[0] if extras else ""].append(requirement)
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    ours = {name for name in names if ".dist-info/" not in name}
    assert {"tileloss/py.typed", "tileloss/kernels/__init__.py"} <= ours
    assert ours == package_files()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_it_takes_to_build_test_and_read_it(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    expected = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt"}
    for folder in ("src", "kernels", "tests", "docs", "benchmarks"):
        expected |= files_below(ROOT / folder)
    assert expected <= names
    assert not {name for name in names if name.endswith(".pyc")}


def test_the_wheel_is_for_every_platform(wheel: Path) -> None:
    """The kernels are in it everywhere; only Linux has the Triton to run them."""
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_metadata_says_whose_it_is_and_what_is_needed_where(
    metadata: Message, requirements: dict[str, list]
) -> None:
    assert metadata["Version"] == tileloss.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert sorted(requirement.name for requirement in requirements[""]) == ["torch", "triton"]
    (triton,) = (requirement for requirement in requirements[""] if requirement.name == "triton")
    assert triton.marker.evaluate({"platform_system": "Linux"})
    assert not triton.marker.evaluate({"platform_system": "Darwin"})
    assert {"train", "bench", "dev"} <= requirements.keys()


def test_every_requirement_has_a_lower_bound_and_a_version_that_was_tested(requirements: dict[str, list]) -> None:
    """The lower bounds are what `make matrix` tests, constraints.txt is what `make test` does."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    tested = {requirement.name: requirement.specifier for requirement in map(packaging.Requirement, lines)}
    for requirement in itertools.chain(*requirements.values()):
        if requirement.name == "tileloss":
            continue
        bounds = list(requirement.specifier)
        assert any(bound.operator in (">=", "==") for bound in bounds), f"{requirement} has no lower bound"
        assert requirement.name in tested, f"{requirement.name} is not in constraints.txt"
        versions = [bound.version for bound in tested[requirement.name] if bound.operator in (">=", "==")]
        assert all(requirement.specifier.contains(version) for version in versions), requirement


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a program of a new environment that holds the wheel, from a folder with nothing in it.

    Of the packages of this environment it sees those that have a folder, but no editable install: that lives in a
    hook, which is not run for folders that are only added to the path.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    programs = folder / "bin"
    python = programs / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, *install, cwd=folder)
    (site / "torch_and_others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return lambda program, *arguments: run(programs / program, *arguments, cwd=elsewhere, OMP_NUM_THREADS="1")


TRAIN = """
import sys
from pathlib import Path
import torch
import tileloss, tileloss.functional, tileloss.kernels
from tileloss.losses import MultipleNegativesRankingLoss

class Model(torch.nn.Module):
    def forward(self, features):
        return {"sentence_embedding": features["x"]}

texts, others = torch.eye(4, 8, requires_grad=True), torch.eye(4, 8)
loss = MultipleNegativesRankingLoss(Model())([{"x": texts}, {"x": others}], None)
loss.backward()
assert torch.isfinite(loss) and texts.grad.shape == texts.shape
site = Path(sys.prefix) / "lib"
assert all(site in Path(module.__file__).parents for module in (tileloss, tileloss.kernels)), tileloss.__file__
assert "kernels" not in sys.modules
print("arguments:", *sys.argv[1:])
"""


def test_an_installed_wheel_trains_and_runs_scripts(installed: Callable[..., str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    for through in ((), ("-m", "tileloss.run")):
        assert installed("python", *through, script, "--epochs", "1") == "arguments: --epochs 1\n"


def test_an_installed_wheel_brings_its_command(installed: Callable[..., str]) -> None:
    assert "doctor" in installed("tileloss", "--help")
    assert installed("tileloss", "doctor", "--device", "cpu").endswith("all is well\n")
