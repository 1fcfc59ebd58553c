"""Answers a file with all processes that were started: `recommend_in_processes.py PLAN`, a JSON file.

The recommender is a made-up one; where the plan says so it is slow, or fails. Each process writes what it did.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from llmrec.processes import Processes
from llmrec.recommendation.batch import recommend_file


@dataclass
class Item:
    item_id: str
    score: float


class Echo:
    """Recommends the items of a history, latest first, numbered; counts what it was asked."""

    def __init__(self, seconds=0.0, fails_at=None):
        self.seconds, self.fails_at, self.asked = seconds, fails_at, []

    def recommend(self, histories, k=10, *, exclude_seen=True, boost=0.0, batch_size=16):
        time.sleep(self.seconds)
        self.asked += [history[0] for history in histories]
        if self.fails_at in self.asked:
            raise ValueError(f"asked for {self.fails_at}")
        return [[Item(item, boost - rank) for rank, item in enumerate(history[::-1][:k])] for history in histories]


def main(path: Path) -> None:
    plan = json.loads(path.read_text())
    processes = Processes.launched()
    recommender = Echo(plan.get("seconds", 0.0), plan.get("fails_at"))
    found = {}
    try:
        summary = recommend_file(recommender, plan["source"], plan["output"], 2, rows_per_part=5, processes=processes)
        found = {"rows": summary.num_rows, "parts": summary.num_parts, "new": summary.num_new_rows}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    result = path.with_name(f"result-{processes.count}-{processes.index}.json")
    result.write_text(json.dumps({**found, "asked": recommender.asked}))
    if "error" in found:
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
