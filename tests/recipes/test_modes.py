"""Every settings file of recipes/ trains a step, on a small catalogue and a small model in place of its own."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from launching import free_port
from safetensors.numpy import load_file

from llmrec.data.loading import load_dataset_from
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import SettingsError
from llmrec.item_tokenizers.fitting import FitSettings, fit_from_settings
from llmrec.pretrained import load_text_tokenizer
from llmrec.recommender import Recommender
from llmrec.tiny_model import TINY_LLAMA, build, is_built_in
from llmrec.training import joint_run
from llmrec.training.finetune import finetune, parse

ROOT = Path(__file__).parents[2]
ALL_FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
JOINT_FILES = [path for path in ALL_FILES if "cycle" in yaml.safe_load(path.read_text())]
FILES = [path for path in ALL_FILES if path not in JOINT_FILES]
NUM_ITEMS, NUM_USERS = 30, 24
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


def write(path, columns, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Items with all texts, users with preferences, codes, and a model with a chat template."""
    folder = tmp_path_factory.mktemp("small")
    generator = np.random.default_rng(0)
    titles = [f"Soft brush number {item}" for item in range(NUM_ITEMS)]
    texts = [
        (f"item{item}", title, f"{title}, for daily use.", f"a brush like {item}") for item, title in enumerate(titles)
    ]
    write(folder / "items.csv", ["item_id", "title", "description", "queries"], texts)
    rows = [
        (f"user{user}", f"item{item}", time)
        for user in range(NUM_USERS)
        for time, item in enumerate(generator.choice(NUM_ITEMS, 6, replace=False))
    ]
    write(folder / "interactions.csv", ["user_id", "item_id", "timestamp"], rows)
    write(
        folder / "users.csv",
        ["user_id", "preferences"],
        [(f"user{user}", "Likes brushes.") for user in range(NUM_USERS)],
    )
    codes = {str(item): [f"<a_{item % 5}>", f"<b_{item // 5}>", f"<c_{item % 3}>"] for item in range(NUM_ITEMS)}
    (folder / "codes.index.json").write_text(json.dumps(codes))
    item_tokenizer = {"num_codebooks": 3, "codebook_size": 8, "codebook_dim": 4, "hidden_sizes": [8], "epochs": 5}
    settings = {
        "method": "rq_vae",
        "dataset": str(folder / "interactions.csv"),
        "embeddings": {"collaborative": {"from": "sasrec", "width": 8, "epochs": 1}},
        "item_tokenizer": item_tokenizer,
        "uniqueness_policy": "extra_level",
    }
    (folder / "codes.yaml").write_text(yaml.safe_dump(settings))
    build(TINY_LLAMA, titles, folder / "model")
    text_tokenizer = load_text_tokenizer(str(folder / "model"))
    text_tokenizer.chat_template = CHAT
    text_tokenizer.save_pretrained(folder / "model")
    return folder


def small_settings(path, small, output):
    """A command line that puts the small catalogue and model in the place of a file's own, for one step."""
    base = yaml.safe_load(path.read_text())["model_name_or_path"]
    smaller = {
        "dataset": small / "interactions.csv",
        "items": small / "items.csv",
        "users": small / "users.csv",
        "k_core": 0,
        "item_tokenizer": small / "codes.index.json",
        "model_name_or_path": base if is_built_in(base) else small / "model",
        "output_dir": output,
        "max_steps": 1,
        "logging_steps": 1,
        "warmup_steps": 0,
        "validation_examples": 4,
        "evaluation_examples": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
    }
    return [part for name, value in smaller.items() for part in (f"--{name}", str(value))]


