"""The checks by name: `nox -s lint`, `nox -s test`. `.ci/run` calls them in an environment of its own.

With `--no-venv` a session uses the environment that nox runs in, and installs nothing.
"""

import nox

nox.options.sessions = ["lint", "types", "test"]
nox.options.reuse_existing_virtualenvs = True


def _install(session: nox.Session, *extras: str) -> None:
    if session.virtualenv.venv_backend != "none":
        session.install("-e", f".[{','.join(extras)}]")


@nox.session
def test(session: nox.Session) -> None:
    """The ordinary suite; arguments after `--` go to pytest."""
    _install(session, "test")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Lint, format, import layers."""
    _install(session, "dev")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Strict types of the package."""
    _install(session, "dev")
    session.run("pyright")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site strictly; the examples are executed."""
    _install(session, "docs")
    quiet = {"NO_MKDOCS_2_WARNING": "1"}  # a box of the theme's about another program
    session.run("mkdocs", "build", "--strict", *session.posargs, env=quiet)


@nox.session
def trackers(session: nox.Session) -> None:
    """W&B, MLflow and trackio without a network: what they stored is what a run's files say."""
    _install(session, "test", "tensorboard", "wandb", "mlflow", "trackio")
    session.run("pytest", "-q", "tests/training/tracking", *session.posargs)


@nox.session
def flower(session: nox.Session) -> None:
    """Real clients over Flower's own processes, in an environment that has it."""
    _install(session, "test", "flower")
    session.run("pytest", "-q", "-m", "", "tests/deployment", "-k", "flower or secure", *session.posargs)


@nox.session
def parity(session: nox.Session) -> None:
    """The live comparison with transformers, PyTorch and PEFT."""
    _install(session, "test", "parity")
    session.run("pytest", "-q", "-m", "parity and not slow", *session.posargs)


@nox.session
def broad(session: nox.Session) -> None:
    """The same for every method, mesh and option, and the examples."""
    _install(session, "test")
    session.run("pytest", "-q", "-n", "2", "-m", "broad and not slow", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """The heavy checks, Florence-2 at its real size among them: an hour and more."""
    _install(session, "test", "plan", "parity")
    session.run("pytest", "-q", "-n", "2", "-m", "slow", *session.posargs)
