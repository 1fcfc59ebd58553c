"""The one trainer: transformers' own, with the ranking-guided loss, planned batches, and code rows that survive.

It adds nothing to the loop. The loss is handed over as `compute_loss_func`, so that the Trainer's own bookkeeping
(division by the number of targets of the global batch, the factor for several processes) stays in force;
`compute_loss` is wrapped only to tell the head which positions to read. Which samples share a step is planned for the
global batch (`llmrec.tasks.batch_plan`); what a checkpoint holds is in `llmrec.training.checkpoints`.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from llmrec.errors import SettingsError
from llmrec.generation.trie import ItemTrie
from llmrec.tasks.base import TaskSamples
from llmrec.tasks.batch_plan import BatchPlan, PlannedOrder, PlannedRows, epochs_of
from llmrec.tasks.collator import RowCollator
from llmrec.training.checkpoints import CheckpointMixin
from llmrec.training.config import RecFinetuneConfig
from llmrec.training.gathering import keep_sums_in_float32
from llmrec.training.losses import target_positions, target_tokens
from llmrec.training.packing_check import why_no_packing
from llmrec.training.short_rows import short_rows
from llmrec.training.target_losses import TargetLosses, hands_on_head_output
from llmrec.vocabulary import CodeVocabulary, code_row_parameters, find_code_head, has_code_rows, head_mode

logger = logging.getLogger(__name__)


class RankingTrainer(CheckpointMixin):
    """Fine-tunes a language model with code rows to write the codes of items.

    Args:
        model: With code rows (`add_code_rows`), plain or with LoRA (`add_lora`); decoder-only or encoder-decoder.
        args: Settings.
        vocabulary: Where the code tokens are.
        text_tokenizer: Saved with each checkpoint; names the padding token.
        train_dataset: Samples of token IDs and labels (`llmrec.tasks`).
        eval_dataset: The same, for the validation loss.
        trie: The catalogue's trie; needed by the loss scope `trie`.
        item_metrics: Called by `evaluate` with the model as it is wrapped for the processes, on all of them; what it
            returns ("ndcg@10") is logged as `eval_ndcg@10`. See `ItemMetrics`.
        callbacks: The Trainer's.

    Attributes:
        plan: The batches of the training; None without `train_dataset`.

    Raises:
        SettingsError: The model has no code rows; scope `trie` without a trie; a model that can't take packed rows.
    """

    args: RecFinetuneConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: RecFinetuneConfig,
        *,
        vocabulary: CodeVocabulary,
        text_tokenizer: PreTrainedTokenizerBase,
        train_dataset: TaskSamples | None = None,
        eval_dataset: TaskSamples | None = None,
        trie: ItemTrie | None = None,
        item_metrics: Callable[[nn.Module], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        if not has_code_rows(model):
            raise SettingsError("the model has no code rows to train: call add_code_rows(model, vocabulary) first")
        if args.loss_scope == "trie" and trie is None:
            raise SettingsError("loss_scope 'trie' needs the trie of the catalogue: pass trie=")
        self.vocabulary = vocabulary
        self.trie = trie
        self.item_metrics = item_metrics
        self._real_token_shares: dict[int, float] = {}
        self.is_encoder_decoder = bool(cast(Any, model).config.is_encoder_decoder)
        with _precision_of(args, model):  # both try the model
            self._loss_in_head = hands_on_head_output(model)
            self.plan = None if train_dataset is None else self._make_plan(model, args, train_dataset)
        if self.plan is not None and args.loss_scope != "vocabulary" and not self.plan.samples.has_text_targets:
            _freeze_unread_head(model)
        if args.ddp_find_unused_parameters is None:  # the Trainer's default looks for them with every LoRA
            args.ddp_find_unused_parameters = self._may_leave_head_unread(model, args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=None if self.plan is None else PlannedRows(self.plan),
            eval_dataset=eval_dataset,
            processing_class=text_tokenizer,
            data_collator=RowCollator(
                int(text_tokenizer.pad_token_id or 0),
                packing=args.packing,
                encoder_decoder=self.is_encoder_decoder,
            ),
            compute_loss_func=self._batch_loss,
            callbacks=callbacks,
        )
        keep_sums_in_float32(self.accelerator)
        if self.trie is not None:
            self.trie = self.trie.to(self.args.device)

    def _may_leave_head_unread(self, model: nn.Module, args: RecFinetuneConfig) -> bool:
        """Whether the base part of the head is trained, and read by the batches with text alone."""
        has_text = self.plan is not None and self.plan.samples.has_text_targets
        return has_text and args.loss_scope != "vocabulary" and find_code_head(model).weight.requires_grad

    # Batches

    def _make_plan(self, model: nn.Module, args: RecFinetuneConfig, samples: TaskSamples) -> BatchPlan:
        reason = why_no_packing(model) if args.packing else None
        if reason is not None:
            raise SettingsError(f"packing is on, but {reason}; set packing to false")

        def plan(num_epochs: int = 1) -> BatchPlan:
            return BatchPlan(
                samples,
                rows_per_step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                seed=args.seed if args.data_seed is None else args.data_seed,
                packing=args.packing,
                row_length=args.row_length,
                order=str(args.train_sampling_strategy),
                num_epochs=num_epochs,
            )

        planned = plan(epochs_of(args.num_train_epochs, args.max_steps, plan))
        self.resume_identity = {
            "tasks": samples.name,
            "samples": len(samples),
            "targets": samples.num_targets,
            "tokens": int(samples.lengths(0).sum()),
            "rows_per_step": planned.rows_per_step,
            "steps_per_epoch": planned.num_steps,
            "seed": planned.seed,
            "packing": planned.packing,
            "row_length": planned.row_length if planned.packing else None,
            "order": planned.order,
        }
        logger.info(
            "%d samples with %d targets, %d steps an epoch; %.1f %% of the tokens read are real",
            *(len(samples), samples.num_targets, planned.num_steps),
            100 * planned.real_token_share(batch_size=args.train_batch_size),
        )
        return planned

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(rows, PlannedRows):
            return super()._get_train_sampler(train_dataset)
        return PlannedOrder(rows, epoch=lambda: int(self.state.epoch or 0))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's, over samples in order of length, so that least is padded: no total depends on the order."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, TaskSamples):
            dataset = Subset(dataset, np.argsort(-dataset.lengths(), kind="stable").tolist())
        return super().get_eval_dataloader(dataset)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's; beside the training loss stands the share of real tokens in the batches of the epoch."""
        if "loss" in logs and self.plan is not None:
            epoch = max(0, math.ceil(self.state.epoch or 0) - 1)
            if epoch not in self._real_token_shares:
                share = self.plan.real_token_share(epoch, batch_size=self.args.train_batch_size)
                self._real_token_shares[epoch] = round(share, 4)
            logs["real_token_share"] = self._real_token_shares[epoch]
        super().log(logs, *args, **kwargs)

    # A step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's own, with what makes it faster and changes nothing but rounding.

        PEFT casts the input of each LoRA layer to the type of its weights; where autocast casts it back, that is left
        out. Short packed rows have attention of their own on CPUs.
        """
        with contextlib.ExitStack() as faster:
            if self.accelerator.native_amp and not self.is_deepspeed_enabled:
                faster.enter_context(disable_input_dtype_casting(model))
            if "position_ids" in inputs and not self.args.torch_compile:
                faster.enter_context(short_rows(self._unwrapped.config.get_text_config(), inputs["input_ids"]))
            return super().training_step(model, inputs, *args, **kwargs)

    # The loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, with a head that reads target positions only, and writes the sum of their losses."""
        labels = inputs["labels"]
        targets = target_tokens(labels, encoder_decoder=self.is_encoder_decoder)
        inside = None
        if self._loss_in_head:
            inside = self._losses.sum_in_head(targets, only_codes=not self._may_hold_text)
        with self._head_for(model, labels, compute=inside):
            return super().compute_loss(model, self._model_inputs(inputs, labels), *args, **kwargs)

    def _head_for(self, model: nn.Module, labels: Tensor, compute: Any = None) -> Any:
        positions = target_positions(labels, encoder_decoder=self.is_encoder_decoder)
        codes_only = compute is None and self._codes_only(labels)
        return head_mode(model, positions=positions, codes_only=codes_only, compute=compute)

    def _model_inputs(self, inputs: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
        """What the forward takes besides: no cache where rows are packed, the shifted targets for a decoder."""
        inputs = dict(inputs)
        if "position_ids" in inputs:
            inputs["use_cache"] = False  # with a cache, or a mask, transformers wouldn't keep the samples apart
        if self.is_encoder_decoder:
            config = self._unwrapped.config
            shifted = torch.full_like(labels, config.decoder_start_token_id)
            shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] < 0, config.pad_token_id)
            inputs["decoder_input_ids"] = shifted
        return inputs

    def _codes_only(self, labels: Tensor) -> bool:
        """Whether the targets of a batch need the code columns alone."""
        if self.args.loss_scope == "vocabulary":
            return False
        return not (self._may_hold_text and bool(self._losses.is_text(labels[labels >= 0]).any()))

    @property
    def _may_hold_text(self) -> bool:
        return self.plan is None or self.plan.samples.has_text_targets

    @property
    def _losses(self) -> TargetLosses:
        return TargetLosses(self.vocabulary, self.args.loss_scope, self.trie, self.args.ranking_temperature)

    def _batch_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if self._loss_in_head:
            total = outputs.logits.sum()
        else:
            targets = target_tokens(labels, encoder_decoder=self.is_encoder_decoder)
            total = self._losses.from_logits(outputs.logits, targets).sum()
        if num_items_in_batch is None:
            num_items_in_batch = target_positions(labels, encoder_decoder=self.is_encoder_decoder).sum()
        # A step always has targets; a batch of one process may have none.
        return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)

    # The optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser; the code rows are a group of their own, with their learning rate, without decay."""
        if self.optimizer is None:
            super().create_optimizer() if model is None else super().create_optimizer(model)
            optimizer = cast(torch.optim.Optimizer, self.optimizer)
            code_rows = {
                id(rows) for rows in code_row_parameters(cast(nn.Module, self.model if model is None else model))
            }
            moved = []
            for group in optimizer.param_groups:
                moved += [parameter for parameter in group["params"] if id(parameter) in code_rows]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in code_rows]
            # Under FSDP2 a group without parameters comes back from a checkpoint without its settings.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            learning_rate = self.args.learning_rate * self.args.code_learning_rate_factor
            optimizer.add_param_group({"params": moved, "lr": learning_rate, "weight_decay": 0.0})
        return cast(torch.optim.Optimizer, self.optimizer)

    # Evaluation by loss

    def evaluate(
        self,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss over all targets, each counted once on however many processes.

        The Trainer's own evaluation averages batch means by their number of samples, so it depends on how samples
        fall into batches.

        Returns:
            `eval_loss` at the training temperature, `eval_perplexity` at temperature 1, both in the training scope;
            then what `item_metrics` gives.
        """
        if isinstance(eval_dataset, Mapping):
            raise SettingsError("evaluate takes one data set; call it once for each, with a metric_key_prefix")
        batches = self.get_eval_dataloader(eval_dataset)
        model = self._evaluation_model(batches)
        totals = torch.zeros(3, dtype=torch.float64)
        for batch in tqdm(batches, desc="validation loss", disable=not self.is_world_process_zero() or None):
            totals += self.accelerator.gather_for_metrics(self._sample_sums(model, batch)).double().sum(dim=0).cpu()
        loss, plain_loss = (totals[:2] / totals[2]).tolist()
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(min(plain_loss, 80))}
        if self.item_metrics is not None:
            found = self.item_metrics(model)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        _share_out_again(model)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluation_model(self, batches: Any) -> nn.Module:
        """The wrapped model in evaluation mode; prepared here where `evaluate` comes before any training."""
        model = self._wrap_model(cast(nn.Module, self.model), training=False, dataloader=batches)
        if len(self.accelerator._models) == 0 and model is self.model:
            prepared = self.accelerator.prepare_model(model, evaluation_mode=True)
            model = prepared if isinstance(prepared, nn.Module) else model
        return model.eval()

    @torch.no_grad()
    def _sample_sums(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """float32 [B, 3]: of each sample the loss at tau, the loss at temperature 1, and the number of targets."""
        batch = dict(self._prepare_inputs(batch))
        labels = batch.pop("labels")
        with self._head_for(model, labels), self.compute_loss_context_manager():
            logits = model(**self._model_inputs(batch, labels)).logits
        targets = target_tokens(labels, encoder_decoder=self.is_encoder_decoder)
        plain = dataclasses.replace(self._losses, temperature=1.0).from_logits(logits, targets)
        tau = self.args.ranking_temperature
        losses = plain if tau == 1.0 else self._losses.from_logits(logits, targets)
        rows = target_positions(labels, encoder_decoder=self.is_encoder_decoder).nonzero()[:, 0]
        sums = torch.zeros(len(labels), 3, device=labels.device)
        return sums.index_add_(0, rows, torch.stack([losses, plain, torch.ones_like(plain)], dim=1))


def _precision_of(args: RecFinetuneConfig, model: nn.Module) -> torch.autocast:
    """The autocast that a run will have: there are kernels that take 16 bits alone."""
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    return torch.autocast(next(model.parameters()).device.type, dtype, enabled=args.bf16 or args.fp16)


def _share_out_again(model: nn.Module) -> None:
    """Lets FSDP2 give back the weights that a forward in evaluation has gathered, and which no backward gives back.

    A checkpoint that is written next would not find them, and weights that are loaded next would be lost.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _freeze_unread_head(model: nn.Module) -> None:
    """The base part of an untied head is not read where all targets are codes: nothing would ever give it a gradient.

    Several processes wait for the gradient of every parameter that is trained.
    """
    head = find_code_head(model)
    embedding = cast(Any, model).get_input_embeddings()
    if head.weight is embedding.weight or not head.weight.requires_grad:
        return
    for parameter in (head.weight, head.bias):
        if parameter is not None:
            parameter.requires_grad_(False)
    logger.info("the head's rows of text tokens stay as they are: no target is text")
