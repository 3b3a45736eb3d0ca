"""The ends of the ranges of versions in pyproject.toml, each in an environment of its own: `make matrix`.

`make test` runs what constraints.txt names. Here `oldest` takes the lowest version of all that pyproject.toml names,
and `kernels` the oldest and the newest Triton. `nox -s oldest -- tests/losses` runs a part.
"""

import nox

nox.options.envdir = "build/nox"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"

CPU_TESTS = ("tests/reference", "tests/functional", "tests/losses", "tests/conformance", "tests/integrations")


@nox.session
def oldest(session: nox.Session) -> None:
    """The tests of what is public, under the lowest versions that pyproject.toml allows."""
    session.install("--resolution", "lowest-direct", "--editable", ".[dev]")
    session.run("pytest", *(session.posargs or CPU_TESTS))


@nox.session
@nox.parametrize("triton", ["3.6.0", "3.9.0"])
def kernels(session: nox.Session, triton: str) -> None:
    """The kernels in Triton's interpreter, and compiled for every GPU family, under one version of Triton."""
    session.install("--constraint", "constraints.txt", "torch", "numpy", "pytest", "tqdm")
    session.install("--no-deps", f"triton=={triton}", "--editable", ".")  # torch would insist on a Triton of its own
    session.run("pytest", *(session.posargs or ("tests/kernels",)))
    session.run("python", "-P", "-m", "tileloss.kernels.compile_report")
