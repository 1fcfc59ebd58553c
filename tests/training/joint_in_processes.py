"""Started by test_joint_engines.py: joint training on the small catalogue as the plan file says; writes what happened.

    accelerate launch --config_file <yaml> tests/training/joint_in_processes.py <plan.json>

The plan holds `output_dir` and `runs`, and `shim` as for train_in_processes.py. A run has a `name`, that of its
folder, and

* `family` ("t5", trained whole, or "llama", with LoRA), `base` (its folder), `settings`, and those of the item
  `tokenizer` and of the `alignment`: a `JointTrainer` trains for cycles of two epochs, from the latest checkpoint that
  there is;
* or `whole`: the settings of `train_jointly`, which then runs from data to folder.

`kill` ends the process by SIGKILL: {"tokenizer_step": n} in a step of the item tokenizer, {"step": n} in one of the
recommender, both counted from 0.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import factories  # noqa: E402
from train_in_processes import reset_engine, turn_on_fsdp  # noqa: E402

SIZES = (4, 4, 4)
COUNTER_SIZE = 4
HISTORIES = [["item-3", "item-1"], ["item-7", "item-2", "item-11", "item-4"], []]


def make_text_tokenizer():
    """That of the factories, with the end token that an encoder's input ends with."""
    from transformers import PreTrainedTokenizerFast

    words = factories.make_text_tokenizer().backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def make_embeddings(width=8):
    from llmrec.embeddings.base import ItemEmbeddings

    item_ids = tuple(factories.make_dataset().item_ids)
    vectors = np.random.default_rng(5).normal(size=(len(item_ids), width)).astype(np.float32)
    return ItemEmbeddings(item_ids, vectors)


def item_tokenizer_settings():
    return {
        "num_codebooks": len(SIZES),
        "codebook_size": SIZES[0],
        "codebook_dim": 4,
        "hidden_sizes": (16,),
        "epochs": 4,
        "batch_size": 8,
    }


def make_item_tokenizer(*, alignment, **settings):
    """The tokenizer's half, fitted by this process alone."""
    from llmrec.item_tokenizers.rq_vae import RQVAEConfig, RQVAETokenizer
    from llmrec.processes import Processes
    from llmrec.training.tokenizer_training import AlignmentSettings, JointTokenizer, TokenizerTraining

    embeddings = {"text": make_embeddings()}
    fitted = RQVAETokenizer(RQVAEConfig(**item_tokenizer_settings()))
    fitted.fit(embeddings, progress=False)
    training = TokenizerTraining(**settings)
    return JointTokenizer(fitted, embeddings, training, AlignmentSettings(**alignment), Processes.launched())


def make_unique(quantized):
    return quantized.make_unique("extra_level", counter_size=COUNTER_SIZE)


def make_model(plan, vocabulary):
    """A T5 that is trained whole, or a LLaMA with LoRA; loaded as users' models are."""
    from peft import LoraConfig

    from llmrec.adapter import add_lora
    from llmrec.pretrained import load_base_model
    from llmrec.vocabulary import add_code_rows

    model = load_base_model(plan["base"])
    add_code_rows(model, vocabulary, seed=2)
    if plan["family"] == "t5":
        return model
    return add_lora(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), seed=3)


