"""FedPGP (arXiv 2405.09771): a soft prompt σ + U V, σ averaged, U and V private, and a contrast that keeps σ general.

    F_k = CE + μ · mean_c −log(e^{⟨f⁰_c, f^σ_c⟩/τ} / (e^{⟨f⁰_c, f^σ_c⟩/τ} + e^{⟨f^σ_c, f_c⟩/τ}))

f⁰ are the classes' embeddings under the words of `--data.class-prompt`, f^σ under σ alone, f under all. As in the
authors' code μ is 0.5 (there also FedProx's), τ is 0.5 and U V has rank 4. They draw σ, U and V; here σ begins at the
words and V at zero, so that a fresh prompt changes nothing. Their code also trains no client 5 in its baselines
(`idxs_users.pop(5)`), which nothing here does.

The gradient of the contrast is added after that of CE is clipped.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Client, Context, Key, Method, MethodOptions, Setup, Updated
from fedvlm_jax.methods.components.factors import matmul, only
from fedvlm_jax.methods.components.soft_prompts import PROMPT_ALONE, draw_like, find_path, get_leaf, set_leaf
from fedvlm_jax.methods.rule_based import Parts, make_share_method
from fedvlm_jax.utils.option_ranges import Count, NonNegative, Positive

SEED = 43


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of fedpgp"""

    rank: Count = 4
    """Rank of the private part U V."""
    mu: NonNegative = 0.5
    """Weight of the contrast."""
    temperature: Positive = 0.5
    """Temperature of the contrast."""


def make(setup: Setup) -> Method:
    """Make fedpgp: a share rule for σ, with the gradient of the contrast added in every step."""
    options = setup.own(Options)
    sigma, u, v = (find_path(setup, name) for name in (lora.PROMPT, "u", "v"))
    source = "arXiv 2405.09771: prompts σ + U_k V_k; σ̄ = Σ p_k σ_k is shared; CE + μ · contrast of f⁰, f^σ and f"

    def extend(adapter: lora.Adapter) -> PyTree:
        prompt = get_leaf(adapter, sigma)
        drawn = draw_like(prompt, SEED, len(prompt), options.rank)
        return set_leaf(set_leaf(adapter, u, drawn), v, jnp.zeros((options.rank, prompt.shape[1]), prompt.dtype))

    def assemble(factors: PyTree) -> lora.Adapter:
        product = matmul(get_leaf(factors, u), get_leaf(factors, v))
        return set_leaf({}, sigma, get_leaf(factors, sigma) + product)

    parts = Parts(
        extend=extend, assemble=assemble, trained=(only("prompt", "u", "v"),), refuses=PROMPT_ALONE, prompt="needed"
    )
    method = make_share_method("fedpgp", source, lora.Rule(r"(^|/)prompt$"), setup, parts)

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        embed = setup.texts
        assert embed is not None, "a method that needs classes is made for a model that has some"

        def contrast(factors: PyTree, words: Float[Array, "C E"]) -> Float[Array, ""]:
            general = embed(ctx.params, set_leaf({}, sigma, get_leaf(factors, sigma)))
            own = embed(ctx.params, assemble(factors))
            return options.mu * contrast_texts(words, general, own, options.temperature)

        def train(factors: PyTree, optimizer: PyTree, client: Client, **choices: Any) -> Any:
            words, others = embed(ctx.params, None), choices.pop("nudge", None)

            def nudge(moving: PyTree) -> PyTree:
                gradient = jax.grad(contrast)(moving, words)
                return gradient if others is None else jax.tree.map(jnp.add, others(moving), gradient)

            return ctx.train(factors, optimizer, client, **choices, nudge=nudge)

        ctx_with = ctx._replace(train=train)
        return method.client_update(ctx_with, server=server, personal=personal, client=client, key=key)

    return replace(method, client_update=client_update)


def contrast_texts(
    words: Float[Array, "C E"], general: Float[Array, "C E"], own: Float[Array, "C E"], temperature: float
) -> Float[Array, ""]:
    """Compute the mean over classes of −log of the share that ⟨words, general⟩ has beside ⟨general, own⟩.

    >>> one = jnp.ones((1, 1))
    >>> round(float(contrast_texts(one, one, one, 0.5)), 4)
    0.6931
    """
    likeness = jnp.stack([(words * general).sum(-1), (general * own).sum(-1)], axis=-1) / temperature
    return -jax.nn.log_softmax(likeness, axis=-1)[..., 0].mean()
