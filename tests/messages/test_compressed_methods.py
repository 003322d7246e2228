"""Every method with every compression, and with a secure sum: the contract of the methods, or the reason why not.

The checks are those of `methods/test_contract.py`. Compression draws and chooses, and a difference in the last bit may
turn a choice; the draws here are the same in every run, and none does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages.compression_cases import INT8, SECURE, TOP_K, WAYS, make_compressed, wrap
from methods import test_contract as contract
from toy import make_cohort, make_method, start_states, take

from fedvlm_jax.config.run_options import methods_available
from fedvlm_jax.federation.communication import count_bytes, find_travelling
from fedvlm_jax.messages.compression import encode_int8, encode_top_k, refuse_top_k
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.methods.base import shape_of_one
from fedvlm_jax.utils import tree

ORDINARY = {("plora", "top-k")}
BROAD = {("plora", "int8"), ("plora", "secure"), ("rolora", "top-k")}
"""Those of every time and of each change; all others are slow: their engine and their wrappers are the same."""


def refuses(name, way):
    """Why a method does not go with a way of sending; None if it does."""
    method = make_method(name)[3]
    if "messages" in method.refuses or (way == "secure" and not method.linear):
        return "sends nothing, or needs every message"
    return refuse_top_k(method) if way == "top-k" else None


def list_all():
    for name in methods_available():
        for way in WAYS:
            marks = [pytest.mark.broad if (name, way) in BROAD else pytest.mark.slow]
            yield pytest.param((name, way), marks=[] if (name, way) in ORDINARY else marks, id=f"{name}-{way}")


@pytest.fixture(scope="module", params=list_all())
def case(request):
    name, way = request.param
    if refuses(name, way):
        pytest.skip("refused, as test_what_top_k_is_refused_for and the checks of options hold")
    return make_compressed(name, WAYS[way])


CHECKS = (
    contract.test_structure_shapes_and_types_are_kept,
    contract.test_numbers_stay_finite,
    contract.test_permuting_clients_permutes_results,
    contract.test_where_no_client_s_numbers_are_finite_nothing_changes,
    contract.test_nobody_counts_and_the_server_stays,
    contract.test_an_empty_client_keeps_its_start,
    contract.test_old_clients_go_on_from_their_own_state_and_new_ones_do_not,
    contract.test_one_compile_for_all_rounds_and_rates,
)
COMPILING = (
    contract.test_waves_change_nothing,
    contract.test_masked_steps_and_padded_rows_change_nothing,
    contract.test_rounds_follow_each_other,
)
"""Those that compile another program each."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("test_"))
def test_contract(case, check):
    if case.name == "plora-reset-a" and "old_clients" in check.__name__:
        pytest.skip("its clients begin anew, but for what they owe")
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("check", COMPILING, ids=lambda check: check.__name__.removeprefix("test_"))
def test_contract_of_other_programs(case, check):
    check(case)


@pytest.mark.parametrize("poison", [np.nan, -7.0])
def test_a_client_of_weight_zero_changes_nothing(case, poison):
    contract.test_a_client_of_weight_zero_changes_nothing(case, poison)


@pytest.mark.parametrize("poison", [np.nan, 3e38])
def test_a_client_whose_numbers_are_not_finite_is_left_out_and_keeps_what_it_owes(case, poison):
    contract.test_a_client_whose_numbers_are_not_finite_is_left_out(case, poison)


@pytest.mark.parametrize("name", methods_available())
def test_what_top_k_is_refused_for(name):
    """For messages that are not the update, in the form of what is shared, that a later round could make up for."""
    method, adapter = make_method(name)[3:]
    if why := refuse_top_k(method):
        with pytest.raises(ValueError, match="top-k does not go with"):
            wrap(method, TOP_K)
        assert not why.endswith(".")
        assert name in (
            *("local", "flora", "fedalt", "fedmosaic", "ce-lora", "feddpa-t", "feddpa-f", "pfedmoap"),
            *("feddat", "fedlease", "hilora", "fedtreelora", "pfit"),
            *("fedsvd", "flexlora"),  # another basis
        )
        return
    server = method.init(adapter=adapter)
    shared = tree.flatten(method.download(server=server))
    phases, rounds = contract.trace_rounds(name)
    for phase in phases:
        sent = tree.flatten(shape_of_one(rounds[phase][1].messages))
        assert {path: leaf.shape for path, leaf in sent.items()}.items() <= {
            path: leaf.shape for path, leaf in shared.items()
        }.items()


