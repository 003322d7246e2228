"""The table of how large the noise of differential privacy is beside an update, for `fedvlm explain`."""

from fedvlm_jax.analysis.noise_size import NoiseSize, RoundNoise
from fedvlm_jax.reporting.tables import Table


def tabulate_noise(method: str, size: NoiseSize) -> Table:
    """Tabulate a round's noise in the message and in s·A·B, for rounds as they are and for larger ones."""
    clip, now = size.clip, size.at[0]
    whole = size.whole / (size.rounds * clip)
    groups = f" in {size.sampling.groups} groups that take turns" if size.sampling.groups > 1 else ""
    note = (
        f"Noise multiplier {size.noise:.4g}, clipping norm {clip:.4g}, {size.entries:,} numbers in a message; "
        f"{size.sampling.population:,} clients{groups}, {now.expected:.4g} a round on average and "
        f"{size.sampling.places:,} at most. The clients' mean update has norm {clip:.4g} at most, mostly far less: a "
        f"ratio of 1 hides it. Updates that agree add up and noise does not: over all {size.rounds} rounds the noise "
        f"in their sum is {whole:.2g} of the most that updates can come to. In s·A·B: expected norms at the start, for "
        f"{method} and where B alone is shared (plora, ffa-lora), A alone (fedsa-lora; through a B of norm "
        f"{clip:.4g}, at first it is zero) or both (fedavg-lora). More clients a round lower the noise in proportion; "
        "fewer sites (--lora.targets), a lower rank, and fewer numbers sent (fed-sb) by the root of what is left out; "
        "an orthonormal A, which fedsvd has after its first rounds, what B's noise does to the model."
    )
    columns = ("clients", "noise", "over the most", f"s·A·B: {method}", "B alone", "A alone", "both")
    return Table("Noise in a round", columns, tuple(_row(at, clip) for at in size.at), note=note)


def _row(at: RoundNoise, clip: float) -> tuple[str, ...]:
    numbers = (at.message, at.message / clip, at.method, at.b, at.a, at.both)
    clients = f"{at.expected:,.0f}" if at.expected >= 100 else f"{at.expected:.4g}"
    return (clients, *(f"{number:.3g}" for number in numbers))
