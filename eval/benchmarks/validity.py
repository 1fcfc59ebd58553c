"""Counts recommendations that are no item: random catalogues and, where its data are given, Amazon Beauty's codes.

    python eval/benchmarks/validity.py --quick
    python eval/benchmarks/validity.py --beauty ../shared/data/beauty --output validity.json

Models have random weights, which prefer no item over a tuple that is none: what makes an answer an item is the search
alone. Checked of every answer: it is an item, no item stands in it twice, none is a denied one, there are as many as
asked for, and (of one request in eight) its score is the one a plain forward over its codes gives. For comparison the
same models search as most published code does: each level allows every code that some item has there.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmrec.generation.beam_search import SCOPES, BeamSearchOutput, beam_search
from llmrec.generation.generate_search import generate_search
from llmrec.generation.trie import ItemTrie
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.vocabulary import CodeVocabulary, add_code_rows

NUM_TEXT_TOKENS = 64
MODEL_TYPES = ("llama", "qwen2", "qwen3")


def main() -> None:
    """Runs the check, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer catalogues: well under a minute on 2 CPU cores")
    parser.add_argument("--beauty", type=Path, help="folder with Beauty.letter-index.json")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    start = time.perf_counter()
    rows = [check_random_catalogues(12 if arguments.quick else 100)]
    if arguments.beauty is not None:
        rows.append(check_beauty(arguments.beauty, num_requests=100 if arguments.quick else 600))
    total, invalid = sum(row["recommendations"] for row in rows), sum(row["value"] for row in rows)

    print(f"{'catalogue':24} {'answers':>10} {'invalid':>8} {'invalid, unconstrained':>23} {'scopes, searches'}")
    for row in rows:
        print(f"{row['name']:24} {row['recommendations']:10,} {row['value']:8} {row['reference']:>23.1%} {row['how']}")
    print(f"{'total':24} {total:10,} {invalid:8}   in {time.perf_counter() - start:.0f} s")
    report = {
        "benchmark": "validity",
        "same_answer": invalid == 0,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if invalid:
        raise SystemExit(f"{invalid} of {total} recommendations are wrong")


def check_random_catalogues(number: int) -> dict[str, Any]:
    """Random sizes, levels, collisions, models, scopes and denied items."""
    answers = invalid = free = free_invalid = 0
    for seed in range(number):
        generator = np.random.default_rng(seed)
        num_levels = int(generator.integers(2, 6))
        sizes = tuple(generator.integers(2, 40, num_levels).tolist())
        num_items = int(min(np.prod(sizes, dtype=np.float64) // 2, generator.integers(2, 2_000))) or 1
        codes = generator.integers(0, sizes, (num_items, num_levels))
        model, vocabulary = random_model(MODEL_TYPES[seed % 3], sizes, seed)
        for scope in SCOPES:
            found, wrong = check(model, vocabulary, codes, scope, generator, num_requests=8, num_beams=50)
            answers, invalid = answers + found, invalid + wrong
        found, wrong = unconstrained(model, vocabulary, codes, generator)
        free, free_invalid = free + found, free_invalid + wrong
    return _row(f"{number} random catalogues", answers, invalid, free_invalid / free, "3 scopes; tree and generate")


def check_beauty(folder: Path, *, num_requests: int) -> dict[str, Any]:
    """The codes LETTER's authors published, 12,101 items of 4 levels."""
    index = folder / "Beauty.letter-index.json"
    num_items = len(json.loads(index.read_text()))
    semantic_ids = SemanticIds.from_index_json(index, [str(row) for row in range(num_items)])
    model, vocabulary = random_model("llama", semantic_ids.codebook_sizes, 0)
    generator = np.random.default_rng(0)
    answers = invalid = 0
    for scope in SCOPES:
        requests = num_requests // len(SCOPES)
        found, wrong = check(model, vocabulary, semantic_ids.codes, scope, generator, requests, num_beams=20)
        answers, invalid = answers + found, invalid + wrong
    free, free_invalid = unconstrained(model, vocabulary, semantic_ids.codes, generator)
    return _row("Amazon Beauty", answers, invalid, free_invalid / free, "3 scopes; tree and generate")


def _row(name: str, answers: int, invalid: int, reference: float, how: str) -> dict[str, Any]:
    return {
        "name": name,
        "recommendations": answers,
        "value": invalid,
        "unit": "invalid recommendations",
        "reference": reference,  # share of answers that are no item where only levels are constrained
        "ratio": None,
        "how": how,
    }


def random_model(model_type: str, sizes: tuple[int, ...], seed: int) -> tuple[Any, CodeVocabulary]:
    """A small model of random weights with rows for the codes."""
    config = CONFIG_MAPPING[model_type](
        vocab_size=NUM_TEXT_TOKENS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=seed % 2 == 0,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    vocabulary = CodeVocabulary(sizes, NUM_TEXT_TOKENS)
    add_code_rows(model, vocabulary, seed=seed)
    return model, vocabulary


def check(
    model: Any,
    vocabulary: CodeVocabulary,
    codes: np.ndarray,
    scope: str,
    generator: np.random.Generator,
    num_requests: int,
    num_beams: int,
) -> tuple[int, int]:
    """Number of answers, and of wrong ones among them (an answer that is missing counts as wrong)."""
    trie = ItemTrie.from_codes(codes, vocabulary.codebook_sizes)
    tuples = {tuple(row) for row in codes.tolist()}
    leaf_codes = codes[trie.items[trie.item_starts[:-1].long()].numpy()]
    answers = invalid = 0
    for start in range(0, num_requests, 8):
        batch = min(8, num_requests - start)
        input_ids, attention_mask = random_prompts(generator, batch)
        seen = [generator.integers(0, len(codes), int(generator.integers(0, 30))) for _ in range(batch)]
        denied = trie.denied_leaves(seen)
        search = (input_ids, attention_mask, trie, vocabulary)
        outputs = [beam_search(model, *search, num_beams=num_beams, scope=scope, denied=denied)]
        if start == 0:  # the way through transformers' generate as well
            outputs.append(
                BeamSearchOutput(*generate_search(model, *search, num_beams=num_beams, scope=scope, denied=denied))
            )
        for output in outputs:
            for request in range(batch):
                forbidden = (
                    {int(leaf) for leaf in denied[request] if leaf < trie.num_leaves} if denied is not None else set()
                )
                leaves = [int(leaf) for leaf in output.leaves[request] if leaf >= 0]
                wanted = min(num_beams, trie.num_leaves - len(forbidden))
                wrong = sum(tuple(leaf_codes[leaf].tolist()) not in tuples for leaf in leaves)
                wrong += len(forbidden & set(leaves)) + len(leaves) - len(set(leaves)) + abs(wanted - len(leaves))
                answers, invalid = answers + len(leaves), invalid + wrong
            if scope == "vocabulary":
                leaves, scores = output.leaves[0], output.scores[0]
                found = leaf_codes[leaves[leaves >= 0].numpy()]
                prompt = input_ids[0, attention_mask[0] == 1]
                invalid += scores_differ(model, vocabulary, prompt, found, scores[leaves >= 0])
    return answers, invalid


@torch.no_grad()
def scores_differ(
    model: Any, vocabulary: CodeVocabulary, prompt: torch.Tensor, codes: np.ndarray, scores: torch.Tensor
) -> int:
    """How many of the scores [R] of codes [R, L] are not those of one plain forward over prompt and codes."""
    if len(codes) == 0:
        return 0
    tokens = torch.from_numpy(vocabulary.token_ids(codes))
    logits = model(input_ids=torch.cat([prompt.expand(len(codes), -1), tokens], dim=1)).logits
    log_probabilities = logits[:, len(prompt) - 1 : -1].log_softmax(dim=2)
    expected = log_probabilities.gather(2, tokens.unsqueeze(2)).sum(dim=(1, 2))
    return int(((expected - scores).abs() > 1e-3).sum())


def unconstrained(
    model: Any, vocabulary: CodeVocabulary, codes: np.ndarray, generator: np.random.Generator
) -> tuple[int, int]:
    """Number of answers, and of those that are no item, where each level allows any code that some item has there."""
    per_level = [np.unique(codes[:, level]) for level in range(codes.shape[1])]
    first = vocabulary.first_token_id + vocabulary.level_offsets

    input_ids, attention_mask = random_prompts(generator, 8)
    prompt_length = input_ids.shape[1]

    def allowed(_: int, prefix: torch.Tensor) -> list[int]:
        level = len(prefix) - prompt_length
        return (per_level[level] + first[level]).tolist()

    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        prefix_allowed_tokens_fn=allowed,
        num_beams=20,
        num_return_sequences=20,
        max_new_tokens=codes.shape[1],
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    tuples = {tuple(row) for row in codes.tolist()}
    answers = [tuple(row) for row in vocabulary.codes(output[:, prompt_length:].numpy()).tolist()]
    return len(answers), sum(answer not in tuples for answer in answers)


def random_prompts(generator: np.random.Generator, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token IDs and mask [number, T] of prompts of 1 to 40 tokens, padded on the left."""
    lengths = generator.integers(1, 41, number)
    positions = np.arange(lengths.max())
    mask = positions >= (lengths.max() - lengths)[:, None]
    tokens = np.where(mask, generator.integers(3, NUM_TEXT_TOKENS, mask.shape), 0)
    return torch.from_numpy(tokens), torch.from_numpy(mask.astype(np.int64))


if __name__ == "__main__":
    main()
