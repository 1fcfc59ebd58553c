"""Counts recommendations that are no item, and holds the search against scoring every item.

    python eval/benchmarks/validity.py --quick
    python eval/benchmarks/validity.py --beauty ../shared/data/beauty --output validity.json     # 1,000,000 answers

Models have random weights, which prefer no item over a tuple that is none: what makes an answer an item is the search
alone. Searches are of all scopes: the best items, drawn ones, diverse ones; each request with a denied history, every
other batch with an allowed set as well.

Checked of every answer: its codes are those of an item, no item stands in it twice, it is allowed and not denied, and
there are as many as asked for (a diverse search may give fewer). Of one request in eight, the score is the one a plain
forward over its codes gives. On small catalogues, with at least as many beams as items, the whole answer is held
against every item's score: same items, same order, same scores. For comparison the same models search as most
published code does: each level allows every code that some item has there.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmrec.generation.beam_search import SCOPES, BeamSearchOutput, beam_search
from llmrec.generation.generate_search import generate_search
from llmrec.generation.selection import Diversity, Sampling
from llmrec.generation.trie import ItemTrie
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.vocabulary import CodeVocabulary, add_code_rows

NUM_TEXT_TOKENS = 64
MODEL_TYPES = ("llama", "qwen2", "qwen3")
SEARCHES = ("best", "drawn", "diverse")
REQUESTS = 8  # of a batch
TOLERANCE = 1e-3  # of scores, sums of up to 5 log-probabilities of random weights with large logits


@dataclass(frozen=True)
class Catalogue:
    """A model and the items it searches.

    Attributes:
        model: With code rows.
        vocabulary: Token IDs of the codes.
        codes: int64 [N, L].
        trie: The same as a trie.
        keys: int64 [M], the distinct code tuples of the items as numbers, ascending: what is an item is read from
            here, not from the trie.
        key_of_item: int64 [N], the place of each item's tuple in `keys`.
    """

    model: Any
    vocabulary: CodeVocabulary
    codes: np.ndarray
    trie: ItemTrie
    keys: np.ndarray
    key_of_item: np.ndarray

    @classmethod
    def make(cls, codes: np.ndarray, sizes: tuple[int, ...], seed: int) -> "Catalogue":
        """With a random model."""
        model, vocabulary = random_model(MODEL_TYPES[seed % 3], sizes, seed)
        keys, key_of_item = np.unique(np.ravel_multi_index(tuple(codes.T), sizes), return_inverse=True)
        return cls(model, vocabulary, codes, ItemTrie.from_codes(codes, sizes), keys, key_of_item)

    def keys_of(self, leaves: Tensor) -> np.ndarray:
        """The codes of leaves [n] as numbers int64 [n]."""
        return np.ravel_multi_index(tuple(self.trie.codes_of(leaves).numpy().T), self.vocabulary.codebook_sizes)


def random_model(model_type: str, sizes: tuple[int, ...], seed: int) -> tuple[Any, CodeVocabulary]:
    """A small model of random weights with rows for the codes."""
    config_class: Any = CONFIG_MAPPING[model_type]
    config = config_class(
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


def random_catalogue(seed: int, most_items: int) -> tuple[Catalogue, np.random.Generator]:
    """Random sizes, levels and collisions, and the generator for what follows."""
    generator = np.random.default_rng(seed)
    num_levels = int(generator.integers(2, 6))
    sizes = tuple(generator.integers(2, 40, num_levels).tolist())
    num_items = max(1, int(min(np.prod(sizes, dtype=np.float64) // 2, generator.integers(2, most_items))))
    return Catalogue.make(generator.integers(0, sizes, (num_items, num_levels)), sizes, seed), generator


def random_prompts(generator: np.random.Generator, number: int) -> list[list[int]]:
    """Prompts of 1 to 40 tokens."""
    return [generator.integers(3, NUM_TEXT_TOKENS, length).tolist() for length in generator.integers(1, 41, number)]


@dataclass
class Exactness:
    """How searches with at least as many beams as items compare with scoring every item.

    Attributes:
        catalogues: How many were searched.
        scores: How many were compared.
        wrong: Answers that miss items or stand in another order than the scores do (closer scores than the tolerance
            may change places), scores that differ by more than it.
        largest_difference: Of two scores of an item.
    """

    catalogues: int = 0
    scores: int = 0
    wrong: int = 0
    largest_difference: float = 0.0


def check_exactness(number: int) -> Exactness:
    """All scopes on small random catalogues, one of them through transformers' `generate` as well."""
    found = Exactness()
    for seed in range(number):
        catalogue, generator = random_catalogue(seed, most_items=200)
        trie, vocabulary = catalogue.trie, catalogue.vocabulary
        prompts = random_prompts(generator, 2)
        leaf_codes = trie.codes_of(torch.arange(trie.num_leaves))
        expected = [every_score(catalogue, prompt, leaf_codes) for prompt in prompts]
        arguments = (catalogue.model, prompts, trie, vocabulary)
        num_beams = trie.num_leaves + 3
        for scope in SCOPES:
            outputs = [beam_search(*arguments, num_beams=num_beams, scope=scope)]
            if scope == SCOPES[seed % len(SCOPES)]:
                outputs.append(BeamSearchOutput(*generate_search(*arguments, num_beams=num_beams, scope=scope)))
            for output in outputs:
                for request in range(len(prompts)):
                    compare_all(found, output.leaves[request], output.scores[request], expected[request][scope])
        found.catalogues += 1
    return found


