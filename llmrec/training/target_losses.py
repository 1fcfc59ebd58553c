"""The ranking-guided loss of a batch: which targets are normalised over what.

Codes are normalised over the loss scope; text over the whole vocabulary in every scope, for it is not decoded under
the trie. The losses are made in one of two places:

* from logits, at target positions, [M, V] or only the code columns [M, n];
* inside the model's head, from hidden states. Of a code target only the columns of its own level are computed, and
  logits over the whole vocabulary are made for some targets at a time, with their gradient at once: they are never
  kept. This is what training uses, wherever the model hands on what its head wrote (`hands_on_head_output`).

This module knows heads, targets and the trie. It knows nothing of trainers and batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.generation.trie import ItemTrie
from llmrec.training.losses import code_losses, ranking_guided_loss
from llmrec.vocabulary import CodeHead, CodeVocabulary, find_code_head, head_mode

# Logits over the vocabulary that are held at a time: 64 MB of float32.
_ELEMENTS = 2**24


@dataclass(frozen=True)
class TargetLosses:
    """Losses of target tokens under one scope and temperature.

    Attributes:
        vocabulary: Where the code tokens are.
        scope: "vocabulary", "codes" or "trie".
        trie: The items, on the device of the targets; needed by the scope "trie".
        temperature: tau of the ranking-guided loss.
    """

    vocabulary: CodeVocabulary
    scope: str
    trie: ItemTrie | None
    temperature: float

    def is_text(self, targets: Tensor) -> Tensor:
        """Which target tokens are no codes: bool [M]."""
        first = self.vocabulary.first_token_id
        return (targets < first) | (targets >= first + self.vocabulary.num_tokens)

    def from_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each target: float32 [M].

        Args:
            logits: [M, V]; or [M, n], the code columns, if the scope isn't "vocabulary" and no target is text.
            targets: int64 [M], token IDs; codes L at a time, a whole item.
        """
        if self.scope == "vocabulary":
            return ranking_guided_loss(logits, targets, temperature=self.temperature)
        first, num_codes = self.vocabulary.first_token_id, self.vocabulary.num_tokens
        if logits.shape[1] == num_codes:
            return self._of_codes(logits, targets)
        is_text = self.is_text(targets)
        of_codes = self._of_codes(logits[~is_text, first : first + num_codes], targets[~is_text])
        of_text = ranking_guided_loss(logits[is_text], targets[is_text], temperature=self.temperature)
        losses = torch.zeros_like(targets, dtype=torch.float32)
        return losses.masked_scatter(is_text, of_text).masked_scatter(~is_text, of_codes)

    def sum_in_head(self, targets: Tensor, *, only_codes: bool) -> Callable[[CodeHead, Tensor], Tensor]:
        """What `head_mode` computes in place of logits: the sum of the losses, float32 [1], of hidden states [M, D].

        Args:
            targets: int64 [M], token IDs; codes L at a time, a whole item.
            only_codes: Whether it is known that no target is text; else it is looked up.
        """

        @torch.compiler.disable
        def compute(head: CodeHead, hidden: Tensor) -> Tensor:
            if self.scope == "vocabulary":
                return _vocabulary_sum(head, hidden, targets, self.temperature)
            if only_codes:
                return self._sum_of_codes(head, hidden, targets)
            is_text = self.is_text(targets)
            of_codes = self._sum_of_codes(head, hidden[~is_text], targets[~is_text])
            return of_codes + _vocabulary_sum(head, hidden[is_text], targets[is_text], self.temperature)

        return compute

    def _of_codes(self, logits: Tensor, targets: Tensor) -> Tensor:
        by_item = logits.view(-1, self.vocabulary.num_levels, logits.shape[1])
        columns = by_item.split(self.vocabulary.codebook_sizes, dim=2)
        of_level = [of_all[:, level] for level, of_all in enumerate(columns)]
        return self._code_losses(of_level, targets).flatten()

    def _sum_of_codes(self, head: CodeHead, hidden: Tensor, targets: Tensor) -> Tensor:
        by_item = hidden.view(-1, self.vocabulary.num_levels, hidden.shape[1])
        rows = head.new_rows.to(hidden.dtype).split(self.vocabulary.codebook_sizes)
        of_level = [F.linear(by_item[:, level], of_codes) for level, of_codes in enumerate(rows)]
        return self._code_losses(of_level, targets).sum().view(1)

    def _code_losses(self, of_level: list[Tensor], targets: Tensor) -> Tensor:
        offsets = torch.from_numpy(self.vocabulary.level_offsets).to(targets.device)
        codes = targets.view(-1, self.vocabulary.num_levels) - (self.vocabulary.first_token_id + offsets)
        trie = self.trie if self.scope == "trie" else None
        return code_losses(of_level, codes, temperature=self.temperature, trie=trie)


