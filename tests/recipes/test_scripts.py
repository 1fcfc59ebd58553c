"""The scripts, started as a user starts them, in processes of their own."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmrec.evaluation.evaluator import load_results
from llmrec.recommender import Recommender

ROOT = Path(__file__).parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml", "--quiet"]
CODES = """
method: rq_vae
dataset: synthetic
embeddings: {text: {from: text, width: 16}}
item_tokenizer: {num_codebooks: 3, codebook_size: 16, codebook_dim: 8, hidden_sizes: [16], batch_size: 200, epochs: 2}
"""


def start(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, env=environment)


def error_line(done):
    """The line that says what is wrong: there must be one, and no traceback."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Options that make the default recipe quick, with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "codes.yaml").write_text(CODES)
    return [
        *("--output_dir", folder / "run", "--item_tokenizer", folder / "codes.yaml"),
        *("--per_device_train_batch_size", "4", "--evaluation_examples", "21", "--num_printed", "3"),
        *("--eval_strategy", "no", "--load_best_model_at_end", "false"),
        *("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "5"),
    ]


@pytest.fixture(scope="module")
def trained(quick):
    """The folder and the printed text of the default recipe after two steps."""
    done = start(*LAUNCH, "recipes/finetune.py", "--max_steps", "2", *quick)
    assert done.returncode == 0, done.stderr
    return Path(quick[1]), done.stdout


def test_the_default_recipe(trained):
    folder, printed = trained
    recommender = Recommender.from_pretrained(folder / "recommender")
    catalogue = dict(zip(recommender.semantic_ids.item_ids, recommender.titles, strict=True))
    assert len(catalogue) == 400
    lines = re.findall(r"^ ?\d+ (item-\d+)  (.+)  \((-\d+\.\d\d)\)$", printed, re.MULTILINE)
    assert len(lines) == 3
    for item_id, title, _ in lines:
        assert catalogue[item_id] == title

    taken = re.findall(r"^   (item-\d+)  ", printed, re.MULTILINE)
    assert len(taken) == 5
    assert not set(taken) & {item_id for item_id, _, _ in lines}

    results = load_results(folder / "results.json")
    assert [(result.name, result.exclude_seen, result.num_examples) for result in results] == [
        (name, seen, 21) for name in ("popularity", "llmrec") for seen in (False, True)
    ]
    assert recommender.config.training
    assert len(recommender.config.metrics) == 4


def test_the_default_recipe_of_joint_training(tmp_path):
    (tmp_path / "codes.yaml").write_text(f"{CODES}uniqueness_policy: extra_level\n")
    quick = [
        *("--output_dir", tmp_path / "run", "--item_tokenizer", tmp_path / "codes.yaml", "--final_epochs", "0"),
        *("--per_device_train_batch_size", "4", "--evaluation_examples", "21", "--num_printed", "3"),
        *("--validation_examples", "8", "--validation_recommendations", "8"),
    ]
    done = start(*LAUNCH, "recipes/train_joint.py", "--max_steps", "2", *quick)
    assert done.returncode == 0, done.stderr
    assert "Saved in" in done.stdout
    recommender = Recommender.from_pretrained(tmp_path / "run" / "recommender")
    catalogue = dict(zip(recommender.semantic_ids.item_ids, recommender.titles, strict=True))
    lines = re.findall(r"^ ?\d+ (item-\d+)  (.+)  \((-\d+\.\d\d)\)$", done.stdout, re.MULTILINE)
    assert [title for _, title, _ in lines] == [catalogue[item_id] for item_id, _, _ in lines]
    assert len({item_id for item_id, _, _ in lines}) == 3
    results = load_results(tmp_path / "run" / "results.json")
    assert [(result.name, result.num_examples) for result in results[-2:]] == [("llmrec", 21)] * 2
    assert len(json.loads((tmp_path / "run" / "joint_history.json").read_text())["cycles"]) == 1


def test_resuming_goes_on_from_the_last_checkpoint(trained, quick):
    folder, _ = trained
    states = {step: folder / f"checkpoint-{step}" / "trainer_state.json" for step in (1, 2, 3)}
    assert not states[3].exists()
    before = {step: states[step].stat().st_mtime_ns for step in (1, 2)}
    words = ["--max_steps", "3", "--resume_from_checkpoint", "latest"]
    done = start(*LAUNCH, "recipes/finetune.py", *words, *quick)
    assert done.returncode == 0, done.stderr
    assert json.loads(states[3].read_text())["global_step"] == 3
    assert {step: states[step].stat().st_mtime_ns for step in (1, 2)} == before  # steps 1 and 2 were not done again
    assert "reused" in done.stderr  # nor were the codes fitted again


def test_unknown_settings_of_a_run_are_refused(tmp_path):
    for script in ("finetune", "train_joint"):
        done = start(*LAUNCH, f"recipes/{script}.py", "--colour", "red", "--output_dir", tmp_path / "run")
        assert done.returncode != 0
        assert "--colour" in error_line(done)
    for command, file in (("finetune", "tiny_llama_letter.yaml"), ("train-joint", "etegrec_t5.yaml")):
        settings = (ROOT / "recipes" / "synthetic" / file).read_text()
        (tmp_path / "run.yaml").write_text(f"{settings}\nflavour: sweet\n")
        done = start("-m", "llmrec.cli", command, "--config", tmp_path / "run.yaml", "--output_dir", tmp_path / "run")
        assert done.returncode != 0
        assert "flavour" in error_line(done)
    assert not (tmp_path / "run").exists()


def test_evaluation_in_one_process_and_in_two(trained, tmp_path):
    folder, _ = trained
    script = ["eval/run_eval.py", "--recommenders", folder / "recommender", "--examples", "21"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/ddp.yaml"]
    alone = start(*script, "--output", tmp_path / "one.json")
    assert alone.returncode == 0, alone.stderr
    both = start(*launch, "--main_process_port=0", *script, "--output", tmp_path / "two.json")
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("full ranking") == 1  # one table, from one process
    # The same examples and ranks as in the run that made the recommender.
    expected = [(one.name, one.exclude_seen, one.ranks.tolist()) for one in load_results(folder / "results.json")]
    for name in ("one.json", "two.json"):
        results = load_results(tmp_path / name)
        assert [(one.name, one.exclude_seen, one.ranks.tolist()) for one in results] == expected


def test_wrong_evaluation_settings_are_refused(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("run_eval", ROOT / "eval" / "run_eval.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "wrong.yaml").write_text("dataset: synthetic\ncolour: red\n")
    assert script.main(["--config", str(tmp_path / "wrong.yaml")]) == 2
    error = capsys.readouterr().err
    assert "unknown setting 'colour'" in error
    assert len(error.splitlines()) == 1
    assert script.main(["--config", str(tmp_path / "none.yaml")]) == 2
    with pytest.raises(SystemExit):
        script.main(["--colour", "red"])


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("recipes/finetune.py", ["--item_tokenizer", "--ranking_temperature", "--lora_r"]),
        (
            "recipes/train_joint.py",
            ["--item_tokenizer", "--ranking_temperature", "--lora_r", "--cycle", "--sia_weight"],
        ),
        ("tokenizers/fit.py", ["--config", "--output"]),
        ("eval/run_eval.py", ["--config", "--output"]),
    ],
)
def test_help(script, options):
    done = start(script, "--help")
    assert done.returncode == 0, done.stderr
    for option in options:
        assert option in done.stdout
