"""The recommender folder: its settings file, its parts, and how it gets to the Hub and back.

The folder holds all that `recommend` needs (see `Recommender.save_pretrained`). This module knows file names, models
and the Hub's client, and joins the parts of a folder; what is inside them is read and written by those they belong to.
"""

import fnmatch
import importlib.metadata
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from llmrec._version import __version__
from llmrec.errors import DataError, MissingPartError, SettingsError
from llmrec.files import atomic_folder, check_format, grant_usual_permissions, read_json, write_json
from llmrec.generation.beam_search import check_scope
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.pretrained import auto_model_class, load_base_model, load_text_tokenizer, resolve_pretrained
from llmrec.tasks.next_item import NextItemTask
from llmrec.tasks.source import DEFAULT_MAX_TEXT_TOKENS
from llmrec.vocabulary import CodeVocabulary, find_code_head, has_code_rows

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CONFIG_NAME = "recommender_config.json"
SEMANTIC_IDS_NAME = "semantic_ids.safetensors"
ITEMS_NAME = "items.parquet"
ITEM_TOKENIZER_NAME = "item_tokenizer"
CARD_NAME = "README.md"
_MODEL_PARTS = ("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json")
_ADAPTER_PARTS = ("adapter_model.safetensors", "adapter_config.json")
_TEXT_TOKENIZER_PARTS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab*", "merges.txt", "*.model"),
)
# Everything that a recommender folder can hold: nothing else of it is replaced, pushed or downloaded.
PARTS = (
    *(CONFIG_NAME, SEMANTIC_IDS_NAME, ITEMS_NAME, ITEM_TOKENIZER_NAME, CARD_NAME),
    *_MODEL_PARTS,
    *_ADAPTER_PARTS,
    *_TEXT_TOKENIZER_PARTS,
)
_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")


@dataclass(frozen=True)
class RecommenderConfig:
    """What `recommender_config.json` holds.

    Attributes:
        base_model: Hub ID, folder or "package:..." of the base model, see `resolve_pretrained`.
        template: Prompt with "{history}" in it.
        max_history: The latest items of a history that a prompt shows.
        codebook_sizes: K of each level.
        first_token_id: Token ID of the first code.
        base_revision: Commit, branch or tag of the base model, for Hub IDs.
        scope: Over what scores are normalised, "vocabulary", "codes" or "trie": the scope the model was trained with.
        chat: Whether prompts are the user's turn of a chat.
        search_template: Prompt of a search, with "{query}" in it; None where the model wasn't trained to search.
        search_history_template: Prompt of a search with a history, with "{query}" and "{history}" in it, or None.
        max_query_tokens: Longer queries are cut there, as they were in training.
        item_tokenizer: Class name of the item tokenizer in the folder; None where there is none.
        dataset: What it was trained on, for the model card: "name", and whatever else is known. JSON values only.
        training: Settings and outcome of the training, for the model card. JSON values only.
        metrics: Results, for the model card: one dictionary a row with "metrics" (name to number), "model" ("llmrec",
            or the name of a baseline beside it) and whatever says under which conditions they were measured
            ("dataset", "split", "protocol", "seed", "num_examples", ...).
        versions: Package to version, as of saving.
    """

    base_model: str
    template: str
    max_history: int
    codebook_sizes: tuple[int, ...]
    first_token_id: int
    base_revision: str | None = None
    scope: str = "vocabulary"
    chat: bool = False
    search_template: str | None = None
    search_history_template: str | None = None
    max_query_tokens: int = DEFAULT_MAX_TEXT_TOKENS
    item_tokenizer: str | None = None
    dataset: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "codebook_sizes", tuple(int(size) for size in self.codebook_sizes))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `recommender_config.json`, with the versions of the packages in use."""
        content = {"format_version": FORMAT_VERSION, **asdict(self), "versions": installed_versions()}
        write_json(Path(folder) / CONFIG_NAME, content)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "RecommenderConfig":
        """Reads `recommender_config.json`.

        Raises:
            MissingPartError: There is none.
            DataError: It isn't ours, is of a later format, or has settings missing or unknown.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise MissingPartError(f"{folder} is no recommender folder: {CONFIG_NAME} is missing")
        content = read_json(path)
        check_format(content if isinstance(content, dict) else {}, FORMAT_VERSION, path)
        content.pop("format_version")
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(content.keys() - known)
        if unknown:
            raise DataError(f"{path} has unknown settings: {', '.join(unknown)}")
        try:
            return cls(**content)
        except TypeError as error:
            raise DataError(f"{path} lacks settings: {error}") from error


