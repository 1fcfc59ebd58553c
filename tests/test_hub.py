"""Pushing and loading through the real client, against a stand-in for the Hub on loopback.

The client reads `HF_ENDPOINT` when it is imported, so it runs in processes of its own.
"""

import json
import os
import subprocess
import sys

import hub_server as hub
import pytest
import tiny


@pytest.fixture
def server():
    with hub.HubServer() as server:
        yield server


def _client(server, tmp_path, code, *arguments):
    """A process with the stand-in as its Hub, an empty cache and no token of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "127.0.0.1,localhost",
    }
    command = [sys.executable, "-W", "error::UserWarning:huggingface_hub", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _run(server, tmp_path, code, *arguments):
    process = _client(server, tmp_path, code, *arguments)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


# Everything in one process, because importing torch and transformers is what takes the time.
PUSH_AND_LOAD = """
import json, sys
from pathlib import Path
from llmrec import Recommender
from llmrec.errors import MissingPartError, SettingsError

def answer(recommender):
    return [(entry.item_id, entry.score) for entry in recommender.recommend(["item-4", "item-17"], k=20)]

def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

folder, token = sys.argv[1:]
adapter = Recommender.from_pretrained(folder)
result = {"adapter": error_of(lambda: adapter.push_to_hub("someone/beauty", token=token))}
merged = adapter.merge()
result["no token"] = error_of(lambda: merged.push_to_hub("someone/beauty"))
result["url"] = merged.push_to_hub("someone/beauty", token=token, private=True, commit_message="First model")
result["private"] = error_of(lambda: Recommender.from_pretrained("someone/beauty"))
result["loaded"] = answer(Recommender.from_pretrained("someone/beauty", token=token))
merged.push_to_hub("someone/beauty", token=token, revision="trial")
result["branch"] = answer(Recommender.from_pretrained("someone/beauty", revision="trial", token=token))
result["no revision"] = error_of(lambda: Recommender.from_pretrained("someone/beauty", revision="v9", token=token))
result["unknown"] = error_of(lambda: Recommender.from_pretrained("someone/else", token=token))
# An adapter whose base model is on the Hub too
from dataclasses import replace
adapter.config = replace(adapter.config, base_model="someone/base", base_revision="main")
adapter.push_to_hub("someone/adapter", token=token)
result["from adapter"] = answer(Recommender.from_pretrained("someone/adapter", token=token))
print(json.dumps(result))
"""


def test_push_and_load(server, tmp_path):
    recommender = tiny.recommender(tmp_path, hidden_size=256)
    recommender.save_pretrained(tmp_path / "saved")
    expected = recommender.recommend(["item-4", "item-17"], k=20)
    base = hub.Repo(private=False)
    base.commit("main", {path.name: server.store(path.read_bytes()) for path in (tmp_path / "base").iterdir()}, "base")
    server.repos["someone/base"] = base

    result = _run(server, tmp_path, PUSH_AND_LOAD, tmp_path / "saved", hub.TOKEN)

    assert "SettingsError" in result["adapter"]
    assert "push recommender.merge()" in result["adapter"]
    assert "401" in result["no token"]
    assert result["url"] == f"{server.url}/someone/beauty"
    assert "MissingPartError" in result["private"]
    assert "pass token" in result["private"]
    assert "has no revision 'v9'" in result["no revision"]
    assert "neither a folder nor a repository" in result["unknown"]
    for name in ("loaded", "branch", "from adapter"):
        assert [item_id for item_id, _ in result[name]] == [entry.item_id for entry in expected]
        assert [score for _, score in result[name]] == pytest.approx([entry.score for entry in expected], abs=1e-4)

    repo = server.repos["someone/beauty"]
    assert repo.private
    assert repo.messages == ["initial commit", "First model", "Upload recommender"]  # one commit a push
    assert set(repo.files()) == {
        *(".gitattributes", "README.md", "config.json", "generation_config.json", "items.parquet"),
        *("model.safetensors", "recommender_config.json", "semantic_ids.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert 'from_pretrained("someone/beauty")' in server.content("someone/beauty", "README.md").decode()
    assert len(server.content("someone/beauty", "model.safetensors")) > 2 * hub.PART_SIZE
    assert any("/lfs/" in request and request.endswith("/3") for request in server.requests)  # sent in parts
    files = server.repos["someone/adapter"].files()
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files


# Light: no torch, no transformers.
PUSH_FOLDER = """
import json, sys
from pathlib import Path
from llmrec.recommender_folder import push_folder
url = push_folder(
    Path(sys.argv[1]), "someone/beauty", private=None, token=sys.argv[2], revision=None, commit_message="New"
)
print(json.dumps(url))
"""


@pytest.fixture
def old_and_new(server, tmp_path):
    """A repository with an old model, and a folder with a new one of 3 MB."""
    repo = server.repos["someone/beauty"] = hub.Repo(private=False)
    old = {
        "README.md": b"---\ntags: []\n---\nold",
        "adapter_model.safetensors": b"old adapter",
        "model.safetensors": b"old" * 999,
    }
    repo.commit("main", {path: server.store(content) for path, content in old.items()}, "old")
    folder = tmp_path / "new"
    (folder / "item_tokenizer").mkdir(parents=True)
    new = {
        "README.md": b"---\ntags: []\n---\nnew",
        "model.safetensors": os.urandom(3 << 20),
        "item_tokenizer/config.json": b"{}",
    }
    for path, content in new.items():
        (folder / path).write_bytes(content)
    return old, folder, new


def _contents(server):
    files = server.repos["someone/beauty"].files()
    return {path: server.blobs[digest] for path, digest in files.items()}


def test_a_push_that_is_killed_leaves_the_old_revision_whole(server, tmp_path, old_and_new):
    old, folder, new = old_and_new
    server.hold_uploads = True
    process = _client(server, tmp_path, PUSH_FOLDER, folder, hub.TOKEN)
    assert server.upload_started.wait(60), process.communicate()
    process.kill()
    process.wait()
    server.hold_uploads = False
    server.released.set()
    assert _contents(server) == old
    assert server.repos["someone/beauty"].messages == ["old"]

    assert _run(server, tmp_path, PUSH_FOLDER, folder, hub.TOKEN) == f"{server.url}/someone/beauty"
    assert _contents(server) == new  # the old adapter is gone, in the same commit
    assert server.repos["someone/beauty"].messages == ["old", "New"]


def test_a_lost_connection_is_taken_up_again(server, tmp_path, old_and_new):
    _, folder, new = old_and_new
    server.drop_uploads = 1
    _run(server, tmp_path, PUSH_FOLDER, folder, hub.TOKEN)
    assert server.drop_uploads == 0
    assert _contents(server) == new
