"""Adding items to a live recommender of a million: seconds, against making it anew with them.

    python eval/benchmarks/add_items.py --quick
    python eval/benchmarks/add_items.py --output add_items.json        # 1,000,000 items x 768, some minutes

The catalogue is made of vectors around 5,000 centres; its item tokenizer is fitted on a sample, and the model is a
tiny one with random weights, which adding items doesn't use. Ours is `add_items` on the recommender as it stands,
encoding, unique codes, trie and item table included, and `remove_items` of as many. The reference is what a user
without them would do: put all items together, encode the new ones, give them codes of their own, and make the
recommender anew from the parts. Both then answer the same histories, with new items in them.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

MOST_LOAD_PER_CPU = 1.5
CHECKED_HISTORIES = 8


def make_vectors(count: int, width: int):
    """Vectors around 5,000 centres: float32 [count, width]."""
    import numpy as np

    draws = np.random.default_rng(0)
    centres = draws.normal(size=(5_000, width)).astype(np.float32)
    vectors = np.empty((count, width), dtype=np.float32)
    for start in range(0, count, 50_000):
        part = vectors[start : start + 50_000]
        draws.standard_normal(dtype=np.float32, out=part)
        part *= 0.7
        part += centres[draws.integers(5_000, size=len(part))]
    return vectors


def item_columns(numbers) -> dict[str, list]:
    """A catalogue's columns."""
    return {
        "item_id": [f"item-{number}" for number in numbers],
        "title": [f"Title of item {number}" for number in numbers],
        "category": [f"category {number % 40}" for number in numbers],
    }


