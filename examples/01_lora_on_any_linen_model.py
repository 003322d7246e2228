# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # LoRA on any linen model
#
# The utilities of `fedvlm_jax.lora` work on any Flax linen model. The model is not changed and knows nothing of them:
# an adapter is a plain pytree in a variable collection of its own, and one interceptor adds its product to the layers.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fedvlm_jax import lora


class Classifier(nn.Module):
    """A small model of yours, whatever it is."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="v_proj")(nn.relu(nn.Dense(32, name="q_proj")(x)))


model, points = Classifier(), jax.random.normal(jax.random.key(1), (64, 16))
params = model.init(jax.random.key(0), points)["params"]

# %% [markdown]
# ## Sites and an adapter
#
# `find_sites` traces the model once, without computing anything. Targets are regular expressions, searched in the
# sites' paths.

# %%
sites = lora.find_sites(model.apply, params, points)
spec = lora.LoRA(rank=2, alpha=4, targets=r"(q|v)_proj$")
adapter = lora.init(jax.random.key(0), sites, spec)
print(jax.tree.map(jnp.shape, adapter))

# %% [markdown]
# B starts at zero, so a fresh adapter changes nothing. `inject` gives a function that takes the adapter as an argument;
# `None` is the bare base.

# %%
forward = lora.inject(model.apply)
print("moved by", float(jnp.abs(forward(params, adapter, points) - forward(params, None, points)).max()))

# %% [markdown]
# ## Training
#
# `scale` is a constant of the adapter: `lora.trainable` is optax's mask of what is to be trained.

# %%
labels = (points[:, 0] > 0).astype(jnp.int32)
optimizer = optax.masked(optax.adam(3e-2), lora.trainable)


@jax.jit
def step(adapter, state):
    def loss(adapter):
        logits = forward(params, adapter, points)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, grads = jax.value_and_grad(loss)(adapter)
    updates, state = optimizer.update(grads, state, adapter)
    return optax.apply_updates(adapter, updates), state, value


state = optimizer.init(adapter)
first = None
for _ in range(60):
    adapter, state, loss = step(adapter, state)
    first = loss if first is None else first
print(f"loss {first:.3f} -> {loss:.3f}")
assert loss < first / 2

# %% [markdown]
# ## Many adapters, one base
#
# Under `vmap` over adapters the base is not copied: its products run once over all rows.

# %%
three = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), adapter)
many = jax.vmap(forward, in_axes=(None, 0, None))
print(many(params, three, points).shape)

# %% [markdown]
# ## Share, merge, compress
#
# A share rule splits an adapter into what leaves a client and what stays; single layers of a scanned stack have paths
# of their own, `layers/3/…/b`.

# %%
shared, personal = lora.partition(adapter, r"/b$", sites)
adapter = lora.combine(shared, personal)
merged = lora.merge(params, adapter)  # W + scale · a b; lora.unmerge takes it off again
error = jnp.abs(model.apply({"params": merged}, points) - forward(params, adapter, points)).max()
print(f"merged and injected differ by {error:.1e}")
assert error < 1e-4

double = lora.concatenate(adapter, adapter)  # the sum of two adapters, of twice the rank
smaller = lora.truncate(double, 2)  # QR and a small SVD; the product itself is never formed
print(smaller["q_proj"]["a"].shape)

# %% [markdown]
# Adapted are `nn.Dense`, `nn.DenseGeneral`, `nn.Conv` (ungrouped) and `nn.Embed` (tied `attend` too). Scanned models
# must carry the collection: `nn.scan(..., variable_axes={"params": 0, "lora": 0})`. An adapter leaf that no call reads,
# a target that matches nothing, a wrong shape: each is an error that lists what there is.
