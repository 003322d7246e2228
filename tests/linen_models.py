"""Small linen models of every kind that an adapter can sit on."""

import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(self.width, name="fc2")(jnp.tanh(nn.Dense(2 * self.width, name="fc1")(x))), None


class Model(nn.Module):
    """Embedding (tied), two scanned layers under remat, attention of DenseGenerals, a convolution, a head."""

    carry_lora: bool = True

    @nn.compact
    def __call__(self, ids, image):
        embed = nn.Embed(11, 6, name="embed")
        x = embed(ids)
        image = nn.Conv(6, (3, 3), strides=2, name="patch")(image)
        image = nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(image)
        x = x + image.mean((1, 2))[:, None]
        axes = {"params": 0, "lora": 0} if self.carry_lora else {"params": 0}
        layers = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs={"params": True}, length=3)
        x, _ = layers(6, name="layers")(x, None)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = nn.LayerNorm(name="norm")(x)
        return embed.attend(x)