def compare_all(found: Exactness, leaves: Tensor, scores: Tensor, expected: Tensor) -> None:
    """Adds one request's answer [K] against the score float64 [M] of every leaf."""
    alive = leaves >= 0
    leaves, scores = leaves[alive], scores[alive].double()
    if sorted(leaves.tolist()) != list(range(len(expected))):
        found.wrong += 1
        return
    differences = (scores - expected[leaves]).abs()
    rises = expected[leaves].diff() > TOLERANCE
    found.scores += len(leaves)
    found.wrong += int((~(differences <= TOLERANCE)).sum()) + int(rises.sum())
    found.largest_difference = max(found.largest_difference, float(differences.max()))


@torch.no_grad()
def every_score(catalogue: Catalogue, prompt: list[int], codes: Tensor) -> dict[str, Tensor]:
    """Of each scope the score float64 [M] of code tuples [M, L], by plain forwards over prompt and codes."""
    vocabulary = catalogue.vocabulary
    tokens = torch.from_numpy(vocabulary.token_ids(codes.numpy()))
    rows = torch.cat([torch.tensor(prompt).expand(len(tokens), -1), tokens], dim=1)
    logits = catalogue.model(input_ids=rows).logits[:, len(prompt) - 1 : -1].double()  # [M, L, V]
    scores = {scope: torch.zeros(len(tokens), dtype=torch.float64) for scope in SCOPES}
    for level, size in enumerate(vocabulary.codebook_sizes):
        first = vocabulary.first_token_id + int(vocabulary.level_offsets[level])
        of_level = logits[:, level, first : first + size]
        chosen = of_level.gather(1, codes[:, level, None]).squeeze(1)
        # [M, M]: whether two tuples agree before this level; then which codes follow each prefix.
        same_prefix = (codes[:, None, :level] == codes[None, :, :level]).all(dim=2)
        follows = torch.zeros(len(tokens), size, dtype=torch.float64)
        follows.index_add_(1, codes[:, level], same_prefix.double())
        normalisers = {
            "vocabulary": logits[:, level],
            "codes": of_level,
            "trie": of_level.masked_fill(follows == 0, -torch.inf),
        }
        for scope, among in normalisers.items():
            scores[scope] += chosen - among.logsumexp(dim=1)
    return scores


@dataclass
class Count:
    """Answers that were checked, and wrong ones among them."""

    answers: int = 0
    invalid: int = 0


def check_searches(catalogue: Catalogue, generator: np.random.Generator, num_beams: int, count: Count) -> None:
    """One batch of requests in each scope and kind of search."""
    for scope in SCOPES:
        for search in SEARCHES:
            check_batch(catalogue, generator, scope, search, num_beams, count)


