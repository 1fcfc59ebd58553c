"""Encoding a catalogue into codes of its own: seconds and memory, against a loop over small batches.

    python eval/benchmarks/encode_items.py --quick
    python eval/benchmarks/encode_items.py --output encode_items.json        # 1,000,000 items x 768, some minutes

The items are a memory-mapped file, as a catalogue that doesn't fit would be. The reference does what the published
export scripts do before any repair: batches of 64, codes joined into strings, counted in a dictionary; it runs on the
first `--reference_items` of them, and its seconds per item are held against ours for the codes. The uniqueness policy
is timed beside them, and has its own benchmark (unique_codes.py). Memory is what the process holds beyond the
input: anonymous pages, sampled while it runs.
"""

import argparse
import os
import platform
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

MOST_LOAD_PER_CPU = 1.5


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status tells no RssAnon: this benchmark needs Linux")


class PeakMemory:
    """Highest anonymous memory above that at the start, while the block runs; bytes in `peak`."""

    def __enter__(self) -> "PeakMemory":
        self.start, self.peak, self._done = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, anonymous_bytes() - self.start)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def write_items(path: Path, count: int, width: int) -> None:
    """Vectors around 5,000 centres, written chunk by chunk: float32 [count, width]."""
    import numpy as np

    draws = np.random.default_rng(0)
    centres = draws.normal(size=(5_000, width)).astype(np.float32)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, width))
    for start in range(0, count, 50_000):
        size = min(50_000, count - start)
        noise = draws.standard_normal((size, width), dtype=np.float32)
        array[start : start + size] = centres[draws.integers(5_000, size=size)] + 0.7 * noise
    array.flush()


def reference(tokenizer, vectors) -> tuple[list[str], int, float]:
    """Codes as strings, items that share theirs, seconds: a loop over batches of 64 and a dictionary."""
    import torch

    from llmrec.item_tokenizers.item_vectors import ItemBatch
    from llmrec.item_tokenizers.quantizers import residual_codes

    start = time.perf_counter()
    strings = []
    codebooks = [codebook.detach() for codebook in tokenizer.codebooks(tokenizer.module)]
    with torch.no_grad():
        for first in range(0, len(vectors), 64):
            batch = torch.from_numpy(vectors[first : first + 64].copy())
            latents = tokenizer.latents(tokenizer.module, ItemBatch({"text": batch}, {}))
            for codes in residual_codes(latents, codebooks).tolist():
                strings.append("".join(f"<{'abcdefgh'[level]}_{code}>" for level, code in enumerate(codes)))
    shared = sum(count for count in Counter(strings).values() if count > 1)
    return strings, shared, time.perf_counter() - start


def measure(count: int, width: int, reference_items: int) -> dict:
    """Runs both sides in one process and puts the result in the form of all benchmarks."""
    import numpy as np
    import torch

    from llmrec.embeddings.base import ItemEmbeddings
    from llmrec.item_tokenizers.rq_kmeans import RQKMeansConfig, RQKMeansTokenizer
    from llmrec.item_tokenizers.rq_vae import RQVAEConfig, RQVAETokenizer

    rows, same = [], True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.npy"
        write_items(path, count, width)
        item_ids = tuple(map(str, range(count)))
        items = ItemEmbeddings.load(path, item_ids=item_ids, memory_map=True)
        sample = ItemEmbeddings(item_ids[:20_000], np.array(items.vectors[:20_000]))
        methods = {
            "rq_vae": RQVAETokenizer(RQVAEConfig(epochs=20)),
            "rq_kmeans": RQKMeansTokenizer(RQKMeansConfig()),
        }
        for name, tokenizer in methods.items():
            tokenizer.fit(sample, progress=False)
            first = ItemEmbeddings(item_ids[:1000], np.array(items.vectors[:1000]))
            tokenizer.encode(first)  # warm
            load = os.getloadavg()[0]
            with PeakMemory() as memory:
                start = time.perf_counter()
                quantized = tokenizer.quantize(items)
                quantize_seconds = time.perf_counter() - start
                semantic_ids = quantized.make_unique()
                seconds = time.perf_counter() - start
            same = same and semantic_ids.is_unique
            row = {"name": f"encode_{name}", "value": seconds, "unit": "s", "items": count, "width": width,
                   "quantize_seconds": quantize_seconds, "peak_bytes": memory.peak, "load_average": load,
                   "collisions_before": semantic_ids.report.collisions_before,
                   "reference": None, "ratio": None}  # fmt: skip
            if name == "rq_vae":
                strings, _, taken = reference(tokenizer, items.vectors[:reference_items])
                ours = ["".join(quantized.semantic_ids.tokens(number)) for number in range(reference_items)]
                agreeing = float(np.mean([left == right for left, right in zip(strings, ours, strict=True)]))
                same = same and agreeing > 0.9999  # equal but for exact ties in floating point
                row["reference"] = taken * count / reference_items
                if load <= MOST_LOAD_PER_CPU * (os.cpu_count() or 1):
                    row["ratio"] = row["reference"] / quantize_seconds
                row["agreeing"] = agreeing
            rows.append(row)
    machine = {"cpu": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {
        "benchmark": "encode_items",
        "same_answer": same,
        "machine": machine,
        "versions": versions,
        "rows": rows,
    }


def main() -> int:
    """Parses the command line, measures, prints; 1 where the answers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: 50,000 items")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--num_items", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=768, help="of the vectors (default: %(default)s)")
    parser.add_argument("--reference_items", type=int, default=20_000, help="default: %(default)s")
    given = parser.parse_args()
    count = 50_000 if given.quick else given.num_items
    result = measure(count, given.width, min(given.reference_items, count))
    print(f"same answer: {result['same_answer']}, threads {result['machine']['threads']}")
    for row in result["rows"]:
        print(
            f"{row['name']:18} {row['items']:>10,} items x {row['width']}: {row['value']:6.1f} s"
            f" ({row['quantize_seconds']:.1f} s codes, the rest unique), {row['peak_bytes'] / 1e9:.2f} GB beyond the"
            f" input, load average {row['load_average']:.1f}"
        )
        if row["reference"] is not None:
            ratio = "no ratio: the machine is busy" if row["ratio"] is None else f"ratio {row['ratio']:.1f}"
            print(f"{'':18} codes by batches of 64, strings in a dictionary: {row['reference']:.1f} s, {ratio}")
    if given.output:
        from llmrec.files import write_json

        write_json(given.output, result)
    return 0 if result["same_answer"] else 1


if __name__ == "__main__":
    sys.exit(main())
