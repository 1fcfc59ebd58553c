"""The one trainer: transformers' own, with the ranking-guided loss and code rows that survive saving and resuming.

It adds nothing to the loop. The loss is handed over as `compute_loss_func`, so that the Trainer's own bookkeeping
(division by the number of targets of the global batch, the factor for several processes) stays in force;
`compute_loss` is wrapped only to tell the head which positions to read.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from llmrec.adapter import load_adapter_weights, save_adapter
from llmrec.errors import SettingsError
from llmrec.generation.trie import ItemTrie
from llmrec.tasks.collator import SampleCollator
from llmrec.training.config import RecFinetuneConfig
from llmrec.training.losses import ranking_guided_loss, same_level, target_positions, target_tokens
from llmrec.vocabulary import CodeVocabulary, code_row_parameters, has_code_rows, head_mode

logger = logging.getLogger(__name__)


class _LengthGroupedEpochs(LengthGroupedSampler):
    """The Trainer's grouping by length, in an order that depends on seed and epoch alone.

    The Trainer's own sampler goes on drawing from one generator, so a run that is resumed after its first epoch would
    see another order than one that was never stopped. The epoch is asked for, not told: accelerate's loader doesn't
    hand it on when several processes resume within an epoch.

    Args:
        batch_size: Samples of a step, of all processes together.
        lengths: Number of tokens of each sample.
        seed: Of the order.
        epoch: Gives the number of the epoch that begins.
    """

    def __init__(self, batch_size: int, lengths: list[int], *, seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed = seed
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self._seed + self._epoch())
        return super().__iter__()


class RankingTrainer(Trainer):
    """Fine-tunes a causal LM with code rows to write the codes of items.

    Args:
        model: With code rows (`add_code_rows`), plain or with LoRA (`add_lora`).
        args: Settings.
        vocabulary: Where the code tokens are.
        trie: The catalogue's trie; needed by the loss scope `trie`.
        train_dataset: Samples of token IDs and labels (`llmrec.tasks`).
        eval_dataset: The same, for the validation loss.
        text_tokenizer: Saved with each checkpoint; names the padding token.
        callbacks: The Trainer's.

    Raises:
        SettingsError: The model has no code rows; scope `trie` without a trie.
    """

    args: RecFinetuneConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: RecFinetuneConfig,
        *,
        vocabulary: CodeVocabulary,
        text_tokenizer: PreTrainedTokenizerBase,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        trie: ItemTrie | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        if not has_code_rows(model):
            raise SettingsError("the model has no code rows to train: call add_code_rows(model, vocabulary) first")
        if args.loss_scope == "trie" and trie is None:
            raise SettingsError("loss_scope 'trie' needs the trie of the catalogue: pass trie=")
        self.vocabulary = vocabulary
        self.trie = trie
        level_of_code = [level for level, size in enumerate(vocabulary.codebook_sizes) for _ in range(size)]
        self._level_of_code = torch.tensor(level_of_code)
        self._level_offsets = torch.from_numpy(vocabulary.level_offsets)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=text_tokenizer,
            data_collator=SampleCollator(int(text_tokenizer.pad_token_id or 0)),
            compute_loss_func=self._batch_loss,
            callbacks=callbacks,
        )
        self._level_of_code = self._level_of_code.to(self.args.device)
        self._level_offsets = self._level_offsets.to(self.args.device)
        if self.trie is not None:
            self.trie = self.trie.to(self.args.device)

    # The loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, with a head that reads target positions only (and code columns, but for `vocabulary`)."""
        with head_mode(model, positions=target_positions(inputs["labels"]), codes_only=self._codes_only):
            return super().compute_loss(model, inputs, *args, **kwargs)

    @property
    def _codes_only(self) -> bool:
        return self.args.loss_scope != "vocabulary"

    def _batch_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        losses = self._target_losses(outputs.logits, labels, self.args.ranking_temperature)
        return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)

    def _target_losses(self, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Loss of each target, float32 [M]; `logits` are those of the target positions alone."""
        targets, allowed = target_tokens(labels), None
        if self._codes_only:
            targets = targets - self.vocabulary.first_token_id
            allowed = same_level(targets, self._level_of_code)
        if self.args.loss_scope == "trie":
            allowed = self._valid_in_trie(targets)
        return ranking_guided_loss(logits, targets, temperature=temperature, allowed=allowed)

    def _valid_in_trie(self, targets: Tensor) -> Tensor:
        """The columns of the scope `trie`, bool [M, n]: codes that some item has after the target's codes before.

        Every target is a whole item, so the targets are L tokens at a time.
        """
        trie = cast(ItemTrie, self.trie)
        offsets = self._level_offsets
        codes = targets.view(-1, trie.num_levels) - offsets  # [items, L]
        allowed = torch.zeros(*codes.shape, self.vocabulary.num_tokens, dtype=torch.bool, device=targets.device)
        nodes = torch.zeros(len(codes), dtype=torch.int64, device=targets.device)
        for level in range(trie.num_levels):
            children = trie.children(level, nodes)
            # Padding repeats a valid child's code, so it is added up, never written over.
            counts = torch.zeros_like(allowed[:, level], dtype=torch.int8)
            counts.scatter_add_(1, children.codes + offsets[level], children.valid.to(torch.int8))
            allowed[:, level] = counts > 0
            nodes, _ = trie.child(level, nodes, codes[:, level])
        return allowed.flatten(0, 1)

    # The order of samples, and the optimiser

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = getattr(dataset, "lengths", None)
        if self.args.train_sampling_strategy != "group_by_length" or lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _LengthGroupedEpochs(batch, lengths, seed=seed, epoch=lambda: int(self.state.epoch or 0))

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
            `eval_loss` at the training temperature, `eval_perplexity` at temperature 1, both in the training scope.
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
        positions = target_positions(labels)
        with head_mode(model, positions=positions, codes_only=self._codes_only), self.compute_loss_context_manager():
            logits = model(**batch).logits
        plain = self._target_losses(logits, labels, 1.0)
        tau = self.args.ranking_temperature
        losses = plain if tau == 1.0 else self._target_losses(logits, labels, tau)
        rows = positions.nonzero()[:, 0]
        sums = torch.zeros(len(labels), 3, device=labels.device)
        return sums.index_add_(0, rows, torch.stack([losses, plain, torch.ones_like(plain)], dim=1))

    # Saving and loading: the Trainer would leave the rows out, and write the whole embedding instead

    @property
    def _is_adapter(self) -> bool:
        from peft import PeftModel

        return isinstance(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), PeftModel)

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self._is_adapter:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = output_dir if output_dir is not None else self.args.output_dir
        os.makedirs(folder, exist_ok=True)
        save_adapter(self._unwrapped, folder, state_dict=state_dict)
        cast(PreTrainedTokenizerBase, self.processing_class).save_pretrained(folder)

    @property
    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_adapter and not self._is_sharded:
            logger.info("loading LoRA and code rows from %s", resume_from_checkpoint)
            load_adapter_weights(self._unwrapped, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._is_adapter and not self._is_sharded:
            best = self.state.best_model_checkpoint
            logger.info("loading the best model, of %s (%s)", best, self.state.best_metric)
            load_adapter_weights(self._unwrapped, str(best))
        else:
            super()._load_best_model()
