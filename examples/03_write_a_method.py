# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Write a method
#
# A federated method is a record of pure functions, which the engine calls with keywords. This page writes one from
# nothing and plays it on four clients with a linear model. What is needed to make it a method of the command line is in
# *How to add a method*.
#
# The method: B is averaged at the server and A stays with its client, as in pLoRA; but a client begins a round half way
# between its own B and the server's.

# %%
import jax
import jax.numpy as jnp
from flax import linen as nn

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Client, Context, Method, Setup
from fedvlm_jax.utils import tree

FACTOR_B = r"/b$"


def make(setup: Setup) -> Method:
    """Return the method for a setup."""

    def split(adapter):
        return lora.partition(adapter, FACTOR_B, setup.sites)

    def half_way(one, other):
        return jax.tree.map(lambda x, y: (x + y) / 2, one, other)

    def init(*, adapter):
        b, private = split(adapter)
        return {"b": b, "private": private}

    def init_client(*, key, server, number):
        del key, number
        return {"b": server["b"], "private": server["private"]}

    def client_update(ctx, *, server, personal, client, key):
        del key
        start = lora.combine(half_way(personal["b"], server["b"]), personal["private"])
        trained, _, metrics = ctx.train(start, setup.start_optimizer(start), client)
        b, private = split(trained)
        message = jax.tree.map(jnp.subtract, b, server["b"])  # an update: a difference to what the server sent
        return {"b": b, "private": private}, message, metrics

    def aggregate(ctx, *, server, messages, weights):
        del ctx  # with weights that are all 0 the sum is 0, and the server stays as it is
        return {**server, "b": jax.tree.map(jnp.add, server["b"], tree.weighted_sum(messages, weights))}, {}

    def personalise(*, server, personal):
        return lora.combine(half_way(personal["b"], server["b"]), personal["private"])

    def trained(*, server, personal, message):
        del server, message
        return lora.combine(personal["b"], personal["private"])

    return Method(
        name="half-way",
        source="ours: B̄ = Σ p_k B_k; a client begins at (B_k + B̄) / 2 with its own A",
        init=init,
        init_client=init_client,
        client_update=client_update,
        aggregate=aggregate,
        personalise=personalise,
        trained=trained,
        download=lambda *, server: server["b"],
    )


# %% [markdown]
# ## A world of four clients
#
# The base is one linear layer. Each client wants it moved in a direction that all share and a little in a direction of
# its own.

# %%
CLIENTS, ROWS, STEPS = 4, 32, 8
x = jax.random.normal(jax.random.key(0), (CLIENTS, ROWS, 10))


class Base(nn.Module):
    """One linear layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, use_bias=False, name="layer")(x)


base = Base()
params = base.init(jax.random.key(1), x[0])["params"]
common = jax.random.normal(jax.random.key(2), (10, 6))
own = 0.3 * jax.random.normal(jax.random.key(3), (CLIENTS, 10, 6))
y = jnp.einsum("kmi,kio->kmo", x, params["layer"]["kernel"] + common + own)

sites = lora.find_sites(base.apply, params, x[0])
forward = lora.inject(base.apply)
spec = lora.LoRA(rank=4, alpha=4)

# %% [markdown]
# ## Local training
#
# In a run the engine gives `ctx.train`: `S` local steps on batches of the client's rows, with the run's objective and
# optimiser. Here it is plain gradient descent.


# %%
def loss_of(adapter, rows):
    return jnp.mean(jnp.square(forward(params, adapter, rows["x"]) - rows["y"]))


def train(factors, optimizer, client):
    def step(factors, _):
        loss, gradient = jax.value_and_grad(loss_of)(factors, client.examples)
        return jax.tree.map(lambda w, g, learn: w - 0.1 * g * learn, factors, gradient, lora.trainable(factors)), loss

    factors, losses = jax.lax.scan(step, factors, None, length=STEPS)
    return factors, optimizer, {"loss": losses.mean()}


# %% [markdown]
# ## Rounds
#
# The engine vmaps `client_update` over the cohort and hands all messages to `aggregate`. It does so in waves over a
# mesh, with drop-outs and checkpoints; these are its bones.

# %%
setup = Setup(sites=sites, spec=spec, start_optimizer=lambda factors, trained=None: {}, population=CLIENTS)
method = make(setup)
server = method.init(adapter=lora.init(jax.random.key(4), sites, spec))
numbers, weights = jnp.arange(CLIENTS), jnp.full(CLIENTS, 1 / CLIENTS)
keys = jax.random.split(jax.random.key(5), CLIENTS)
personal = jax.vmap(lambda key, number: method.init_client(key=key, server=server, number=number))(keys, numbers)
clients = Client(
    examples={"x": x, "y": y},
    indices=jnp.zeros((CLIENTS, STEPS, ROWS), int),
    mask=jnp.ones((CLIENTS, STEPS, ROWS), bool),
    weight=weights,
    number=numbers,
    new=jnp.ones(CLIENTS, bool),
    share=weights,
)


@jax.jit
def play(server, personal, number, key):
    ctx = Context(params, number, 0, {}, train, key)
    keys = jax.random.split(key, CLIENTS)

    def update(personal, client, key):
        return method.client_update(ctx, server=server, personal=personal, client=client, key=key)

    personal, messages, metrics = jax.vmap(update)(personal, clients, keys)
    server, _ = method.aggregate(ctx, server=server, messages=messages, weights=weights)
    return server, personal, metrics["loss"].mean()


losses = []
for number in range(1, 13):
    server, personal, loss = play(server, personal, jnp.int32(number), jax.random.key(number))
    losses.append(float(loss))
print("loss by round:", [round(loss, 3) for loss in losses])
assert losses[-1] < losses[0] / 4

# %% [markdown]
# ## What the clients use
#
# `personalise` gives each client's adapter.

# %%
adapters = jax.vmap(lambda state: method.personalise(server=server, personal=state))(personal)
mine = jax.vmap(loss_of)(adapters, clients.examples)
base_alone = jnp.mean(jnp.square(jnp.einsum("kmi,io->kmo", x, params["layer"]["kernel"]) - y), axis=(1, 2))
print("base alone:", base_alone.round(2))
print("personal:  ", mine.round(2))
assert (mine < base_alone).all()
