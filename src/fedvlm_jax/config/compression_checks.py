"""Options that make messages smaller or sum them as integers, and what they do not go with; judged before any load."""

from typing import TYPE_CHECKING

from fedvlm_jax.config.run_options import Run
from fedvlm_jax.errors import UserError
from fedvlm_jax.messages.config import MessageOptions

if TYPE_CHECKING:
    from fedvlm_jax.methods import Method

DEFAULT = MessageOptions()


def check_fewer_bytes(run: Run, method: "Method", label: str) -> None:
    """Refuse compression and secure sums that the method, or another option, has no place for.

    Args:
        label: the method as the command line names it, `--method plora`.

    Raises:
        UserError: the first such option, with the reason.
    """
    messages = run.messages
    if messages.compress != "top-k" and messages.keep != DEFAULT.keep:
        raise UserError(
            f"--messages.keep means nothing to --messages.compress {messages.compress}: leave it out, or say "
            "--messages.compress top-k"
        )
    if messages.compress == "top-k":
        from fedvlm_jax.messages.compression import MORE_THAN_UPDATE, refuse_top_k  # late: it imports jax

        beside = "".join(f" and {flag}" for flag, on in _list_additions(run).items() if on)
        if why := refuse_top_k(method) or (MORE_THAN_UPDATE if beside else None):
            raise UserError(
                f"--messages.compress top-k does not go with {label}{beside}, because {why}; --messages.compress int8 "
                "goes with all methods that send something"
            )
    if not messages.secure:
        for name in ("secure_bits", "secure_range"):
            if getattr(messages, name) != getattr(DEFAULT, name):
                raise UserError(
                    f"--messages.{name.replace('_', '-')} means nothing without --messages.secure: add that, or leave "
                    "it out"
                )
        return
    _check_secure_sum(run, method, label)


def _list_additions(run: Run) -> dict[str, bool]:
    """List the options that put more into a message than the update."""
    return {"--local.scaffold": run.local.scaffold, "--lora.ranks": bool(run.lora.ranks)}


def _check_secure_sum(run: Run, method: "Method", label: str) -> None:
    from fedvlm_jax.messages.secure_sum import check_width  # late: it imports jax

    messages = run.messages
    apart = {
        f"--messages.compress {messages.compress}": (
            messages.compress != "none",
            "masks are as wide as the sum and cover every entry, so nothing smaller could be sent",
        ),
        "--privacy": (
            run.privacy.on,
            "rounding can lengthen an update beyond the clipping norm, which epsilon does not count",
        ),
    }
    for flag, (given, why) in apart.items():
        if given:
            raise UserError(f"--messages.secure and {flag} exclude each other: {why}; leave one out")
    if beside := [flag for flag, on in _list_additions(run).items() if on]:
        raise UserError(
            f"--messages.secure and {beside[0]} exclude each other: a server that knows the mean alone cannot use what "
            "else is in a message"
        )
    if not method.linear:
        raise UserError(
            f"--messages.secure does not go with {label}, because its server needs every client's message by itself"
        )
    if run.cohort is not None:
        check_width(messages, run.cohort)
