"""The mechanism that a run's options of privacy ask for, as the pool that goes before a method's `aggregate`."""

from fedvlm_jax.messages.pool import Pool
from fedvlm_jax.privacy.accounting import choose_noise
from fedvlm_jax.privacy.banded import make_banded_pool
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.privacy.gaussian import make_gaussian_pool
from fedvlm_jax.privacy.sampling import Sampling


def make_mechanism(options: PrivacyOptions, sampling: Sampling, rounds: int) -> Pool:
    """Make the pool of a run of so many rounds, with the noise that the options say or that spends their ε.

    Raises:
        UserError: adaptive clipping with too few clients, more bands than rounds, no noise is enough, or dp-accounting
            is not installed.

    >>> make_mechanism(PrivacyOptions(noise=1.0), Sampling("all", population=9, expected=9, places=9), rounds=3).name
    'gaussian'
    """
    noise = choose_noise(options, sampling, rounds)
    if options.mechanism == "banded":
        return make_banded_pool(noise, options.clip, sampling.expected, options.bands, rounds)
    return make_gaussian_pool(noise, options.clip, sampling.expected, options.quantile)
