"""Reinforcement learning of a client's own mix of two rewards (PFIT, arXiv 2404.13238v1), by policy gradient.

Every example's question is answered A times with tokens drawn from the model as it is, and with the client's mix w,

    r = w r_1 + (1 − w) r_2,    R = r − β (log π(y) − log π₀(y)),    Â_i = R_i − mean of R over the question's others,
    gradient = −E[Â ∇ log π(y)]

which is the gradient of −(E[r] − β KL(π ‖ π₀)), π₀ the frozen base: REINFORCE with the other samples as the baseline
(arXiv 2402.14740), and the KL in the reward (arXiv 1909.08593, eq. 2). The paper names PPO. Here a set of samples
serves one step alone, and where the policy is the one that drew them PPO's ratio is 1 and its clip never acts: what is
left of it is this gradient, without the network of values that a client would have to train and keep.

Published is the linear mix of two rewards, helpful and safe, by a client's own weights. Both of the paper's rewards are
models. Here, by this project's choice, they are numbers that tokens decide (`answer_rewards`: metrics, or what a file
has for an answer), so that drawing, scoring and the step are one compiled program of fixed shapes. Answers have as many
tokens as the data's labels at most.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fedvlm_jax import lora
from fedvlm_jax.data.batches import IGNORED
from fedvlm_jax.models import Batch, Params, Vlm
from fedvlm_jax.models.beam_search import Settings
from fedvlm_jax.objectives.answer_rewards import cut_at_end, score_answers
from fedvlm_jax.objectives.base import Loss, Objective
from fedvlm_jax.objectives.config import PreferenceOptions
from fedvlm_jax.objectives.log_probs import token_losses
from fedvlm_jax.objectives.reward_tables import OF_ANSWERS, TABLES, Known


def make(options: PreferenceOptions) -> Objective:
    """Make reward, of two rewards and a client's mix of them."""

    def loss(vlm: Vlm, params: Params, adapter: lora.Adapter | None, batch: Batch) -> Loss:
        settings, labels, given = vlm.settings(), batch["labels"], batch
        batch = {name: rows for name, rows in batch.items() if name not in TABLES}
        keys = jax.random.wrap_key_data(batch["sampling_keys"])
        drawn = vlm.generate(
            params, jax.lax.stop_gradient(adapter), batch, labels.shape[-1], samples=options.samples, keys=keys
        )
        answers = cut_at_end(drawn, settings.eos_token_ids)
        gold = jnp.broadcast_to(labels[:, None], (*answers.shape[:2], labels.shape[-1]))
        mix = jnp.broadcast_to(find_mix(options, batch["client"])[:, None], answers.shape[:2])
        known = {name: given[name] for name in TABLES if name in given}
        of_rows = {name: batch[name][:, None] for name in OF_ANSWERS if name in batch}
        known |= {name: jnp.broadcast_to(rows, answers.shape[:2]) for name, rows in of_rows.items()}
        mixed, both = score_answers(options.rewards, mix, answers, gold, find_frame(settings), known)
        asked = {**batch, "labels": answers}
        logits, base = vlm.logits(params, adapter, asked), vlm.logits(params, None, asked)
        ours, theirs = (-token_losses(part, answers)[0].sum(axis=-1) for part in (logits, base))
        counts = (labels != IGNORED).any(axis=-1)
        value = follow_reward(mixed, ours, theirs, counts, options.beta)
        told = {"reward": mixed, "first_reward": both[0], "second_reward": both[1]}
        told |= {"kl": measure_kl(logits, base, answers), "answer_tokens": (answers != IGNORED).sum(axis=-1)}
        return value, {"loss": value, **{name: _average(values, counts) for name, values in told.items()}}

    source = "arXiv 2404.13238v1 (PFIT): E[w r_1 + (1−w) r_2] − β KL(π ‖ π₀), by REINFORCE with leave-one-out baselines"
    return Objective("reward", source, loss, samples=True, select_by="reward", reads=READS)


