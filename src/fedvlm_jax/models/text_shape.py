"""Sizes and options of causal text models, from which `causal_decoder` is built, and the cuts that they allow."""

from dataclasses import dataclass
from typing import NamedTuple

from fedvlm_jax.distributed.sharding import Cut, Cuts


class Reach(NamedTuple):
    """What the tokens of a layer see of those before them.

    Attributes:
        theta: base of the rotary positions' wavelengths.
        factor: what positions are divided by (arXiv 2306.15595).
        window: tokens that a token sees, itself the last; None for all.
    """

    theta: float
    factor: float = 1.0
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """Sizes and options of a causal text model, as a family reads them off its configuration.

    Attributes:
        width: numbers D of a token.
        heads, kv_heads, head_width: query heads H, heads of keys and values, and numbers d of each.
        hidden: width of the feed-forward part.
        layers: depth L.
        vocabulary: tokens V.
        activation: of the feed-forward part, as Hugging Face names it.
        epsilon: of the norms.
        theta, factor: of the `Reach` of layers that are not local.
        tied: is the head the token table?
        qkv_bias: have the projections to queries, keys and values a bias?
        deviation: of random weights.
        local, local_layers: the reach of local layers, and which of all layers are local.
        shifted_norms: do norms multiply by 1 + weight, in float32 (arXiv 2403.08295)?
        norms_after: has every sub-layer a norm behind it, too (arXiv 2408.00118)?
        head_norms: has every query and key a norm before it is rotated (arXiv 2503.19786)?
        multiplier: of token embeddings, rounded to the type that is computed in.
        scale: of scores; None for the usual one, head_width ** -0.5.
        score_cap, logit_cap: bounds that tanh keeps scores and logits in; None for none.
    """

    width: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    layers: int
    vocabulary: int
    activation: str
    epsilon: float
    theta: float
    tied: bool
    qkv_bias: bool = False
    deviation: float = 0.02
    factor: float = 1.0
    local: Reach | None = None
    local_layers: tuple[bool, ...] = ()
    shifted_norms: bool = False
    norms_after: bool = False
    head_norms: bool = False
    multiplier: float = 1.0
    scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None

    @property
    def reaches(self) -> tuple[Reach, ...]:
        """The kinds of layers: those that see all tokens, and local ones where there are any."""
        return (Reach(self.theta, self.factor), *([self.local] if self.local else []))


def cut_text(text: TextShape) -> Cuts:
    """Cut the text model over devices: whole heads, the columns of a pair's first matrix and the rows of its second."""
    layer = "language_model/layers/"
    return (
        Cut(rf"{layer}self_attn/q_proj/(kernel|bias)", (-1,), text.heads),
        # Where heads of keys do not divide, every device has them whole.
        Cut(rf"{layer}self_attn/(k|v)_proj/(kernel|bias)", (-1,), text.kv_heads),
        Cut(rf"{layer}self_attn/o_proj/kernel", (-2,), text.heads),
        Cut(rf"{layer}mlp/(gate|up)_proj/kernel", (-1,)),
        Cut(rf"{layer}mlp/down_proj/kernel", (-2,)),
        Cut("language_model/embed_tokens/embedding", (-2, -1)),
        *([] if text.tied else [Cut("language_model/lm_head/kernel", (-1, -2))]),
    )
