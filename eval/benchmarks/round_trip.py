"""A saved recommender answers the same in a fresh process, and merged, saved and loaded again.

    python eval/benchmarks/round_trip.py runs/beauty_smollm2_letter/recommender --dataset ../shared/data/beauty
    python eval/benchmarks/round_trip.py FOLDER --dataset PATH --quick --output round_trip.json

Takes the histories of test examples and compares the top 20 of four recommenders: the folder loaded here; loaded here,
saved elsewhere and loaded in a fresh process; merged into a whole model here; and that saved and loaded in a fresh
process. Prints the size of what is saved, beside what the base model's embedding alone would take.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

IN_A_FRESH_PROCESS = """
import json, sys
from llmrec import Recommender
histories = json.load(open(sys.argv[2]))
answers = Recommender.from_pretrained(sys.argv[1], dtype="float32").recommend(histories, k=20)
json.dump([[(item.item_id, item.score) for item in answer] for answer in answers], open(sys.argv[3], "w"))
"""


def fresh_answers(folder: Path, histories: list[list[str]], scratch: Path) -> list[list[tuple[str, float]]]:
    """The top 20 of each history, by a new Python process that loads `folder`."""
    (scratch / "histories.json").write_text(json.dumps(histories))
    arguments = [str(folder), str(scratch / "histories.json"), str(scratch / "answers.json")]
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS, *arguments], check=True)
    return [[tuple(item) for item in answer] for answer in json.loads((scratch / "answers.json").read_text())]


def compare(name: str, expected: list, found: list) -> dict:
    """A row: the share of places in the top 20 with the same item, and the largest difference of scores there."""
    places = [pair for left, right in zip(expected, found, strict=True) for pair in zip(left, right, strict=True)]
    same = sum(left[0] == right[0] for left, right in places) / len(places)
    return {"name": name, "value": same, "unit": "share", "score_difference": max(abs(a[1] - b[1]) for a, b in places)}


def main() -> int:
    """Runs the comparison; exit status 1 where an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--quick", action="store_true", help="4 histories in place of 32")
    parser.add_argument("--output", type=Path, help="JSON file")
    given = parser.parse_args()

    from llmrec import Recommender, leave_one_out, load_dataset_from
    from llmrec.recommender_folder import installed_versions

    dataset = load_dataset_from(given.dataset)
    examples = leave_one_out(dataset).test.sample(4 if given.quick else 32)
    histories = [[dataset.item_ids[row] for row in examples.history(example)] for example in range(len(examples))]
    model = Recommender.from_pretrained(given.folder, dtype="float32")

    def answers(recommender: Recommender) -> list:
        return [[(item.item_id, item.score) for item in one] for one in recommender.recommend(histories, k=20)]

    rows = []
    expected = answers(model)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model.save_pretrained(scratch / "saved")
        rows.append(compare("saved, fresh process", expected, fresh_answers(scratch / "saved", histories, scratch)))
        merged = model.merge()
        rows.append(compare("merged", expected, answers(merged)))
        merged.save_pretrained(scratch / "merged")
        found = fresh_answers(scratch / "merged", histories, scratch)
        rows.append(compare("merged, saved, fresh process", expected, found))
    adapter = given.folder / "adapter_model.safetensors"
    if adapter.is_file():
        weight = merged.model.get_input_embeddings().weight
        size, whole = adapter.stat().st_size / 1e6, weight.numel() * 4 / 1e6
        size_row = {"name": "adapter_model.safetensors", "value": size, "unit": "MB"}
        rows.append({**size_row, "reference": whole, "ratio": whole / size})
    same = all(row["value"] == 1.0 for row in rows if row["unit"] == "share")
    for row in rows:
        numbers = ", ".join(f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float))
        print(f"{row['name']:32s} {numbers} ({row['unit']})")
    print(f"{len(histories)} histories, top 20: {'all the same' if same else 'NOT the same'}")
    if given.output is not None:
        content = {"benchmark": "round_trip", "same_answer": same, "machine": {"processor": platform.processor()}}
        given.output.write_text(json.dumps({**content, "versions": installed_versions(), "rows": rows}, indent=2))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
