"""Models of the T5 family through trainer, recommender and folder: LETTER-TIGER's way."""

import copy

import datasets
import factories
import numpy as np
import pytest
import tiny_t5
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

from llmrec.adapter import add_lora
from llmrec.data.interactions import InteractionDataset
from llmrec.data.splits import leave_one_out
from llmrec.errors import SettingsError
from llmrec.generation.trie import ItemTrie
from llmrec.recommender import Recommender
from llmrec.recommender_folder import RecommenderConfig
from llmrec.tasks.next_item import NextItemTask, evaluation_samples, training_samples
from llmrec.training.config import RecFinetuneConfig
from llmrec.training.trainer import RankingTrainer
from llmrec.vocabulary import CodeVocabulary, add_code_rows

SCOPES = ("vocabulary", "codes", "trie")
END = 2


def make_text_tokenizer():
    """Whole words, 16 tokens; ends with `</s>` what an encoder reads, and has no start token."""
    words = ["<unk>", "<s>", "</s>", "<pad>", *factories.WORDS, "filler"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def make_trainer(folder, *, lora=False, tied=True, dataset=None, evaluation=False, model_settings=None, **settings):
    """A RankingTrainer of a tiny T5, as `factories.make_trainer` makes one of a LLaMA."""
    defaults = {
        "loss_scope": "vocabulary",
        "code_learning_rate_factor": 1.0,
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "packing": False,
        "seed": 1,
    }
    args = RecFinetuneConfig(output_dir=str(folder / "run"), **{**defaults, **settings})
    tokenizer, semantic_ids = make_text_tokenizer(), factories.make_semantic_ids()
    dataset = factories.make_dataset() if dataset is None else dataset
    model = tiny_t5.make_t5(**(model_settings or {}))
    model = model if tied else tiny_t5.untied(model, folder / "untied")
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    vocabulary = CodeVocabulary.add_to(tokenizer, semantic_ids.codebook_sizes)
    add_code_rows(model, vocabulary, seed=2)
    if lora:
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
        model = add_lora(model, config, seed=3)
    task = NextItemTask(tokenizer, vocabulary, semantic_ids, template="{history}", max_history=8, encoder_decoder=True)
    splits = leave_one_out(dataset) if evaluation else None
    trainer = RankingTrainer(
        model,
        args,
        vocabulary=vocabulary,
        text_tokenizer=tokenizer,
        train_dataset=training_samples(task, splits.train if splits else dataset, form="prefix"),
        eval_dataset=evaluation_samples(task, splits.validation) if splits else None,
        trie=ItemTrie.from_semantic_ids(semantic_ids),
    )
    trainer.task = task
    trainer.semantic_ids = semantic_ids
    return trainer


def make_recommender(trainer, folder, **settings):
    config = RecommenderConfig(
        base_model=str(folder / "base"),
        template="{history}",
        max_history=8,
        codebook_sizes=trainer.vocabulary.codebook_sizes,
        first_token_id=trainer.vocabulary.first_token_id,
        **settings,
    )
    item_ids = list(trainer.semantic_ids.item_ids)
    items = datasets.Dataset.from_dict({"item_id": item_ids, "title": item_ids})
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    parts = (trainer.processing_class, trainer.semantic_ids, trainer.vocabulary, items, trainer.task, config)
    return Recommender(model, *parts)


def scope_columns(trainer, scope, before):
    """Naive: the columns of the softmax that follows some codes of an item."""
    vocabulary, codes = trainer.vocabulary, trainer.task.item_tokens
    level = len(before)
    if scope == "vocabulary":
        return list(range(vocabulary.first_token_id + vocabulary.num_tokens))
    if scope == "codes":
        first = vocabulary.first_token_id + int(vocabulary.level_offsets[level])
        return list(range(first, first + vocabulary.codebook_sizes[level]))
    return sorted({int(item[level]) for item in codes if item[:level].tolist() == before})


def dense_losses(trainer, model, sample, scope, temperature):
    """Losses of one sample's targets out of the full logits, one target after the other."""
    target = sample["labels"]
    decoder_input_ids = torch.tensor([[tiny_t5.START, *target[:-1]]])
    logits = model(input_ids=torch.tensor([sample["input_ids"]]), decoder_input_ids=decoder_input_ids).logits[0]
    losses = []
    for level, token in enumerate(target):
        scaled = logits[level] / temperature
        losses.append(scaled[scope_columns(trainer, scope, target[:level])].logsumexp(0) - scaled[token])
    return losses


def dense_run(trainer, scope, temperature=1.0, batch_size=8):
    """What the trainer should do, written out: plain SGD on the mean loss of all targets of a batch."""
    model = copy.deepcopy(trainer.model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows, log = trainer.plan.rows(0), []
    for step in range(trainer.args.max_steps):
        indices = np.concatenate(rows[step * batch_size : (step + 1) * batch_size])
        batch = [trainer.plan.samples[int(index)] for index in indices]
        losses = [loss for sample in batch for loss in dense_losses(trainer, model, sample, scope, temperature)]
        loss = torch.stack(losses).mean()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        present = [gradient for gradient in gradients if gradient is not None]
        norm = torch.stack([gradient.square().sum() for gradient in present]).sum().sqrt()
        log.append({"loss": loss.item(), "grad_norm": norm.item()})
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    parameter -= trainer.args.learning_rate * gradient
    return log


def assert_same_steps(found, expected, tolerance=1e-5):
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=tolerance)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=tolerance)


