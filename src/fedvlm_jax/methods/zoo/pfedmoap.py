"""pFedMoAP (arXiv 2410.10114): soft prompts of others are downloaded as frozen experts, and a private gate mixes them.

A client trains its prompt, from the average of those trained last, and from its second round on its gate too; it sends
its prompt. The server keeps each client's last (of the last 256 at most) and gives a client K − 1 of them, the nearest
to its own or random ones. A client uses the prompt that it trained, not the average. The head is
`models.clip.heads.moap`, with the authors' numbers: λ 0.5, scores times 10, 8 heads, embeddings pooled to 128.

Different from the authors' code, where it does what the paper does not say: selection is by distance by default, as the
paper has it (there `--sparse_selection` is never read, so it is random, and its branch for the nearest fails); a
client's first gate is drawn for it (there it is that of the client before); each client has its own optimiser's state
(there one for all). The gate has the learning rate of A, the prompt that of B.
"""

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge
from jaxtyping import Array, Bool, Float, PyTree

from fedvlm_jax import lora
from fedvlm_jax.errors import UserError
from fedvlm_jax.methods import base
from fedvlm_jax.methods.base import (
    AVERAGING,
    Aggregated,
    Client,
    Context,
    Key,
    Method,
    MethodOptions,
    Number,
    Setup,
    Updated,
    Weights,
)
from fedvlm_jax.methods.components.factors import norm_of
from fedvlm_jax.methods.components.personalized_download import NOBODY, count_places, renew, start_pool
from fedvlm_jax.methods.components.soft_prompts import PROMPT_ALONE, find_path, get_leaf, set_leaf
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.option_ranges import Count, NonNegative, Positive

MOST = 256
"""Clients whose prompts the server keeps, at most."""
SEED = 47
_WHOLE = {"top-k": "others use a client's prompt whole, as it was trained"}
_NO_GATE = "in 1 round pfedmoap trains no gate: a client's is trained from its second round on"
_NO_AVERAGE = "clients do not use the average, but begin their rounds with it"


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of pfedmoap"""

    experts: Annotated[int, Ge(2)] = 10
    """Experts that a gate mixes, the client's own among them."""
    random: bool = False
    """Give a client random experts, other ones in every round, in place of the nearest to its own prompt."""
    weight: NonNegative = 0.5
    """Weight (lambda) of the logits under the own prompt beside those of the mixture."""
    scaling: Positive = 10.0
    """Factor of the scores of the gate's attention."""
    gate_width: Count = 128
    """Numbers that embeddings are pooled to for the gate, at most: it has to divide theirs."""
    gate_heads: Count = 8
    """Heads of the gate's attention."""


