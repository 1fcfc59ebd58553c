"""What a recommender has to beat: popularity. (SASRec, the stronger baseline, is in `embeddings/collaborative.py`.)"""

from collections.abc import Sequence

import numpy as np

from llmrec.data.interactions import InteractionDataset
from llmrec.data.recommendation import Recommendation, as_histories, check_k


class PopularityRecommender:
    """Recommends the items with the most interactions, to everyone the same.

    Args:
        train: The training part of a split; anything more would count what is to be predicted. Items with equally many
            interactions stand in the order of the catalogue; those without any come last.

    Example:
        >>> popularity = PopularityRecommender(leave_one_out(dataset).train)
        >>> popularity.recommend(["item-001"], k=3)
    """

    name = "popularity"

    def __init__(self, train: InteractionDataset):
        counts = np.bincount(train.flat_items, minlength=train.num_items)
        order = np.argsort(-counts, kind="stable")
        self._item_index = train.item_index
        self._ranking = [
            Recommendation(item_id=train.item_ids[row], score=float(counts[row]), title=train.titles[row])
            for row in order
        ]

    def recommend(
        self, history: Sequence[str] | Sequence[Sequence[str]], k: int = 10, *, exclude_seen: bool = True
    ) -> list[Recommendation] | list[list[Recommendation]]:
        """Recommends for one history or many.

        Args:
            history: Item IDs oldest first, or a list of such lists; may be empty.
            k: Items to recommend; fewer where the catalogue has fewer left.
            exclude_seen: Whether items of the history are left out.

        Returns:
            Best first, the score being the number of training interactions; a list of lists for many histories.

        Raises:
            UnknownItemError: An item of a history is not in the catalogue.
            DataError: The history is no list of item IDs.
            SettingsError: k below 1.
        """
        histories, single = as_histories(history)
        k = check_k(k)
        answers = [self._answer(one, k, exclude_seen) for one in histories]
        return answers[0] if single else answers

    def _answer(self, history: list[str], k: int, exclude_seen: bool) -> list[Recommendation]:
        self._item_index.rows(history)  # refuses unknown items
        if not exclude_seen:
            return self._ranking[:k]
        seen = set(history)
        return [item for item in self._ranking[: k + len(seen)] if item.item_id not in seen][:k]
