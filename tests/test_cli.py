import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import hub_server as hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from safetensors import safe_open

from llmrec import InteractionDataset, __version__, cli
from llmrec.commands.evaluate import EvaluationSettings
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.embeddings.collaborative import SASRec
from llmrec.embeddings.lightgcn import LightGCN
from llmrec.errors import SettingsError
from llmrec.evaluation.evaluator import load_results
from llmrec.recommender import Recommender

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("recommender")
    results = [{"metrics": {"recall@10": 0.125}, "protocol": "seen items kept", "seed": 7}]
    recommender = tiny.recommender(path, dataset={"name": "made-up"}, training={"epochs": 3}, metrics=results)
    recommender.save_pretrained(path / "saved")
    return path / "saved"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Twelve users who took items of the recommender above, five each; and the items with titles."""
    path = tmp_path_factory.mktemp("files")
    rows = [(f"u{user}", f"item-{(7 * user + 3 * step) % 30}", step) for user in range(12) for step in range(5)]
    interactions = "who,what,timestamp\n" + "".join(f"{user},{item},{1000 + time}\n" for user, item, time in rows)
    (path / "log.csv").write_text(interactions)
    (path / "items.csv").write_text("what,title\n" + "".join(f"item-{row},Title {row}\n" for row in range(30)))
    return path


@pytest.fixture(scope="module")
def dataset(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset") / "saved"
    InteractionDataset.from_files(
        files / "log.csv", files / "items.csv", user_column="who", item_column="what", items_without_metadata="keep"
    ).save(path)
    return path


@pytest.fixture
def run(capsys):
    """Runs a command that must succeed; returns what it printed."""

    def run(*words):
        assert cli.main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail; returns its one line on standard error."""

    def fails(*words, status=2):
        try:
            found = cli.main([str(word) for word in words])
        except SystemExit as error:
            found = error.code
        captured = capsys.readouterr()
        assert found == status, captured
        lines = captured.err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return fails


# Help, and what holds for all commands