def check_parts(
    config: RecommenderConfig, model: Any, vocabulary: CodeVocabulary, semantic_ids: SemanticIds, task: NextItemTask
) -> None:
    """Refuses parts that don't fit each other.

    Raises:
        SettingsError: The message names the two, and what they say.
    """
    described = {
        "codebook_sizes": (config.codebook_sizes, vocabulary.codebook_sizes, "the vocabulary"),
        "levels": (config.codebook_sizes, semantic_ids.codebook_sizes, "the semantic IDs"),
        "first_token_id": (config.first_token_id, vocabulary.first_token_id, "the text tokenizer"),
        "template": (config.template, task.template, "the task"),
        "max_history": (config.max_history, task.max_history, "the task"),
        "chat": (config.chat, task.frame.chat, "the task"),
    }
    for name, (expected, found, where) in described.items():
        if expected != found:
            raise SettingsError(f"{name} is {expected!r} in the config, {found!r} in {where}: they don't fit")
    if bool(model.config.is_encoder_decoder) is not task.frame.encoder_decoder:
        kind = "an encoder and a decoder" if model.config.is_encoder_decoder else "a decoder alone"
        raise SettingsError(
            f"the model is {kind}, the task makes prompts for the other kind: give NextItemTask encoder_decoder="
            f"{model.config.is_encoder_decoder}"
        )
    check_scope(config.scope)
    end = vocabulary.first_token_id + vocabulary.num_tokens
    if has_code_rows(model):
        head = find_code_head(model)
        rows = (head.first_token_id, head.num_codes)
        if rows != (vocabulary.first_token_id, vocabulary.num_tokens):
            raise SettingsError(
                f"the model has {rows[1]} code rows from token {rows[0]}, the vocabulary {vocabulary.num_tokens} from"
                f" token {vocabulary.first_token_id}: they don't fit"
            )
    elif model.get_output_embeddings().weight.shape[0] < end:
        raise SettingsError(
            f"the model writes {model.get_output_embeddings().weight.shape[0]} tokens, the codes reach up to token"
            f" {end - 1}: it doesn't know them"
        )