def test_what_holds_more_than_the_update_is_refused_too():
    for choices in ({"ranks": (1, 2, 1, 2)}, {"local": contract.LocalOptions(scaffold=True), "optimizer": "sgd"}):
        method = make_method("plora", **choices)[3]
        with pytest.raises(ValueError, match="not the update of what is shared, and alone"):
            wrap(method, TOP_K)
        assert wrap(method, INT8).linear is False


@pytest.mark.broad
def test_to_keep_all_entries_is_to_send_the_message():
    """Where a share below 1 rounds to all of them; the bytes are those of the message, which needs no places."""
    nearly = make_compressed("rolora", MessageOptions(compress="top-k", keep=0.9999))
    for at, other in zip(contract.make_case("rolora").rounds, nearly.rounds, strict=True):
        contract.assert_close(other.out.server, at.out.server, **contract.later(at))
        shapes = jax.eval_shape(lambda part: part, at.out.messages)
        sizes = {
            count_bytes(find_travelling(case.method, at.server, shapes)[0])
            for case in (contract.make_case("rolora"), nearly)
        }
        assert len(sizes) == 1
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(other.personal["owed"]))


def test_what_is_not_asked_for_is_the_method_itself():
    """Nothing is compiled anew, so a run has the same bits."""
    method = make_method("plora")[3]
    assert wrap(method, MessageOptions()) is method
    assert wrap(method, MessageOptions(compress="top-k", keep=1.0)) is method


@pytest.mark.parametrize(
    ("name", "choices"), [("plora", {}), ("rolora", {}), ("fedalt", {}), ("plora", {"ranks": (1, 2, 1, 2)})]
)
@pytest.mark.parametrize("way", ["int8", "top-k"])
def test_bytes_are_those_of_the_encoded_tree(name, choices, way):
    """Of what a client would put on the wire, array by array; what comes down is as before."""
    method, adapter = make_method(name, **choices)[3:]
    if refuse_top_k(method) and way == "top-k":
        return
    wrapped = wrap(method, WAYS[way])
    server = method.init(adapter=adapter)
    phases, rounds = contract.trace_rounds(name, **choices)
    for phase in phases:
        messages = rounds[phase][1].messages
        one = jax.tree.map(lambda leaf: jnp.ones(leaf.shape[1:], leaf.dtype), messages)
        encoded = encode_int8(one, jax.random.key(0)) if way == "int8" else encode_top_k(one, TOP_K.keep)
        up, down = find_travelling(wrapped, server, messages)
        assert count_bytes(up) == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(encoded))
        before_up, before_down = find_travelling(method, server, messages)
        assert count_bytes(up) < count_bytes(before_up)
        assert count_bytes(down) == count_bytes(before_down)


def test_padding_beyond_a_client_s_rank_does_not_travel():
    """Half of the rank: half of the integers, and all scales, of which there is one for a matrix."""
    method, adapter = make_method("fedavg-lora", ranks=(1, 2, 1, 2))[3:]
    messages = contract.trace_rounds("fedavg-lora", ranks=(1, 2, 1, 2))[1][0][1].messages
    up, _ = find_travelling(wrap(method, INT8), method.init(adapter=adapter), messages)
    rows, scales, rank = 6 + 8 + 8 + 15, 4 * 4, 4
    assert count_bytes(up) == 2 * rows + scales + rank
    assert count_bytes(up, 0.5) == rows + scales + rank


@pytest.mark.broad
def test_a_phase_leaves_what_others_owe_as_it_is():
    """rolora trains B in odd rounds and A in even ones."""
    case = make_compressed("rolora", TOP_K)
    for at in case.rounds[1:]:
        before, after = (tree.flatten(states["owed"]) for states in (at.states, at.personal))
        for path in before:
            assert np.array_equal(before[path], after[path]) == (path.endswith("/b") == (at.number % 2 == 0))