def test_help_and_version_import_nothing_heavy():
    code = """
import contextlib, io, sys
from llmrec import cli
for words in [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)]:
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        cli.main(words)
    text = output.getvalue()
    print(words[0], "example" in text or words[0].startswith("--"), len(text) > 5)
print(sorted({"torch", "transformers", "numpy", "datasets", "pyarrow"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *commands, heavy = done.stdout.splitlines()
    assert len(commands) == len(cli.COMMANDS) + 2 == 12
    assert all(line.endswith("True True") for line in commands), commands
    assert heavy == "[]"


def test_the_examples_of_every_command_are_understood(monkeypatch):
    """Those in `--help` run as they are: here their options are parsed."""
    seen = []
    for name, module in cli.COMMANDS.items():
        monkeypatch.setattr(module, "run", lambda arguments: seen.append(arguments.command))
        lines = module.EXAMPLES.replace("\\\n", " ").splitlines()
        commands = [line.split() for line in lines if line.startswith(f"  llmrec {name} ")]
        assert commands, name
        for words in commands:
            assert cli.main(words[1:]) == 0
    assert set(seen) == set(cli.COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"llmrec {__version__}\n"


def test_unknown_words_are_refused_in_one_line(fails):
    assert "COMMAND" in fails()
    assert "invalid choice: 'train'" in fails("train")
    assert "--colour" in fails("info", "somewhere", "--colour", "red")
    assert "llmrec info --help" in fails("info", "somewhere", "--colour", "red")
    assert "--spl" in fails("evaluate", "somewhere", "--dataset", "synthetic", "--spl", "test")  # no abbreviations
    assert "--history" in fails("recommend", "somewhere")
    assert "invalid int value: 'ten'" in fails("recommend", "somewhere", "--history", "a", "-k", "ten")


def test_a_mistake_shows_its_traceback_with_verbose_only(tmp_path, capsys, caplog):
    missing = str(tmp_path / "missing")
    for words in (["--verbose", "info", missing], ["info", missing, "--verbose"]):
        caplog.clear()
        assert cli.main(words) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: there is no folder {missing}"
        assert "MissingPartError" in caplog.text
        assert logging.getLogger("llmrec").level == logging.INFO
    caplog.clear()
    assert cli.main(["info", missing]) == 2
    assert not caplog.text
    assert logging.getLogger("llmrec").level == logging.WARNING


def test_interruption_and_bugs(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    def fail(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(cli.COMMANDS["info"], "run", interrupt)
    assert cli.main(["info", "x"]) == 130
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cli.COMMANDS["info"], "run", fail)
    with pytest.raises(ZeroDivisionError):  # no mistake of the user: the traceback is wanted
        cli.main(["info", "x"])


def test_a_reader_that_stops_early_is_no_error(dataset):
    command = f"{sys.executable} -m llmrec.cli info {dataset} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.stderr == ""
    assert done.returncode in (0, 141)


# data


def test_data_reads_filters_splits_and_saves(run, files, tmp_path):
    source = ["data", files / "log.csv", "--items", files / "items.csv", "--user_column", "who"]
    source += ["--item_column", "what", "--name", "mine"]
    out = run(*source, "--split", "leave_one_out", "--output", tmp_path / "saved")
    assert "mine" in out
    assert "leave-one-out: 36 interactions to train on, 12 validation and 12 test examples" in out
    saved = InteractionDataset.load(tmp_path / "saved")
    assert (saved.num_users, saved.num_interactions) == (12, 60)
    assert InteractionDataset.load(tmp_path / "saved" / "train").num_interactions == 36
    validation = pq.read_table(tmp_path / "saved" / "validation.parquet").to_pylist()
    test = pq.read_table(tmp_path / "saved" / "test.parquet").to_pylist()
    assert validation[1] == {"user_id": "u1", "history": ["item-7", "item-10", "item-13"], "target": "item-16"}
    assert test[1] == {"user_id": "u1", "history": ["item-7", "item-10", "item-13", "item-16"], "target": "item-19"}
    assert run("data", tmp_path / "saved").count("60") >= 1  # a saved one is read again

    run(*source, "--k_core", "2", "--output", tmp_path / "core")
    core = InteractionDataset.load(tmp_path / "core")
    counts = [core.flat_items.tolist().count(row) for row in range(core.num_items)]
    assert min(counts) >= 2
    assert core.num_interactions <= 60

    out = run(*source, "--split", "by_time", "--validation_from", "1003", "--test_from", "1970-01-01T00:16:44")
    assert "36 interactions to train on, 12 validation and 12 test examples" in out


def test_data_passes_options_to_the_reader(run, fails, tmp_path):
    (tmp_path / "log.csv").write_text("user_id;item_id\nu;a\nu;b\nu;a\n")
    run("data", tmp_path / "log.csv", "--option", "delimiter=;", "--repeats", "drop_later", "--output", tmp_path / "d")
    saved = InteractionDataset.load(tmp_path / "d")
    assert [saved.item_ids[row] for row in saved.history(0)] == ["a", "b"]
    assert "40" in run("data", "synthetic", "--option", "num_users=40", "--option", "num_items=50")
    assert "takes no option 'colour'" in fails("data", "synthetic", "--option", "colour=red")
    assert "write NAME=VALUE" in fails("data", "synthetic", "--option", "colour")
    assert "given twice" in fails("data", "synthetic", "--option", "num_users=3", "--option", "num_users=4")


def test_data_says_what_is_wrong(fails, files, tmp_path):
    assert "there is no data set" in fails("data", tmp_path / "missing.csv")
    assert "'user_id'" in fails("data", files / "log.csv")
    columns = ["--user_column", "who", "--item_column", "what"]
    assert "50-core" in fails("data", files / "log.csv", *columns, "--k_core", "50")
    assert "k is -1" in fails("data", files / "log.csv", *columns, "--k_core", "-1")
    assert "--fractions is of use" in fails("data", "synthetic", "--fractions", "0.8", "0.1", "0.1")
    assert "validation_from and test_from" in fails("data", "synthetic", "--split", "by_time")
    (tmp_path / "mine.txt").write_text("precious")
    assert "holds no data set" in fails("data", "synthetic", "--output", tmp_path)
    assert (tmp_path / "mine.txt").is_file()


# embed, fit


def test_embed_text(run, fails, dataset, tmp_path):
    out = run("embed", dataset, "--width", "4", "--output", tmp_path / "text.safetensors")
    assert out.startswith("30 items, 4 values each")
    embeddings = ItemEmbeddings.load(tmp_path / "text.safetensors", item_ids=InteractionDataset.load(dataset).item_ids)
    assert embeddings.width == 4
    assert embeddings.source["encoder"] == "tfidf"
    output = ["--output", tmp_path / "x.safetensors"]
    assert "no column 'colour'" in fails("embed", dataset, "--fields", "colour", *output)
    assert "--epochs is of use only with --collaborative" in fails("embed", dataset, "--epochs", "1", *output)
    assert "can't be used with" in fails("embed", dataset, "--collaborative", "--encoder", "tfidf", *output)
    assert "must end in .safetensors" in fails("embed", dataset, "--output", tmp_path / "x")
    assert not (tmp_path / "x.safetensors").exists()


def test_embed_collaborative(run, dataset, tmp_path):
    out = run(
        "embed", dataset, "--collaborative", "--width", "8", "--epochs", "1", "--seed", "3", "--output", tmp_path / "s"
    )
    assert out.startswith("30 items, 8 values each")
    model = SASRec.from_pretrained(tmp_path / "s")
    assert (model.config.epochs, model.config.seed) == (1, 3)
    assert int(model.item_counts.sum()) == 36  # the training part of 60
    vectors = ItemEmbeddings.load(tmp_path / "s" / "item_embeddings.safetensors").vectors
    assert (vectors == model.item_embeddings().vectors).all()


def test_embed_lightgcn(run, dataset, tmp_path):
    options = ["--model", "lightgcn", "--width", "8", "--epochs", "1", "--output", tmp_path / "s"]
    out = run("embed", dataset, "--collaborative", *options)
    assert out.startswith("30 items")
    model = LightGCN.from_pretrained(tmp_path / "s")
    vectors = ItemEmbeddings.load(tmp_path / "s" / "item_embeddings.safetensors")
    assert (vectors.vectors == model.item_embeddings().vectors).all()
    assert vectors.item_ids == InteractionDataset.load(dataset).item_ids


def test_embed_own_vectors_in_the_order_of_the_catalogue(run, fails, dataset, tmp_path):
    item_ids = InteractionDataset.load(dataset).item_ids
    vectors = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors[::-1])
    (tmp_path / "ids.txt").write_text("\n".join(item_ids[::-1]))
    own = ["--vectors", tmp_path / "vectors.npy", "--ids", tmp_path / "ids.txt"]
    output = ["--output", tmp_path / "own.safetensors"]
    assert run("embed", dataset, *own, *output).startswith("30 items, 3 values each")
    assert (ItemEmbeddings.load(output[1], item_ids=item_ids).vectors == vectors).all()
    (tmp_path / "ids.txt").write_text("\n".join(["other", *item_ids[:0:-1]]))
    assert "have no vector for 1 of the 30 items" in fails("embed", dataset, *own, *output)
    assert run("embed", dataset, *own, *output, "--mask_missing").startswith("30 items, 1 of them masked")
    assert "--seed can't be used with --vectors" in fails("embed", dataset, *own, *output, "--seed", "1")
    assert "--ids is of use only with --vectors" in fails("embed", dataset, *own[2:], *output)
    assert "run the command once for each" in fails("embed", dataset, *own, *output, "--collaborative")


def test_embed_images(run, fails, dataset, tmp_path):
    from PIL import Image
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ViTModel(ViTConfig(image_size=16, patch_size=8, **shape)).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    given = InteractionDataset.load(dataset)
    names = [f"{row}.png" for row in range(given.num_items)]
    for name in names[1:]:
        Image.new("RGB", (16, 16), (len(name), 0, 0)).save(tmp_path / name)
    items = given.items.add_column("photo", names)
    InteractionDataset(items, given.histories, name=given.name).save(tmp_path / "with_images")
    command = ["embed", tmp_path / "with_images", "--images", "photo", "--output", tmp_path / "image.safetensors"]
    out = run(*command, "--encoder", tmp_path / "vit", "--image_folder", tmp_path)
    assert out.splitlines()[-1].startswith("30 items, 1 of them masked, 8 values each")  # making the model prints, too
    assert not ItemEmbeddings.load(tmp_path / "image.safetensors").present[0]
    assert "--images needs an --encoder" in fails(*command)
    assert "--image_folder is of use only with --images" in fails(
        "embed", dataset, "--image_folder", ".", "--output", tmp_path / "x.safetensors"
    )


FIT = """
method: rq_vae
dataset: {dataset}
embeddings: {{text: {{from: text, width: 8}}}}
item_tokenizer: {{num_codebooks: 3, codebook_size: 8, codebook_dim: 4, hidden_sizes: [8], epochs: 2{more}}}
"""


def test_fit_and_info(run, fails, dataset, tmp_path):
    (tmp_path / "settings.yaml").write_text(FIT.format(dataset=dataset, more=""))
    assert "collision rate" in run("fit", "--config", tmp_path / "settings.yaml", "--output_dir", tmp_path / "out")
    out = run("info", tmp_path / "out")
    assert "RQVAETokenizer" in out
    assert "Codes of 30 items" in out
    assert "semantic_ids.safetensors" in out
    (tmp_path / "wrong.yaml").write_text(FIT.format(dataset=dataset, more=", colour: red"))
    line = fails("fit", "--config", tmp_path / "wrong.yaml", "--output_dir", tmp_path / "none")
    assert "unknown setting 'colour'" in line
    assert not (tmp_path / "none").exists()


# finetune, train-joint


@pytest.mark.parametrize(
    ("command", "module"), [("finetune", "llmrec.training.finetune"), ("train-joint", "llmrec.training.joint_run")]
)
def test_what_trains_hands_over_to_accelerate(monkeypatch, tmp_path, command, module):
    became = []
    monkeypatch.setattr(os, "execv", lambda program, words: became.append(words))
    config, devices = tmp_path / "run.yaml", tmp_path / "ddp.yaml"
    config.touch()
    devices.touch()
    passed_on = ["--max_steps", "50", "--learning_rate", "1e-4", "--bf16", "--template", "-: {history}"]
    words = [command, "--max_steps", "50", "--accelerate_config", str(devices), "--config", str(config)]
    assert cli.main([*words, *passed_on[2:]]) == 0
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(devices)]
    assert became == [[*launcher, "-m", module, "--config", str(config), *passed_on]]
    assert importlib.util.find_spec(module)


@pytest.mark.parametrize("command", ["finetune", "train-joint"])
def test_what_trains_refuses_early(monkeypatch, fails, tmp_path, command):
    monkeypatch.setattr(os, "execv", lambda program, words: pytest.fail("started"))
    assert "--config" in fails(command, "--max_steps", "3")
    assert "no settings file" in fails(command, "--config", tmp_path / "none.yaml")
    (tmp_path / "run.yaml").touch()
    line = fails(command, "--config", tmp_path / "run.yaml", "--accelerate_config", tmp_path / "none.yaml")
    assert "none.yaml" in line


# evaluate


def test_evaluate(run, folder, dataset, tmp_path):
    run("embed", dataset, "--collaborative", "--width", "8", "--epochs", "1", "--output", tmp_path / "sasrec")
    baselines = f"popularity,{tmp_path / 'sasrec'}"
    words = ["evaluate", folder, "--dataset", dataset, "--baselines", baselines, "--ks", "1", "30"]
    out = run(*words, "--examples", "9", "--output", tmp_path / "results.json")
    assert "9 examples" in out
    results = load_results(tmp_path / "results.json")
    names = [(result.name, result.exclude_seen) for result in results]
    assert names == [(name, seen) for name in ("popularity", "SASRec", "llmrec") for seen in (False, True)]
    for result in results:
        assert result.num_examples == 9
        assert result.split == "test"
        assert result.metrics["recall@30"] == 1.0  # the whole catalogue: no target is a repeat
        assert f"{result.metrics['recall@1']:.4f}" in out
        assert result.protocol in out
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert settings["baselines"] == ["popularity", str(tmp_path / "sasrec")]

    # The figures are those of the recommender's own answers.
    recommender, data = Recommender.from_pretrained(folder), InteractionDataset.load(dataset)
    out = run("evaluate", folder, "--dataset", dataset, "--split", "validation", "--baselines", "", "--ks", "3")
    histories = [[data.item_ids[row] for row in data.history(user)] for user in range(12)]
    answers = recommender.recommend([history[:3] for history in histories], 3, exclude_seen=True)
    hits = [
        history[3] in [item.item_id for item in answer] for history, answer in zip(histories, answers, strict=True)
    ]
    assert f"{sum(hits) / 12:.4f}" in out.splitlines()[-1]
    assert "popularity" not in out


def test_evaluate_says_when_a_baseline_has_seen_more(run, folder, dataset, tmp_path, caplog):
    data = InteractionDataset.load(dataset)
    words = ["evaluate", folder, "--dataset", dataset, "--examples", "1", "--ks", "1", "--baselines"]
    from llmrec.embeddings.collaborative import SASRecConfig

    SASRec.fit(data, SASRecConfig(width=8, epochs=1)).save_pretrained(tmp_path / "all")  # test items included
    run(*words, tmp_path / "all")
    assert "it may have seen the test items" in caplog.text


def test_evaluate_says_what_is_wrong(fails, folder, dataset, tmp_path):
    words = ["evaluate", folder, "--dataset", dataset]
    assert "no baseline 'random'" in fails(*words, "--baselines", "popularity,random")
    assert "ks is [0]" in fails(*words, "--ks", "0")
    assert "examples is 0" in fails(*words, "--examples", "0")
    assert "no data set" in fails("evaluate", folder, "--dataset", tmp_path / "none")
    assert "no recommender folder" in fails("evaluate", tmp_path / "none", "--dataset", dataset)
    assert "unknown item ID" in fails("evaluate", folder, "--dataset", "synthetic", "--examples", "3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset: synthetic\ncolour: red", "unknown setting 'colour'"),
        ("recommenders: [a]", "dataset must be set"),
        ("dataset: synthetic\nrecommenders: runs/a", "recommenders is 'runs/a': write a list"),
        ("dataset: synthetic\nbaselines: []", "nothing to evaluate"),
        ("dataset: synthetic\nsplit: train", "split is 'train'"),
        ("dataset: synthetic\nks: 10", "ks is 10: write a list"),
        ("dataset: synthetic\nks: [true]", "ks is"),
        ("- dataset", "name: value"),
        ("dataset: [", "not valid YAML"),
    ],
)
def test_wrong_evaluation_settings(tmp_path, text, message):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(SettingsError, match=message.replace("[", r"\[")):
        EvaluationSettings.from_yaml(tmp_path / "settings.yaml")


def test_evaluation_settings_can_be_replaced(tmp_path):
    (tmp_path / "settings.yaml").write_text("dataset: synthetic\nexamples: 5\nrecommenders: [a]")
    settings = EvaluationSettings.from_yaml(tmp_path / "settings.yaml", examples=None, recommenders=["b"])
    assert (settings.examples, settings.recommenders, settings.baselines) == (5, ["b"], ["popularity"])


# recommend, info, push


def test_recommend(run, fails, folder):
    history = ["item-3", "item-8"]
    recommender = Recommender.from_pretrained(folder)
    expected = recommender.recommend(history, 4)
    lines = run("recommend", folder, "--history", *history, "-k", "4").splitlines()
    assert [line.split()[:2] for line in lines] == [[str(n), item.item_id] for n, item in enumerate(expected, 1)]
    for line, item in zip(lines, expected, strict=True):
        assert float(line.split()[2]) == pytest.approx(item.score, abs=1e-3)
        assert line.endswith(item.title)

    content = json.loads(run("recommend", folder, "--history", *history, "-k", "30", "--include_seen", "--json"))
    assert {entry["item_id"] for entry in content} == set(recommender.semantic_ids.item_ids)
    assert set(content[0]) == {"item_id", "score", "title"}
    assert len(run("recommend", folder, "--history", "-k", "3").splitlines()) == 3  # nothing taken yet
    narrow = json.loads(run("recommend", folder, "--history", *history, "-k", "2", "--num_beams", "2", "--json"))
    answer = recommender.recommend(history, 2, num_beams=2)
    assert [entry["item_id"] for entry in narrow] == [item.item_id for item in answer]

    assert "'item-99'" in fails("recommend", folder, "--history", "item-99")
    assert "k is 0" in fails("recommend", folder, "--history", "item-3", "-k", "0")
    assert "device is 'abacus'" in fails("recommend", folder, "--history", "item-3", "--device", "abacus")
    assert "base model" in fails("recommend", folder, "--history", "item-3", "--base_model", "./nowhere")
    assert "num_beams is 2" in fails("recommend", folder, "--history", "item-3", "--num_beams", "2")


def test_info_of_a_recommender(run, fails, folder, tmp_path):
    out = run("info", folder)
    for text in ("LoRA and code rows", "made-up", "recall@10 0.1250", "seen items kept, 7", "item_id, title, price"):
        assert text in out
    assert "Codes of 30 items" in out
    assert "collision rate 0.00%" in out
    assert all(path.name in out for path in folder.iterdir())
    assert "is none of" in fails("info", tmp_path)
    (tmp_path / "recommender_config.json").write_text("{}")
    assert "format_version" in fails("info", tmp_path)


def test_info_of_a_data_set(run, dataset):
    assert "interactions" in run("info", dataset)


def test_push(fails, folder, tmp_path):
    assert "--merge" in fails("push", folder, "someone/tiny")  # its base model is a folder that nobody else has
    assert "can't be the name of a repository" in fails("push", folder, "no//name")

    with hub.HubServer() as server:
        environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        words = ["push", str(folder), "someone/tiny", "--merge", "--private", "--token"]
        code = f"from llmrec import cli; print(cli.main({[*words, 'wrong']})); print(cli.main({[*words, hub.TOKEN]}))"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.splitlines() == ["2", f"pushed to {server.url}/someone/tiny", "0"], done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: the Hub refused")]) == 1
    assert server.repos["someone/tiny"].private
    content = tmp_path / "model.safetensors"
    content.write_bytes(server.content("someone/tiny", "model.safetensors"))
    with safe_open(content, framework="pt") as tensors:
        assert not any("lora" in name for name in tensors.keys())  # noqa: SIM118 (not a mapping)
