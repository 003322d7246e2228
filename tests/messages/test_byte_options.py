"""Options of compression and secure sums: what is refused, what is explained, and what a plan and a run share."""

import dataclasses

import pytest

from fedvlm_jax.analysis.explain import explain
from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.option_checks import validate, validate_comparison
from fedvlm_jax.config.run_options import LocalOptions, LoraOptions, Run, TrainOptions, from_json, to_json
from fedvlm_jax.errors import UserError
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.reporting.method_report import tabulate_explanation

INT8 = MessageOptions(compress="int8")
TOP_K = MessageOptions(compress="top-k")
SECURE = MessageOptions(secure=True)
SGD = TrainOptions(optimizer="sgd")
SCAFFOLD = LocalOptions(scaffold=True)
RANKS = LoraOptions(rank=4, ranks=(2, 4))
NOISE = PrivacyOptions(noise=1.0, sampling="all")

REFUSED = [
    (Run(messages=MessageOptions(keep=0.2)), "--messages.keep means nothing to --messages.compress none"),
    (Run(messages=MessageOptions(compress="int8", keep=0.2)), "--messages.keep means nothing to .* int8"),
    (Run(messages=MessageOptions(secure_bits=20)), "--messages.secure-bits means nothing without --messages.secure"),
    (Run(messages=MessageOptions(secure_range=2.0)), "--messages.secure-range means nothing without"),
    (Run(messages=MessageOptions(compress="top-k", keep=0.0)), "--messages.keep is 0.0"),
    (Run(messages=MessageOptions(compress="top-k", keep=1.5)), "--messages.keep is 1.5"),
    (Run(messages=MessageOptions(secure=True, secure_bits=32)), "--messages.secure-bits is 32"),
    (Run(method="fedsvd", messages=TOP_K), "top-k does not go with --method fedsvd, because .* another basis"),
    (Run(method="flora", messages=TOP_K), "top-k does not go with --method flora, because a message is not the update"),
    (Run(messages=TOP_K, local=SCAFFOLD, train=SGD), "--method plora and --local.scaffold, because a message is not"),
    (Run(messages=TOP_K, lora=RANKS), "--method plora and --lora.ranks, because a message is not"),
    (
        Run(method="local", messages=INT8),
        "--messages.compress does not go with --method local, because no client",
    ),
    (Run(method="local", messages=SECURE), "--messages.secure does not go with --method local"),
    (Run(method="flexlora", messages=SECURE), "--messages.secure does not go with --method flexlora"),
    (Run(messages=SECURE, local=SCAFFOLD, train=SGD), "--messages.secure and --local.scaffold exclude each other"),
    (Run(messages=SECURE, lora=RANKS), "--messages.secure and --lora.ranks exclude each other"),
    (Run(messages=dataclasses.replace(SECURE, compress="int8")), "secure and --messages.compress int8 exclude"),
    (Run(messages=dataclasses.replace(SECURE, pool="median")), "--messages.secure .*exclude each other"),
    (
        Run(messages=SECURE, privacy=NOISE),
        "--messages.secure and --privacy exclude each other",
    ),
    (Run(messages=dataclasses.replace(SECURE, secure_bits=31), cohort=3), "a sum of 3 clients could need 33 bits"),
]


@pytest.mark.parametrize(("run", "expected"), REFUSED, ids=[expected for _, expected in REFUSED])
def test_what_cannot_work_is_refused_in_a_line(run, expected):
    with pytest.raises(UserError, match=expected) as refusal:
        validate(run)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "run",
    [
        Run(messages=INT8),
        Run(method="flora", messages=INT8),
        Run(messages=INT8, local=SCAFFOLD, train=SGD),
        Run(messages=INT8, lora=RANKS),
        Run(method="rolora", messages=TOP_K),
        Run(messages=MessageOptions(secure=True, secure_bits=30), cohort=4),
    ],
)
def test_what_can_work_is_not(run):
    validate(run)
    assert from_json(to_json(run)) == run


def test_a_comparison_leaves_compression_out_where_nothing_is_sent():
    validate_comparison(Compare(("local", "plora"), base=Run(messages=INT8)))
    with pytest.raises(UserError, match=r"--messages.compress means nothing to any of --methods local"):
        validate_comparison(Compare(("local",), base=Run(messages=INT8)))


FEW = LoraOptions(rank=2, targets="encoder/layers/fc1")
"""B of one site, two layers: 2 x 2 x 512 numbers in two matrices."""


@pytest.mark.broad
def test_explain_shows_the_bytes_of_what_is_encoded():
    """And the tensors as without compression."""
    plain, int8, top_k = (explain(Run(messages=messages, lora=FEW)) for messages in (MessageOptions(), INT8, TOP_K))
    (one,), (rounded,), (largest,) = plain.stages, int8.stages, top_k.stages
    assert one.up == 4 * 2048
    assert rounded.up == 2048 + 4 * 2
    assert largest.up == (4 + 2) * 205
    assert {stage.down for stage in (one, rounded, largest)} == {one.down}
    assert {stage.whole for stage in (one, rounded, largest)} == {one.up}
    said = [dict(tabulate_explanation(explained)[-1].rows)["sent by a client"] for explained in (plain, int8)]
    assert said == ["8.0 KiB (8,192 bytes)", "2.0 KiB (2,056 bytes) in place of 8.0 KiB"]
    stages = (one, rounded, largest)
    told = [[(t.group, t.name, t.trained, t.sent, t.received) for t in stage.tensors] for stage in stages]
    assert told[0] == told[1] == told[2]
    assert any(tensor.sent for tensor in one.tensors)
    assert (int8.state, top_k.state) == (plain.state, plain.state + 2 * 4 * 2048)


@pytest.mark.broad
def test_padding_of_ranks_is_not_counted_in_what_is_encoded():
    lora = dataclasses.replace(FEW, ranks=(1, 2))
    (stage,) = explain(Run(messages=INT8, lora=lora)).stages
    scales, rank = 4 * 2, 4
    assert {rank: up for rank, (up, _) in stage.by_rank.items()} == {1: 1024 + scales + rank, 2: 2048 + scales + rank}
