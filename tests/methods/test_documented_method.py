"""The page "Add a method" holds: its code, as a new file beside the others, is a method that keeps the contract."""

import re
from functools import partial
from pathlib import Path

import pytest
import test_contract as contract

import fedvlm_jax.methods.zoo
from fedvlm_jax.config.method_checks import declare
from fedvlm_jax.config.run_options import Run
from fedvlm_jax.utils import tree

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "add-a-method.md"


BLOCK = re.compile(r"`methods/zoo/(\w+)\.py`, say.*?```python\n(.*?)```", re.DOTALL)


PROMPTED = ("prompt-half", "prompt-pair")


@pytest.fixture(
    scope="module", params=["encoder-b", *(pytest.param(name, marks=pytest.mark.broad) for name in PROMPTED)]
)
def case(request, tmp_path_factory):
    """The contract's case for a block of code, in a file of the name that the text gives it."""
    blocks = {stem.replace("_", "-"): (stem, code) for stem, code in BLOCK.findall(PAGE.read_text(encoding="utf-8"))}
    stem, code = blocks[request.param]
    folder = tmp_path_factory.mktemp("zoo")
    (folder / f"{stem}.py").write_text(code, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedvlm_jax.methods.zoo, "__path__", [*fedvlm_jax.methods.zoo.__path__, str(folder)])
        yield contract.Case(request.param)


SENT = {
    "encoder-b": ["encoder/fc1/b"],
    "prompt-half": ["text_model/token_embedding/prompt/0"],  # of two vectors
    "prompt-pair": ["text_model/token_embedding/prompt"],
}


def test_it_shares_what_it_says(case):
    assert case.method.name == case.name
    assert list(tree.flatten(case.out.messages)) == SENT[case.name]


def test_it_declares_what_its_average_takes(case):
    refused = {"lora.ranks", "lora.targets", "start"} if case.name in PROMPTED else set()
    assert declare(case.name, Run()).refuses.keys() == refused


@pytest.mark.parametrize(
    "check",
    [
        contract.test_structure_shapes_and_types_are_kept,
        contract.test_a_fresh_client_has_the_bare_base,
        contract.test_training_moves_the_model_and_never_the_scale,
        contract.test_permuting_clients_permutes_results,
        partial(contract.test_a_client_of_weight_zero_changes_nothing, poison=-7.0),
        contract.test_nobody_counts_and_the_server_stays,
        contract.test_masked_steps_and_padded_rows_change_nothing,
        contract.test_an_empty_client_keeps_its_start,
        contract.test_old_clients_go_on_from_their_own_state_and_new_ones_do_not,
        contract.test_what_travels,
        contract.test_rounds_follow_each_other,
        contract.test_a_kept_optimizer_is_used,
    ],
)
def test_it_keeps_the_contract(case, check):
    check(case)
