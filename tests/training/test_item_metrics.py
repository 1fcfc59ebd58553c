"""Recall and NDCG during training: those of the saved recommender, and without a trace in the training."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import EarlyStoppingCallback

from llmrec.data.splits import leave_one_out
from llmrec.errors import SettingsError
from llmrec.evaluation.evaluator import evaluate
from llmrec.recommender import Recommender
from llmrec.tasks.next_item import evaluation_samples, training_samples
from llmrec.training.config import RecFinetuneConfig
from llmrec.training.item_metrics import ItemMetrics
from llmrec.training.trainer import RankingTrainer
from llmrec.vocabulary import find_code_head

SETTINGS = {
    "loss_scope": "vocabulary",
    "code_learning_rate_factor": 1.0,
    "per_device_train_batch_size": 8,
    "max_steps": 8,
    "learning_rate": 0.02,
    "optim": "adamw_torch",
    "lr_scheduler_type": "constant",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 2,
    "disable_tqdm": True,
    "packing": False,
    "seed": 1,
}


def make_run(factories, folder, *, with_metrics=True, callbacks=None, num_users=24, ks=(10,), **settings):
    """A recommender with 30 items, and a trainer of its model that asks for recommendations in each evaluation."""
    recommender = tiny.recommender(folder / "base_model", kind=settings.pop("kind", "adapter"))
    lengths = tuple(3 + user % 5 for user in range(num_users))
    splits = leave_one_out(factories.make_dataset(lengths, num_items=30))
    metrics = ItemMetrics(recommender, splits.validation, splits.dataset, ks=ks, batch_size=7)
    args = RecFinetuneConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    trainer = RankingTrainer(
        recommender.model,
        args,
        vocabulary=recommender.vocabulary,
        text_tokenizer=recommender.text_tokenizer,
        train_dataset=training_samples(recommender.task, splits.train, form="history"),
        eval_dataset=evaluation_samples(recommender.task, splits.validation),
        item_metrics=metrics if with_metrics else None,
        callbacks=callbacks,
    )
    return SimpleNamespace(recommender=recommender, splits=splits, metrics=metrics, trainer=trainer)


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


def test_equal_to_those_of_the_saved_recommender(factories, tmp_path):
    run = make_run(factories, tmp_path, ks=(5, 10))
    run.trainer.train()
    run.recommender.save_pretrained(tmp_path / "recommender")
    saved = Recommender.from_pretrained(tmp_path / "recommender")
    expected = evaluate(saved, run.splits.dataset, run.splits.validation, ks=(5, 10))
    assert run.metrics.names == ("ndcg@5", "recall@5", "ndcg@10", "recall@10")
    for name in run.metrics.names:
        found = logged(run.trainer, f"eval_{name}")
        assert len(found) == 4
        assert len(set(found)) > 1  # it is the model of the moment that is asked
        assert found[-1] == pytest.approx(expected.metrics[name], abs=1e-12)
    assert 0 < expected.metrics["ndcg@5"] < expected.metrics["recall@10"]


def test_seen_items_and_the_width_of_the_search_are_settings(factories, tmp_path):
    run = make_run(factories, tmp_path)
    model = run.recommender.model
    for exclude_seen, num_beams in ((False, 10), (True, None), (False, 30)):
        metrics = ItemMetrics(
            run.recommender, run.splits.validation, run.splits.dataset, exclude_seen=exclude_seen, num_beams=num_beams
        )
        ranks = evaluate(
            SimpleNamespace(
                recommend=lambda history, k, exclude_seen, num_beams=num_beams: run.recommender.recommend(
                    history, k, exclude_seen=exclude_seen, num_beams=num_beams
                )
            ),
            run.splits.dataset,
            run.splits.validation,
            ks=(10,),
            exclude_seen=exclude_seen,
        )
        assert metrics(model) == {name: ranks.metrics[name] for name in ("ndcg@10", "recall@10")}


def test_training_goes_on_as_without_them(factories, tmp_path):
    """The same weights in the end, dropout's draws among them."""
    runs = []
    for name, with_metrics in (("with", True), ("without", False)):
        run = make_run(factories, tmp_path / name, with_metrics=with_metrics)
        for module in run.trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        run.trainer.train()
        runs.append(run)
    tensors = [factories.trained_tensors(run.trainer) for run in runs]
    for name, tensor in tensors[1].items():
        assert torch.equal(tensors[0][name], tensor), name
    model = runs[0].trainer.model
    for training in (True, False):
        model.train(training)
        cache = model.config.use_cache
        runs[0].metrics(model)
        assert (model.training, model.config.use_cache) == (training, cache)
        assert all(module.training is training for module in model.modules())
        head = find_code_head(model)
        assert (head.positions, head.codes_only, type(head).__name__) == (None, False, "CodeHead")


def test_the_best_by_ndcg_is_the_model_returned(factories, tmp_path):
    """At this learning rate the ranking is best halfway, and the last model's is far from it."""
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "ndcg@10"}
    run = make_run(factories, tmp_path, learning_rate=0.05, max_steps=12, **settings)
    run.trainer.train()
    found, state = logged(run.trainer, "eval_ndcg@10"), run.trainer.state
    assert run.trainer.args.greater_is_better is True
    assert state.best_metric == max(found)
    assert found[-1] < max(found), found  # else this shows nothing
    assert state.best_global_step == 2 * (found.index(max(found)) + 1)
    assert state.best_model_checkpoint == str(tmp_path / f"checkpoint-{state.best_global_step}")
    assert run.trainer.evaluate()["eval_ndcg@10"] == pytest.approx(state.best_metric, abs=1e-12)
    assert run.metrics(run.trainer.model)["ndcg@10"] == pytest.approx(state.best_metric, abs=1e-12)


def test_early_stopping_by_ndcg(factories, tmp_path):
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "ndcg@10", "max_steps": 40}
    run = make_run(factories, tmp_path, callbacks=[EarlyStoppingCallback(2)], **settings)
    run.trainer.train()
    found, state = logged(run.trainer, "eval_ndcg@10"), run.trainer.state
    assert state.global_step == 2 * (found.index(max(found)) + 1 + 2) < 40
    assert state.best_metric == max(found)


def test_trackers_are_given_the_metrics(factories, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run = make_run(factories, tmp_path, report_to="tensorboard", max_steps=4)
    run.trainer.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/grad_norm", "train/real_token_share", "eval/loss", "eval/perplexity"} <= tags
    for name in ("ndcg@10", "recall@10"):
        written = [(event.step, event.value) for event in events.Scalars(f"eval/{name}")]
        expected = logged(run.trainer, f"eval_{name}")
        assert written == [(2, pytest.approx(expected[0])), (4, pytest.approx(expected[1]))]


def test_what_is_refused(factories, tmp_path):
    run = make_run(factories, tmp_path)
    with pytest.raises(SettingsError, match="there are 0 examples"):
        ItemMetrics(run.recommender, run.splits.validation.take([]), run.splits.dataset)
    with pytest.raises(SettingsError, match=r"ks is \(0,\)"):
        ItemMetrics(run.recommender, run.splits.validation, run.splits.dataset, ks=(0,))
