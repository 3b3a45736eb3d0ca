"""The ends of the ranges of versions in pyproject.toml, each in an environment of its own: `make matrix`.

`make test` runs under what constraints.txt names. Here `oldest` takes the lowest version of everything that
pyproject.toml names, `newest` the newest, Python among them, `newest_python` the newest Python that all of
constraints.txt is built for, and `newest_triton` the newest Triton, which few builds of torch bring.
`build/nox/oldest/bin/pytest tests/losses` runs less.
"""

import nox

nox.options.envdir = "build/nox"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"

NEWEST_PYTHON, NEWEST_CONSTRAINED_PYTHON, NEWEST_TRITON = "3.15", "3.14", "3.9.0"
OF_THE_LIBRARY = "reference functional losses conformance integrations test_encoder.py test_run.py test_trainer.py"


@nox.session
def oldest(session: nox.Session) -> None:
    """The functions, the losses and the kernels under the lowest versions that pyproject.toml allows."""
    session.install("--resolution", "lowest-direct", "--editable", ".[dev]")
    check_library(session)
    check_kernels(session, may_spill=48)  # the configurations were chosen under newer compilers


@nox.session(python=NEWEST_PYTHON)
def newest(session: nox.Session) -> None:
    """The functions, the losses and the kernels under the newest versions that there are of everything."""
    session.install("--upgrade", "--editable", ".[dev]")
    check_library(session)
    check_kernels(session)


@nox.session(python=NEWEST_CONSTRAINED_PYTHON)
def newest_python(session: nox.Session) -> None:
    """The functions, the losses and the kernels under a newer Python, with what constraints.txt names."""
    session.install("--constraint", "constraints.txt", "--editable", ".[dev]")
    check_library(session)
    check_kernels(session, may_spill=24)  # by the Triton that this torch asks for


@nox.session
def newest_triton(session: nox.Session) -> None:
    """The kernels under a Triton that this torch does not ask for."""
    session.install("--constraint", "constraints.txt", "torch", "numpy", "pytest", "tqdm")
    session.install("--no-deps", f"triton=={NEWEST_TRITON}", "--editable", ".")
    check_kernels(session)


def check_library(session: nox.Session) -> None:
    """The functions and the losses."""
    session.run("pytest", *(f"tests/{name}" for name in OF_THE_LIBRARY.split()))


def check_kernels(session: nox.Session, may_spill: int = 0) -> None:
    """Interpreted, and compiled for every GPU family."""
    session.run("pytest", "tests/kernels")
    session.run("python", "-P", "-m", "tileloss.kernels.compile_report", "--may-spill", str(may_spill))
