"""The plan of a deployment, which everybody has, and a node's own file, which gives it its number and a secret."""

import hashlib
import json
import secrets
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import fedvlm_jax
from fedvlm_jax.config.audit_options import AuditOptions
from fedvlm_jax.config.option_checks import validate
from fedvlm_jax.config.run_options import Run, from_json, to_json
from fedvlm_jax.data.config import PLANNED
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.models import resolve_folder
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.run_dir.fingerprints import describe_model
from fedvlm_jax.run_dir.validated_files import Form, check_form, read_json
from fedvlm_jax.utils.files import write_json

PLAN: Form = {
    "version": str,
    "run": dict[str, Any],
    "clients": int,
    "least": int,
    "timeout": float,
    "secure": bool,
    "tokens": list[str],
    "model": {"weights": str, "model_files": dict[str, str]},
}
NODE: Form = {"number": int, "token": str, "port": int | None, "plan": dict[str, Any]}
MOST_CLIENTS = 100_000
SECURE = 3
"""Clients of a secure sum, at least."""


@dataclass(frozen=True)
class Plan:
    """The terms on which coordinator and nodes agree before the first round.

    Attributes:
        run: the options, with the classes that were agreed on; where data and model are is each side's own matter.
        clients: so many nodes, with the numbers from 0.
        tokens: digests of their secrets, by number.
        model: digests of the model's files, see `run_dir.fingerprints.describe_model`.
        least: so many nodes must have answered for a round to count; fewer leave the server as it was.
        timeout: seconds that a node has for an order.
        secure: whether the server learns the mean of the messages alone (SecAgg+).
        version: of this package, the same on both sides.
    """

    run: Run
    clients: int
    tokens: tuple[str, ...]
    model: dict[str, Any]
    least: int = 1
    timeout: float = 3600.0
    secure: bool = False
    version: str = fedvlm_jax.__version__

    @property
    def cohort(self) -> int:
        """Return how many clients a round has at most."""
        return min(self.run.cohort or self.clients, self.clients)

    @cached_property
    def digest(self) -> str:
        """Return the digest of all that the plan says."""
        return hashlib.sha256(json.dumps(_encode(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class NodeFile:
    """The file that one node is given, and nobody else.

    Attributes:
        number, token: who it is, and its secret.
        plan: on which all agree.
        port: of the server, for the commands that a node prints; None: the usual one.
    """

    number: int
    token: str
    plan: Plan
    port: int | None = None


def make_plan(
    run: Run, clients: int, *, least: int = 1, timeout: float = 3600.0, secure: bool = False
) -> tuple[Plan, list[str]]:
    """Make a plan for so many clients; return it with each client's secret, which the plan holds as digests alone.

    Raises:
        UserError: the options cannot work, or belong to a simulation; or the model is not there.
    """
    _refuse_simulated(run)
    validate(run)
    _check(run, clients, least, timeout, secure)
    tokens = [secrets.token_hex(16) for _ in range(clients)]
    digests = tuple(digest_token(token) for token in tokens)
    model = describe_model(resolve_folder(run.model))
    return Plan(replace(run, out=None), clients, digests, model, least, float(timeout), secure), tokens


def digest_token(token: str) -> str:
    """Return the digest of a secret of 128 random bits."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def _refuse_simulated(run: Run) -> None:
    """Refuse options that belong to a simulation, whatever else they would need there."""
    refused = {
        "--participation": (
            replace(run.participation, sampling="uniform", attack="none", attackers=0) != ParticipationOptions(),
            "who drops out or comes late is not drawn: real clients do it themselves",
        ),
        "--participation.attack": (
            run.participation.attack != "none" or run.participation.attackers > 0,
            "attackers are simulated, and nodes are real",
        ),
        "--messages": (run.messages != MessageOptions(), "what nodes send is as the method has it"),
        "--audit": (run.audit != AuditOptions(), "what nodes send is kept nowhere"),
        "--privacy": (run.privacy != PrivacyOptions(), "noise is drawn in a simulation alone so far"),
        "--start": (run.start is not None, "nodes draw the adapter to start from by the seed, and have no such folder"),
        "--train.finetune-steps": (run.train.finetune_steps > 0, "no node takes steps after the last round"),
        "--evaluation.cross-clients": (run.evaluation.cross_clients, "no client's model leaves its node"),
        "--evaluation.cold-start": (run.evaluation.cold_start != "initial", "newcomers begin with the adapter drawn"),
        "--preference.mix": (len(run.preference.mix) > 1, "a node scores its model as the only client that it knows"),
        "--preference.rewards cider": (
            "cider" in run.preference.rewards,
            "no node knows how often others' answers have a word",
        ),
        "--preference.reward-file": (run.preference.reward_file is not None, "nodes have no such file"),
        "--evaluation.clients": (run.evaluation.clients is not None, "every node evaluates its own model"),
    }
    for flag, (given, why) in refused.items():
        if given:
            raise UserError(f"{flag}: not in a deployment, for {why}; leave it out")


def _check(run: Run, clients: int, least: int, timeout: float, secure: bool) -> None:
    if not 2 <= clients <= MOST_CLIENTS:
        raise UserError(f"--clients {clients}: expected 2 to {MOST_CLIENTS:,}")
    if not 1 <= least <= min(run.cohort or clients, clients):
        raise UserError(f"--at-least {least}: expected 1 to {min(run.cohort or clients, clients)}, the clients a round")
    if run.cohort is not None and run.cohort > clients:
        raise UserError(f"--cohort {run.cohort}: there are only {clients} clients")
    if not 1 <= timeout <= 7 * 86_400:
        raise UserError(f"--timeout {timeout:g}: expected 1 second to 7 days")
    if secure and min(run.cohort or clients, clients) < SECURE:
        raise UserError(f"--secure: a mean of two tells each of them the other's: a round needs {SECURE} clients")


def write_plan(file: Path, plan: Plan) -> None:
    """Write the plan, which holds no secret."""
    write_json(file, {**_encode(plan), "digest": plan.digest})


def read_plan(file: Path) -> Plan:
    """Read a plan.

    Raises:
        UserError: it is none, was edited, or is of another version.
    """
    return _decode(file, read_json(file, PLAN))


def write_node_file(file: Path, plan: Plan, number: int, token: str, port: int | None = None) -> None:
    """Write what one node is given."""
    file.touch(mode=0o600)  # before there is a secret in it
    about = {"number": number, "token": token, "port": port}
    write_json(file, {**about, "plan": {**_encode(plan), "digest": plan.digest}})
    file.chmod(0o600)


def read_node_file(file: Path) -> NodeFile:
    """Read what a node was given.

    Raises:
        UserError: it is no such file, was edited, or is of another version.
    """
    stored = read_json(file, NODE)
    check_form(file, stored["plan"], PLAN, before="plan.")
    plan, number, token = _decode(file, stored["plan"]), stored["number"], stored["token"]
    if not 0 <= number < plan.clients or digest_token(token) != plan.tokens[number]:
        raise UserError(f"{file}: its secret is not that of client {number} in its plan; was it edited?")
    return NodeFile(number, token, plan, stored["port"])


def _encode(plan: Plan) -> dict[str, Any]:
    # Each side has its own data and devices, and the plan is read where neither is.
    run = replace(plan.run, data=emoji.Options().replace(**list_agreed(plan.run)))
    return {
        "version": plan.version,
        "run": to_json(run),
        "clients": plan.clients,
        "least": plan.least,
        "timeout": plan.timeout,
        "secure": plan.secure,
        "tokens": list(plan.tokens),
        "model": plan.model,
    }


def list_agreed(run: Run) -> dict[str, Any]:
    """Return the options of the data that are the same at every node, by name."""
    return {name: getattr(run.data, name) for name in PLANNED}


def _decode(file: Path, stored: dict[str, Any]) -> Plan:
    if stored["version"] != fedvlm_jax.__version__:
        raise UserError(
            f"{file} is of fedvlm-jax {stored['version']}, and this is {fedvlm_jax.__version__}: both sides need the "
            "same version"
        )
    try:
        run = from_json(stored["run"])
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    plan = Plan(
        run, stored["clients"], tuple(stored["tokens"]), stored["model"], stored["least"], stored["timeout"],
        stored["secure"],
    )  # fmt: skip
    if plan.digest != stored.get("digest") or len(plan.tokens) != plan.clients:
        raise UserError(
            f"{file} is not as it was written: was it edited, or damaged? Make a new deployment for changes"
        )
    return plan
