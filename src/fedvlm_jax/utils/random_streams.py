"""Random streams of a run's seed, each with a number that no other has.

Host draws put the number first: `numpy.random.default_rng([Stream.BATCHES, seed, …])`. Draws on devices fold it into
the run's key, and then what else they depend on: `jax.random.fold_in(key, Stream.NEWCOMERS)`. So whatever two places go
on to append (a round here, a client there), they never read the same numbers.
"""

from enum import IntEnum, unique


@unique
class Stream(IntEnum):
    """First number of a stream; a number that was ever in use is never given to another."""

    # Folded into the run's key.
    ADAPTER = 0  # the adapter that every client starts from
    NEWCOMERS = 1  # the personal state that a client begins with, by client
    UPDATES = 2  # draws of a method during local training, by round and client
    DROPOUT = 3  # what dropout leaves out, by round, client, training, step and site
    AGGREGATION = 4  # whatever the server draws when it aggregates, by round
    HOSTILE_NOISE = 21  # noise that a hostile client sends, of its own key
    ROUNDING = 5  # of a message to fewer bits, by round and client: folded into the key of `UPDATES`

    # First integers of numpy's seeds.
    TOPICS = 101  # an emoji client's mix of topics, by client
    CONCEPTS = 102  # the images it gets, by client and split
    TURNOUT = 103  # clients that drop out or stop early, by round
    COHORTS = 104  # the clients of a round; 101 in release 0.1, which was also that of `TOPICS`
    EVALUATED = 105  # the clients that are evaluated, where not all are
    GROUPS = 106  # the groups of clients that take turns under correlated noise
    ATTACKERS = 121  # the clients that are hostile
    POISONED = 122  # what a hostile client trains on, by client
    BATCHES = 201  # the examples of each local step, by round and client
    LIMIT = 301  # the rows of a table that `--data.limit` keeps
    PARTITIONS = 302  # the cut of a table into clients, by attempt
    AUDITED = 401  # the clients that an audit attacks, where not all are
    CANDIDATES = 402  # the rows that it asks about, by client
    CANARIES = 403  # the canaries that replay a run's noise
