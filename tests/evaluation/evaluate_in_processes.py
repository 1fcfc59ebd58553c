"""Started several times by test_evaluator.py: evaluates as one of several processes and writes what came out."""

import json
import sys

import numpy as np
from accelerate import Accelerator

from llmrec.data.splits import leave_one_out
from llmrec.data.synthetic import synthetic_dataset
from llmrec.evaluation.baselines import PopularityRecommender
from llmrec.evaluation.evaluator import evaluate


class Counting:
    """Popularity that counts how often it is called, and reaches a collective in each call like a sharded model."""

    def __init__(self, train, accelerator):
        self.inner, self.accelerator, self.calls = PopularityRecommender(train), accelerator, 0

    def recommend(self, histories, k=10, *, exclude_seen=True):
        self.calls += 1
        self.accelerator.wait_for_everyone()
        return self.inner.recommend(histories, k, exclude_seen=exclude_seen)


def main():
    accelerator = Accelerator(cpu=True)
    dataset = synthetic_dataset(41, 60, max_length=10)
    splits = leave_one_out(dataset)
    outcomes = []
    for num_examples, batch_size in [(41, 4), (1, 8), (2, 1), (7, 3), (3, 2)]:
        recommender = Counting(splits.train, accelerator)
        examples = splits.test.take(np.arange(num_examples))
        result = evaluate(
            recommender,
            dataset,
            examples,
            ks=(5, 30),
            exclude_seen=True,
            batch_size=batch_size,
            accelerator=accelerator,
        )
        outcomes.append({"calls": recommender.calls, "ranks": result.ranks.tolist(), "metrics": result.metrics})
    with open(sys.argv[1], "w") as file:
        json.dump({"processes": accelerator.num_processes, "outcomes": outcomes}, file)
    accelerator.end_training()


if __name__ == "__main__":
    main()
