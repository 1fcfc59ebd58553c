"""Texts and images that two processes share out: the vectors of one, on both of them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SCRIPT = Path(__file__).with_name("embed_in_processes.py")
WORDS = ["[PAD]", "[UNK]", "red", "blue", "green", "shoe", "hat"]
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_plan(folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(WORDS), **SHAPE)).save_pretrained(folder / "text")
        ViTModel(ViTConfig(image_size=16, patch_size=8, **SHAPE)).save_pretrained(folder / "image")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(folder / "text")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "image")
    # Nothing can be read in the second process's part of the images: it must know the width all the same.
    titles = ["red shoe", "blue hat", None, "green green hat", "red shoe"]
    images = ["0.png", "1.png", None, "no.png", None]
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    items = {"item_id": list("abcde"), "title": titles, "image": images}
    plan = {"text": str(folder / "text"), "image": str(folder / "image"), "items": items}
    (folder / "plan.json").write_text(json.dumps(plan))


def embed(folder: Path, repository: Path, *launch: str) -> str:
    """Runs the script; judged by files, because a run may abort at exit, after all work is done."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    command = [sys.executable, *launch, str(SCRIPT), str(folder)]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=280)
    return done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory, repository):
    folder = tmp_path_factory.mktemp("processes")
    make_plan(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/ddp.yaml"]
    errors = embed(folder, repository) + embed(folder, repository, *launch, "--main_process_port", port)
    names = ["1-0", "2-0", "2-1"]
    assert all((folder / f"log-{name}.json").is_file() for name in names), errors
    arrays = [dict(np.load(folder / f"result-{name}.npz")) for name in names]
    logs = [json.loads((folder / f"log-{name}.json").read_text()) for name in names]
    return arrays, logs, folder


@pytest.mark.parametrize("name", ["tfidf", "text", "image"])
def test_both_processes_have_the_vectors_of_one(results, name):
    alone, *together = results[0]
    assert alone[f"{name} 0"].shape[0] == 5
    for arrays in (alone, *together):
        for turn in (0, 1):
            np.testing.assert_allclose(arrays[f"{name} {turn}"], alone[f"{name} 0"], atol=1e-6)
            assert arrays[f"{name} {turn} present"].tolist() == [
                True,
                True,
                False,
                name != "image",
                name != "image",
            ]


def test_the_main_process_writes_and_logs(results):
    _, (_, main, other), folder = results
    assert len(list((folder / "cache-2").iterdir())) == 3
    assert sum("embeddings read from" in line for line in main) == 3
    assert any("no text in title" in line for line in main)
    assert any("'d'" in line and "doesn't exist" in line for line in main)
    assert not other
