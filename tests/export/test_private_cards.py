"""The card of a model that was trained with noise tells nobody what the noise came from."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.export.model_card import write_card
from fedvlm_jax.privacy.budget import describe_coverage, settle
from fedvlm_jax.privacy.config import PrivacyOptions

SEED = 31_415


@pytest.mark.parametrize("secret", ["", 16 * "5e"])
def test_no_seed_stands_beside_an_epsilon(secret, tmp_path):
    budget = settle(PrivacyOptions(noise=5.0, sampling="all"), clients=20, cohort=None, rounds=1)
    results = {"selected_round": 1, "privacy": describe_coverage(replace(budget, secret=secret))}
    record = SimpleNamespace(results=results, method="plora", metric="loss")
    for private in (True, False):
        if not private:
            del results["privacy"]
        run = SimpleNamespace(record=record, run=Run(seed=SEED))
        write_card(tmp_path, run, "title", "about", "code", "peft", "base", [])
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert (str(SEED) in card) == (not private)
        assert ("who knows or guesses the run's seed" in card) == (private and not secret)
        assert ("epsilon" in card) == private
        assert not secret or secret not in card