def make(setup: Setup) -> Method:
    """Make pfedmoap."""
    options, path = setup.own(Options), find_path(setup)
    slots = max(1, min(options.experts, count_places(setup, MOST)) - 1)
    width = choose_width(options, setup.width)

    def init(adapter: lora.Adapter) -> PyTree:
        return {"shared": adapter, "pool": start_pool(adapter, setup, MOST)}

    def init_client(key: Key, server: PyTree, number: Number) -> PyTree:
        gate = draw_gate(key, width, options.gate_heads)
        own = {**server["shared"], "head": {"moap": {"gate": gate}}}
        state = {"own": own, "number": jnp.asarray(number, jnp.int32)}
        state |= {"sent": jnp.zeros((), bool), "gated": jnp.zeros((), bool)}
        return state | setup.kept(setup.start_optimizer(own, is_trained))

    def find_experts(server: PyTree, number: Number) -> PyTree:
        """Select what a client downloads: `experts` [slots, …], and `present` [slots]; a view has them already."""
        if "experts" in server:
            return {name: server[name] for name in ("experts", "present")}
        pool = server["pool"]
        prompts, others = get_leaf(pool["moved"], path), (pool["number"] != NOBODY) & (pool["number"] != number)
        score = score_experts(prompts, pool["number"], jnp.max(pool["round"]), jnp.asarray(number), options.random)
        found, at = jax.lax.top_k(jnp.where(others, score, -jnp.inf), slots)
        present = found > -jnp.inf
        experts = jnp.where(present[:, None, None], jnp.take(prompts, at, axis=0), 0)
        return {"experts": set_leaf({}, path, experts), "present": present}

    def assemble(own: PyTree, present: Bool[Array, " slots"], **leaves: Array) -> lora.Adapter:
        """Give the own prompt and gate the rest of their head; there are experts only where it says so."""
        there = jnp.concatenate([jnp.ones(1), present.astype(jnp.float32)])
        numbers = {"weight": jnp.float32(options.weight), "scaling": jnp.float32(options.scaling)}
        return tree.combine(own, {"head": {"moap": {"present": there, **numbers, **leaves}}})

    def use(own: PyTree, server: PyTree, personal: PyTree) -> lora.Adapter:
        found = find_experts(server, personal["number"])
        prompts = jnp.concatenate([get_leaf(own, path)[None], get_leaf(found["experts"], path)])
        return assemble(set_leaf(own, path, prompts), found["present"] & personal["gated"])

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        del key
        assert setup.texts is not None, "a method that needs classes is made for a model that has some"
        found, again = find_experts(server, personal["number"]), personal["sent"]
        # Frozen prompts embed the classes alike in all steps, so that is done once.
        experts = setup.texts(ctx.params, found["experts"])
        own = {**personal["own"], **server["shared"]}
        optimizer = personal["optimizer"] if setup.keep_optimizer else setup.start_optimizer(own, is_trained)
        new, optimizer, metrics = ctx.train(
            own, optimizer, client, trained=is_trained,
            assemble=lambda factors: assemble(factors, found["present"] & again, experts=experts),
        )  # fmt: skip
        # The gate of a client's first round was not asked, but weight decay would move it.
        new = {**new, "head": tree.choose(again, new["head"], own["head"])}
        moved = {name: jax.tree.map(jnp.subtract, new[name], part) for name, part in server["shared"].items()}
        state = {**personal, "own": new, "sent": jnp.ones((), bool), "gated": again, **setup.kept(optimizer)}
        return tree.choose(client.mask.any(), state, personal), moved, metrics | {"update_norm": norm_of(moved)}

    def aggregate(ctx: Context, server: PyTree, messages: PyTree, weights: Weights) -> Aggregated:
        assert ctx.numbers is not None
        trained = jax.tree.map(jnp.add, server["shared"], messages)
        pool = renew(server["pool"], trained, ctx.numbers, weights, ctx.round)
        update = tree.weighted_sum(messages, weights)
        shared = jax.tree.map(jnp.add, server["shared"], update)
        return {"shared": shared, "pool": pool}, {"shared_norm": norm_of(shared), "shared_update_norm": norm_of(update)}

    def personalise(server: PyTree, personal: PyTree) -> lora.Adapter:
        prompt = jnp.where(personal["sent"], get_leaf(personal["own"], path), get_leaf(server["shared"], path))
        return use(set_leaf(personal["own"], path, prompt), server, personal)

    def trained_adapter(server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter:
        prompt = get_leaf(server["shared"], path) + get_leaf(message, path)
        return use(set_leaf(personal["own"], path, prompt), server, personal)

    def travels(server: PyTree, messages: PyTree) -> base.Travelling:
        experts = jax.eval_shape(lambda server: find_experts(server, jnp.int32(0))["experts"], server)
        return base.shape_of_one(messages), {"shared": server["shared"], "experts": experts}

    return Method(
        name="pfedmoap",
        source="arXiv 2410.10114: P_i sent and kept; K−1 others' P_j are i's frozen experts, mixed by its gate G_i",
        init=init, init_client=init_client, client_update=client_update, aggregate=aggregate, personalise=personalise,
        trained=trained_adapter, download=lambda server: server["shared"], travels=travels, mixes=True,
        broadcast=lambda server, number, last: {"shared": server["shared"], **find_experts(server, number)},
        refuses=dict.fromkeys(AVERAGING, _NO_AVERAGE) | PROMPT_ALONE | _WHOLE, prompt="needed", classes=True,
        unreached=_NO_GATE if setup.rounds < 2 else "",
    )  # fmt: skip


def is_trained(path: str) -> bool:
    """Return whether a leaf is trained: a prompt's, or one of the gate's.

    >>> is_trained("text_model/token_embedding/prompt"), is_trained("head/moap/gate/key")
    (True, True)
    """
    return path.endswith("/prompt") or "/gate/" in path


def choose_width(options: Options, embedding: int) -> int:
    """Choose the gate's width W: the largest number that its heads divide and that divides an embedding's, or 128.

    Raises:
        UserError: there is none.

    >>> [choose_width(Options(), embedding) for embedding in (512, 768, 192)]
    [128, 128, 96]
    """
    if not embedding:  # no model is known yet
        return options.gate_width
    most = min(options.gate_width, embedding)
    fits = [w for w in range(1, most + 1) if embedding % w == 0 and w % options.gate_heads == 0]
    if not fits:
        raise UserError(
            f"--method.gate-heads {options.gate_heads} and --method.gate-width {options.gate_width}: no multiple of "
            f"the heads up to that width divides the {embedding} numbers of the model's embeddings; lower the heads"
        )
    return max(fits)


def draw_gate(key: Key, width: int, heads: int) -> dict[str, Array]:
    """Draw a gate as PyTorch draws linear layers: U(±1/√W), weights and biases.

    >>> gate = draw_gate(jax.random.key(0), 128, 8)
    >>> sum(leaf.size for leaf in gate.values())
    66048
    """
    shape = (heads, width // heads)
    shapes = dict.fromkeys(("query", "key", "value"), (width, *shape)) | {"output": (width, width)}
    shapes |= {f"{name}_bias": size[1:] for name, size in shapes.items()}
    drawn = zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True)
    return {name: jax.random.uniform(at, size, jnp.float32, -1, 1) / width**0.5 for (name, size), at in drawn}


def score_experts(
    prompts: Float[Array, "P n width"], numbers: Array, round_: Array, number: Array, at_random: bool
) -> Float[Array, " P"]:
    """Score prompts for a client: the nearer to its own the higher; at random where it has none here, or is to be.

    >>> prompts = jnp.asarray([0.0, 3.0, 1.0]).reshape(3, 1, 1)
    >>> score_experts(prompts, jnp.asarray([7, 8, 9]), jnp.int32(1), jnp.int32(7), False).tolist()
    [-0.0, -9.0, -1.0]
    """
    mine = numbers == number
    own = jnp.where(mine[:, None, None], prompts, 0).sum(0)
    distance = jnp.square(prompts - own).sum((1, 2))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), round_), number)
    drawn = jax.vmap(lambda at: jax.random.uniform(jax.random.fold_in(key, at)))(numbers)
    return drawn if at_random else jnp.where(mine.any(), -distance, drawn)
