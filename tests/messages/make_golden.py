"""Write `golden_pools.npz`: robust rules of flwr and of ByzFL on sixteen rows, six of them hostile.

Of ByzFL's Krum there is none: it sums over n - f - 1 neighbours, the paper and Flower over n - f - 2. Each package is
in an environment of its own:

    python make_golden.py flwr FILE      with flwr 1.42.0
    python make_golden.py byzfl FILE     with byzfl 0.0.11 (and torch)
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np

HOSTILE = 6


def make_rows():
    rows = np.random.default_rng(7).normal(size=(16, 30)).astype(np.float32)
    rows[[1, 4, 5, 9, 12, 15]] *= np.float32(30)
    return rows


def ask_flwr(rows):
    from flwr.server.strategy import aggregate

    results = [([row[:10], row[10:].reshape(4, 5)], 1) for row in rows]

    def join(parts):
        return np.concatenate([part.ravel() for part in parts])

    return {
        "flwr_median": join(aggregate.aggregate_median(results)),
        "flwr_trimmed": join(aggregate.aggregate_trimmed_avg(results, HOSTILE / len(rows) + 1e-9)),
        "flwr_krum": join(aggregate.aggregate_krum(results, HOSTILE, 0)),
        "flwr_multikrum": join(aggregate.aggregate_krum(results, HOSTILE, len(rows) - HOSTILE)),
    }


def ask_byzfl(rows):
    # Its rules alone: all of the package asks for torchvision, seaborn and more.
    spec, package = importlib.util.find_spec("byzfl"), types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["byzfl"] = package
    rules = importlib.import_module("byzfl.aggregators.aggregators")
    return {
        "byzfl_median": rules.Median()(rows),
        "byzfl_trimmed": rules.TrMean(f=HOSTILE)(rows),
        "byzfl_geometric": rules.GeometricMedian(nu=1e-6, T=200)(rows.astype(np.float64)),
    }


if __name__ == "__main__":
    which, file = sys.argv[1], Path(sys.argv[2])
    stored = dict(np.load(file)) if file.exists() else {}
    rows = make_rows()
    found = {"flwr": ask_flwr, "byzfl": ask_byzfl}[which](rows)
    np.savez(file, **{**stored, "rows": rows, "hostile": HOSTILE, **found})
