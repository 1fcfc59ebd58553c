import torch

from llmrec.generation.packing import pack_prompts
from llmrec.generation.prompt_tree import prompt_tree


@torch.no_grad()
def test_keys_stand_in_slots_that_are_allocated_once_and_the_last_level_has_none(tiny):
    _, _, vocabulary = tiny.random_catalogue(0)
    model = tiny.tiny_model("llama", vocabulary)
    packed = pack_prompts(tiny.random_prompts(1, (3, 5)), attention_scale=100)
    codes, parents = torch.tensor([[0, 2, 3]] * 2), torch.zeros(2, 3, dtype=torch.int64)
    with prompt_tree(model, packed, vocabulary, scope="codes", num_slots=3) as tree:
        tree.read_prompts()
        layer = tree._cache.layers[0]
        keys = layer.keys
        assert keys.shape == (2, 2, 5 + 3, 8)
        first = tree.write(0, codes, parents)
        written = keys.clone()
        tree.write(1, codes, torch.tensor([[2, 0, 1]] * 2), is_last=True)
        assert layer.keys is keys
        assert torch.equal(keys, written)
        tree.rewind()
        torch.testing.assert_close(tree.write(0, codes, parents), first)
