"""The table of how large the noise of differential privacy is beside an update, for `fedvlm explain`."""

from fedvlm_jax.analysis.noise_size import NoiseSize, RoundNoise
from fedvlm_jax.reporting.tables import Table


def tabulate_noise(method: str, size: NoiseSize) -> Table:
    """Tabulate a round's noise in the message and in s·A·B, for rounds as they are and for larger ones.

    Where no adapter has low-rank factors, as soft prompts alone have none, there is no s·A·B.
    """
    clip, now = size.clip, size.at[0]
    whole = size.whole / (size.rounds * clip)
    groups = f" in {size.sampling.groups} groups that take turns" if size.sampling.groups > 1 else ""
    note = (
        f"Noise multiplier {size.noise:.4g}, clipping norm {clip:.4g}, {size.entries:,} numbers in a message; "
        f"{size.sampling.population:,} clients{groups}, {now.expected:.4g} a round on average and "
        f"{size.sampling.places:,} at most. "
        f"Noise: its expected norm in the mean update. Over the clip: that over {clip:.4g}, which the mean update is "
        "at most, mostly far less; from 1 on the noise is surely the longer. Updates that agree add up over rounds "
        f"and noise does not: after all {size.rounds} rounds the ratio is {whole:.2g}."
    )
    if not now.b:
        note += " More clients a round lower the noise in proportion; fewer numbers sent by a root."
        rows = tuple(_row(at, clip)[:3] for at in size.at)
        return Table("Noise in a round", ("clients", "noise", "over the clip"), rows, note=note)
    note += (
        f" s·A·B: the noise in the model's weights at the start, for {method}, and if B alone were shared (plora, "
        f"ffa-lora), A alone (fedsa-lora; through a B of norm {clip:.4g}, at first it is zero) or both (fedavg-lora)."
        " More clients a round lower the noise in proportion; fewer sites (--lora.targets), a lower rank and fewer "
        "numbers sent (fed-sb) by a root; an orthonormal A (fedsvd, after its first rounds) what the model feels of it."
    )
    columns = ("clients", "noise", "over the clip", f"s·A·B: {method}", "B alone", "A alone", "both")
    return Table("Noise in a round", columns, tuple(_row(at, clip) for at in size.at), note=note)


def _row(at: RoundNoise, clip: float) -> tuple[str, ...]:
    numbers = (at.message, at.message / clip, at.method, at.b, at.a, at.both)
    clients = f"{at.expected:,.0f}" if at.expected >= 100 else f"{at.expected:.4g}"
    return (clients, *(f"{number:.3g}" for number in numbers))
