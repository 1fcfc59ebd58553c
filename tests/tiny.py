"""Random two-layer language models with code tokens, catalogues for them, and recommenders of both."""

import datasets
import numpy as np
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from llmrec.adapter import add_lora
from llmrec.generation.trie import ItemTrie
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.recommender import Recommender
from llmrec.recommender_folder import RecommenderConfig
from llmrec.tasks.next_item import NextItemTask
from llmrec.vocabulary import CodeVocabulary, add_code_rows, merge_code_rows

NUM_TEXT_TOKENS = 40


def tiny_model(model_type: str, vocabulary: CodeVocabulary, *, code_rows: bool = True, seed: int = 0, **settings):
    """A random model whose logits differ a lot between tokens, so that the order of items is clear."""
    common = {
        "vocab_size": vocabulary.first_token_id if code_rows else vocabulary.first_token_id + vocabulary.num_tokens,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.3,
    }
    if model_type in ("qwen3", "gemma"):
        common["head_dim"] = 8
    config = CONFIG_MAPPING[model_type](**{**common, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    if code_rows:
        add_code_rows(model, vocabulary, seed=seed)
    return model


def random_catalogue(seed: int, *, num_items: int = 30, sizes: tuple[int, ...] = (4, 6, 5)):
    """Distinct random codes, their trie and a vocabulary."""
    generator = np.random.default_rng(seed)
    keys = generator.choice(int(np.prod(sizes)), num_items, replace=False)
    codes = np.stack(np.unravel_index(keys, sizes), axis=1)
    return codes, ItemTrie.from_codes(codes, sizes), CodeVocabulary(sizes, NUM_TEXT_TOKENS)


def padded(prompts: list[list[int]], pad_token_id: int = 2):
    """Token IDs and mask [B, T], padded on the left."""
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), pad_token_id)
    attention_mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    return input_ids, attention_mask


def random_prompts(seed: int, lengths: tuple[int, ...], num_tokens: int = NUM_TEXT_TOKENS) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, num_tokens, length).tolist() for length in lengths]


@torch.no_grad()
def exhaustive_scores(model, prompt: list[int], codes, trie, vocabulary, scope: str) -> torch.Tensor:
    """Score [N] of every item, each by one plain forward of prompt and codes, in double precision from the logits."""
    tokens = torch.from_numpy(vocabulary.token_ids(codes))
    rows = torch.cat([torch.tensor(prompt).expand(len(codes), -1), tokens], dim=1)
    logits = model(input_ids=rows).logits[:, len(prompt) - 1 : -1].double()
    scores = torch.zeros(len(codes), dtype=torch.float64)
    for level in range(trie.num_levels):
        first = vocabulary.first_token_id + int(vocabulary.level_offsets[level])
        for item in range(len(codes)):
            if scope == "vocabulary":
                scope_tokens = range(logits.shape[2])
            elif scope == "codes":
                scope_tokens = range(first, first + trie.codebook_sizes[level])
            else:
                same_prefix = (codes[:, :level] == codes[item, :level]).all(axis=1)
                scope_tokens = sorted({first + int(code) for code in codes[same_prefix, level]})
            normaliser = logits[item, level, list(scope_tokens)].logsumexp(0)
            scores[item] += logits[item, level, tokens[item, level]] - normaliser
    return scores


WORDS = ["Items", "chosen", "by", "one", "person", ",", "oldest", "first", ":", "Next"]


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words only; padding is the end-of-sequence token."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{word: number for number, word in enumerate(WORDS, start=3)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def recommender(
    folder, *, kind: str = "adapter", codes=None, sizes=(4, 6, 5), seed: int = 0, hidden_size: int = 32, **settings
):
    """A recommender of random weights.

    Args:
        folder: The base model is saved there, in `base`.
        kind: "adapter" (LoRA and code rows), "rows" (code rows alone) or "plain".
        codes: [N, L]; 30 random distinct tuples by default.
        sizes: Codebook sizes.
        seed: Of codes, weights and adapter.
        hidden_size: D.
        **settings: Of `RecommenderConfig`.
    """
    codes = random_catalogue(seed, sizes=sizes)[0] if codes is None else codes
    item_ids = tuple(f"item-{row}" for row in range(len(codes)))
    semantic_ids = SemanticIds(item_ids, codes, sizes)
    tokenizer = text_tokenizer()
    base = tiny_model(
        "llama",
        CodeVocabulary(sizes, len(tokenizer)),
        code_rows=False,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
    )
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    vocabulary = CodeVocabulary.add_to(tokenizer, sizes)
    add_code_rows(base, vocabulary, seed=seed)
    model = base
    if kind == "adapter":
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = add_lora(base, lora).eval()
    elif kind == "plain":
        merge_code_rows(base)
    task = NextItemTask(tokenizer, vocabulary, semantic_ids, max_history=4)
    titles = [f"Title of {item_id}" if row % 5 else None for row, item_id in enumerate(item_ids)]
    items = datasets.Dataset.from_dict({"item_id": list(item_ids), "title": titles, "price": [1.5] * len(codes)})
    config = RecommenderConfig(
        **{
            "base_model": str(folder / "base"),
            "template": task.template,
            "max_history": 4,
            "codebook_sizes": sizes,
            "first_token_id": vocabulary.first_token_id,
            **settings,
        }
    )
    return Recommender(model, tokenizer, semantic_ids, vocabulary, items, task, config)


def histories(seed: int, lengths, num_items: int = 30) -> list[list[str]]:
    generator = np.random.default_rng(seed)
    return [[f"item-{row}" for row in generator.integers(0, num_items, length)] for length in lengths]
