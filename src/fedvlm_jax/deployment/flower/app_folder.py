"""The folder of a deployment: Flower's app of a plan, a file for each node, and a text with the commands."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from fedvlm_jax import __version__
from fedvlm_jax.deployment.flower.server_app import PLAN

if TYPE_CHECKING:
    from fedvlm_jax.deployment.plan import Plan

PORT = 8000
"""Where a SuperLink listens unless it is told otherwise."""

NODE_PORT = 9094
"""Where the first SuperNode of a machine serves its own processes; each further one needs a port of its own."""

PACKAGE = "fedvlm_app"
"""The app's modules; its name at Flower has a hyphen instead."""

MODULE = '''"""Flower's {name} of this deployment; fedvlm-jax has all that it does."""

from pathlib import Path

from fedvlm_jax.deployment.flower.{module} import make_{module}

app = make_{module}({arguments})
'''

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedvlm-app"
version = "{version}"
description = "A federation of fedvlm-jax"
license = "Apache-2.0"
dependencies = []  # nothing is installed at run time: fedvlm-jax is where Flower is

[tool.flwr.app]
publisher = "local"

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

[tool.flwr.app.config]
out = {out}  # the run's folder, on the SuperLink's machine
model = ""  # where the base lies there, if not where the plan says
"""

CONNECTIONS = """\
[superlink]
default = "plain"

[superlink.plain]
address = "127.0.0.1:{port}"
insecure = true

[superlink.tls]
address = "127.0.0.1:{port}"
root-certificates = {certificate}
"""


def write_deployment(
    folder: Path, plan: "Plan", tokens: Sequence[str], *, place: Path, out: Path, port: int = PORT
) -> None:
    """Write a deployment into an empty folder.

    Args:
        folder: to write into.
        plan: for everybody; it holds no secret.
        tokens: a secret per client, each in the file of its node alone.
        place: where the folder will be: what is written names it.
        out: the run's folder, on the machine of the SuperLink.
        port: of the SuperLink.
    """
    from fedvlm_jax.deployment.plan import write_node_file, write_plan

    place, out = place.absolute(), out.absolute()
    app, nodes, home = folder / "app", folder / "nodes", folder / "flwr"
    package = app / PACKAGE
    package.mkdir(parents=True)
    nodes.mkdir(mode=0o700)
    home.mkdir()
    (package / "__init__.py").write_text('"""The Flower app of a deployment of fedvlm-jax."""\n', encoding="utf-8")
    for module, name, arguments in (
        ("server_app", "ServerApp", "Path(__file__).parent"),
        ("client_app", "ClientApp", ""),
    ):
        text = MODULE.format(name=name, module=module, arguments=arguments)
        text = text if arguments else text.replace("from pathlib import Path\n\n", "")
        (package / f"{module}.py").write_text(text, encoding="utf-8")
    write_plan(package / PLAN, plan)
    project = PROJECT.format(version=__version__, package=PACKAGE, out=json.dumps(str(out), ensure_ascii=False))
    (app / "pyproject.toml").write_text(project, encoding="utf-8")
    certificate = json.dumps(str(place / "certificates" / "ca.crt"), ensure_ascii=False)
    (home / "config.toml").write_text(CONNECTIONS.format(port=port, certificate=certificate), encoding="utf-8")
    for number, token in enumerate(tokens):
        write_node_file(nodes / f"client-{number}.json", plan, number, token, port)
        (nodes / f"client-{number}.json").chmod(0o600)
    (folder / "README.md").write_text(describe_deployment(plan, place, out, len(tokens), port), encoding="utf-8")


def describe_deployment(plan: "Plan", place: Path, out: Path, clients: int, port: int) -> str:
    """Write the deployment's README: what is where, and the commands, with the paths and ports of this plan."""
    template = Template(Path(__file__).with_name("deployment_readme.md").read_text(encoding="utf-8"))
    run = plan.run
    return template.substitute(
        version=__version__,
        place=shlex.quote(str(place)),
        out=shlex.quote(str(out)),
        clients=clients,
        last=clients - 1,
        port=port,
        node_port=NODE_PORT,
        method=run.method,
        model=run.model,
        rounds=run.train.rounds,
        flags=f"--clients {clients} --train.rounds {run.train.rounds}",
    )


def describe_supernode(socket: Path, number: int, port: int = PORT) -> str:
    """Write the command of the SuperNode that goes with a worker, as far as its machine knows it.

    >>> print(describe_supernode(Path("/n/w.sock"), 1))
    flower-supernode --insecure --superlink 127.0.0.1:8000 --port 9095 --node-config 'socket="/n/w.sock"'
    """
    config = shlex.quote(f"socket={json.dumps(str(socket), ensure_ascii=False)}")
    ports = f"--superlink 127.0.0.1:{port} --port {NODE_PORT + number % 1000}"
    return f"flower-supernode --insecure {ports} --node-config {config}"
