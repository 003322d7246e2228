"""The tables of `fedvlm explain --model`: a model's parts, and the sites that adapters can sit on."""

import math
from collections import Counter

from fedvlm_jax import lora
from fedvlm_jax.errors import format_count
from fedvlm_jax.models import Vlm
from fedvlm_jax.reporting.method_report import fold_path, join_path
from fedvlm_jax.reporting.tables import Table
from fedvlm_jax.utils import tree

HEADINGS = ("site", "kind", "layers", "shape", "by default")


def tabulate_model(vlm: Vlm, name: str, size: tuple[int, int] | None, rank: int) -> list[Table]:
    """Tabulate parameters by part, image tokens and positions; and the sites, alike ones in a line.

    Args:
        name: the model, as the user named it.
        size: height and width of its pictures in pixels, where its folder states them.
        rank: of the adapter whose parameters are counted.
    """
    counted = Counter[str]()
    for path, leaf in tree.flatten(vlm.shapes()).items():
        counted[vlm.component(path) or "other"] += leaf.size
    rows = [(part, f"{counted[part]:,} parameters") for part in (*vlm.components, "other") if counted[part]]
    rows.append(("in all", f"{counted.total():,} parameters"))
    if size is not None:
        rows.append(("picture", f"{size[1]}×{size[0]} pixels, {format_count(vlm.image_tokens(*size), 'image token')}"))
    if vlm.grids is not None:
        each = f"{vlm.grids.pixels:,} pixels an image token: --image-pixels says how many a picture has at most"
        rows.append(("on a grid of its own", each))
    share = "an answer goes on where its prompt ends" if vlm.shared_positions else "for a prompt, and for an answer"
    written = ("vocabulary", f"{vlm.vocabulary:,} tokens")
    if vlm.bind is not None:
        share, written = "for the prompt of a class", ("answers", "chosen among those of the data")
    rows += [("positions", f"{vlm.positions:,}, {share}"), written]
    chosen = lora.select(vlm.sites, vlm.targets)
    adapted = sum(max(1, _layers(site)) * rank * (site.d_in + site.d_out) for site in chosen)
    alike: dict[tuple[str, ...], list[str]] = {}
    for site in sorted(vlm.sites.values(), key=lambda site: site not in chosen):  # those of an adapter first
        parent, _, last = site.path.rpartition("/")
        mark = f"cannot: {site.obstacle}" if site.obstacle else "yes" if site in chosen else "–"
        layers = str(_layers(site) or "")
        alike.setdefault((parent, site.kind, layers, f"{site.d_in:,} → {site.d_out:,}", mark), []).append(last)
    cells: list[tuple[str, ...]] = []
    for (parent, *rest), names in alike.items():
        lines = fold_path(join_path(parent, names))
        cells += [(line, *(rest if number == 0 else [""] * 4)) for number, line in enumerate(lines)]
    note = (
        f"By default: whether an adapter sits there unless --lora.targets says otherwise; {vlm.targets} chooses them. "
        f"Of rank {rank} it has {adapted:,} parameters, {100 * adapted / counted.total():.2g} % of the model's."
    )
    return [
        Table(f"{name}: {vlm.family}", ("", ""), tuple(rows), prose=frozenset({1})),
        Table("Sites", HEADINGS, tuple(cells), note=note, prose=frozenset({1, 4})),
    ]


def _layers(site: lora.Site) -> int:
    """Count the layers of a stacked weight; 0 of one that is not stacked."""
    return math.prod(site.stack) if site.stack else 0
