import numpy as np
import pytest
import torch

from llmrec.generation.packing import PADDING, SHARED, pack_prompts


def _read_back(packed, prompts):
    for request, prompt in enumerate(prompts):
        rows, columns = packed.rows[request, : len(prompt)], packed.columns[request, : len(prompt)]
        assert packed.input_ids[rows, columns].tolist() == list(prompt)
        assert packed.positions[rows, columns].tolist() == list(range(len(prompt)))
        last = tuple(int(part[request]) for part in packed.last())
        assert packed.input_ids[last] == prompt[-1]
        visible = packed.visible()[last[0], last[1]]
        assert sorted(visible.nonzero().flatten().tolist()) == sorted(columns.tolist())  # all of it and nothing else


def test_prompts_stand_side_by_side_with_the_common_start_once():
    prompts = [[7, 8, 1], [7, 8, 2, 3, 4], [7, 8, 5]]
    packed = pack_prompts(prompts, attention_scale=10**6)
    assert packed.input_ids.tolist() == [[7, 8, 2, 3, 4, 1, 5]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 2, 2]]
    assert packed.owners.tolist() == [[SHARED, SHARED, 1, 1, 1, 0, 2]]
    assert packed.lengths.tolist() == [3, 5, 3]
    assert packed.present().sum(1).tolist() == [3, 5, 3]
    assert not packed.is_plain
    _read_back(packed, prompts)
    assert packed.visible(window=2)[0, 4].nonzero().flatten().tolist() == [3, 4]
    assert packed.visible(window=2)[0, 5].nonzero().flatten().tolist() == [
        1,
        5,
    ]  # by place in the prompt, not in the row


@pytest.mark.parametrize("seed", range(5))
def test_any_prompts_can_be_read_back(seed):
    generator = np.random.default_rng(seed)
    start = generator.integers(0, 9, generator.integers(0, 6)).tolist()
    lengths = generator.integers(1, 40, generator.integers(1, 20))
    prompts = [start + generator.integers(0, 9, length).tolist() for length in lengths]
    for attention_scale in (1, 30, 10**6):
        _read_back(pack_prompts(prompts, attention_scale=attention_scale), prompts)


def test_a_row_is_as_long_as_attention_allows():
    prompts = [[number] * length for number, length in enumerate((40, 10, 20, 30, 40))]
    assert pack_prompts(prompts, attention_scale=10**6).input_ids.shape == (2, 70)
    packed = pack_prompts(prompts, attention_scale=40)
    assert packed.input_ids.shape == (3, 50)  # 40 and 10, 30 and 20, 40
    assert (packed.owners == PADDING).sum() == 10
    like = [[number] * length for number, length in enumerate((40, 38, 39, 40))]
    assert pack_prompts(like, attention_scale=40).input_ids.shape == (4, 40)


def test_one_prompt_or_equal_ones_are_left_as_they_are():
    for prompts in ([[1, 2, 3]], [[1, 2], [3, 4], [5, 6]]):
        packed = pack_prompts(prompts, attention_scale=100)
        assert packed.is_plain
        assert torch.equal(packed.input_ids, torch.tensor(prompts))
        _read_back(packed, prompts)
    same = [[1, 2, 3]] * 3  # the last token is always its own
    packed = pack_prompts(same, attention_scale=10**6)
    assert packed.input_ids.tolist() == [[1, 2, 3, 3, 3]]
    _read_back(packed, same)
