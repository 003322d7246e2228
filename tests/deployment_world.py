"""Three clients' rows, in one file for the simulator and in one for each node; a transport within the process."""

import json
from dataclasses import replace
from pathlib import Path

from rlaif_pictures import read_emoji
from tiny_run import tiny_run

from fedvlm_jax.data.sources.registry import make_options
from fedvlm_jax.deployment.node import open_node
from fedvlm_jax.deployment.packets import Failure, SecureSum
from fedvlm_jax.deployment.plan import NodeFile, make_plan
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.utils.progress import SilentProgress

NAMES = ("ann", "bob", "cyd")
SPLITS = {"ann": "tttvvs", "bob": "ttttttvs", "cyd": "ttttvss"}
WORDS = {"t": "train", "v": "validation", "s": "test"}
LENGTHS = {"max_prompt_tokens": 40, "max_answer_tokens": 12}


def write_rows(folder):
    """Write `all` and a folder for each client; a client's rows are in the same order in both."""
    pictures = read_emoji()[::17]
    rows = {name: [] for name in NAMES}
    for name in NAMES:
        for at, split in enumerate(SPLITS[name]):
            picture = pictures[sum(map(len, rows.values()))]
            row = {"file": f"{name}-{at}{picture.suffix}", "bytes": picture.encoded, "client": name}
            row |= {"question": f"What is number {at}?", "chosen": picture.questions[0].chosen, "split": WORDS[split]}
            rows[name].append(row)
    for where, held in {"all": [row for name in NAMES for row in rows[name]], **rows}.items():
        place = folder / where
        place.mkdir(parents=True)
        for row in held:
            (place / row["file"]).write_bytes(row["bytes"])
        kept = ("question", "chosen", "client", "split")
        lines = [json.dumps({"image": row["file"], **{name: row[name] for name in kept}}) for row in held]
        (place / "rows.jsonl").write_text("\n".join(lines))
    return folder


def make_run(model, out, source, **changes):
    run = tiny_run(Path(model), out, cohort=None, data=make_options(str(source), **LENGTHS))
    run = replace(run, train=replace(run.train, rounds=2, batch_size=2), participation=ParticipationOptions())
    return replace(run, **changes)


class LocalTransport:
    """Nodes in this process, whose ids are 100 and on; `lost` has the (kind, round, number) whose replies are lost."""

    def __init__(self, nodes, lost=()):
        self.nodes, self.lost, self.carried = nodes, set(lost), []

    def list_nodes(self):
        return [100 + number for number in self.nodes]

    def ask(self, orders, timeout):
        found = {}
        for node, order in orders.items():
            try:
                reply = self.nodes[node - 100].answer(order)
            except UserError as error:
                found[node] = Failure(str(error))
                continue
            self.carried.append((order, reply))
            if (order.header["kind"], order.header.get("round"), node - 100) not in self.lost:
                found[node] = reply
        return found


class SummingTransport(LocalTransport):
    """Adds up what nodes hand over for a secure sum."""

    def ask_sum(self, orders, clip, timeout):
        import numpy as np

        vectors = [
            np.frombuffer(self.nodes[node - 100].answer(order).payload, np.float32) for node, order in orders.items()
        ]
        assert max(np.abs(vector).max() for vector in vectors) <= clip
        return SecureSum(np.sum(vectors, axis=0), list(orders))


def open_nodes(plan, tokens, rows, folder, numbers=range(3), loaded=None):
    return {
        number: open_node(
            NodeFile(number, tokens[number], plan),
            make_options(str(rows / NAMES[number])),
            None,
            folder / f"node-{number}",
            SilentProgress(),
            loaded,
        )
        for number in numbers
    }


def plan_run(run, **options):
    return make_plan(run, 3, **options)
