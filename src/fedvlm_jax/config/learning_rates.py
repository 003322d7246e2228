"""The schedule of the learning rates over the rounds of a run."""

from fedvlm_jax.config.run_options import TrainOptions


def find_rates(train: TrainOptions, round_: int) -> dict[str, float]:
    """Return the learning rates of A and B in a round: they rise over the rounds of warm-up and fall late.

    >>> find_rates(TrainOptions(rounds=8, learning_rate_a=4.0, learning_rate_b=8.0, warmup_rounds=3), 1)
    {'a': 1.0, 'b': 2.0}
    """
    factor = train.decay if round_ > train.decay_at * train.rounds else 1.0
    factor *= min(1.0, round_ / (train.warmup_rounds + 1))
    return {"a": train.learning_rate_a * factor, "b": train.learning_rate_b * factor}
