"""FedDAT (arXiv 2308.12305): a shared and a private adapter that learn from each other, for federated VQA.

    y = x W_0 + s x A_g B_g                                    the global adapter g, alone
    y = x W_0 + ½ s x A_l B_l + ½ s x A_r B_r                  the teacher: the private l beside r, g as it was received

On every batch g takes a step on ½ F(g) + ½ T² KL(teacher ‖ g), then l, in the teacher, one on ½ F(teacher) +
½ T² KL(g ‖ teacher), with the g of before its step. Who teaches has no gradient; r is frozen; g is averaged, l is the
client's. A client uses the teacher, with g as it was received last; before it ever trained, g alone.

The abstract and the authors' code (github.com/HaokunChen245/FedDAT) were read, the paper's equations were not: weights
of a half, T = 3 and the order of steps are the code's. There the weight of the two adapters is a gate that is commented
out, so that it is always ½, and so it is here. Otherwise than in the code: adapters are LoRA, not bottlenecks; the
distance is the mean over an answer's tokens, as the cross-entropy is, where the code sums over all positions, padding
too, and divides by the examples; optimisers are kept from round to round, one for each adapter, where the code has one
that starts anew; clients count as `--train.weighting` says, in the code alike; and in the code a client is evaluated
with the r of the round before, which it trained beside.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fedvlm_jax.methods.base import Client, Context, Distillation, Method, MethodOptions, Setup
from fedvlm_jax.methods.components.dual_adapters import Pairs, PairsTrained, make_dual_method
from fedvlm_jax.methods.components.factors import mix
from fedvlm_jax.methods.components.training_metrics import over_steps
from fedvlm_jax.utils import tree
from fedvlm_jax.utils.option_ranges import Positive, Share

HALF = 0.5  # of each adapter in the teacher


@dataclass(frozen=True)
class Options(MethodOptions):
    """Numbers of feddat"""

    weight: Share = 0.5
    """Weight of the distance from the other adapter's answers; the objective has the rest."""
    temperature: Positive = 3.0
    """Temperature that softens the answers that are compared."""


def make(setup: Setup) -> Method:
    """Make feddat: on each batch a step of the global adapter, then one of the local adapter in the teacher."""
    options = setup.own(Options)
    source = (
        "arXiv 2308.12305: g on ½F(g) + ½KL(t‖g), averaged; private l on ½F(t) + ½KL(g‖t), t = ½l + ½g as received; "
        "equations from the authors' code, where distances are summed over all positions"
    )

    def train(ctx: Context, pairs: Pairs, client: Client) -> PairsTrained:
        received, scales = pairs.received, pairs.scales

        def step(carry: PyTree, at: tuple[Array, Array, Array]) -> tuple[PyTree, PyTree]:
            (g, g_state), (own, own_state) = carry
            one = client._replace(indices=at[0][None], mask=at[1][None])
            teacher, student = mix(received, own, scales, HALF), tree.combine(g, scales)
            *after, metrics = ctx.train(
                g, g_state, one, first=at[2], assemble=lambda factors: tree.combine(factors, scales),
                distil=Distillation(teacher, options.weight, options.temperature),
            )  # fmt: skip
            *mine, own_metrics = ctx.train(
                own, own_state, one, first=at[2], assemble=lambda factors: mix(received, factors, scales, HALF),
                distil=Distillation(student, options.weight, options.temperature),
            )  # fmt: skip
            return (tuple(after), tuple(mine)), (metrics, own_metrics)

        ((g, g_state), (own, own_state)), history = jax.lax.scan(
            step,
            ((received, pairs.optimizers["global"]), (pairs.own, pairs.optimizers["local"])),
            (client.indices, client.mask, jnp.arange(len(client.indices))),
        )
        of_global, of_teacher = (over_steps(part) for part in history)
        metrics = of_teacher | {"global_loss": of_global["loss"]}
        message = jax.tree.map(jnp.subtract, g, received)
        return PairsTrained(own, message, {"global": g_state, "local": own_state}, client.mask.any(), metrics)

    method = make_dual_method("feddat", source, setup, HALF, train=train)
    drawn = "its adapters learn from each other's answers to what the data say, and there every step draws its own"
    return replace(method, refuses={**method.refuses, "samples": drawn})