def make_trainer(plan, folder):
    from llmrec.recommender import Recommender
    from llmrec.recommender_folder import RecommenderConfig
    from llmrec.tasks.next_item import NextItemTask, training_samples
    from llmrec.training.config import RecFinetuneConfig
    from llmrec.training.joint import JointTrainer
    from llmrec.training.joint_schedule import JointSchedule
    from llmrec.vocabulary import CodeVocabulary

    defaults = {
        "code_learning_rate_factor": 1.0,
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
    # Processes must be known before a model is made: TrainingArguments starts them.
    args = RecFinetuneConfig(output_dir=str(folder), **{**defaults, **plan["settings"]})
    item_tokenizer = make_item_tokenizer(alignment=plan["alignment"], **plan["tokenizer"])
    semantic_ids = make_unique(item_tokenizer.quantize())
    encoder_decoder = plan["family"] == "t5"
    text_tokenizer = make_text_tokenizer() if encoder_decoder else factories.make_text_tokenizer()
    vocabulary = CodeVocabulary.add_to(text_tokenizer, semantic_ids.codebook_sizes)
    template = "{history}" if encoder_decoder else "Items chosen : {history}"
    task = NextItemTask(
        text_tokenizer, vocabulary, semantic_ids, template=template, max_history=8, encoder_decoder=encoder_decoder
    )
    dataset = factories.make_dataset()
    config = RecommenderConfig(
        base_model="base",
        template=template,
        max_history=8,
        codebook_sizes=semantic_ids.codebook_sizes,
        first_token_id=vocabulary.first_token_id,
    )
    samples = training_samples(task, dataset, form="prefix" if encoder_decoder else "history")
    return JointTrainer(
        Recommender(
            make_model(plan, vocabulary), text_tokenizer, semantic_ids, vocabulary, dataset.items, task, config
        ),
        args,
        item_tokenizer=item_tokenizer,
        make_unique=make_unique,
        schedule=JointSchedule(cycle=2, warmup_epochs=0),
        train_dataset=samples,
    )


def run_trainer(plan, folder):
    """Trains; on every process `result-*.json`, and `joint-*.safetensors` of what the engine doesn't know."""
    from llmrec.training.gathering import trained_parameters

    trainer = make_trainer(plan, folder)
    before = trainer.recommender.semantic_ids.codes.tolist()
    trainer.train("latest")
    index = trainer.args.process_index
    tensors = trained_parameters(trainer.model, trainer.accelerator)
    if tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "trained.safetensors")
    beside = {
        f"{part}.{name}": tensor.detach().clone()
        for part, module in (("tokenizer", trainer.item_tokenizer.module), ("projections", trainer.projections))
        for name, tensor in module.state_dict().items()
    }
    save_file(beside, folder / f"joint-{index}.safetensors")
    result = {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type.value),
        "codes_before": before,
        "codes": trainer.recommender.semantic_ids.codes.tolist(),
        "log": factories.step_log(trainer),
        "records": trainer.records,
    }
    (folder / f"result-{index}.json").write_text(json.dumps(result))
    return trainer.accelerator


def run_whole(plan, folder):
    """`train_jointly`; on every process `result-*.json` with what the returned recommender says, where it is whole."""
    from accelerate import PartialState

    from llmrec.processes import is_sharded
    from llmrec.training.joint_run import parse, train_jointly

    settings = {**plan["whole"], "output_dir": str(folder)}
    command_line = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    recommender, _, results = train_jointly(*parse(command_line))
    state = PartialState()
    result = {
        "codes": recommender.semantic_ids.codes.tolist(),
        "sharded": is_sharded(recommender.model),
        "metrics": [dict(result.metrics) for result in results],
    }
    if not result["sharded"]:
        result["recommended"] = recommend(recommender)
    (folder / f"result-{state.process_index}.json").write_text(json.dumps(result))


def recommend(recommender):
    answers = recommender.recommend(HISTORIES, k=5)
    return {
        "items": [[item.item_id for item in answer] for answer in answers],
        "scores": [[item.score for item in answer] for answer in answers],
    }


def kill_at(*, tokenizer_step=None, step=None):
    """Ends this process by SIGKILL, when gradients are there and nothing has been stepped."""
    from llmrec.training.joint import JointTrainer
    from llmrec.training.tokenizer_training import JointTokenizer

    of_tokenizer, of_recommender = JointTokenizer.step, JointTrainer.step_projections

    def in_tokenizer(self, **options):
        if self.steps_done == tokenizer_step:
            os.kill(os.getpid(), signal.SIGKILL)
        of_tokenizer(self, **options)

    def in_recommender(self):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        of_recommender(self)

    JointTokenizer.step, JointTrainer.step_projections = in_tokenizer, in_recommender


def main(plan: dict) -> None:
    if plan.get("shim"):
        turn_on_fsdp()
    if "kill" in plan:
        kill_at(**plan["kill"])
    for part in plan["runs"]:
        of_part = Path(plan["output_dir"]) / part["name"]
        of_part.mkdir(exist_ok=True)
        reset_engine()
        (run_whole if "whole" in part else run_trainer)(part, of_part)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
