"""Joint training of item tokenizer and recommender, after ETEGRec.

Liu et al., "Generative Recommender with End-to-End Learnable Item Tokenization" (ETEGRec, arXiv 2409.05546). The two
learn in turns. A cycle of C epochs has one of the item tokenizer, with the recommender frozen, then C - 1 of the
recommender, with the item tokenizer frozen:

    L_tokenizer   = L_SQ  + mu L_SIA + lambda L_PSA
    L_recommender = L_REC + mu L_SIA + lambda L_PSA

After each epoch of the item tokenizer all items are encoded anew: samples, trie and catalogue change at once, between
two epochs. The recommender's epochs are those of `RankingTrainer`; so engines, precision, packing, checkpoints and
evaluation are its own. What the paper does with a small T5 works here with any model that `RankingTrainer` takes.

Where the released code and the paper differ, or the paper is silent:

* alignment, see `llmrec.training.alignment`;
* the projections belong to the recommender (as in the code): they are frozen in the item tokenizer's epochs;
* dropout is off while the frozen recommender is read for the item tokenizer: what it says of a sequence is a target,
  and noise in it has no use. (In the code it is off too, by accident of order: validation leaves it so.)
* the schedule of the recommender's learning rate goes over its own epochs, so that it ends at its end (the code lays
  a cosine over all epochs and steps it in the recommender's alone: at C = 2 it ends at half the peak);
* in-batch negatives, and the rule that each different item of a batch counts once, hold for the batch of all processes
  together (in the code for each process alone);
* the item tokenizer's epoch goes through the catalogue and not through all sequences: see `tokenizer_training`.

This module joins the two halves. The loop over both, with data and files, is `llmrec.training.joint_run`.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from llmrec.errors import SettingsError
from llmrec.files import check_format, read_json, write_json
from llmrec.generation.trie import ItemTrie
from llmrec.item_tokenizers.base import QuantizedItems
from llmrec.item_tokenizers.fit_loop import load_optimizer_tensors, optimizer_tensors
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.recommender import Recommender
from llmrec.tasks.base import generator_of
from llmrec.tasks.batch_plan import BatchPlan
from llmrec.tasks.next_item import NextItemSamples
from llmrec.training.alignment import Projections, first_of_each
from llmrec.training.config import RecFinetuneConfig
from llmrec.training.item_states import CoveringSamples, ItemStates, StateTables
from llmrec.training.joint_schedule import JointSchedule
from llmrec.training.running_sums import RunningSums
from llmrec.training.sequence_states import SequenceStates, WatchedForward, watch_states
from llmrec.training.short_rows import short_rows
from llmrec.training.tokenizer_training import JointTokenizer, encoding_figures
from llmrec.training.trainer import RankingTrainer
from llmrec.vocabulary import find_code_head, head_mode

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
JOINT_FOLDER = "joint"
STATE_NAME = "joint_state.json"
TENSORS_NAME = "joint_state.safetensors"
CODES_NAME = "semantic_ids.safetensors"
MEASURED = ("loss", "sia", "psa")  # of each forward of the recommender


class JointTrainer(RankingTrainer):
    """Trains a recommender, and between its epochs the item tokenizer that makes its codes.

    Args:
        recommender: Its model is trained, its codes are replaced. They must be those that `make_unique` gives for the
            item tokenizer as it is.
        args: Settings of the recommender's half.
        item_tokenizer: The item tokenizer's half.
        make_unique: Gives every item codes of its own, always of the same codebook sizes.
        schedule: Who learns when.
        train_dataset: Samples of the next item, made by the recommender's task.
        eval_dataset: The same, for the validation loss.
        item_metrics: See `RankingTrainer`.
        on_cycle: Called on the main process at the end of each cycle with all records so far; see `records`.
        callbacks: The Trainer's.

    Attributes:
        projections: From the model's states to the item tokenizer's spaces; they learn with the recommender, at its
            learning rate, by an optimiser of their own, so that no engine needs to know them.
        records: What was measured in each cycle, JSON values by name; see `llmrec.training.joint_report`.
        tokens_read: Tokens of the samples that were read for the last epoch of the item tokenizer.

    Raises:
        SettingsError: Settings that don't go together.
    """

    def __init__(
        self,
        recommender: Recommender,
        args: RecFinetuneConfig,
        *,
        item_tokenizer: JointTokenizer,
        make_unique: Callable[[QuantizedItems], SemanticIds],
        schedule: JointSchedule,
        train_dataset: NextItemSamples,
        eval_dataset: NextItemSamples | None = None,
        item_metrics: Callable[[nn.Module], dict[str, float]] | None = None,
        on_cycle: Callable[[list[dict[str, Any]]], None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        if args.torch_compile:
            raise SettingsError("torch_compile is on, but joint training reads the model's states; leave it out")
        if args.fp16:
            raise SettingsError(
                "fp16 is on: it scales the loss, and item tokenizer and projections, which stand outside it,"
                " don't know by how much; use bf16"
            )
        if args.dataloader_persistent_workers:
            raise SettingsError(
                "dataloader_persistent_workers is on: such workers would go on with the codes of their start; leave"
                " it out"
            )
        self.recommender = recommender
        self.item_tokenizer = item_tokenizer
        self.make_unique = make_unique
        self.schedule = schedule
        self.on_cycle = on_cycle
        self.records: list[dict[str, Any]] = []
        self._samples = [samples for samples in (train_dataset, eval_dataset) if samples is not None]
        self._watched: WatchedForward | None = None
        self._mask: Tensor | None = None
        self._aligns = False
        self._sums = RunningSums(MEASURED)
        self._since = time.monotonic()
        self.tokens_read = 0
        super().__init__(
            recommender.model,
            args,
            vocabulary=recommender.vocabulary,
            text_tokenizer=recommender.text_tokenizer,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            trie=ItemTrie.from_semantic_ids(recommender.semantic_ids),
            item_metrics=item_metrics,
            callbacks=[*(callbacks or []), _SideOptimizers(self)],
        )
        if not schedule.alternate and self.is_deepspeed_enabled:
            raise SettingsError(
                "alternate is false: item tokenizer and recommender learn in one backward pass, which DeepSpeed steps"
                " on its own; use another engine, or let them alternate"
            )
        self._check_unique(recommender.semantic_ids)
        self.processes = item_tokenizer.processes
        width = find_code_head(cast(nn.Module, self.model)).in_features
        self.projections = Projections(width, item_tokenizer.code_width, item_tokenizer.item_width, seed=args.seed)
        self.projections.to(self.processes.device)
        self._projections_optimizer = torch.optim.AdamW(
            self.projections.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay
        )
        if self.plan is not None:
            item_tokenizer.total_steps = self._tokenizer_steps(self.plan.num_steps)
        self.resume_identity = {
            **self.resume_identity,
            **dataclasses.asdict(schedule),
            "item_tokenizer": type(item_tokenizer.tokenizer).__name__,
        }

    def _tokenizer_steps(self, steps_per_epoch: int) -> int:
        """Steps of the item tokenizer's optimiser in the whole run."""
        args = self.args
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
        if not self.schedule.alternate:
            return steps
        epochs = self.schedule.num_tokenizer_epochs(math.ceil(steps / steps_per_epoch))
        return epochs * self.item_tokenizer.steps_per_epoch

    # Epochs

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's; where a cycle begins, the item tokenizer has an epoch before."""
        if self._has_ended() or not self.schedule.train_tokenizer:
            super()._run_epoch(*args, **kwargs)
            return
        epoch = int(self.state.epoch or 0)
        cycle = self.schedule.cycle_of(epoch)
        if len(self.records) <= cycle:
            self._begin_cycle(cycle)
        self._aligns = self.schedule.aligns_recommender(epoch)
        self.records[-1]["aligned"] = self._aligns
        self._since = time.monotonic()
        super()._run_epoch(*args, **kwargs)
        self._write_means()
        if self.on_cycle is not None and self.is_world_process_zero():
            self.on_cycle(self.records)

    def _begin_cycle(self, cycle: int) -> None:
        record: dict[str, Any] = {"cycle": cycle}
        self.records.append(record)
        self._sums = RunningSums(MEASURED)
        if self.schedule.alternate:
            start = time.monotonic()
            aligns = self.schedule.aligns_tokenizer(cycle)
            states = self._item_states(cycle) if aligns else None
            losses = self.item_tokenizer.train_epoch(states)
            record |= {f"tokenizer_{name}": value for name, value in losses.items()}
            record["tokenizer_seconds"] = round(time.monotonic() - start, 3)
        elif cycle == 0:
            self.item_tokenizer.start_epoch()
            return  # no step was made since the items were encoded
        self.encode_items(record)
        if not self.schedule.alternate:
            self.item_tokenizer.epochs_done += 1
            self.item_tokenizer.start_epoch()

    def encode_items(self, record: dict[str, Any] | None = None) -> None:
        """Encodes all items by the item tokenizer as it is, and lets everything that holds codes have the new ones.

        Args:
            record: Gets what is measured: share of items whose codes changed, collision rate, use of the codes.
        """
        start = time.monotonic()
        quantized = self.item_tokenizer.quantize()
        before, after = self.recommender.semantic_ids.codes, self.make_unique(quantized)
        self._set_codes(after)
        measured = encoding_figures(quantized, before, after.codes)
        measured["encoding_seconds"] = round(time.monotonic() - start, 3)
        if record is not None:
            record |= measured
        self._log(
            "codes of %.1f %% of the items changed; %.2f %% collide, %s of the codes in use",
            *(100 * measured["share_changed"], 100 * measured["collision_rate"]),
            " / ".join(f"{share:.0%}" for share in measured["utilisation"]),
        )

    def _set_codes(self, semantic_ids: SemanticIds) -> None:
        """Samples, trie, catalogue: whatever holds codes has these from now on."""
        self._check_unique(semantic_ids)
        self.recommender.replace_codes(semantic_ids)
        for samples in self._samples:
            samples.task = self.recommender.task
        self.trie = self.recommender.catalogue.trie.to(self.args.device)

    @staticmethod
    def _check_unique(semantic_ids: SemanticIds) -> None:
        if not semantic_ids.is_unique:
            raise SettingsError(
                f"{semantic_ids.num_items - semantic_ids.num_distinct} items share their codes with another one: joint"
                " training finds the item of a target by its codes; choose the policy extra_level or min_cost"
            )

    # What the frozen recommender says, for an epoch of the item tokenizer

    @torch.no_grad()
    def _item_states(self, cycle: int) -> ItemStates:
        """The projected states of one sequence for each item that is a target in training.

        Of several that lead to an item the one with the greatest draw is taken; draws depend on sample, seed and cycle
        alone, so the choice is the same on any number of processes.
        """
        plan = cast(BatchPlan, self.plan)
        draws = generator_of(self.args.seed, cycle, "item states")
        samples = CoveringSamples.drawn(cast(NextItemSamples, plan.samples), len(self.item_tokenizer), draws)
        self.tokens_read = int(samples.lengths().sum())
        size = self.args.eval_batch_size
        rows = BatchPlan(
            samples,
            rows_per_step=size * self.processes.count,
            seed=self.args.seed,
            packing=plan.packing,
            row_length=plan.row_length if plan.packing else None,
            order=plan.order,
        ).rows(cycle)
        model = extract_model_from_parallel(self.model_wrapped, keep_fp32_wrapper=True, keep_torch_compile=False)
        model.eval()
        widths = (self.item_tokenizer.code_width, self.item_tokenizer.item_width)
        tables = StateTables(len(self.item_tokenizer), *widths)
        starts = range(self.processes.index * size, len(rows), self.processes.count * size)
        for first in tqdm(starts, desc="states of sequences", disable=not self.is_world_process_zero() or None):
            of_batch = rows[first : first + size]
            batch = cast(Any, self.data_collator)([[samples.sample(int(n), cycle) for n in row] for row in of_batch])
            states = self._states_of(model, batch)
            with torch.autocast(self.processes.device.type, enabled=False):
                summaries = self.projections.to_codes(states.summaries.float())
                preferences = self.projections.to_items(states.preferences.float())
            numbers = np.concatenate([*of_batch, np.empty(0, dtype=np.int64)])
            found = self._rows_of(states.codes).cpu().numpy()
            tables.offer(found, samples.draws_of_targets(numbers), summaries.cpu(), preferences.cpu())
        return tables.of_all(self.processes)

    def _states_of(self, model: Any, batch: dict[str, Tensor]) -> SequenceStates:
        """One forward without a head: of a decoder that reads another's states its start token alone."""
        inputs = cast(dict[str, Tensor], self._prepare_inputs(batch))
        labels = inputs.pop("labels")
        taken = self._model_inputs(inputs, labels)
        if self.is_encoder_decoder:
            taken["decoder_input_ids"] = taken["decoder_input_ids"][:, :1]

        def no_logits(head: nn.Module, hidden: Tensor) -> Tensor:
            return hidden.new_zeros(1)

        with contextlib.ExitStack() as around:
            around.enter_context(self.compute_loss_context_manager())
            if "position_ids" in inputs:
                around.enter_context(short_rows(self._unwrapped.config.get_text_config(), inputs["input_ids"]))
            around.enter_context(head_mode(model, compute=no_logits))
            watched = around.enter_context(watch_states(model))
            model(**taken)
        if self.is_encoder_decoder and watched.head_input is not None:
            # One state a row: it stands where the row's first target would be read.
            width = labels.shape[1]
            watched.head_input = watched.head_input.expand(-1, width, -1)
        return watched.states(inputs, labels, self.vocabulary)

    def _rows_of(self, codes: Tensor) -> Tensor:
        """Catalogue rows, int64 [n], of codes int64 [n, L] that an item has."""
        trie = cast(ItemTrie, self.trie)
        nodes = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
        for level, of_level in enumerate(codes.unbind(dim=1)):
            nodes, _ = trie.child(level, nodes, of_level)
        return trie.items[nodes].long()  # leaf i is item i of `items`: no two share one

    # The recommender's loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`RankingTrainer`'s, with the alignments added where they are on."""
        if not self._aligns:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self._mask = inputs.get("attention_mask")
        with watch_states(model) as self._watched:
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _batch_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        loss = super()._batch_loss(outputs, labels, num_items_in_batch)
        if not self.schedule.train_tokenizer:
            return loss
        self._sums.add("loss", loss)
        if self.schedule.alternate and not self._aligns:
            return loss
        if not self._aligns:
            with torch.autocast(loss.device.type, enabled=False):
                return loss + self._share(labels, num_items_in_batch) * self._own_losses(labels)
        watched = cast(WatchedForward, self._watched)
        states = watched.states({"attention_mask": self._mask}, labels, self.vocabulary)
        with torch.autocast(loss.device.type, enabled=False):
            return loss + self._share(labels, num_items_in_batch) * self._aligned(states, labels)

    def _share(self, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """The targets of this forward, on all processes, over those of the step: parts of a step add up to a mean."""
        own = (labels >= 0).sum()
        whole = own if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=own.device)
        return self.processes.sum(own) / whole.clamp(min=1)

    def _aligned(self, states: SequenceStates, labels: Tensor) -> Tensor:
        """Mu SIA + lambda PSA of the different items of the batch of all processes: this process's share."""
        projected = torch.cat(
            [
                self.projections.to_codes(states.summaries.float()),
                self.projections.to_items(states.preferences.float()),
            ],
            dim=1,
        )
        projected = self.processes.gather_rows(projected)
        items = self.processes.gather_rows(self._rows_of(states.codes))
        first = first_of_each(items)
        summaries, preferences = projected[first].split(
            [self.item_tokenizer.code_width, self.item_tokenizer.item_width], dim=1
        )
        rows = items[first].cpu().numpy()
        sia, psa = self.item_tokenizer.alignment_losses(rows, summaries, preferences, frozen=self.schedule.alternate)
        self._sums.add("sia", sia)
        self._sums.add("psa", psa)
        weights = self.item_tokenizer.alignment
        aligned = weights.sia_weight * sia + weights.psa_weight * psa
        return aligned if self.schedule.alternate else aligned + self._quantization(rows)

    def _own_losses(self, labels: Tensor) -> Tensor:
        """L_SQ of the batch's different items, where both learn at once and nothing is aligned yet."""
        offsets = torch.from_numpy(self.vocabulary.level_offsets).to(labels.device) + self.vocabulary.first_token_id
        of_labels = labels if self.is_encoder_decoder else labels[:, 1:]
        codes = of_labels[of_labels >= 0].view(-1, self.vocabulary.num_levels) - offsets
        items = self.processes.gather_rows(self._rows_of(codes))
        return self._quantization(items[first_of_each(items)].cpu().numpy())

    def _quantization(self, rows: np.ndarray) -> Tensor:
        draws = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
        return torch.stack(list(self.item_tokenizer.own_losses(rows, draws).values())).sum()

    def step_projections(self) -> None:
        """Called before each step of the recommender's optimiser: the projections step with it."""
        if self._aligns:
            self.processes.sum_gradients(self.projections)
            for parameter in self.projections.parameters():  # the Trainer multiplied the loss for its mean
                parameter.grad = None if parameter.grad is None else parameter.grad / self.processes.count
            if self.args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(self.projections.parameters(), self.args.max_grad_norm)
            for group in self._projections_optimizer.param_groups:
                group["lr"] = self.args.learning_rate * self._schedule_factor()
            self._projections_optimizer.step()
            self._projections_optimizer.zero_grad(set_to_none=True)
        if self.schedule.train_tokenizer and not self.schedule.alternate:
            self.item_tokenizer.step(gradients_of=self.processes.count)

    def _schedule_factor(self) -> float:
        """The learning rate of now over the highest; that of the first group, which may have a rate of its own."""
        highest = cast(torch.optim.Optimizer, self.optimizer).param_groups[0]["initial_lr"]
        return self._get_learning_rate() / highest if highest else 0.0

    # What is measured

    def _write_means(self) -> None:
        """Writes the means of the cycle's epochs of the recommender so far into its record. All processes call it."""
        record = self.records[-1]
        for name, total in self._sums.totals(self.processes).items():
            count = self._sums.count(name)
            if count:
                # the loss of a forward is a part of its step's mean; the alignments are means of their own
                steps = count / self.args.gradient_accumulation_steps if name == "loss" else count
                record[f"recommender_{name}"] = total / steps
        record["epoch"] = round(float(self.state.epoch or 0), 4)
        record["recommender_seconds"] = round(
            record.get("recommender_seconds", 0.0) + time.monotonic() - self._since, 3
        )
        self._since = time.monotonic()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`RankingTrainer`'s; the record of the cycle gets its figures."""
        start = time.monotonic()
        metrics = super().evaluate(*args, **kwargs)
        if self.records:
            self.records[-1] |= {name: value for name, value in metrics.items() if name.startswith("eval_")}
        self._since += time.monotonic() - start
        return metrics

    # Checkpoints: model, item tokenizer, projections, codes and all optimisers are those of one step

    def _write_checkpoint(self, model: nn.Module, trial: Any, checkpoint: Path, partial: Path) -> None:
        super()._write_checkpoint(model, trial, checkpoint, partial)
        if self.records:
            self._write_means()  # at the end of a cycle nobody does it after a run is resumed from here
        sums = self._sums.state(self.processes)
        if not self.args.should_save:
            return
        folder = partial / checkpoint.name / JOINT_FOLDER
        folder.mkdir()
        self.recommender.semantic_ids.save(folder / CODES_NAME)
        tensors = {f"tokenizer.{name}": tensor for name, tensor in self.item_tokenizer.state().items()}
        tensors |= {f"projections.{name}": tensor for name, tensor in self.projections.state_dict().items()}
        tensors |= optimizer_tensors(self._projections_optimizer, "projections_optimizer.")
        save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, folder / TENSORS_NAME)
        content = {
            "format_version": FORMAT_VERSION,
            "tokenizer_epochs": self.item_tokenizer.epochs_done,
            "tokenizer_steps": self.item_tokenizer.steps_done,
            "records": self.records,
            "sums": sums,
        }
        write_json(folder / STATE_NAME, content)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_joint(Path(checkpoint) / JOINT_FOLDER)

    def _load_best_model(self) -> None:
        """The Trainer's; the item tokenizer and the codes are those of the same step."""
        records = self.records
        super()._load_best_model()
        self._load_joint(Path(str(self.state.best_model_checkpoint)) / JOINT_FOLDER)
        self.records = records

    def _load_joint(self, folder: Path) -> None:
        content = read_json(folder / STATE_NAME)
        check_format(content, FORMAT_VERSION, folder / STATE_NAME)
        tensors = load_file(folder / TENSORS_NAME)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.item_tokenizer.load_state(part("tokenizer."))
        self.item_tokenizer.epochs_done = int(content["tokenizer_epochs"])
        self.item_tokenizer.steps_done = int(content["tokenizer_steps"])
        self.projections.load_state_dict(part("projections."))
        load_optimizer_tensors(self._projections_optimizer, part("projections_optimizer."))
        self.records = list(content["records"])
        self._sums.load_state(content["sums"], self.processes)
        item_ids = self.recommender.semantic_ids.item_ids
        self._set_codes(SemanticIds.load(folder / CODES_NAME, item_ids=item_ids))
        if not self.schedule.alternate and self.schedule.train_tokenizer:
            self.item_tokenizer.start_epoch()

    @property
    def best_record(self) -> dict[str, Any] | None:
        """The record of the cycle whose model was the best, where one was chosen."""
        metric, best = self.args.metric_for_best_model, self.state.best_metric
        if metric is None or best is None:
            return None
        name = metric if metric.startswith("eval_") else f"eval_{metric}"
        return next((record for record in self.records if record.get(name) == best), None)


class _SideOptimizers(TrainerCallback):
    """Lets what is trained beside the model step when its optimiser does."""

    def __init__(self, trainer: JointTrainer):
        self._trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.step_projections()