def check_batch(
    catalogue: Catalogue, generator: np.random.Generator, scope: str, search: str, num_beams: int, count: Count
) -> None:
    """One batch of requests, each with a history to leave out, half of the batches with an allowed set."""
    trie, num_items = catalogue.trie, len(catalogue.codes)
    prompts = random_prompts(generator, REQUESTS)
    allowed = generator.random(num_items) < generator.uniform(0.05, 1.0)
    if generator.random() < 0.5:
        allowed[:] = True
    seen = [generator.integers(0, num_items, int(generator.integers(0, 30))) for _ in prompts]
    allow = None if allowed.all() else trie.item_set(allowed)
    variant: dict[str, Any] = {}
    if search == "drawn":
        seed = int(generator.integers(2**31))
        variant["sampling"] = Sampling(temperature=float(generator.uniform(0.5, 2.0)), seed=seed)
    elif search == "diverse":
        groups = min(num_beams, int(generator.integers(2, 6)))
        variant["diversity"] = Diversity(num_groups=groups, penalty=float(generator.uniform(0.0, 2.0)))
    output = beam_search(
        catalogue.model,
        prompts,
        trie,
        catalogue.vocabulary,
        num_beams=num_beams,
        scope=scope,
        subset=trie.subset(allow=allow, deny=seen),
        **variant,
    )
    for request, rows in enumerate(seen):
        left = allowed.copy()
        left[rows] = False
        alive = output.leaves[request] >= 0
        leaves, scores = output.leaves[request][alive], output.scores[request][alive]
        count.answers += len(leaves)
        count.invalid += num_wrong(catalogue, leaves, left, num_beams, may_be_fewer=search == "diverse")
        if request == 0 and scope == "vocabulary" and len(leaves):
            count.invalid += scores_differ(catalogue, prompts[0], leaves, scores)


def num_wrong(catalogue: Catalogue, leaves: Tensor, left: np.ndarray, num_beams: int, *, may_be_fewer: bool) -> int:
    """Wrong answers among the leaves of a request; what is missing counts as wrong.

    Args:
        catalogue: What was searched.
        leaves: int64 [n].
        left: bool [N], the items that the request may be answered with.
        num_beams: K.
        may_be_fewer: Whether an answer may be shorter than K although more is left.
    """
    possible = np.zeros(len(catalogue.keys), dtype=bool)
    possible[catalogue.key_of_item[left]] = True
    found = catalogue.keys_of(leaves) if len(leaves) else np.empty(0, dtype=np.int64)
    places = np.searchsorted(catalogue.keys, found).clip(max=len(possible) - 1)
    right = (catalogue.keys[places] == found) & possible[places]
    wrong = int((~right).sum()) + len(found) - len(np.unique(found))
    missing = min(num_beams, int(possible.sum())) - len(found)
    return wrong + (int(len(found) == 0) if missing > 0 and may_be_fewer else abs(missing))


@torch.no_grad()
def scores_differ(catalogue: Catalogue, prompt: list[int], leaves: Tensor, scores: Tensor) -> int:
    """How many of the scores [n] of leaves are not those of one plain forward over prompt and codes."""
    tokens = torch.from_numpy(catalogue.vocabulary.token_ids(catalogue.trie.codes_of(leaves).numpy()))
    rows = torch.cat([torch.tensor(prompt).expand(len(tokens), -1), tokens], dim=1)
    log_probabilities = catalogue.model(input_ids=rows).logits[:, len(prompt) - 1 : -1].log_softmax(dim=2)
    expected = log_probabilities.gather(2, tokens.unsqueeze(2)).sum(dim=(1, 2))
    return int((~((expected - scores).abs() <= TOLERANCE)).sum())


