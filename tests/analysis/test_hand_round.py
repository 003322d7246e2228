"""`fedvlm plan` of FedAvg on Florence-2-base's shapes against the same round written by hand, for a v5e:2x2.

The other round is hand_round.py: jax and optax, and of the package the model's forward alone. Two compilations of a
minute or two of one core each, so it is marked slow; it needs libtpu and no TPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedvlm_jax.models.florence2.config import TARGETS

HERE = Path(__file__).parent
CHIPS, CLIENTS, STEPS, BATCH, ANSWER, RANK = 4, 4, 4, 2, 64, 8
WIDTH, INNER, LAYERS = 768, 3072, 6  # of Florence-2-base's encoder, and of its decoder
FEED_FORWARD = 2 * (WIDTH + INNER)  # what fc1 and fc2 have to do with: d_in + d_out of both
FACTORS = RANK * LAYERS * ((4 * 2 * WIDTH + FEED_FORWARD) + (8 * 2 * WIDTH + FEED_FORWARD))
"""Numbers in A and B: of q, k, v, out, fc1 and fc2 in the encoder, and in the decoder with its cross-attention."""


def run_python(*words):
    """In a process of its own, whose devices are not settled, and without the flags that make tests compile quickly."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """-> plan.json, and what the compiler says of the round written by hand."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('libtpu is not installed, which compiles for TPUs: pip install -e ".[plan]"')
    folder = tmp_path_factory.mktemp("plan")
    options = ["--topology", "v5e:2x2", "--model", "florence2-base", "--method", "fedavg-lora"]
    options += ["--clients", str(CHIPS * CLIENTS), "--train.local-steps", str(STEPS)]
    options += ["--train.batch-size", str(BATCH), "--sizes.answer-tokens", str(ANSWER), "--lora.rank", str(RANK)]
    options += ["--system.compute", "bfloat16", "--system.remat", "--out", str(folder)]
    run_python("-m", "fedvlm_jax", "plan", *options)
    planned = json.loads((folder / "plan.json").read_text())
    described = {
        "topology": "v5e:2x2", "model": "florence2-base", "clients": CLIENTS, "steps": STEPS, "batch": BATCH,
        "prompt": planned["example"]["input_ids"][0], "answer": ANSWER, "rank": RANK, "targets": TARGETS,
        "returned": True,
    }  # fmt: skip
    return planned, json.loads(run_python(str(HERE / "hand_round.py"), json.dumps(described)))


@pytest.mark.slow
def test_one_all_reduce_of_both_factors(both):
    """Counted by the package's reader of HLO, by two regular expressions, and worked out from the model's widths."""
    planned, by_hand = both
    flags, reduced = sorted(planned["collectives"], key=lambda one: one["bytes_per_round"])
    assert (flags["kind"], flags["bytes_per_round"]) == ("all-gather", CLIENTS), (
        "whose numbers are finite, a byte a client"
    )
    assert (reduced["kind"], reduced["axes"], reduced["runs_per_round"]) == ("all-reduce", ["clients"], 1)
    assert reduced["bytes_per_round"] == 4 * FACTORS
    assert [(one["bytes"], one["entry"]) for one in by_hand["all_reduces"]] == [(4 * FACTORS, True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "apart"),
    [("arguments", 0.01), ("outputs", 0.01), ("aliases", 0.01), ("temporaries", 0.1), ("peak", 0.1)],
)
def test_memory_is_that_of_the_round_by_hand(both, what, apart):
    """What goes in and out is the same but for numbers per client; scratch depends on how the loss is written."""
    planned, by_hand = both
    assert planned["memory"][what] == pytest.approx(by_hand[what], rel=apart)


@pytest.mark.slow
def test_what_is_needed_is_the_sum_and_the_unread_part_of_the_base(both):
    """The program's own code, a few dozen MiB, differs most: the round's is longer by masks, newcomers and metrics."""
    planned, by_hand = both
    memory = planned["memory"]
    total = by_hand["arguments"] + by_hand["outputs"] - by_hand["aliases"] + by_hand["temporaries"] + by_hand["code"]
    assert memory["needed"] - memory["unread"] == pytest.approx(total, rel=0.1)
    assert memory["base"] == 4 * planned["parameters"]
