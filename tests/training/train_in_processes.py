"""Started by test_engines.py: trains on the small catalogue as the plan file says, and writes what happened.

    accelerate launch --config_file <yaml> tests/training/train_in_processes.py <plan.json>

The plan holds `output_dir` and the `settings` of `make_trainer`, and may hold

* `resume_from`: a second trainer starts from that checkpoint;
* `num_evaluated`: the validation loss is computed on so many samples;
* `base`: the folder of the base model, which is loaded as users' models are;
* `rows_alone`: of a model without LoRA the code rows alone are trained;
* `num_samples`: the training takes so many of the samples;
* `num_users`: a list; the trained model recommends for so many users, evaluated over all processes;
* `name`: of the result file.

In place of all that it may hold `runs`, a list of such plans: one process trains several times. `shim` turns FSDP on
for CPU processes, where accelerate 1.15 would quietly take DDP.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import factories

from llmrec.tasks.base import TaskSamples


class FirstSamples(TaskSamples):
    """The first samples of others."""

    def __init__(self, samples, count):
        self.samples, self.count, self.name = samples, count, samples.name

    def __len__(self):
        return self.count

    @property
    def num_targets(self):
        return self.count

    def lengths(self, epoch=0):
        return self.samples.lengths(epoch)[: self.count]

    def sample(self, index, epoch=0):
        return self.samples.sample(index, epoch)


class OneAtATime:
    """A recommender that searches for one user at a time, so that processes with more users search more often."""

    def __init__(self, recommender):
        self.recommender = recommender

    def recommend(self, histories, k=10, *, exclude_seen=True):
        return self.recommender.recommend(histories, k, exclude_seen=exclude_seen, batch_size=1)


def make_trainer(plan, folder):
    settings = dict(plan["settings"])
    if "num_samples" in plan:
        settings["samples"] = lambda samples: FirstSamples(samples, plan["num_samples"])
    if "base" in plan:
        from llmrec.pretrained import load_base_model

        factories.make_tiny_model = lambda *args, **kwargs: load_base_model(plan["base"])
    trainer = factories.make_trainer(folder, **settings)
    if plan.get("rows_alone"):
        from llmrec.adapter import freeze_base

        freeze_base(trainer.model)
    return trainer


def make_recommender(model, base="base"):
    """The recommender that the tests' process makes of a saved adapter too."""
    from llmrec.recommender import Recommender
    from llmrec.recommender_folder import RecommenderConfig
    from llmrec.tasks.next_item import NextItemTask
    from llmrec.vocabulary import CodeVocabulary

    tokenizer, semantic_ids = factories.make_text_tokenizer(), factories.make_semantic_ids()
    vocabulary = CodeVocabulary.add_to(tokenizer, semantic_ids.codebook_sizes)
    task = NextItemTask(tokenizer, vocabulary, semantic_ids, template="Items chosen : {history}", max_history=8)
    config = RecommenderConfig(
        base_model=str(base),
        template="Items chosen : {history}",
        max_history=8,
        codebook_sizes=semantic_ids.codebook_sizes,
        first_token_id=vocabulary.first_token_id,
    )
    return Recommender(model, tokenizer, semantic_ids, vocabulary, factories.make_dataset().items, task, config)


def recommend(recommender, accelerator, num_users):
    """What some users are recommended, and the ranks of the targets of all, counted over the processes."""
    from llmrec.data.splits import leave_one_out
    from llmrec.evaluation.evaluator import evaluate

    dataset = factories.make_dataset()
    test = leave_one_out(dataset).test
    answers = recommender.recommend([[dataset.item_ids[row] for row in test.history(user)] for user in range(3)], k=5)
    return {
        "items": [[item.item_id for item in answer] for answer in answers],
        "scores": [[item.score for item in answer] for answer in answers],
        "ranks": {
            str(count): evaluate(
                OneAtATime(recommender), dataset, test.take(np.arange(count)), ks=(12,), accelerator=accelerator
            ).ranks.tolist()
            for count in num_users
        },
    }


def run(plan, folder):
    from llmrec.training.gathering import trained_parameters

    trainer = make_trainer(plan, folder)
    trainer.train()
    tensors = trained_parameters(trainer.model, trainer.accelerator)
    result = {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type.value),
        "wrapped_by": type(trainer.model_wrapped).__name__,
        "log": factories.step_log(trainer),
        "num_tensors": len(tensors),
        "held_elements": sum(parameter.numel() for parameter in local_parameters(trainer.model)),
    }
    if tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "trained.safetensors")
    if trainer.is_deepspeed_enabled:
        config = trainer.deepspeed.config
        result["deepspeed"] = {name: config.get(name) for name in ("bf16", "gradient_clipping", "zero_optimization")}
        result["dtypes"] = sorted({str(parameter.dtype) for parameter in trainer.model.parameters()})
    if "num_evaluated" in plan:
        result["evaluation"] = trainer.evaluate(Subset(trainer.plan.samples, range(plan["num_evaluated"])))
    if "num_users" in plan:
        recommender = make_recommender(trainer.accelerator.unwrap_model(trainer.model))
        result["recommended"] = recommend(recommender, trainer.accelerator, plan["num_users"])
        trainer.save_model(str(folder / "adapter"))
        result["loaded_difference"] = load_other_values(trainer, folder / "trained.safetensors")
    if "resume_from" in plan:
        reset_engine()
        resumed = make_trainer(plan, folder)
        resumed.train(resume_from_checkpoint=str(folder / plan["resume_from"]))
        result["resumed_log"] = factories.step_log(resumed)
        again = trained_parameters(resumed.model, resumed.accelerator)
        result["resumed_difference"] = max(
            ((again[name] - tensor).abs().max().item() for name, tensor in tensors.items()), default=0.0
        )
    (folder / f"result-{trainer.args.process_index}.json").write_text(json.dumps(result))
    return trainer


def load_other_values(trainer, file):
    """Doubles all that is trained; how far the model, and what DeepSpeed's optimizer keeps, are from that."""
    from llmrec.training.gathering import load_trained_parameters, trained_parameters

    trainer.accelerator.wait_for_everyone()
    doubled = {name: 2 * tensor for name, tensor in load_file(file).items()}
    load_trained_parameters(trainer.model, doubled, trainer.accelerator)
    found = trained_parameters(trainer.model, trainer.accelerator)
    difference = max(((found[name] - doubled[name]).abs().max().item() for name in found), default=0.0)
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
        for name, tensor in doubled.items():
            kept = safe_get_full_fp32_param(parameters[name]).cpu().view_as(tensor)
            difference = max(difference, (kept - tensor).abs().max().item())
    return difference


def local_parameters(model):
    """What this process holds of each parameter."""
    for parameter in model.parameters():
        local = getattr(parameter, "ds_tensor", parameter)
        yield local.to_local() if hasattr(local, "to_local") else local


def reset_engine():
    """Lets the next trainer of this process choose an engine of its own; the processes stay as they are."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()


def turn_on_fsdp():
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from llmrec.training.trainer import RankingTrainer

    start = RankingTrainer.__init__

    def with_fsdp(self, *args, **kwargs):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        start(self, *args, **kwargs)

    RankingTrainer.__init__ = with_fsdp


def main(plan: dict) -> None:
    if plan.get("shim"):
        turn_on_fsdp()
    folder = Path(plan["output_dir"])
    for part in plan.get("runs", [plan]):
        of_part = folder / part.get("name", "")
        of_part.mkdir(exist_ok=True)
        reset_engine()
        trainer = run(part, of_part)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
