"""What a user installs is whole: the sdist and the wheel carry every module, the kernels, types and licence."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import tileloss

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("build")


def package_files() -> set[str]:
    """Every file that belongs into an installed tileloss, by its path there."""
    folders = {"tileloss": ROOT / "src" / "tileloss", "tileloss/kernels": ROOT / "kernels"}
    return {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in folders.items()
        for path in folder.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a bare copy of the checkout, and the wheel built from that sdist alone."""
    copy, built = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=built, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return built


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {"tileloss/py.typed", "tileloss/kernels/__init__.py"} <= names
    assert names == package_files()


def test_the_sdist_holds_the_sources(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        path.relative_to(ROOT).as_posix() for folder in ("src", "kernels") for path in (ROOT / folder).rglob("*.py")
    }
    assert sources | {"pyproject.toml", "README.md", "LICENSE", "src/tileloss/py.typed"} <= names


def test_an_installed_wheel_imports_from_where_it_was_put(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, cwd=tmp_path)
    # -I ignores the environment and the working directory; an editable install would fill in for what is missing
    code = (
        "import sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if '__editable__' not in str(finder)]\n"
        f"sys.path.insert(0, {str(target)!r})\n"
        "import tileloss, tileloss.kernels, tileloss.losses, tileloss.functional\n"
        "print(tileloss.__file__, tileloss.kernels.__file__, sep='\\n')"
    )
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    folders = [Path(line).parent for line in done.stdout.split()]
    assert folders == [target / "tileloss", target / "tileloss" / "kernels"]
    assert not (target / "kernels").exists()


def test_the_metadata_says_what_is_needed_where(metadata: Message) -> None:
    assert metadata["Version"] == tileloss.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.partition(">")[0] for line in needed) == ["torch", "triton"]
    assert next(line for line in needed if line.startswith("triton")).endswith('platform_system == "Linux"')
    assert {"train", "bench"} <= set(metadata.get_all("Provides-Extra", []))


def test_the_kernels_need_no_triton_to_be_found(wheel: Path) -> None:
    """The package of kernels is in the wheel of every platform; only Linux has the Triton to run them."""
    assert wheel.name.endswith("-py3-none-any.whl")
