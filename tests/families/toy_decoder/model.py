"""The model, its names in checkpoints, and the record that it is to the package."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedvlm_jax import lora
from fedvlm_jax.distributed.sharding import Cut
from fedvlm_jax.errors import UserError
from fedvlm_jax.models.base import Vlm, select_leaves
from fedvlm_jax.models.beam_search import Cache, Decoder, Settings
from fedvlm_jax.models.generation import make_generate
from fedvlm_jax.models.layers import HIDDEN, USUAL, Norm, Stacking, dot_attention, scanned
from fedvlm_jax.models.weight_table import Rule, Table, dense, weights

PAD, EOS, IMAGE = 0, 1, 2
PROJECTIONS = "q_proj|k_proj|v_proj|o_proj|up_proj|down_proj"
VISION = ("vision/", "connector/")
TABLE = Table(
    rules=(
        *dense("{whole}", "{whole}"),
        *dense("layers.{layer}.{projection}", "layers/{projection}"),
        *weights("layers.{layer}.{norm}", "layers/{norm}", "scale"),
        *weights("norm", "norm", "scale"),
        Rule("{embedding}.weight", "{embedding}/embedding"),
    ),
    fields={"whole": "vision|connector", "projection": PROJECTIONS, "norm": "norm[12]", "embedding": "tokens|places"},
)


@dataclasses.dataclass(frozen=True)
class Config:
    model_type: str = "toy_decoder"
    vocabulary: int = 260
    width: int = 16
    heads: int = 2
    depth: int = 2
    positions: int = 192
    side: int = 16
    patch: int = 8


def read_config(values, file):
    try:
        return Config(**values)
    except TypeError as error:
        raise UserError(f"{file}: {error}") from None


class Layer(nn.Module):
    """Attends to a prompt's keys, where there are some, and to those of its rows: given ones up to `index`, or new."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, prompt, kept, index, bias):  # x [N, U, D]; keys [N, H, S, d]; bias [N, 1, U, S]
        width, heads = self.config.width, self.config.heads
        normed = Norm(self.dtype, name="norm1")(x)
        query, *new = (self._split(nn.Dense(width, dtype=self.dtype, name=f"{n}_proj")(normed), heads) for n in "qkv")
        if kept is not None:
            new = [jax.lax.dynamic_update_slice_in_dim(a, b, index, 2) for a, b in zip(kept, new, strict=True)]
        key, value = new if prompt is None else (jnp.concatenate(pair, 2) for pair in zip(prompt, new, strict=True))
        x = x + nn.Dense(width, dtype=self.dtype, name="o_proj")(dot_attention(query, key, value, bias))
        wide = nn.gelu(nn.Dense(2 * width, dtype=self.dtype, name="up_proj")(Norm(self.dtype, name="norm2")(x)))
        return x + nn.Dense(width, dtype=self.dtype, name="down_proj")(wide), tuple(new)

    def _split(self, x, heads):
        return x.reshape(*x.shape[:-1], heads, -1).swapaxes(1, 2)


class Toy(nn.Module):
    config: Config
    dtype: jnp.dtype = jnp.float32
    stacking: Stacking = USUAL

    def setup(self):
        config = self.config
        self.vision = nn.Dense(config.width, dtype=self.dtype)
        self.connector = nn.Dense(config.width, dtype=self.dtype)
        self.tokens = nn.Embed(config.vocabulary, config.width, dtype=self.dtype)
        self.places = nn.Embed(config.positions, config.width, dtype=self.dtype)
        build = scanned(Layer, config.depth, (0, 0, nn.broadcast, nn.broadcast), self.stacking)
        self.layers = build(config, self.dtype)
        self.norm = Norm(self.dtype)

    def image_features(self, pixels):
        side, patch = pixels.shape[1] // self.config.patch, self.config.patch
        patches = pixels.reshape(-1, side, patch, side, patch, 3).swapaxes(2, 3).reshape(-1, side * side, patch**2 * 3)
        return self.connector(nn.gelu(self.vision(patches.astype(self.dtype))))

    def encode(self, batch):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        features = batch.get("image_features")
        features = self.image_features(batch["pixel_values"]) if features is None else features.astype(self.dtype)
        # Image tokens come first in every prompt.
        x = jnp.concatenate([features, self.tokens(ids[:, features.shape[1] :])], 1)
        x = x + self.places(jnp.arange(ids.shape[1]))
        seen = jnp.tri(ids.shape[1], dtype=bool) & (mask[:, None, None, :] != 0)
        x, kept = self.layers(x, None, None, None, jnp.where(seen, 0.0, HIDDEN))
        last = jnp.take_along_axis(self.norm(x), (mask.sum(-1) - 1)[:, None, None], 1)[:, 0]
        return {"keys": tuple(jnp.moveaxis(leaf, 1, 0) for leaf in kept), "last": last}

    def states(self, memory, batch):
        mask, labels = batch["attention_mask"], batch["labels"]
        answers = labels.size // labels.shape[0] // labels.shape[-1]
        inputs = jnp.maximum(labels, 0).reshape(-1, labels.shape[-1])
        lengths, mask = (jnp.repeat(x, answers, 0) for x in (mask.sum(-1), mask))
        x = self.tokens(inputs) + self.places(lengths[:, None] + jnp.arange(inputs.shape[1]))
        own = jnp.broadcast_to(jnp.tri(inputs.shape[1], dtype=bool), (len(inputs), inputs.shape[1], inputs.shape[1]))
        seen = jnp.concatenate([jnp.broadcast_to(mask[:, None] != 0, (*own.shape[:2], mask.shape[-1])), own], -1)
        x, _ = self.layers(x, self._repeat(memory, answers), None, None, jnp.where(seen, 0.0, HIDDEN)[:, None])
        first = jnp.repeat(memory["last"], answers, 0)[:, None]
        hidden = jnp.concatenate([first, self.norm(x)[:, :-1]], 1)
        return hidden.reshape(*labels.shape, -1), self.say(hidden).reshape(*labels.shape, -1)

    def say(self, hidden):
        return self.tokens.attend(hidden).astype(jnp.promote_types(jnp.float32, self.dtype))

    def step(self, ids, index, cache, mask):  # ids [B, K]; beams' keys [L, B, K, H, S, d]
        batch, beams = ids.shape
        kept = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], batch * beams, *leaf.shape[3:]), cache.beams)
        lengths, mask = (jnp.repeat(x, beams, 0) for x in (mask.sum(-1), mask))
        x = (self.tokens(ids).reshape(batch * beams, -1) + self.places(lengths + index))[:, None]
        told = jnp.broadcast_to(jnp.arange(kept[0].shape[-2]) <= index, (len(x), kept[0].shape[-2]))
        bias = jnp.where(jnp.concatenate([mask != 0, told], -1), 0.0, HIDDEN)[:, None, None]
        x, kept = self.layers(x, self._repeat(cache.prompt, beams), kept, index, bias)
        hidden = self.norm(x).reshape(batch, beams, -1)
        kept = jax.tree.map(lambda new, old: new.reshape(old.shape), kept, cache.beams)
        return hidden, self.say(hidden), cache._replace(beams=kept)

    def everything(self, batch):
        return self.states(self.encode(batch), batch)

    def _repeat(self, memory, times):
        """The prompt's keys [L, B · times, H, T, d]."""
        return tuple(jnp.repeat(jnp.moveaxis(leaf, 1, 0), times, 1) for leaf in memory["keys"])