READS = ("beta", "rewards", "reward_file", "mix", "samples")


def judge_answers(
    options: PreferenceOptions,
    settings: Settings,
    generated: Int[np.ndarray, "N U"],
    labels: Int[np.ndarray, "N V"],
    client: int,
    known: Known | None = None,
) -> Float[np.ndarray, " N"]:
    """Compute a client's mixed reward of generated answers, as `Vlm.generate` gives them, beside gold labels.

    `known` is what the rewards read beside: the tables, and `reward_question` [N] where there is a file.
    """
    answers, who = cut_at_end(jnp.asarray(generated), settings.eos_token_ids), jnp.full(len(labels), client)
    mixed, _ = score_answers(
        options.rewards, find_mix(options, who), answers, jnp.asarray(labels), find_frame(settings),
        {**(known or {}), "client": who},
    )  # fmt: skip
    return np.asarray(mixed)


def find_mix(options: PreferenceOptions, clients: Int[Array, " B"]) -> Float[Array, " B"]:
    """Find the first reward's weight for clients by their numbers; the options' are dealt to them in turn.

    >>> find_mix(PreferenceOptions(mix=(0.25, 0.75)), jnp.asarray([0, 1, 2])).tolist()
    [0.25, 0.75, 0.25]
    """
    return jnp.asarray(options.mix, jnp.float32)[jnp.asarray(clients) % len(options.mix)]


def find_frame(settings: Settings) -> tuple[int, ...]:
    """Find the tokens that begin and end answers, and say nothing."""
    begins = (settings.decoder_start_token_id, settings.forced_bos_token_id)
    return (*settings.eos_token_ids, *(token for token in begins if token is not None))


def follow_reward(
    rewards: Float[Array, "B A"],
    log_probs: Float[Array, "B A"],
    base_log_probs: Float[Array, "B A"],
    counts: Array,
    beta: float,
) -> Float[Array, ""]:
    """Compute −mean(r − β log π/π₀) over the examples that count [B], with the policy's gradient.

    Args:
        rewards: r of A ≥ 2 answers to each example.
        log_probs, base_log_probs: of the answers, summed over their tokens, in nats: under the policy that drew them,
            which is what is differentiated, and under the base.
        counts: which examples count.
        beta: weight of the KL.

    >>> one = jnp.ones((1, 2))
    >>> rule = lambda lp: follow_reward(jnp.asarray([[1.0, 0.0]]), lp, -one, jnp.ones(1, bool), 0.0)
    >>> float(rule(-one)), jax.grad(rule)(-one).tolist()
    (-0.5, [[-0.5, 0.5]])
    """
    rewards = jax.lax.stop_gradient(rewards - beta * (log_probs - base_log_probs))
    others = (rewards.sum(axis=-1, keepdims=True) - rewards) / (rewards.shape[-1] - 1)
    score = (rewards - others) * log_probs
    # The difference is zero, and its gradient is the policy's.
    return -_average(rewards + score - jax.lax.stop_gradient(score), counts)


def measure_kl(
    logits: Float[Array, "B A U V"], base: Float[Array, "B A U V"], answers: Int[Array, "B A U"]
) -> Float[Array, "B A"]:
    """Compute KL(π ‖ π₀) of every token's distribution, summed over an answer's tokens, in nats.

    Over answers that the policy drew its mean is that of the whole answers' KL.
    """
    ours, theirs = (jax.nn.log_softmax(jax.lax.stop_gradient(part), axis=-1) for part in (logits, base))
    per_token = jnp.sum(jnp.exp(ours) * (ours - theirs), axis=-1)
    return jnp.sum(jnp.where(answers == IGNORED, 0.0, per_token), axis=-1)


def _average(values: Float[Array, "B A"], counts: Array) -> Float[Array, ""]:
    """Average over the answers to the examples that count [B]; what does not count may hold any number."""
    kept = jnp.where(counts[:, None], values, 0.0)
    return kept.sum() / jnp.maximum(counts.sum() * values.shape[-1], 1)
