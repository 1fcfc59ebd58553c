import pickle

from llmrec.tasks.epoch_cache import EpochCache


class Counter:
    def __init__(self):
        self.asked = []
        self.cache = EpochCache(self.draw)

    def draw(self, epoch):
        self.asked.append(epoch)
        return epoch * 10


def test_each_epoch_is_drawn_once_and_few_are_kept():
    counter = Counter()
    assert [counter.cache(epoch) for epoch in (3, 4, 3, 4)] == [30, 40, 30, 40]
    assert counter.asked == [3, 4]
    for epoch in range(100, 140):
        counter.cache(epoch)
    assert len(counter.cache._drawn) == 16
    assert counter.cache(3) == 30
    assert counter.asked.count(3) == 2


def test_it_can_be_sent_to_another_process():
    assert pickle.loads(pickle.dumps(Counter())).cache(2) == 20
