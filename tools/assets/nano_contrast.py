"""CLIP-nano's only phase: texts come to the pictures that they are true of (CLIP, arXiv 2103.00020, section 2.3).

The tower is SmolVLM-nano's, which learned from the same pictures, and stays as it is (LiT, arXiv 2111.07991); the text
model begins at random. A step has three contrastive losses with one learned temperature: against the names or keywords
of some of the batch's concepts, against its subgroups and some others, and against all groups, each text in a language
and a template of its own. It deviates from CLIP where several texts are true of a picture, or several pictures of a
text: they share the target.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import nano_augment
import numpy as np
from clip_nano import TEMPLATES
from emoji_texts import LANGUAGES
from nano_corpus import Classes, Corpus, draw_epoch
from nano_text import feature_copies
from nano_training import ROOT, Pretrain, smoothed, spread_kernels, train

from fedvlm_jax.models import load_vlm
from fedvlm_jax.models.clip.model import make_module

LENGTH = 20
"""Tokens that a text is padded or cut to."""
TAG_SHARE = 0.4
"""Of the batch's concepts, how many are stood for by a keyword in the place of their name."""
KIND_WEIGHTS = {"concept": 1.0, "subgroup": 1.0, "group": 0.3}
CONCEPTS, SUBGROUPS = 40, 40
"""Texts of either kind that a step compares with: those of its pictures first."""
NOISE = 0.15
"""Deviation of the noise on features of pictures, which have deviation 1."""
LARGEST_SCALE = np.log(100.0)
TOWER = ROOT / "src" / "fedvlm_jax" / "assets" / "smolvlm-nano"


def begin(config: Any, params: dict, processor: Any, corpus: Corpus) -> dict:
    """Weights to start from: SmolVLM-nano's tower in CLIP's form, and embeddings that tell pictures and texts apart.

    At random embeddings are all but the same, and nothing is learned (cf. `nano_vision`): so both last norms and
    projections are set to give them mean 0 and variance 1 in their main directions, over some pictures and texts.
    """
    pixels = nano_augment.normalize(corpus.pixels[::5])
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
    return normalise(features[:, 0] if method == "image_features" else features)


def normalise(features: Any) -> Any:
    return features * jax.lax.rsqrt(jnp.square(features).sum(-1, keepdims=True) + 1e-12)


def train_contrast(
    run: Pretrain, vlm: Any, params: dict, processor: Any, classes: Classes, corpus: Corpus, valid: Corpus
) -> dict:
    """The text model, and both projections, after the contrastive phase."""
    module = make_module(vlm.config, jnp.float32)
    subgroups, groups = make_texts(classes, corpus)
    features = feature_copies(run, vlm, params, corpus, run.clip_copies)[:, :, 0]
    unseen = feature_copies(run, vlm, params, valid, 1)[0, :, 0].astype(np.float32)
    learned = {name: params[name] for name in ("text_model", "text_projection", "logit_scale")}
    learned["turn"] = jnp.eye(features.shape[-1])  # of pictures' features; the projection takes it over at the end

    def compare(learned: dict, features: Any, ids: Any) -> Any:
        """Cosines [B, C]."""
        kept = {name: part for name, part in learned.items() if name != "turn"}
        texts = embed(module, params | kept, ids, "text_features")
        return normalise(features @ learned["turn"]) @ texts.T

    def loss(learned: dict, features: Any, ids: Any, truths: dict) -> tuple[Any, dict]:
        logits = jnp.exp(jnp.minimum(learned["logit_scale"], LARGEST_SCALE)) * compare(learned, features, ids)
        total, metrics, start = 0.0, {"scale": learned["logit_scale"]}, 0
        for kind, weight in KIND_WEIGHTS.items():  # not in the order of `truths`, whose keys jit sorts
            truth = truths[kind]
            part = logits[:, start : start + truth.shape[1]]
            start += truth.shape[1]
            metrics[f"loss_{kind}"] = value = (spread(part, truth) + spread(part.T, truth.T)) / 2
            total += weight * value
            right = jnp.take_along_axis(truth, part.argmax(1)[:, None], 1)
            metrics[f"train_{kind}"] = right.sum() / truth.any(1).sum()
        return total, metrics

    def spread(scores: Any, true: Any) -> Any:
        """Mean cross-entropy of the rows for which something is true, which share their target."""
        target = true / jnp.maximum(true.sum(1, keepdims=True), 1)
        return smoothed(scores, target, 0.05).sum() / true.any(1).sum()

    def write(rng: np.random.Generator, names: dict) -> str:
        template = rng.choice(list(TEMPLATES), p=list(TEMPLATES.values()))
        return str(template).replace("{}", names[str(rng.choice(LANGUAGES))])

    def draw_concept(rng: np.random.Generator, names: dict) -> dict:
        """Write a concept's name, or one of its keywords, by language."""
        if rng.random() >= TAG_SHARE:
            return {language: names[language]["label"] for language in LANGUAGES}
        tags = {language: names[language]["tags"] or [names[language]["label"]] for language in LANGUAGES}
        return {language: str(rng.choice(words)) for language, words in tags.items()}

    def batches(rng: np.random.Generator, number: int) -> tuple:
        chosen = draw_epoch(run.seed, len(corpus.pixels), run.clip_batch, number)
        named = chosen[:CONCEPTS]
        shown = np.unique(corpus.subgroup[chosen])
        asked = rng.permutation(shown)[:SUBGROUPS]
        others = rng.permutation(np.setdiff1d(np.arange(len(subgroups)), shown))
        asked = np.concatenate([asked, others])[:SUBGROUPS]
        texts = [draw_concept(rng, corpus.names[row]) for row in named]
        texts += [*(subgroups[number] for number in asked), *groups]
        truths = {
            "concept": corpus.concept[chosen][:, None] == corpus.concept[named],
            "subgroup": corpus.subgroup[chosen][:, None] == asked,
            "group": corpus.group[chosen][:, None] == np.arange(len(groups)),
        }
        seen = features[rng.integers(0, run.clip_copies, len(chosen)), chosen].astype(np.float32)
        seen += rng.normal(0, NOISE, seen.shape).astype(np.float32)
        return seen, encode_texts(processor, [write(rng, names) for names in texts]), truths

    compare_jit = jax.jit(compare)

    def evaluate(learned: dict) -> dict:
        """Zero-shot top-1 of validation concepts: groups and subgroups in two languages."""
        found = {}
        for kind, texts, truth in (("group", groups, valid.group), ("subgroup", subgroups, valid.subgroup)):
            for language in ("en", "de"):
                ids = encode_texts(processor, [f"a photo of a {names[language]}." for names in texts])
                scores = compare_jit(learned, unseen, ids)
                found[f"valid_{kind}_{language}"] = float(np.mean(scores.argmax(1) == truth))
        return found

    for cycle, steps in enumerate(run.clip_steps):
        drawn = sum(run.clip_steps[:cycle])
        learned = train(run, f"contrast{cycle}", learned, steps, run.clip_rate, loss, batches, evaluate, drawn)
    kernel = params["visual_projection"]["kernel"] @ learned.pop("turn")
    learned["logit_scale"] = jnp.minimum(learned["logit_scale"], LARGEST_SCALE)
    return {**params, **learned, "visual_projection": {"kernel": kernel}}
