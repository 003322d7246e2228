"""What the attacks of an audit come to: scores by test, attacker and client as numbers for `audit.json`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedvlm_jax.audit import detection, reconstruction


class MembershipScores:
    """Scores of members and others, by test, attacker and client."""

    def __init__(self) -> None:
        """Begin with none."""
        self.found: dict[tuple[str, str], dict[str, tuple[np.ndarray, np.ndarray]]] = {}

    def add(self, test: str, who: str, client: str, scores: np.ndarray, members: int) -> None:
        """Add a client's scores, of which the first `members` are those of members."""
        self.found.setdefault((test, who), {})[client] = (scores[:members], scores[members:])

    def summarise(self) -> list[dict[str, Any]]:
        """Judge every test over all clients together and for each."""
        return [self._judge(test, who, by_client) for (test, who), by_client in self.found.items()]

    @staticmethod
    def _judge(test: str, who: str, by_client: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
        members, others = (np.concatenate(side) for side in zip(*by_client.values(), strict=True))
        clients = {
            name: {**_judge_scores(*both), "members": len(both[0]), "others": len(both[1])}
            for name, both in by_client.items()
        }
        return {
            "test": test,
            "knows": who,
            **_judge_scores(members, others),
            "members": len(members),
            "others": len(others),
            "curve": [list(point) for point in detection.trace_roc(members, others)],
            "clients": clients,
        }


def _judge_scores(members: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    auroc, tpr = detection.find_auroc(members, others), detection.find_tpr(members, others)
    return {"auroc": list(auroc), "tpr": list(tpr)}


class SpanScores:
    """Rankings of candidate rows by round and client, and what spans captured, by attacker."""

    def __init__(self) -> None:
        """Begin with none."""
        self.captured: dict[str, list[reconstruction.Captured]] = {}
        self.rankings: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def add_captured(self, who: str, captured: reconstruction.Captured | None) -> None:
        """Add what the spans of a message captured; nothing where it spans none."""
        if captured is not None:
            self.captured.setdefault(who, []).append(captured)

    def add_ranking(self, test: str, who: str, scores: np.ndarray, inside: np.ndarray) -> None:
        """Add a ranking: was the first row in the batch, and how likely is that by chance; rows at a tie share it."""
        if inside.all() or not inside.any():
            return
        first = scores == scores.max()
        self.rankings.setdefault((test, who), []).append((float(inside[first].mean()), float(inside.mean())))

    def summarise_rankings(self) -> list[dict[str, Any]]:
        """Count how often the first row of a ranking was in the batch."""
        summaries = []
        for (test, who), ranked in self.rankings.items():
            hits, chances = np.asarray(ranked).T
            share = detection.clopper_pearson(round(float(hits.sum())), len(hits))
            summaries.append(
                {"test": test, "knows": who, "top": list(share), "chance": float(chances.mean()), "rankings": len(hits)}
            )
        return summaries

    def summarise_spans(self) -> list[dict[str, Any]]:
        """Average what spans captured over rounds and clients."""
        return [
            {
                "knows": who,
                **dict(zip(reconstruction.Captured._fields, np.mean(found, axis=0).tolist(), strict=True)),
                "above_unrelated": sum(one.batch > one.unrelated for one in found),
                "spans": len(found),
            }
            for who, found in self.captured.items()
        ]
