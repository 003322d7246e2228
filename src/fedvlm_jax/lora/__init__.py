"""Low-rank adapters (LoRA, arXiv 2106.09685) for any Flax linen model, as plain pytrees beside its parameters.

An adapter mirrors only the adapted part of the parameter tree. At every adapted site it holds

    a      [*stack, d_in, rank]   starts random
    b      [*stack, rank, d_out]  starts at zero, so a fresh adapter is the identity
    scale  [*stack]               alpha / rank (or alpha / √rank): data, since clients may differ; its gradient is zero

and the site computes `y = f(x) + scale · (x a) b`. In the notation of the papers W = W0 + s·B·A, `a` is A transposed
and `b` is B transposed. `d_in` and `d_out` are products where a layer has several input or output axes (DenseGeneral,
Conv); `stack` are the leading axes that `nn.scan` or `nn.vmap` put on the parameters.

A soft prompt (CoOp, arXiv 2109.01134) is one more kind of leaf, at the site of an `nn.Embed`:

    prompt [n, width]             starts at zero; added to the embeddings of the n tokens after the first

A site may have a nonlinear adapter after its layer too, beside `a` and `b` or in their place: see `lora.bottleneck`.
Adapters beside whole layers are in `lora.parallel`.

The model is not changed and knows nothing of this. The adapter is passed as one more variable collection, `lora`, and
an interceptor adds the low-rank term to every `nn.Dense`, `nn.DenseGeneral`, `nn.Conv` and `nn.Embed` (its tied
`attend` too) whose scope holds such variables: exactly these types, not their subclasses. A scanned model must carry
the collection: `nn.scan(..., variable_axes={"params": 0, "lora": 0})`. An adapter leaf that no call read is an error.
"""

from fedvlm_jax.lora.adapter import PROMPT, Adapter, LoRA, init, low_rank, sites_of, trainable, with_dropout
from fedvlm_jax.lora.adapter_algebra import (
    add_to_weights,
    concatenate,
    fix_signs,
    merge,
    one_by_one,
    thin_svd,
    truncate,
    unmerge,
)
from fedvlm_jax.lora.bottleneck import add_bottlenecks
from fedvlm_jax.lora.forward_injection import inject
from fedvlm_jax.lora.share_rules import Rule, combine, partition, virtual_paths
from fedvlm_jax.lora.sites import LoraError, Site, Sites, find_sites, select, trace_init
from fedvlm_jax.lora.target_patterns import find_dead_targets

__all__ = [
    "PROMPT", "Adapter", "LoRA", "LoraError", "Rule", "Site", "Sites", "add_bottlenecks", "add_to_weights", "combine",
    "concatenate", "find_dead_targets", "find_sites", "fix_signs", "init", "inject", "low_rank", "merge", "one_by_one",
    "partition",
    "select", "sites_of", "thin_svd", "trace_init", "trainable", "truncate", "unmerge", "virtual_paths", "with_dropout",
]  # fmt: skip