def run(path, small, output, *more):
    return finetune(*parse(["--config", str(path), *small_settings(path, small, output), *more]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_a_step_of_every_settings_file(path, small, tmp_path):
    arguments, training, model_arguments = parse(["--config", str(path)])
    if model_arguments.load_in_4bit or model_arguments.load_in_8bit:
        pytest.importorskip("bitsandbytes")
    recommender, splits, results = run(path, small, tmp_path)
    assert recommender.config.training["steps"] == 1
    assert {result.name for result in results} == {"popularity", "llmrec"}
    model = recommender.model
    assert getattr(model, "is_loaded_in_4bit", False) == model_arguments.load_in_4bit
    assert getattr(model, "is_loaded_in_8bit", False) == model_arguments.load_in_8bit
    check_trained(model, model_arguments)
    check_saved(tmp_path / "recommender", splits, arguments, training)


def check_trained(model, model_arguments):
    """What learns is what the file says: LoRA or all weights, and the rows of the codes."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    kinds = {"lora": "lora_" in " ".join(names), "full": any(name.endswith("norm.weight") for name in names)}
    assert kinds == {"lora": model_arguments.trained == "lora", "full": model_arguments.trained == "full"} or (
        model.config.is_encoder_decoder and model_arguments.trained == "full"
    )
    assert any(name.endswith("new_rows") for name in names)


def check_saved(folder, splits, arguments, training):
    """The saved recommender answers, under the settings of the file; returns it."""
    history = [splits.dataset.item_ids[row] for row in splits.test.history(0)]
    saved = Recommender.from_pretrained(folder)
    found = [item.item_id for item in saved.recommend(history, k=5)]
    assert len(set(found)) == 5
    assert saved.config.chat == arguments.chat
    assert saved.config.scope == training.loss_scope
    return saved


def run_jointly(path, small, output, *more):
    """Joint training with the settings of a file: one step in the only cycle, and one epoch of the last phase."""
    smaller = {
        "item_tokenizer": small / "codes.yaml",
        "validation_recommendations": 4,
        "alignment_warmup_epochs": 0,
        "counter_size": 16,
        "final_epochs": 1,
    }
    words = [part for name, value in smaller.items() for part in (f"--{name}", str(value))]
    command_line = ["--config", str(path), *small_settings(path, small, output), *words, *more]
    return joint_run.train_jointly(*joint_run.parse(command_line))


@pytest.mark.parametrize("path", JOINT_FILES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_a_step_of_every_settings_file_of_joint_training(path, small, tmp_path):
    arguments, training, model_arguments = joint_run.parse(["--config", str(path)])
    recommender, splits, results = run_jointly(path, small, tmp_path)
    assert {result.name for result in results} == {"popularity", "SASRec", "llmrec"}
    assert (tmp_path / "results.json").is_file()
    check_trained(recommender.model, model_arguments)
    saved = check_saved(tmp_path / "recommender", splits, arguments, training)
    # Codes of a level of their own each, and the counter at its full size, since the vocabulary can't grow.
    assert saved.semantic_ids.codebook_sizes == (8, 8, 8, 16)
    assert len(np.unique(saved.semantic_ids.codes, axis=0)) == NUM_ITEMS
    history = json.loads((tmp_path / "joint_history.json").read_text())
    assert history["format_version"] == 1
    (record,) = history["cycles"]
    assert (record["cycle"], record["aligned"]) == (0, True)
    terms = ["quantization", "reconstruction", "sia", "psa"]
    losses = [record[f"tokenizer_{name}"] for name in terms] + [record[f"recommender_{name}"] for name in terms[2:]]
    losses.append(record["recommender_loss"])
    assert np.isfinite(losses).all()
    assert min(losses) > -1e-6
    assert len(record["utilisation"]) == 3
    assert all(1 / 8 <= share <= 1 for share in record["utilisation"])
    assert 0 <= record["share_changed"] <= 1
    assert (tmp_path / "joint_report.html").is_file()


def test_joint_training_with_the_item_tokenizer_left_alone(small, tmp_path):
    """To compare with: no code changes, so the saved ones are those that the item tokenizer had."""
    path = ROOT / "recipes" / "synthetic" / "etegrec_t5.yaml"
    recommender, _, _ = run_jointly(path, small, tmp_path, "--train_tokenizer", "false")
    fitted = load_file(tmp_path / "item_codes" / "semantic_ids.safetensors")
    assert np.array_equal(recommender.semantic_ids.codes, fitted["codes"])


def test_joint_training_killed_in_its_last_phase(small, tmp_path):
    """Resumed, it goes on there with the codes of the joint phase, and ends as the run that wasn't killed."""
    path = ROOT / "recipes" / "synthetic" / "etegrec_t5.yaml"
    often = ["--max_steps", "4", "--tokenizer_learning_rate", "0.01"]
    for kind in ("eval", "save"):
        often += [f"--{kind}_strategy", "steps", f"--{kind}_steps", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_jointly(path, small, whole, *often)
    shutil.copytree(whole, killed)
    for part in ("final/checkpoint-4", "recommender"):
        shutil.rmtree(killed / part)
    run_jointly(path, small, killed, *often, "--resume_from_checkpoint", "latest")
    assert (killed / "final" / "checkpoint-4").is_dir()
    expected = Recommender.from_pretrained(whole / "recommender")
    found = Recommender.from_pretrained(killed / "recommender")
    assert np.array_equal(found.semantic_ids.codes, expected.semantic_ids.codes)
    assert not np.array_equal(
        expected.semantic_ids.codes, load_file(whole / "item_codes" / "semantic_ids.safetensors")["codes"]
    )
    for (name, tensor), other in zip(
        expected.model.state_dict().items(), found.model.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("method", ["rq_kmeans", "letter", "simcit"])
def test_joint_training_from_a_fitted_item_tokenizer(method, small, tmp_path):
    """With its own levels alone; what comes out takes new items, and embeddings of another kind are refused."""
    text = {"from": "text", "encoder": "tfidf", "width": 8}
    collaborative = {"from": "sasrec", "width": 8, "epochs": 1}
    of_method = {
        "rq_kmeans": ({"text": text}, {}),
        "letter": (
            {"text": text, "collaborative": collaborative},
            {"codebook_dim": 8, "epochs": 2, "num_clusters": 2},
        ),
        "simcit": ({"text": text, "collaborative": collaborative}, {"codebook_dim": 8, "epochs": 2}),
    }
    embeddings, more = of_method[method]
    if method != "rq_kmeans":
        more = {**more, "hidden_sizes": [16], "batch_size": 16}
    settings = {
        "method": method,
        "dataset": str(small / "interactions.csv"),
        "embeddings": embeddings,
        "item_tokenizer": {"num_codebooks": 3, "codebook_size": 8, **more},
    }
    settings_file = tmp_path / "settings.yaml"
    settings_file.write_text(yaml.safe_dump(settings))
    dataset = load_dataset_from(str(small / "interactions.csv"), items=str(small / "items.csv"))
    fit_from_settings(FitSettings.from_yaml(settings_file), tmp_path / "fitted", dataset=dataset)
    path = ROOT / "recipes" / "synthetic" / "etegrec_t5.yaml"
    given = ["--item_tokenizer", str(tmp_path / "fitted"), "--uniqueness", "min_cost"]
    with pytest.raises(SettingsError, match="embeddings_from"):
        run_jointly(path, small, tmp_path / "run", *given)
    recommender, _, _ = run_jointly(
        path, small, tmp_path / "run", *given, "--embeddings_from", str(settings_file), "--psa_weight", "0.1"
    )
    assert recommender.semantic_ids.codebook_sizes == (8, 8, 8)
    assert recommender.semantic_ids.is_unique
    found = json.loads((tmp_path / "run" / "joint_history.json").read_text())["cycles"][0]
    assert np.isfinite([found["tokenizer_sia"], found["tokenizer_psa"], found["recommender_psa"]]).all()
    saved = Recommender.from_pretrained(tmp_path / "run" / "recommender")
    widths = saved.item_tokenizer.widths
    vectors = np.random.default_rng(0).standard_normal((1, 8), dtype=np.float32)
    saved.add_items(
        [{"item_id": "new"}], {name: ItemEmbeddings(("new",), vectors[:, :width]) for name, width in widths.items()}
    )
    assert "new" in {
        item.item_id for item in saved.recommend(["item1"], k=NUM_ITEMS, exclude_seen=False, num_beams=64)
    }

    other = {**settings, "embeddings": {name: {**text, "fields": ["description"]} for name in embeddings}}
    settings_file.write_text(yaml.safe_dump(other))
    with pytest.raises(SettingsError, match="not those that it was fitted on"):
        run_jointly(path, small, tmp_path / "other", *given, "--embeddings_from", str(settings_file))


def test_all_tasks_and_search(small, tmp_path):
    """Of one run; what is searched for afterwards is answered by the saved recommender."""
    path = ROOT / "recipes" / "office" / "smollm2_lcrec.yaml"
    tasks = ["next_item", "item_to_codes", "codes_to_item:0.5", "fused:2", "item_search", "preference"]
    recommender, _, _ = run(path, small, tmp_path, "--max_text_tokens", "6", "--tasks", *tasks)
    assert recommender.config.training["tasks"] == tasks
    saved = Recommender.from_pretrained(tmp_path / "recommender")
    assert len(saved.search("a soft brush", k=3)) == 3
    assert len(saved.search(["a soft brush", "another"], k=3, history=[["item1"], []])) == 2
    long = "soft brush number three for daily use and"  # cut after 6 tokens, as in training
    assert [item.score for item in saved.search(f"{long} me", k=3)] == [
        item.score for item in saved.search(f"{long} you", k=3)
    ]


def test_split_by_time(small, tmp_path):
    path = ROOT / "recipes" / "synthetic" / "tiny_llama_letter.yaml"
    _, splits, results = run(path, small, tmp_path, "--split", "by_time", "--split_fractions", "0.6", "0.2", "0.2")
    assert splits.method.startswith("by time")
    assert {result.split for result in results} == {"test"}


@pytest.mark.parametrize("file", ["beauty/letter_tiger.yaml", "beauty/smollm2_letter.yaml"])
def test_a_settings_file_under_zero_3(file, small, tmp_path):
    """From launching to the recommendations that the main process prints, with a model that no process holds whole."""
    pytest.importorskip("deepspeed")
    settings = small_settings(ROOT / "recipes" / file, small, tmp_path)
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())),
        *("--config_file", "accelerate_configs/deepspeed_zero3.yaml", "recipes/finetune.py"),
        *("--config", f"recipes/{file}", *settings),
    ]
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280
    )
    assert (tmp_path / "recommender").is_dir(), done.stderr[-4000:]  # judged by what is there: gloo aborts at times
    assert "Saved in" in done.stdout, done.stderr[-4000:]  # printed last, after the recommendations
    saved = Recommender.from_pretrained(tmp_path / "recommender")
    assert len(saved.recommend(["item1", "item2"], k=5)) == 5
    assert json.loads((tmp_path / "results.json").read_text())["results"][-1]["num_examples"] == 4
