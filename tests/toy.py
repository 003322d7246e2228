"""A model small enough to work out by hand, in the shape of a `Vlm`: logits = fc2(tanh(fc1(features))).

It does not look at what it has said so far: several answers to one prompt have the same logits.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from prompted_toy import make_prompted

from fedvlm_jax import lora
from fedvlm_jax.config.method_checks import declare
from fedvlm_jax.config.run_options import Run, methods_available
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.distributed.sharding import replicate
from fedvlm_jax.federation.local_training import make_local_trainer
from fedvlm_jax.federation.round import make_round, to_waves
from fedvlm_jax.methods import Client, Setup, load_method
from fedvlm_jax.models.beam_search import Cache, Decoder, Settings
from fedvlm_jax.models.generation import make_generate
from fedvlm_jax.objectives import load_objective

WIDTH, VOCABULARY, LABELS = 6, 5, 3
WRITES = {"bind": None, "prompt_at": "", "layers": (), "texts": None, "image_width": WIDTH}
"""Fields of a model that writes its answers."""
WRITING = [name for name in methods_available() if not declare(name, Run()).classes]
"""Methods for models that write their answers, as most here are; the others' are tried on a CLIP."""
SPEC = lora.LoRA(rank=2, alpha=4.0, targets="fc")
SETTINGS = Settings(
    num_beams=1, decoder_start_token_id=VOCABULARY, pad_token_id=0, eos_token_ids=(0,), forced_bos_token_id=None,
    forced_eos_token_ids=(), no_repeat_ngram_size=0, min_length=0, min_new_tokens=0, length_penalty=1.0,
    early_stopping=False,
)  # fmt: skip
"""Answers end with token 0."""


class Half(nn.Module):
    """One layer, in a room of its own, because some methods tell encoder and decoder apart."""

    layer: str
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width, name=self.layer)(x)


class Toy(nn.Module):
    @nn.compact
    def __call__(self, features):
        hidden = jnp.tanh(Half("fc1", 8, name="encoder")(features))
        said = Half("fc2", LABELS * VOCABULARY, name="decoder")(hidden)
        return said.reshape(*features.shape[:-1], LABELS, VOCABULARY)


def make_toy():
    model = Toy()
    example = jnp.zeros((1, WIDTH))
    params = model.init(jax.random.key(0), example)["params"]
    forward = lora.inject(model.apply)

    def logits(params, adapter, batch):
        found = forward(params, adapter, batch["image_features"])
        several = batch["labels"].ndim == found.ndim
        return jnp.broadcast_to(found[..., None, :, :], (*batch["labels"].shape, VOCABULARY)) if several else found

    def open_decoder(params, adapter, batch, beams, length):
        said = forward(params, adapter, batch["image_features"])
        states = jnp.zeros((len(said), beams, 1))

        def say(count):
            at = jax.lax.dynamic_index_in_dim(said, count, 1)
            return states, jnp.broadcast_to(at, (len(said), beams, VOCABULARY)), Cache({}, {})

        return Decoder(len(said), lambda ids: say(0), lambda ids, count, cache: say(count))

    return SimpleNamespace(
        logits=logits, sites=lora.find_sites(model.apply, params, example), component=lambda path: None,
        settings=lambda: SETTINGS, generate=make_generate(lambda: SETTINGS, open_decoder), **WRITES,
    ), params  # fmt: skip


def make_method(
    name, *, objective="sft", optimizer="adamw", keep_optimizer=True, common_start=True, clip_norm=1.0, **choices
):
    """-> vlm, params, trainer, method, the adapter that all start from."""
    halves = {name: f"{name}/" for name in ("encoder", "decoder")}
    choices = {
        "population": 4,
        "cohort": 4,
        "places": 4,
        "rounds": 4,
        "local_steps": 3,
        "components": halves,
        **choices,
    }
    declared = declare(name, Run())
    vlm, params, spec = make_prompted(declared) if declared.classes else (*make_toy(), SPEC)
    trainer = make_local_trainer(vlm, load_objective(objective), optimizer=optimizer, clip_norm=clip_norm)
    setup = Setup(
        sites=vlm.sites,
        spec=spec,
        start_optimizer=trainer.start,
        texts=vlm.texts,
        width=vlm.image_width,
        keep_optimizer=keep_optimizer,
        common_start=common_start,
        **choices,
    )
    adapter = lora.init(jax.random.key(9), vlm.sites, spec)
    return vlm, params, trainer, load_method(name, setup), adapter


def make_cohort(clients, *, rows=10, steps=3, batch=4, seed=0):
    """A cohort of random data, as host arrays [K, …], everybody new."""
    rng = np.random.default_rng(seed)
    return Client(
        examples={
            "image_features": rng.normal(size=(clients, rows, WIDTH)).astype(np.float32),
            "labels": rng.integers(0, VOCABULARY, (clients, rows, LABELS)).astype(np.int32),
        },
        indices=rng.integers(0, rows, (clients, steps, batch)).astype(np.int32),
        mask=np.ones((clients, steps, batch), bool),
        weight=np.full(clients, 1 / clients, np.float32),
        number=np.arange(clients, dtype=np.int32),
        new=np.ones(clients, bool),
        share=np.full(clients, 1 / clients, np.float32),
    )


def take(cohort, order):
    return jax.tree.map(lambda x: x[np.asarray(order)], cohort)


def start_states(method, server, clients):
    one = jax.eval_shape(lambda: method.init_client(key=jax.random.key(0), server=server, number=jnp.int32(0)))
    return jax.tree.map(lambda x: np.zeros((clients, *x.shape), x.dtype), one)


RATES = {"a": jnp.float32(5e-2), "b": jnp.float32(5e-2)}


def run_round(run, params, server, cohort, weights, states, *, waves=1, round_=1, key=3, phase=0, rates=RATES):
    """One call of a round; states come back as [K, …]."""
    cohort, states = to_waves(cohort, waves), to_waves(states, waves)
    weights, server = jnp.asarray(weights, jnp.float32), replicate(make_mesh(1), server)
    out = run(params, server, states, cohort, weights, rates, jnp.int32(round_), jax.random.key(key), phase=phase)
    personal = jax.tree.map(lambda x: np.swapaxes(np.asarray(x), 0, 1).reshape(-1, *x.shape[2:]), out.personal)
    return out, personal


def trace_rounds(name, **choices):
    """A method without compiling anything: the rounds' phases; per phase, what is computed (text) and returned."""
    _, params, trainer, method, adapter = make_method(name, **choices)
    run = make_round(method, trainer, make_mesh(1))
    server = method.init(adapter=adapter)
    if method.base is not None:
        params = method.base(params=params, server=server)
    states, cohort = to_waves(start_states(method, server, 4), 1), to_waves(make_cohort(4), 1)
    weights, key = jnp.full(4, 0.25), jax.random.key(0)
    phases = [method.phase(number) for number in range(1, 5)]
    traced = {
        phase: run.trace(params, server, states, cohort, weights, RATES, jnp.int32(1), key, phase=phase)
        for phase in dict.fromkeys(phases)
    }
    return phases, {phase: (str(one.jaxpr), one.out_info) for phase, one in traced.items()}