def unconstrained(catalogue: Catalogue, generator: np.random.Generator) -> Count:
    """Answers that are no item where each level allows any code that some item has there."""
    codes, vocabulary = catalogue.codes, catalogue.vocabulary
    first = vocabulary.first_token_id + vocabulary.level_offsets
    per_level = [(np.unique(codes[:, level]) + first[level]).tolist() for level in range(codes.shape[1])]
    prompts = generator.integers(3, NUM_TEXT_TOKENS, (REQUESTS, int(generator.integers(1, 41))))

    def allowed(_: int, row: Tensor) -> list[int]:
        return per_level[len(row) - prompts.shape[1]]

    output = catalogue.model.generate(
        input_ids=torch.from_numpy(prompts),
        attention_mask=torch.ones(prompts.shape, dtype=torch.int64),
        prefix_allowed_tokens_fn=allowed,
        num_beams=20,
        num_return_sequences=20,
        max_new_tokens=codes.shape[1],
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    answers = vocabulary.codes(output[:, prompts.shape[1] :].numpy())
    keys = np.ravel_multi_index(tuple(answers.T), vocabulary.codebook_sizes)
    return Count(len(keys), int((~np.isin(keys, catalogue.keys)).sum()))


def check_random_catalogues(number: int) -> dict[str, Any]:
    """Catalogues of 2 to 2,000 items."""
    count, free = Count(), Count()
    for seed in range(number):
        catalogue, generator = random_catalogue(seed, most_items=2_000)
        check_searches(catalogue, generator, num_beams=50, count=count)
        without = unconstrained(catalogue, generator)
        free = Count(free.answers + without.answers, free.invalid + without.invalid)
    return validity_row(f"{number} random catalogues", count, free)


def check_one(
    name: str, codes: np.ndarray, sizes: Sequence[int], *, num_answers: int, num_beams: int
) -> dict[str, Any]:
    """One catalogue, until there are so many answers."""
    catalogue, generator, count = Catalogue.make(codes, tuple(sizes), 0), np.random.default_rng(0), Count()
    while count.answers < num_answers:
        check_searches(catalogue, generator, num_beams, count)
    return validity_row(name, count, unconstrained(catalogue, generator))


def beauty_codes(folder: Path) -> SemanticIds:
    """The codes LETTER's authors published, 12,101 items of 4 levels, in the order of the file."""
    index = folder / "Beauty.letter-index.json"
    keys = list(json.loads(index.read_text(encoding="utf-8")))
    return SemanticIds.from_index_json(index, keys, item_keys=keys)


def validity_row(name: str, count: Count, free: Count) -> dict[str, Any]:
    """A row of the report."""
    return {
        "name": name,
        "recommendations": count.answers,
        "value": count.invalid,
        "unit": "invalid recommendations",
        "reference": free.invalid / free.answers,  # share that is no item where only levels are constrained
        "ratio": None,
    }


def main(command_line: list[str] | None = None) -> int:
    """Runs the checks, prints a table and writes JSON; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer of everything: well under a minute on 2 CPU cores")
    parser.add_argument("--beauty", type=Path, help="folder with Beauty.letter-index.json")
    parser.add_argument("--answers", type=int, default=1_000_000, help="to check (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args(command_line)
    catalogues, answers = (10, min(given.answers, 60_000)) if given.quick else (100, given.answers)

    start = time.perf_counter()
    exact = check_exactness(catalogues)
    rows = [check_random_catalogues(catalogues)]
    if given.beauty is not None:
        codes = beauty_codes(given.beauty)
        rows.append(
            check_one("Amazon Beauty", codes.codes, codes.codebook_sizes, num_answers=answers // 10, num_beams=50)
        )
    sizes = (256, 256, 256, 256)
    made_up = np.random.default_rng(1).integers(0, sizes, (100_000, 4))
    rest = answers - sum(row["recommendations"] for row in rows)
    rows.append(check_one("100,000 random items", made_up, sizes, num_answers=rest, num_beams=256))
    total, invalid = sum(row["recommendations"] for row in rows), sum(row["value"] for row in rows)
    seconds = time.perf_counter() - start

    print("| catalogue | answers | invalid | invalid where only levels are constrained |\n|---|--:|--:|--:|")
    for row in rows:
        print(f"| {row['name']} | {row['recommendations']:,} | {row['value']} | {row['reference']:.1%} |")
    print(f"| all | {total:,} | {invalid} | |")
    print(
        f"\nWith at least as many beams as items, on {exact.catalogues} random catalogues: {exact.scores:,} scores"
        f" held against scoring every item, {exact.wrong} wrong, largest difference {exact.largest_difference:.1e}."
    )
    print(f"Scopes {', '.join(SCOPES)}; {', '.join(SEARCHES)} items; allowed and denied sets; {seconds:.0f} s.")
    exactness_row = {
        "name": f"exhaustive, {exact.catalogues} random catalogues",
        "value": exact.wrong,
        "unit": "wrong answers or scores",
        "reference": None,
        "ratio": None,
        "scores": exact.scores,
        "largest_score_difference": exact.largest_difference,
    }
    report = {
        "benchmark": "validity",
        "same_answer": invalid == 0 and exact.wrong == 0,
        "quick": given.quick,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "seconds": seconds,
        "rows": [*rows, exactness_row],
    }
    if given.output is not None:
        given.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report["same_answer"] else 1


if __name__ == "__main__":
    sys.exit(main())