def make_recommender(folder: Path, semantic_ids, items, item_tokenizer):
    """A tiny model with random weights on these codes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmrec.recommender import Recommender
    from llmrec.recommender_folder import RecommenderConfig
    from llmrec.tasks.next_item import NextItemTask
    from llmrec.tiny_model import build_tiny_llama
    from llmrec.vocabulary import CodeVocabulary, add_code_rows

    build_tiny_llama(["Items chosen by one person, oldest first: "] * 50, folder, hidden_size=64, num_layers=2)
    text_tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = CodeVocabulary.add_to(text_tokenizer, semantic_ids.codebook_sizes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    add_code_rows(model, vocabulary, seed=0)
    task = NextItemTask(text_tokenizer, vocabulary, semantic_ids)
    config = RecommenderConfig(
        base_model=str(folder),
        template=task.template,
        max_history=task.max_history,
        codebook_sizes=semantic_ids.codebook_sizes,
        first_token_id=vocabulary.first_token_id,
        scope="trie",
    )
    return Recommender(model.eval(), text_tokenizer, semantic_ids, vocabulary, items, task, config, item_tokenizer)


def make_anew(recommender, items, embeddings):
    """The reference: the same recommender from its parts, with further items."""
    import datasets

    from llmrec.recommender import Recommender
    from llmrec.tasks.next_item import NextItemTask

    semantic_ids = recommender.item_tokenizer.extend(recommender.semantic_ids, embeddings)
    everything = datasets.Dataset.from_list([*recommender.items.to_list(), *items])
    task = NextItemTask(
        recommender.text_tokenizer, recommender.vocabulary, semantic_ids, template=recommender.config.template
    )
    return Recommender(
        recommender.model,
        recommender.text_tokenizer,
        semantic_ids,
        recommender.vocabulary,
        everything,
        task,
        recommender.config,
        recommender.item_tokenizer,
    )


def answers_of(recommender, num_items: int, num_new: int) -> list[list[tuple[str, str, float]]]:
    """What it recommends for some histories, half of whose items are new."""
    import numpy as np

    draws = np.random.default_rng(1)
    histories = [
        [
            f"item-{number}"
            for number in [*draws.integers(num_items, size=5), *(num_items + draws.integers(num_new, size=5))]
        ]
        for _ in range(CHECKED_HISTORIES)
    ]
    only_new = recommender.item_set([f"item-{number}" for number in range(num_items, num_items + num_new)])
    answers = [*recommender.recommend(histories, k=10), *recommender.recommend(histories, k=10, allow=only_new)]
    return [[(entry.item_id, entry.title, round(entry.score, 3)) for entry in answer] for answer in answers]


def timed(action) -> tuple[object, float]:
    """What a function gives, and its seconds."""
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start


def measure(count: int, num_new: int, width: int, method: str) -> dict:
    """Runs both sides in one process and puts the result in the form of all benchmarks."""
    import datasets
    import numpy as np
    import torch

    from llmrec.embeddings.base import ItemEmbeddings
    from llmrec.item_tokenizers.rq_kmeans import RQKMeansConfig, RQKMeansTokenizer
    from llmrec.item_tokenizers.rq_vae import RQVAEConfig, RQVAETokenizer

    vectors = make_vectors(count + num_new, width)
    names = item_columns(range(count + num_new))
    old_ids, new_ids = tuple(names["item_id"][:count]), tuple(names["item_id"][count:])
    sample = ItemEmbeddings(old_ids[:2_000], vectors[: min(count, 2_000)])
    quick_fit = RQKMeansConfig(initialisation_items=1_000, iterations=5)  # how good the codes are doesn't matter here
    tokenizer = RQVAETokenizer(RQVAEConfig(epochs=5)) if method == "rq_vae" else RQKMeansTokenizer(quick_fit)
    tokenizer.fit(sample, progress=False)
    semantic_ids = tokenizer.encode(ItemEmbeddings(old_ids, vectors[:count]))
    items = datasets.Dataset.from_dict({name: values[:count] for name, values in names.items()})
    new_items = [{name: names[name][row] for name in names} for row in range(count, count + num_new)]
    embeddings = ItemEmbeddings(new_ids, vectors[count:])

    with tempfile.TemporaryDirectory() as folder:
        recommender = make_recommender(Path(folder) / "model", semantic_ids, items, tokenizer)
        recommender.recommend([])  # warm
        tokenizer.encode(sample.select(slice(0, 1000)))
        load = os.getloadavg()[0]
        anew, anew_seconds = timed(lambda: make_anew(recommender, new_items, embeddings))
        before = recommender.catalogue
        _, add_seconds = timed(lambda: recommender.add_items(new_items, embeddings))
        same = np.array_equal(recommender.semantic_ids.codes, anew.semantic_ids.codes)
        same = same and recommender.semantic_ids.is_unique
        found = answers_of(recommender, count, num_new)
        same = same and found == answers_of(anew, count, num_new) and any(found)
        _, remove_seconds = timed(lambda: recommender.remove_items(new_ids))
        same = same and np.array_equal(recommender.semantic_ids.codes, before.semantic_ids.codes)
        same = same and recommender.trie.fingerprint == before.trie.fingerprint
    busy = load > MOST_LOAD_PER_CPU * (os.cpu_count() or 1)
    common = {"unit": "s", "items": count, "changed": num_new, "width": width, "load_average": load}
    rows = [
        {"name": f"add_items_{method}", "value": add_seconds, "reference": anew_seconds,
         "ratio": None if busy else anew_seconds / add_seconds, **common},
        {"name": "remove_items", "value": remove_seconds, "reference": None, "ratio": None, **common},
    ]  # fmt: skip
    machine = {"cpu": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"benchmark": "add_items", "same_answer": same, "machine": machine, "versions": versions, "rows": rows}


def main() -> int:
    """Parses the command line, measures, prints; 1 where the answers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: 1,000 items to 50,000")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--num_items", type=int, default=1_000_000, help="of the catalogue (default: %(default)s)")
    parser.add_argument("--num_new", type=int, default=10_000, help="that are added (default: %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="of the vectors (default: %(default)s)")
    parser.add_argument("--method", choices=["rq_vae", "rq_kmeans"], default="rq_kmeans", help="default: %(default)s")
    given = parser.parse_args()
    count, num_new = (50_000, 1_000) if given.quick else (given.num_items, given.num_new)
    result = measure(count, num_new, given.width, given.method)
    print(f"same answer: {result['same_answer']}, threads {result['machine']['threads']}")
    for row in result["rows"]:
        print(
            f"{row['name']:20} {row['changed']:>7,} of {row['items']:>10,} items x {row['width']}: {row['value']:6.2f}"
            f" s, load average {row['load_average']:.1f}"
        )
        if row["reference"] is not None:
            ratio = "no ratio: the machine is busy" if row["ratio"] is None else f"ratio {row['ratio']:.1f}"
            print(f"{'':20} made anew from its parts: {row['reference']:.2f} s, {ratio}")
    if given.output:
        from llmrec.files import write_json

        write_json(given.output, result)
    return 0 if result["same_answer"] else 1


if __name__ == "__main__":
    sys.exit(main())
