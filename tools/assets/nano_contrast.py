"""CLIP-nano's only phase: pictures and texts that are true of them come together (CLIP, arXiv 2103.00020, section 2.3).

The tower begins as SmolVLM-nano's, which learned from the same pictures; class token and text model begin at
random. A step has three contrastive losses with one learned temperature: against the names or keywords of the
batch's concepts, against its subgroups and some others, and against all groups, each text in a language and a template
of its own. It deviates from CLIP where several texts are true of a picture, or several pictures of a text: they share
the target. But for a last stretch the tower sees a random half of a picture's patches, which halves its cost (FLIP,
arXiv 2212.00794).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import nano_augment
import numpy as np
from clip_nano import TEMPLATES
from emoji_texts import LANGUAGES
from nano_corpus import Classes, Corpus, draw_epoch
from nano_training import ROOT, Pretrain, smoothed, spread_kernels, train

from fedvlm_jax.models import load_vlm
from fedvlm_jax.models.clip.model import make_module

LENGTH = 20
"""Tokens that a text is padded or cut to."""
TAG_SHARE = 0.4
"""Of the batch's concepts, how many are stood for by a keyword in the place of their name."""
KIND_WEIGHTS = {"concept": 1.0, "subgroup": 1.0, "group": 0.3}
SUBGROUPS = 40
"""That a step compares with: those of its pictures, and others."""
SPEEDS = {"vision_tower": 0.15}
"""What has learned already goes on more slowly."""
LARGEST_SCALE = np.log(100.0)
TOWER = ROOT / "src" / "fedvlm_jax" / "assets" / "smolvlm-nano"


def begin(config: Any, params: dict, processor: Any, corpus: Corpus) -> dict:
    """Weights to start from: SmolVLM-nano's tower in CLIP's form, and embeddings that tell pictures and texts apart.

    At random embeddings are all but the same, and nothing is learned (cf. `nano_vision`): so both last norms and
    projections are set to give them mean 0 and variance 1 in their main directions, over some pictures and texts.
    """
    pixels = nano_augment.normalize(corpus.pixels[::4])
    params = {**params, "vision_tower": take_tower(params["vision_tower"], pixels)}
    params |= {"text_model": spread_kernels(params["text_model"])}
    ids = encode_texts(processor, [names[language]["label"] for names in corpus.names[::50] for language in LANGUAGES])
    module = make_module(config, jnp.float32)
    states = module.apply({"params": params}, pixels, method=lambda clip, pixels: clip.vision_tower(pixels)[:, 0])
    params |= whiten(params, states, "vision_tower", "post_layernorm", "visual_projection")
    states = module.apply({"params": params}, ids, method=lambda clip, ids: clip.text_model(clip.text_model.embed(ids)))
    states = states[np.arange(len(ids)), (ids == config.text_config.eos_token_id).argmax(1)]
    return params | whiten(params, states, "text_model", "final_layer_norm", "text_projection")


def take_tower(fresh: dict, pixels: np.ndarray) -> dict:
    """SmolVLM-nano's tower in CLIP's form, for normalised ``pixels``.

    CLIP's patches have no bias, which moves into their positions, and its states pass a norm first, which is given the
    scale and the mean that they have without one. The class token, which is new, begins with the mean of all patches in
    the last layer.
    """
    given = load_vlm(TOWER)[1]["vision_tower"]
    kernel, bias = given["patch_embedding"]["kernel"], given["patch_embedding"]["bias"]
    patches = given["position_embedding"]["embedding"] + bias
    step, axes = kernel.shape[:2], ("NHWC", "HWIO", "NHWC")
    states = jax.lax.conv_general_dilated(pixels, kernel, step, "VALID", dimension_numbers=axes)
    states = states.reshape(len(pixels), -1, kernel.shape[-1]) + patches
    norm, layers = fresh["pre_layernorm"], given["layers"]
    attention = layers["self_attn"]
    query = jax.tree.map(lambda leaf: leaf.at[-1].set(0), attention["q_proj"])
    return {
        **fresh,
        "layers": {**layers, "self_attn": {**attention, "q_proj": query}},
        "post_layernorm": given["post_layernorm"],
        "patch_embedding": {"kernel": kernel},
        "position_embedding": {"embedding": fresh["position_embedding"]["embedding"].at[1:].set(patches)},
        "pre_layernorm": {"scale": norm["scale"] * states.std(-1).mean(), "bias": norm["bias"] + states.mean()},
    }