def play_rounds(updates, keep=0.3):
    """A client whose training moves it by these amounts: what it sent in each round, and what it owes."""
    _, params, _, method, adapter = make_method("plora")
    method = wrap(method, MessageOptions(compress="top-k", keep=keep))
    server = method.init(adapter=adapter)
    state = method.init_client(key=jax.random.key(0), server=server, number=jnp.int32(0))
    client, sent = take(make_cohort(1), 0), []
    for number, update in enumerate(updates, start=1):

        def train(factors, optimizer, client, *, update=update, **choices):
            del client, choices
            flat = tree.flatten(factors)
            moved = {path: flat[path] + update[path] if path in update else leaf for path, leaf in flat.items()}
            metrics = dict.fromkeys(("loss", "gradient_norm", "last_loss"), jnp.float32(1))
            return tree.unflatten(moved), optimizer, metrics | {"steps": jnp.int32(3)}

        ctx = contract.make_context(params, train, number)
        state, message, _ = method.client_update(
            ctx, server=server, personal=state, client=client, key=jax.random.key(number)
        )
        sent.append(tree.flatten(message))
    return (
        sent,
        tree.flatten(state["owed"]),
        {path: np.asarray(x) for path, x in tree.flatten(server["shared"]).items()},
    )


def draw_updates(shapes, rounds, draw):
    return [{path: draw(leaf.shape) for path, leaf in shapes.items()} for _ in range(rounds)]


def test_what_was_sent_and_is_owed_is_what_was_meant():
    """Exactly, where the sums are: of multiples of 1/1024 below 1, which float32 adds without rounding."""
    rng, shapes = np.random.default_rng(0), play_rounds([])[2]
    updates = draw_updates(shapes, 12, lambda shape: (rng.integers(-1000, 1000, shape) / 1024).astype(np.float32))
    sent, owed, _ = play_rounds(updates)
    for path in shapes:
        whole = sum(message[path] for message in sent) + owed[path]
        assert np.array_equal(whole, sum(update[path] for update in updates))
    assert all(sum(np.count_nonzero(leaf) for leaf in message.values()) <= round(0.3 * 46) for message in sent)


def test_any_numbers_are_added_from_left_to_right_until_they_are_sent():
    """In float32, bit for bit: an entry goes out as the running sum of its updates since it last did, and none else."""
    rng, shapes = np.random.default_rng(1), play_rounds([])[2]
    updates = draw_updates(shapes, 8, lambda shape: rng.normal(size=shape).astype(np.float32))
    sent, owed, shared = play_rounds(updates)
    for path in shapes:
        running = np.zeros_like(updates[0][path])
        for update, message in zip(updates, sent, strict=True):
            # What local training makes of an update is itself rounded: it is a difference to what was received.
            running = running + ((shared[path] + update[path]) - shared[path])
            out = np.asarray(message[path]) != 0
            np.testing.assert_array_equal(np.where(out, message[path], 0), np.where(out, running, 0))
            running = np.where(out, np.float32(0), running)
        np.testing.assert_array_equal(owed[path], running)


def test_trained_is_what_was_trained_whatever_was_sent():
    """Not what the server has of it: for top-k; with int8 it is within a level of each entry."""
    for way, distance in ((TOP_K, 1e-5), (INT8, 0.02)):
        case = make_compressed("plora", way)
        contract_case = contract.make_case("plora")
        first, plain = case.rounds[0], contract_case.rounds[0]
        for k in range(4):
            got, want = (
                one.method.trained(
                    server=at.server, personal=contract.row(at.personal, k), message=contract.row(at.out.messages, k)
                )
                for one, at in ((case, first), (contract_case, plain))
            )
            got, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(part)]) for part in (got, want))
            assert np.abs(got - want).max() < distance * np.abs(want).max()


def test_error_is_told():
    for way, most in ((INT8, 0.02), (TOP_K, 0.9)):
        error = make_compressed("plora", way).rounds[0].out.metrics["compression_error"]
        assert error.shape == (4,)
        assert ((error > 0) & (error < most)).all()


def test_a_client_s_state_holds_what_the_docs_say():
    state = make_compressed("plora", TOP_K).fresh
    shared = make_method("plora")[3].download(server=make_compressed("plora", TOP_K).server)
    assert jax.tree.structure(state["owed"]) == jax.tree.structure(state["unlike"]) == jax.tree.structure(shared)
    assert (
        make_compressed("plora", INT8).fresh.keys()
        == make_method("plora")[3]
        .init_client(key=jax.random.key(0), server=make_compressed("plora", INT8).server, number=jnp.int32(0))
        .keys()
    )
    assert SECURE.compress == "none"
    assert start_states(make_compressed("plora", TOP_K).method, make_compressed("plora", TOP_K).server, 2)