def hands_on_head_output(model: nn.Module) -> bool:
    """Whether a model returns exactly what its head wrote: no softcap, no scale after it.

    Tried on one token, but where the weights are spread over processes already (ZeRO-3 while loading): there, such
    settings of the model are looked for.
    """
    config: Any = model.config
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
        return all(getattr(config.get_text_config(), name, None) in (None, 1.0) for name in names)
    token = torch.zeros(1, 1, dtype=torch.int64, device=find_code_head(model).new_rows.device)
    inputs = {"input_ids": token, "use_cache": False}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = token
    marker = torch.tensor([17.25], device=token.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), head_mode(model, compute=lambda head, hidden: marker):
            found = model(**inputs).logits
    finally:
        model.train(was_training)
    return found.shape == marker.shape and bool((found == marker).all())


def _vocabulary_sum(head: CodeHead, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Sum of the losses over the whole vocabulary, float32 [1], of hidden states [M, D]."""
    total: Tensor = _VocabularySum.apply(
        hidden, head.weight, head.bias, head.new_rows, targets, head.first_token_id, temperature
    )
    return total


class _VocabularySum(torch.autograd.Function):
    """Sum over targets of -log softmax(logits / tau)[target], a part of the targets at a time.

    The gradient of a sum is known but for one factor, so it is made while the logits are there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        targets: Tensor,
        first: int,
        temperature: float,
    ) -> Tensor:
        end = first + len(rows)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        bias_grad = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        rows_grad = torch.zeros_like(rows) if ctx.needs_input_grad[3] else None
        total = torch.zeros(1, dtype=torch.float32, device=hidden.device)
        size = max(1, _ELEMENTS // (len(weight) + len(rows)))
        for start in range(0, len(hidden), size):
            part, of_part = hidden[start : start + size], targets[start : start + size]
            base = F.linear(part, weight, bias).float()
            codes = F.linear(part, rows.to(part.dtype)).float()
            base[:, first:end] = -torch.inf  # base rows that the codes stand in the place of (Qwen) are no tokens
            for logits in (base, codes):
                logits.div_(temperature)
            normaliser = torch.logaddexp(base.logsumexp(dim=1), codes.logsumexp(dim=1))
            is_code = (of_part >= first) & (of_part < end)
            of_codes = codes.gather(1, (of_part - first).clamp(0, len(rows) - 1)[:, None])[:, 0]
            of_base = base.gather(1, of_part.clamp(0, len(weight) - 1)[:, None])[:, 0]
            total += (normaliser - torch.where(is_code, of_codes, of_base)).sum()
            if hidden_grad is None:
                continue
            # dL/dlogit(v) = (P_tau(v) - [v = target]) / tau
            for logits in (base, codes):
                logits.sub_(normaliser[:, None]).exp_()
            _subtract_one(codes, of_part - first, is_code)
            _subtract_one(base, of_part, ~is_code)
            base_low, codes_low = ((logits / temperature).to(part.dtype) for logits in (base, codes))
            hidden_grad[start : start + size] = base_low @ weight.to(part.dtype) + codes_low @ rows.to(part.dtype)
            if weight_grad is not None:
                weight_grad += base_low.T @ part
            if bias_grad is not None:
                bias_grad += base_low.sum(dim=0)
            if rows_grad is not None:
                rows_grad += codes_low.T @ part
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad, rows_grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if saved is None else saved * gradients[0].to(saved.dtype) for saved in ctx.saved_tensors]
        return (*found, None, None, None)


def _subtract_one(probabilities: Tensor, columns: Tensor, rows: Tensor) -> None:
    """Takes one from each row's column, in the rows marked."""
    columns = columns.clamp(0, probabilities.shape[1] - 1)[:, None]
    probabilities.scatter_add_(1, columns, -rows.to(probabilities.dtype)[:, None])
