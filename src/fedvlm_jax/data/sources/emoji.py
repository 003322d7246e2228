"""The emoji set that ships: one client per drawing style and language; how they are drawn is in `emoji_topics.py`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro

from fedvlm_jax.data.config import Alpha, DataOptions, Natural, Partition, check_names
from fedvlm_jax.errors import UserError
from fedvlm_jax.utils.option_ranges import Amount, Count

if TYPE_CHECKING:
    from fedvlm_jax.data.federated_dataset import Federation
    from fedvlm_jax.data.table import Table

_DEFAULT_CLIENTS = "(default: one per style and language)"


@dataclass(frozen=True, kw_only=True)
class Topics(Natural):
    """The set's own clients, each with a mix of topics"""

    clients: Annotated[
        Count | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_DEFAULT_CLIENTS, aliases=("--clients",))
    ] = None
    """Number of clients; further ones share styles and languages. Ours, not the paper's."""
    alpha: Alpha = 0.3


@dataclass(frozen=True)
class Options(DataOptions):
    """The emoji set"""

    partition: Annotated[Partition, tyro.conf.arg(name="")] = field(default_factory=Topics)
    languages: tuple[str, ...] = ("en", "de", "fr", "es")
    """Languages; with the vendors they make the clients. Ours, not the paper's."""
    vendors: tuple[str, ...] = ("noto", "twemoji", "fluent", "emojione")
    """Drawing styles; one client per style and language. Ours, not the paper's."""
    tasks: tuple[str, ...] = ("group", "subgroup")
    """What is asked about every image (group, subgroup, name). Ours, not the paper's."""
    images_per_client: Amount = 60
    """Training images; fewer are a prefix of more, so comparisons nest. Ours, not the paper's."""
    validation_per_client: Amount = 30
    """Validation images. Ours, not the paper's."""
    test_per_client: Amount = 60
    """Test images. Ours, not the paper's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("languages", "vendors", "tasks"):
            if not getattr(self, name):
                raise UserError(f"--data.{name} is empty: it must have at least one name")
            check_names(f"--data.{name}", getattr(self, name))
        by = getattr(self.partition, "by", None)
        if by is not None and isinstance(self.partition, Topics) and self.partition != Topics(by=by):
            raise UserError(
                f"--data.clients and --data.alpha mean nothing with --data.partition-by {by}, whose values are the "
                "clients: leave them out, or choose another --data.partition"
            )

    def read(self) -> "Table":
        """Open the set that ships; no option says where it lies."""
        from fedvlm_jax.data.partitioning import emoji_topics

        return emoji_topics.read_file(emoji_topics.FILE)

    def federate(self, table: "Table", seed: int) -> "Federation":
        """Give every client its images; see `federate_topics`."""
        from fedvlm_jax.data.partitioning.emoji_topics import federate_topics

        return federate_topics(table, self, seed)
