"""Methods with compression or a secure sum around them, on the toy model of the methods' contract."""

import functools

from methods.test_contract import Case

from fedvlm_jax.messages.compression import with_compression
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.messages.pool import with_pool
from fedvlm_jax.messages.secure_sum import make_secure_sum

INT8 = MessageOptions(compress="int8")
TOP_K = MessageOptions(compress="top-k", keep=0.3)
SECURE = MessageOptions(secure=True)
WAYS = {"int8": INT8, "top-k": TOP_K, "secure": SECURE}


def wrap(method, options, cohort=4):
    method = with_compression(method, options)
    return with_pool(method, make_secure_sum(options, cohort)) if options.secure else method


@functools.cache
def make_compressed(name, options, **choices):
    return Case(name, lambda method: wrap(method, options), **choices)