def whiten(params: dict, states: Any, part: str, norm: str, projection: str) -> dict:
    """``part`` and its projection, set so that ``states`` [N, D], which its last norm gave, are whitened."""
    kernel = params[projection]["kernel"]
    sizes, directions = np.linalg.eigh(np.cov(np.asarray(states, np.float64).T))
    sizes, directions = sizes[::-1][: kernel.shape[1]], directions[:, ::-1][:, : kernel.shape[1]]
    white = (directions / np.sqrt(sizes + 0.1 * sizes.mean())).astype(np.float32)
    last = params[part][norm]
    moved = {**last, "bias": last["bias"] - states.mean(0)}
    return {part: {**params[part], norm: moved}, projection: {"kernel": jnp.asarray(white)}}


def show_patches(kept: Any) -> Callable[..., Any]:
    """A linen interceptor that leaves of the states behind the tower's first norm those of numbers ``kept`` [B, P]."""

    def choose(run: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        states = run(*args, **kwargs)
        if context.module.name != "pre_layernorm" or context.method_name != "__call__":
            return states
        return jnp.take_along_axis(states, kept[:, :, None], 1)

    return choose


def draw_patches(rng: np.random.Generator, images: int, tokens: int, share: float) -> np.ndarray:
    """int32 [images, 1 + P]: the class token, and a share of the others in an order of their own."""
    order = np.argsort(rng.random((images, tokens - 1)), 1)[:, : round(share * (tokens - 1))]
    return np.concatenate([np.zeros((images, 1), np.int32), 1 + order.astype(np.int32)], 1)


def make_texts(classes: Classes, corpus: Corpus) -> tuple[list[dict], list[dict]]:
    """Names of all subgroups, and of all groups, by language, as the rows of ``corpus`` have them."""
    found: tuple[list[dict], list[dict]] = [{} for _ in classes.subgroups], [{} for _ in classes.groups]
    for subgroup, group, names in zip(corpus.subgroup, corpus.group, corpus.names, strict=True):
        found[0][subgroup] = {language: names[language]["subgroup"] for language in LANGUAGES}
        found[1][group] = {language: names[language]["group"] for language in LANGUAGES}
    return found


def encode_texts(processor: Any, texts: list[str]) -> np.ndarray:
    """int32 [N, LENGTH]; a text that is longer loses what is before its end."""
    rows = processor.tokenise(texts)
    ids = np.zeros((len(rows), LENGTH), np.int32)
    for line, row in zip(ids, rows, strict=True):
        kept = row if len(row) <= LENGTH else [*row[: LENGTH - 1], row[-1]]
        line[: len(kept)] = kept
    return ids


def embed(module: Any, params: dict, inputs: Any, method: str) -> Any:
    """Embeddings [N, E] of length 1, of pixels ("image_features") or of tokens ("text_features")."""
    features = module.apply({"params": params}, inputs, method=method)
    features = features[:, 0] if method == "image_features" else features
    return features * jax.lax.rsqrt(jnp.square(features).sum(-1, keepdims=True) + 1e-12)


def train_contrast(
    run: Pretrain, config: Any, params: dict, processor: Any, classes: Classes, corpus: Corpus, valid: Corpus
) -> dict:
    """Both towers after the contrastive phase."""
    module = make_module(config, jnp.float32)
    subgroups, groups = make_texts(classes, corpus)

    def loss(params: dict, pixels: Any, kept: Any, ids: Any, truths: dict) -> tuple[Any, dict]:
        with nn.intercept_methods(show_patches(kept)):
            images = embed(module, params, pixels, "image_features")
        texts = embed(module, params, ids, "text_features")
        logits = jnp.exp(jnp.minimum(params["logit_scale"], LARGEST_SCALE)) * images @ texts.T
        total, metrics, start = 0.0, {"scale": params["logit_scale"]}, 0
        for kind, truth in truths.items():
            part = logits[:, start : start + truth.shape[1]]
            start += truth.shape[1]
            both = [
                smoothed(scores, true / jnp.maximum(true.sum(1, keepdims=True), 1), 0.05).sum()
                / jnp.sum(true.any(1), dtype=jnp.float32)
                for scores, true in ((part, truth), (part.T, truth.T))
            ]
            metrics[f"loss_{kind}"] = value = sum(both) / 2
            total += KIND_WEIGHTS[kind] * value
            right = jnp.take_along_axis(truth, part.argmax(1)[:, None], 1)
            metrics[f"train_{kind}"] = right.mean(dtype=jnp.float32)
        return total, metrics

    def write(rng: np.random.Generator, names: dict) -> str:
        template = rng.choice(list(TEMPLATES), p=list(TEMPLATES.values()))
        return str(template).replace("{}", names[str(rng.choice(LANGUAGES))])

    def draw_concept(rng: np.random.Generator, names: dict) -> dict:
        """Write a concept's name, or one of its keywords, by language."""
        if rng.random() >= TAG_SHARE:
            return {language: names[language]["label"] for language in LANGUAGES}
        tags = {language: names[language]["tags"] or [names[language]["label"]] for language in LANGUAGES}
        return {language: str(rng.choice(words)) for language, words in tags.items()}

    def batches(share: float, rng: np.random.Generator, number: int) -> tuple:
        chosen = draw_epoch(run.seed, len(corpus.pixels), run.clip_batch, number)
        images = nano_augment.blend_styles(rng, corpus.pixels, chosen, corpus.peers)
        shown = np.unique(corpus.subgroup[chosen])
        others = rng.permutation(np.setdiff1d(np.arange(len(subgroups)), shown))
        asked = np.concatenate([shown, others])[:SUBGROUPS]
        texts = [draw_concept(rng, corpus.names[row]) for row in chosen]
        texts += [*(subgroups[number] for number in asked), *groups]
        ids = encode_texts(processor, [write(rng, names) for names in texts])
        truths = {
            "concept": corpus.concept[chosen][:, None] == corpus.concept[chosen],
            "subgroup": corpus.subgroup[chosen][:, None] == asked,
            "group": corpus.group[chosen][:, None] == np.arange(len(groups)),
        }
        kept = draw_patches(rng, len(chosen), module.vision.tokens, share)
        return nano_augment.augment(rng, images, run.strength), kept, ids, truths

    embed_jit = jax.jit(partial(embed, module), static_argnums=2)

    def evaluate(params: dict) -> dict:
        """Zero-shot top-1 of validation concepts: groups and subgroups in two languages, and names among their own."""
        pixels = nano_augment.normalize(valid.pixels)
        starts = range(0, len(pixels), 102)
        images = np.concatenate([embed_jit(params, pixels[i : i + 102], "image_features") for i in starts])
        named = {names["en"]["label"]: number for number, names in enumerate(valid.names)}
        truths = {"group": (groups, valid.group), "subgroup": (subgroups, valid.subgroup)}
        truths["name"] = (
            [valid.names[number] for number in named.values()],
            np.array([list(named).index(names["en"]["label"]) for names in valid.names]),
        )
        found = {}
        for kind, (texts, truth) in truths.items():
            for language in ("en", "de"):
                written = [names[language] if kind != "name" else names[language]["label"] for names in texts]
                ids = encode_texts(processor, [f"a photo of a {text}." for text in written])
                scores = images @ np.asarray(embed_jit(params, ids, "text_features")).T
                found[f"valid_{kind}_{language}"] = float(np.mean(scores.argmax(1) == truth))
        return found

    half, whole = (partial(batches, share) for share in (0.5, 1.0))
    for cycle, steps in enumerate(run.clip_steps):
        drawn = sum(run.clip_steps[:cycle])
        params = train(run, f"contrast{cycle}", params, steps, run.clip_rate, loss, half, evaluate, drawn, SPEEDS)
    drawn, rate = sum(run.clip_steps), run.clip_rate / 5
    params = train(run, f"whole{drawn}", params, run.clip_whole_steps, rate, loss, whole, evaluate, drawn, SPEEDS)
    return {**params, "logit_scale": jnp.minimum(params["logit_scale"], LARGEST_SCALE)}