# Samples


def test_the_encoder_reads_codes_and_an_end_the_decoder_writes_codes(tmp_path):
    trainer = make_trainer(tmp_path)
    tokens = trainer.task.item_tokens
    assert trainer.task.prompt([]) == [END]
    assert trainer.task.prompt([4, 0]) == [*tokens[4], *tokens[0], END]
    for sample in trainer.plan.samples:
        assert sample["input_ids"][-1] == END
        assert len(sample["input_ids"]) % 3 == 1
        assert sample["labels"] in tokens.tolist()


# Steps


@pytest.mark.parametrize(
    ("scope", "temperature", "lora", "tied"),
    [
        ("vocabulary", 0.7, False, True),
        ("vocabulary", 1.0, True, False),
        ("codes", 1.2, True, True),
        ("trie", 0.7, False, True),
        ("trie", 1.0, True, False),
    ],
)
def test_steps_equal_a_dense_reference(tmp_path, scope, temperature, lora, tied):
    trainer = make_trainer(tmp_path, lora=lora, tied=tied, loss_scope=scope, ranking_temperature=temperature)
    expected = dense_run(trainer, scope, temperature)
    trainer.train()
    assert_same_steps(factories.step_log(trainer), expected)


@pytest.mark.parametrize("scope", ["vocabulary", "trie"])
def test_accumulation_equals_one_batch(tmp_path, scope):
    whole = make_trainer(tmp_path / "whole", loss_scope=scope)
    parts = make_trainer(
        tmp_path / "parts", loss_scope=scope, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    whole.train()
    parts.train()
    assert_same_steps(factories.step_log(parts), factories.step_log(whole))
    for name, tensor in factories.trained_tensors(whole).items():
        torch.testing.assert_close(factories.trained_tensors(parts)[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_only_lora_and_rows_move(tmp_path, tied):
    trainer = make_trainer(tmp_path, lora=True, tied=tied, optim="adamw_torch", learning_rate=1e-2)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        is_trained = "lora_" in name or name.endswith(".new_rows")
        assert torch.equal(tensor, before[name]) is not is_trained, name


@pytest.mark.parametrize("scope", ["vocabulary", "trie"])
def test_evaluation_is_the_dense_loss(tmp_path, scope):
    trainer = make_trainer(tmp_path, loss_scope=scope, ranking_temperature=0.7, per_device_eval_batch_size=5)
    samples = trainer.plan.samples
    with torch.no_grad():
        losses = [loss for each in samples for loss in dense_losses(trainer, trainer.model, each, scope, 0.7)]
    assert trainer.evaluate(samples)["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


def test_a_run_that_is_resumed_ends_where_another_does(tmp_path):
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "model_settings": {"dropout_rate": 0.1}}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "whole", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-2"))
    for name, tensor in factories.trained_tensors(whole).items():
        assert torch.equal(factories.trained_tensors(resumed)[name], tensor), name
    model = resumed.model
    assert model.encoder.embed_tokens.new_rows is model.shared.new_rows is model.lm_head.new_rows


def test_what_an_encoder_decoder_cannot_have(tmp_path):
    with pytest.raises(SettingsError, match="packing"):
        make_trainer(tmp_path, packing=True)
    trainer = make_trainer(tmp_path)
    with pytest.raises(SettingsError, match="use the form 'prefix'"):
        training_samples(trainer.task, factories.make_dataset(), form="history")
    causal = NextItemTask(
        factories.make_text_tokenizer(start_token=True),
        trainer.vocabulary,
        trainer.semantic_ids,
        template="{history}",
        max_history=8,
    )
    trainer.task = causal
    with pytest.raises(SettingsError, match="encoder_decoder=True"):
        make_recommender(trainer, tmp_path)


# From random weights to a recommender


def cyclic_dataset():
    """Whoever took an item takes the one after it: 60 users, histories of 4 to 8 of the twelve items from each."""
    histories = [[(user + place) % 12 for place in range(4 + user % 5)] for user in range(60)]
    items = datasets.Dataset.from_dict({"item_id": [f"item-{row}" for row in range(12)]})
    users = {"user_id": [f"user-{user}" for user in range(60)], "items": histories}
    return InteractionDataset(items, datasets.Dataset.from_dict(users), name="cyclic")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A T5 that learned the cycle from random weights, in the scope `trie`."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(
        folder,
        dataset=cyclic_dataset(),
        evaluation=True,
        loss_scope="trie",
        optim="adamw_torch",
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        max_steps=120,
        per_device_train_batch_size=32,
        logging_steps=40,
        train_sampling_strategy="random",
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return trainer, folder, before


def answers(recommender):
    histories = [[f"item-{row % 12}" for row in range(start, start + 3)] for start in range(12)]
    return recommender.recommend([*histories, []], k=5, exclude_seen=False)


def assert_same_answers(found, expected):
    for left, right in zip(found, expected, strict=True):
        assert [one.item_id for one in left] == [one.item_id for one in right]
        np.testing.assert_allclose([one.score for one in left], [one.score for one in right], atol=1e-4)


def test_it_learns_a_pattern_from_random_weights(trained):
    trainer, folder, before = trained
    assert before > 1.0
    assert trainer.evaluate()["eval_loss"] < 0.35
    found = answers(make_recommender(trainer, folder, scope="trie"))
    assert [one[0].item_id for one in found[:12]] == [f"item-{(start + 3) % 12}" for start in range(12)]


def test_the_saved_recommender_answers_the_same(trained, tmp_path):
    trainer, folder, _ = trained
    recommender = make_recommender(trainer, folder, scope="trie")
    expected = answers(recommender)
    recommender.save_pretrained(tmp_path)
    loaded = Recommender.from_pretrained(tmp_path, device="cpu")
    assert type(loaded.model) is T5ForConditionalGeneration
    assert loaded.task.prompt([]) == [END]
    assert_same_answers(answers(loaded), expected)
    merged = recommender.merge()
    assert not any("new_rows" in name for name in merged.model.state_dict())
    assert_same_answers(answers(merged), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_adapter_answers_the_same(tmp_path, tied):
    trainer = make_trainer(tmp_path, lora=True, tied=tied, learning_rate=0.01)
    trainer.train()
    recommender = make_recommender(trainer, tmp_path)
    assert recommender.is_adapter
    expected = answers(recommender)
    recommender.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert_same_answers(answers(Recommender.from_pretrained(tmp_path / "adapter", device="cpu")), expected)
    merged = recommender.merge()
    assert_same_answers(answers(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert_same_answers(answers(Recommender.from_pretrained(tmp_path / "merged", device="cpu")), expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_given_items_score_as_they_are_recommended(trained, scope):
    trainer, folder, _ = trained
    recommender = make_recommender(trainer, folder, scope=scope)
    histories = [["item-3", "item-4"], []]
    for history, found in zip(histories, recommender.recommend(histories, k=12, exclude_seen=False), strict=True):
        assert len(found) == 12
        scores = recommender.score(history, [one.item_id for one in found])
        np.testing.assert_allclose(scores, [one.score for one in found], atol=1e-4)
