"""Imports flow one way, and no folder of scripts is a package."""

import ast
import subprocess
import sys

import pytest

# Each part may import what stands before it, itself, and the basics; parts of one line don't import each other.
BASICS = {"errors", "files", "settings", "_version", "pretrained", "processes"}
ORDER = (
    {"data"},
    {"embeddings"},
    {"item_tokenizers"},
    {"vocabulary", "adapter"},
    {"tasks", "generation"},
    {"recommender"},
    {"training"},
    {"cli"},
)
TOGETHER = {("adapter", "vocabulary")}  # of one line, and in this direction
# Modules that belong to a part without lying in a folder of its name.
MEMBERS = {
    "model_card": "recommender",
    "recommendation": "recommender",
    "recommender_folder": "recommender",
    "recommender_parts": "recommender",
    "tiny_model": "training",
    "commands": "cli",
}


def part_of(module):
    """`llmrec.data.splits` -> "data"."""
    name = module.split(".")[1] if "." in module else "__init__"
    return MEMBERS.get(name, name)


def imports_of(path, root):
    """All `llmrec` modules that a file imports, at its top or inside functions, for types only or not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.relative_to(root).with_suffix("").parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = ".".join(package[: len(package) - node.level])
            names = [f"{above}.{node.module}" if node.module else f"{above}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"llmrec.{alias.name}" for alias in node.names] if node.module == "llmrec" else [node.module]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "llmrec" and "." in name)


def allowed_for(part):
    if part in BASICS:
        return BASICS
    if part == "evaluation":
        return BASICS | {"data", "evaluation"}
    levels = [number for number, parts in enumerate(ORDER) if part in parts]
    assert levels, f"the new part {part!r} has no place in the order of imports: give it one in tests/test_layout.py"
    before = set().union(*ORDER[: levels[0]])
    beside = {other for one, other in TOGETHER if one == part}
    # What recommends needs no evaluation; what trains reports with it.
    above = {"evaluation"} if part in ("training", "cli") else set()
    return BASICS | before | beside | above | {part}


def test_imports_flow_one_way(repository):
    wrong, checked = [], 0
    for path in sorted((repository / "llmrec").rglob("*.py")):
        module = ".".join(path.relative_to(repository).with_suffix("").parts)
        if module == "llmrec.__init__":
            continue  # serves all names, and imports none before it is asked
        part = part_of(module)
        for imported in imports_of(path, repository):
            checked += 1
            if part_of(imported) not in allowed_for(part):
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)
    assert checked > 100


def test_the_reader_of_imports_sees_all_kinds(tmp_path):
    folder = tmp_path / "llmrec" / "data"
    folder.mkdir(parents=True)
    (folder / "some.py").write_text(
        "import llmrec.training.trainer\nfrom llmrec import recommender\nimport torch\n"
        "from .splits import x\nfrom ..tasks import y\n"
        "def f():\n    from llmrec.cli import main\n"
    )
    assert set(imports_of(folder / "some.py", tmp_path)) == {
        "llmrec.training.trainer",
        "llmrec.recommender",
        "llmrec.data.splits",
        "llmrec.tasks",
        "llmrec.cli",
    }
    assert "training" not in allowed_for("recommender")
    assert "evaluation" not in allowed_for("generation")
    assert "generation" not in allowed_for("tasks")
    assert "adapter" not in allowed_for("vocabulary")


@pytest.mark.parametrize("folder", ["tokenizers", "eval", "recipes", "accelerate_configs", "tests"])
def test_folders_of_scripts_are_no_packages(repository, folder):
    found = [str(path.relative_to(repository)) for path in (repository / folder).rglob("__init__.py")]
    assert found == []


def test_no_name_of_ours_hides_a_library(repository):
    hidden = {"tokenizers", "datasets", "evaluate", "peft", "transformers", "accelerate", "trl"}
    assert not {path.stem for path in (repository / "llmrec").iterdir()} & hidden
    scripts = [path for folder in ("tokenizers", "eval", "recipes") for path in (repository / folder).rglob("*.py")]
    assert not {path.stem for path in scripts} & hidden


def python(repository, code):
    """Runs code with the repository's root first on the path, as `python -c` does there."""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hugging_faces_tokenizers_wins_from_the_root(repository):
    code = "import tokenizers; print(tokenizers.__file__); tokenizers.Tokenizer"
    assert not python(repository, code).startswith(str(repository / "tokenizers"))  # an environment may lie inside


def test_importing_llmrec_loads_no_heavy_library(repository):
    code = (
        "import sys, llmrec\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'sklearn', 'peft'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "llmrec.LlmrecError\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert python(repository, code).splitlines() == ["[]", "[]"]


def test_public_names(repository):
    import llmrec

    assert set(llmrec.__all__) <= set(dir(llmrec))
    for name in llmrec.__all__:
        assert getattr(llmrec, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llmrec.nothing
    tree = ast.parse((repository / "llmrec" / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("llmrec.")
        for alias in node.names
    }
    assert typed == set(llmrec.__all__)  # what type checkers see is what is served