def installed_versions() -> dict[str, str]:
    """Package to version, of the packages that a recommender's answers depend on."""
    versions = {"llmrec": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def find_kind(folder: Path) -> str:
    """Whether a folder holds an "adapter" or a "full" model.

    Raises:
        MissingPartError: One of the files that every recommender folder holds is missing; the message names it.
    """
    for name, what in ((SEMANTIC_IDS_NAME, "the codes of the items"), (ITEMS_NAME, "the catalogue")):
        _require(folder, name, what)
    if not (folder / "tokenizer.json").is_file() and not any(folder.glob("*.model")):
        _require(folder, "tokenizer.json", "the text tokenizer")
    _require(folder, "tokenizer_config.json", "the text tokenizer's settings")
    if any((folder / name).is_file() for name in _ADAPTER_PARTS):
        for name in _ADAPTER_PARTS:
            _require(folder, name, "LoRA and the rows of the codes")
        return "adapter"
    if not any(
        (folder / name).is_file() for name in ("config.json", "model.safetensors", "model.safetensors.index.json")
    ):
        raise MissingPartError(
            f"{folder} holds no model: neither adapter_model.safetensors and adapter_config.json nor model.safetensors"
            " and config.json are there"
        )
    _require(folder, "config.json", "the model's settings")
    if not (folder / "model.safetensors.index.json").is_file():
        _require(folder, "model.safetensors", "the model's weights")
    return "full"


def _require(folder: Path, name: str, what: str) -> None:
    if not (folder / name).exists():
        raise MissingPartError(f"{folder / name} is missing: {what} can't be loaded without it")


@contextmanager
def replace_parts(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder, and puts what is in it in the place of all recommender parts of `folder`.

    A folder with nothing else in it is replaced whole or not at all. Where other files share it (a training's
    checkpoints), they stay, and the parts are moved one by one with `recommender_config.json` last: a folder that was
    interrupted in between lacks it, and says so when it is loaded.
    """
    target = Path(folder)
    shared = target.is_dir() and any(not _is_part(entry.name) for entry in target.iterdir())
    if not shared:
        with atomic_folder(target) as temporary:
            yield temporary
        return
    with TemporaryDirectory(prefix=".recommender.", dir=target) as name:
        temporary = Path(name)
        yield temporary
        grant_usual_permissions(temporary)
        (target / CONFIG_NAME).unlink(missing_ok=True)
        for entry in [entry for entry in target.iterdir() if _is_part(entry.name)]:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name == CONFIG_NAME):
            os.replace(entry, target / entry.name)


def _is_part(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PARTS)


def find_folder(name: str, *, revision: str | None, token: str | None) -> Path:
    """The folder of a recommender: as it is named, or brought from the Hub.

    Raises:
        MissingPartError: No such folder, repository or revision, or no access to it.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingPartError(f"no recommender folder {name!r}")
    return download_folder(name, revision=revision, token=token)


def read_folder(folder: Path, *, base_model: str | None, token: str | None, **arguments: Any) -> dict[str, Any]:
    """The parts of a recommender, as `Recommender` takes them.

    Args:
        folder: What `Recommender.save_pretrained` wrote.
        base_model: Another place to take the base model of an adapter from.
        token: Access token for it.
        **arguments: For transformers' `from_pretrained`, such as `dtype`.

    Raises:
        MissingPartError: A part is missing: the message names it.
        DataError: A part can't be read.
    """
    config = RecommenderConfig.load(folder)
    kind = find_kind(folder)
    item_tokenizer = None
    if config.item_tokenizer is not None:
        from llmrec.item_tokenizers.base import ItemTokenizer

        if not (folder / ITEM_TOKENIZER_NAME).is_dir():
            raise MissingPartError(f"{folder / ITEM_TOKENIZER_NAME} is missing: the {config.item_tokenizer} is there")
        item_tokenizer = ItemTokenizer.from_pretrained(folder / ITEM_TOKENIZER_NAME)
    text_tokenizer = load_text_tokenizer(str(folder))
    semantic_ids = SemanticIds.load(folder / SEMANTIC_IDS_NAME)
    try:
        items = datasets.Dataset(pq.read_table(folder / ITEMS_NAME))
    except pa.ArrowInvalid as error:
        raise DataError(f"{folder / ITEMS_NAME} can't be read: {error}") from error
    vocabulary = CodeVocabulary.from_tokenizer(text_tokenizer, config.codebook_sizes)
    if kind == "adapter":
        model = load_adapter_model(folder, config, base_model=base_model, token=token, **arguments)
    else:
        model = load_full_model(folder, **arguments)
    task = NextItemTask(
        text_tokenizer,
        vocabulary,
        semantic_ids,
        template=config.template,
        max_history=config.max_history,
        chat=config.chat,
        encoder_decoder=model.config.is_encoder_decoder,
    )
    return {
        "model": model,
        "text_tokenizer": text_tokenizer,
        "semantic_ids": semantic_ids,
        "vocabulary": vocabulary,
        "items": items,
        "task": task,
        "config": config,
        "item_tokenizer": item_tokenizer,
    }


def download_folder(repo_id: str, *, revision: str | None, token: str | None) -> Path:
    """Brings the parts of a recommender from the Hub into the Hub's cache, or finds them there.

    Raises:
        MissingPartError: No such repository or revision, or no access to it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        path = snapshot_download(
            repo_id, revision=revision, token=token, allow_patterns=[*PARTS, f"{ITEM_TOKENIZER_NAME}/*"]
        )
    except RepositoryNotFoundError as error:
        raise MissingPartError(
            f"{repo_id!r} is neither a folder nor a repository of the Hub that you have access to; if it is private,"
            " pass token or log in (`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise MissingPartError(f"{repo_id!r} has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        raise MissingPartError(f"{repo_id!r} is not in the cache, and the Hub can't be reached: {error}") from error
    return Path(path)


def push_folder(
    folder: Path, repo_id: str, *, private: bool | None, token: str | None, revision: str | None, commit_message: str
) -> str:
    """Makes a repository of the Hub hold exactly the files of a folder, by one commit.

    The files are uploaded first and become visible with the commit, so a push that is interrupted leaves the old
    revision whole. (`HfApi.upload_folder` may split a folder over several commits from huggingface_hub 2.)

    Returns:
        The repository's address.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    repo_id = url.repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    added = {path.relative_to(folder).as_posix(): path for path in files}
    stale = sorted(set(api.list_repo_files(repo_id, revision=revision)) - added.keys() - {".gitattributes"})
    operations: list[Any] = [
        *(CommitOperationDelete(path_in_repo=name) for name in stale),
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in added.items()),
    ]
    with warnings.catch_warnings():
        # It asks whether a Parquet file in a model repository is meant. It is: the catalogue.
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
        api.create_commit(repo_id, operations=operations, commit_message=commit_message, revision=revision)
    return str(url)


def load_adapter_model(
    folder: Path, config: RecommenderConfig, *, base_model: str | None, token: str | None, **arguments: Any
) -> Any:
    """Loads the base model, from `base_model` where given, and puts the folder's adapter on it.

    Raises:
        MissingPartError: The base model isn't where the config says.
        DataError: The adapter doesn't fit it.
    """
    from llmrec.adapter import load_adapter

    name = base_model or config.base_model
    revision = None if base_model else config.base_revision
    try:
        base = load_base_model(name, revision=revision, token=token, **arguments)
    except OSError as error:
        raise MissingPartError(
            f"the base model {name!r} of {folder} can't be loaded ({error}); pass base_model= if it is somewhere else"
        ) from error
    return load_adapter(base, folder)


def load_full_model(folder: Path, **arguments: Any) -> Any:
    """Loads a model whose weights are in the folder, all of them.

    Raises:
        MissingPartError: The weights lack a tensor, which transformers would leave at random values.
        DataError: They can't be read.
    """
    from safetensors import SafetensorError

    try:
        loaded: Any = auto_model_class(str(folder)).from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **arguments
        )
    except SafetensorError as error:
        raise DataError(f"the weights in {folder} can't be read: {error}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise MissingPartError(f"the weights in {folder} lack {len(missing)} tensor(s), first {missing[0]}")
    return model


def check_others_can_load(base_model: str) -> None:
    """Says what others need besides an adapter: it is of use only to who has its base model.

    Raises:
        SettingsError: The base model is a local folder.
    """
    if base_model.startswith("package:"):
        package = base_model.removeprefix("package:")
        logger.warning(
            "who loads this adapter needs the Python package %s, which carries the base model; push"
            " recommender.merge() to publish a model that needs nothing else",
            package,
        )
    elif not resolve_pretrained(base_model).is_hub_id:
        raise SettingsError(
            f"the base model is the local folder {base_model!r}, which nobody else has: push recommender.merge(),"
            " which holds the whole model, or set base_model in the config to a Hub ID"
        )