def build(config, *, dtype=jnp.float32, stacking=USUAL, generation_config=None):
    module = Toy(config, dtype, stacking)
    call = lora.inject(module.apply)
    tokens = (config.side // config.patch) ** 2

    def example_batch():
        ids = jax.ShapeDtypeStruct((1, tokens + 1), jnp.int32)
        pixels = jax.ShapeDtypeStruct((1, config.side, config.side, 3), jnp.float32)
        labels = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids, "labels": labels}

    def init(key):
        zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in example_batch().items()}
        zeros |= {"attention_mask": zeros["attention_mask"] + 1}
        return dict(module.init(key, zeros, method="everything")["params"])

    def image_features(params, adapter, pixels):
        seeing = select_leaves(adapter, lambda path: path.startswith(VISION))
        return call(params, seeing, pixels, method="image_features")

    def encode(params, adapter, batch):
        if "memory" in batch:
            return batch["memory"]
        seen = "image_features" in batch
        part = select_leaves(adapter, lambda path: not (seen and path.startswith(VISION)))
        return call(params, part, batch, method="encode")

    def states(params, adapter, batch):
        part = select_leaves(adapter, lambda path: not path.startswith(VISION))
        return call(params, part, encode(params, adapter, batch), batch, method="states")

    def settings():
        return Settings(
            num_beams=1, decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_ids=(EOS,), forced_bos_token_id=None,
            forced_eos_token_ids=(), no_repeat_ngram_size=0, min_length=0, min_new_tokens=0, length_penalty=1.0,
            early_stopping=False,
        )  # fmt: skip

    def open_decoder(params, adapter, batch, beams, length):
        memory, mask = encode(params, adapter, batch), batch["attention_mask"]
        rows = len(mask)
        shape = (config.depth, rows, beams, config.heads, length, config.width // config.heads)

        def first(ids):
            last = jnp.repeat(memory["last"][:, None], beams, 1)
            logits = call(params, select_leaves(adapter, lambda path: path.startswith("tokens/")), last, method="say")
            return last, logits, Cache((jnp.zeros(shape, dtype),) * 2, memory)

        def step(ids, position, cache):
            part = select_leaves(adapter, lambda path: not path.startswith(VISION))
            return call(params, part, ids, position - 1, cache, mask, method="step")

        return Decoder(rows, first, step)

    def image_tokens(height, width):
        if height % config.patch or width % config.patch:
            raise UserError(f"a picture of {height}x{width} pixels does not divide into patches of {config.patch}")
        return height * width // config.patch**2

    return Vlm(
        family="toy_decoder",
        config=config,
        fingerprint=repr(config),
        dtype=dtype,
        init=init,
        image_features=image_features,
        encode=encode,
        states=states,
        generate=make_generate(settings, open_decoder),
        settings=settings,
        image_tokens=image_tokens,
        image_width=config.width,
        image_token_id=IMAGE,
        vocabulary=config.vocabulary,
        positions=config.positions,
        shared_positions=True,
        components={
            "vision": "vision/", "connector": "connector/", "decoder": "(layers|norm|places)/", "embedding": "tokens/",
        },
        targets=f"layers/({PROJECTIONS})",
        cuts=(Cut(r"layers/(q|k|v|up)_proj/(kernel|bias)", (-1,)), Cut(r"layers/(o|down)_proj/kernel", (-2,))),
        table=TABLE,
        write_configs=lambda folder: (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config))),
        example_batch=example_batch,
    )  # fmt: skip
