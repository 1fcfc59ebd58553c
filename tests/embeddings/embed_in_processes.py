"""Embeds texts and images with all processes that were started: `embed_in_processes.py FOLDER`.

FOLDER holds plan.json: encoders, and the cells of a catalogue. Each process writes what it got.
"""

import json
import logging
import sys
from pathlib import Path

import datasets
import numpy as np

from llmrec.embeddings.image import embed_images
from llmrec.embeddings.text import embed_text
from llmrec.processes import Processes


def main(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    processes = Processes.launched()
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("llmrec").addHandler(handler)
    logging.getLogger("llmrec").setLevel(logging.INFO)
    items = datasets.Dataset.from_dict(plan["items"])
    made = {}
    for turn in range(2):  # the second one finds the cache
        common = {"processes": processes, "cache_dir": folder / f"cache-{processes.count}"}
        found = {
            "tfidf": embed_text(items, **common),
            "text": embed_text(items, encoder=plan["text"], **common),
            "image": embed_images(items, encoder=plan["image"], image_folder=folder, **common),
        }
        for name, embeddings in found.items():
            made[f"{name} {turn}"] = embeddings.vectors
            made[f"{name} {turn} present"] = embeddings.present
    np.savez(folder / f"result-{processes.count}-{processes.index}.npz", **made)
    (folder / f"log-{processes.count}-{processes.index}.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
