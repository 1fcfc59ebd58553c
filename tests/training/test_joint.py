"""Joint training in one process: who learns when and from what, codes that change under it, kill and resume."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llmrec.data.splits import leave_one_out
from llmrec.errors import LlmrecError, MissingPartError, SettingsError
from llmrec.generation.trie import ItemTrie
from llmrec.item_tokenizers.quantizers import residual_codes
from llmrec.training.alignment import preference_semantic_losses, sequence_item_losses
from llmrec.training.arguments import ModelArguments
from llmrec.training.item_states import covering_samples
from llmrec.training.joint import JOINT_FOLDER
from llmrec.training.joint_arguments import JointArguments
from llmrec.training.joint_run import _train_final
from llmrec.training.joint_schedule import JointSchedule
from llmrec.training.preparation import ItemCodes
from llmrec.training.sequence_states import watch_states
from llmrec.training.tokenizer_training import JointTokenizer
from llmrec.training.trainer import RankingTrainer
from llmrec.vocabulary import find_code_head

PACKED = {"packing": True, "row_length": 60, "per_device_train_batch_size": 3}
MODELS = {
    "t5": {"family": "t5"},
    "llama-packed-lora": {"lora": True, **PACKED},
    "llama-packed": PACKED,
    "llama-padded": {},
    "llama-prefix": {"form": "prefix"},
}
models = pytest.mark.parametrize("model", MODELS)
HALVES = ("model", "projections", "encoder", "decoder", "codebooks")


def make(factories, folder, model="t5", **settings):
    return factories.make_joint_trainer(folder, **{**MODELS[model], **settings})


def tensors_of(trainer):
    """Copies of everything that learns, by part and name."""
    module = trainer.item_tokenizer.module
    parts = {
        "model": trainer.model,
        "projections": trainer.projections,
        "encoder": module.encoder,
        "decoder": module.decoder,
        "codebooks": module.quantizer,
    }
    return {
        part: {name: tensor.detach().clone() for name, tensor in of.state_dict().items()} for part, of in parts.items()
    }


def changed(before, after):
    """The parts of which any tensor differs."""
    return {
        part
        for part in before
        if any(not torch.equal(tensor, after[part][name]) for name, tensor in before[part].items())
    }


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def samples_of(trainer):
    samples = trainer.plan.samples
    return [samples.sample(number) for number in range(len(samples))]


@torch.no_grad()
def state_alone(trainer, prompt):
    """Summary and preference of one prompt by itself: [W] each, by the model's own parts."""
    model = trainer.recommender.model.eval()
    if not trainer.is_encoder_decoder:
        state = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0, -1]
        return state, state
    encoded = model.encoder(input_ids=torch.tensor([prompt])).last_hidden_state
    start = torch.tensor([[model.config.decoder_start_token_id]])
    decoded = model.decoder(input_ids=start, encoder_hidden_states=encoded).last_hidden_state[0, 0]
    # A tied T5 scales what its head reads.
    return encoded[0].mean(dim=0), decoded * (model.config.d_model**-0.5 if model.config.scale_decoder_outputs else 1)


def prompts_of(trainer, sample):
    """The prompt and the codes of each target of a sample."""
    levels, inputs = trainer.vocabulary.num_levels, sample["input_ids"]
    learned = [token for token in sample["labels"] if token >= 0]
    targets = [learned[start : start + levels] for start in range(0, len(learned), levels)]
    if trainer.is_encoder_decoder:
        return [(inputs, target) for target in targets]
    first = len(inputs) - len(learned)
    return [(inputs[: first + number * levels], target) for number, target in enumerate(targets)]


def rows_in_batch_order(trainer):
    """The samples of the first batch, in the order in which they stand in it."""
    rows = trainer.plan.rows(0)[: trainer.args.train_batch_size]
    return [trainer.plan.samples.sample(int(number)) for row in rows for number in row]


def item_of(trainer, tokens):
    """The catalogue row of code tokens, by going through the catalogue."""
    return trainer.recommender.task.item_tokens.tolist().index(tokens)


# States


@models
def test_states_are_those_of_each_prompt_alone(factories, tmp_path, model):
    trainer = make(factories, tmp_path, model)
    batch = first_batch(trainer)
    expected = [pair for sample in rows_in_batch_order(trainer) for pair in prompts_of(trainer, sample)]
    assert len(expected) > 5
    alone = [state_alone(trainer, prompt) for prompt, _ in expected]
    trainer.model.eval()
    labels = batch["labels"]
    with torch.no_grad(), watch_states(trainer.model) as watched:
        trainer.model(**trainer._model_inputs({k: v for k, v in batch.items() if k != "labels"}, labels))
        of_forward = watched.states(batch, labels, trainer.vocabulary)
        without_head = trainer._states_of(trainer.model, batch)
    codes = [np.array(tokens) - trainer.vocabulary.token_ids(np.zeros((1, 3), int))[0] for _, tokens in expected]
    for found in (of_forward, without_head):
        assert found.codes.tolist() == [code.tolist() for code in codes]
        torch.testing.assert_close(found.summaries, torch.stack([state for state, _ in alone]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.preferences, torch.stack([state for _, state in alone]), rtol=1e-4, atol=1e-5)


@models
def test_preference_is_what_the_first_code_is_written_from(factories, tmp_path, model):
    trainer = make(factories, tmp_path, model)
    head, vocabulary = find_code_head(trainer.model), trainer.vocabulary
    for sample in samples_of(trainer)[:3]:
        for prompt, _ in prompts_of(trainer, sample):
            _, preference = state_alone(trainer, prompt)
            taken = {"input_ids": torch.tensor([prompt])}
            if trainer.is_encoder_decoder:
                taken["decoder_input_ids"] = torch.tensor([[trainer.model.config.decoder_start_token_id]])
            with torch.no_grad():
                logits = trainer.model(**taken).logits[0, -1, vocabulary.first_token_id :][: vocabulary.num_tokens]
                torch.testing.assert_close(head.new_rows @ preference, logits, rtol=1e-4, atol=1e-5)


def test_hooks_are_gone_after_the_block_even_after_an_error(factories, tmp_path):
    trainer = make(factories, tmp_path)
    head, encoder = find_code_head(trainer.model), trainer.model.encoder

    def fail():
        with watch_states(trainer.model):
            assert head._forward_pre_hooks
            assert encoder._forward_hooks
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not head._forward_pre_hooks
    assert not encoder._forward_hooks


def test_states_without_a_forward_are_an_error(factories, tmp_path):
    trainer = make(factories, tmp_path)
    batch = first_batch(trainer)
    with watch_states(trainer.model) as watched, pytest.raises(RuntimeError, match="head wasn't called"):
        watched.states(batch, batch["labels"], trainer.vocabulary)


# Who learns when


@pytest.mark.parametrize(
    ("schedule", "epochs"),
    [
        # of each epoch of the recommender: cycle, epochs of both kinds before, aligned, tokenizer's epoch aligned
        (JointSchedule(2, 10), {0: (0, 1, False, False), 3: (3, 7, False, False), 4: (4, 9, False, False),
                                5: (5, 11, True, True), 6: (6, 13, True, True)}),
        (JointSchedule(2, 5), {1: (1, 3, False, False), 2: (2, 5, True, False), 3: (3, 7, True, True)}),
        (JointSchedule(4, 5), {0: (0, 1, False, False), 2: (0, 3, False, False), 3: (1, 5, True, False),
                               5: (1, 7, True, False), 6: (2, 9, True, True)}),
        (JointSchedule(4, 4), {2: (0, 3, False, False), 3: (1, 5, True, True)}),
        (JointSchedule(2, 0), {0: (0, 1, True, True), 9: (9, 19, True, True)}),
        (JointSchedule(2, 3, alternate=False), {0: (0, 0, False, False), 2: (2, 2, False, False),
                                                3: (3, 3, True, False)}),
        (JointSchedule(2, 0, train_tokenizer=False), {0: (0, 0, False, False), 20: (20, 20, False, False)}),
    ],
)  # fmt: skip
def test_schedule(schedule, epochs):
    for epoch, expected in epochs.items():
        cycle = schedule.cycle_of(epoch)
        found = (cycle, schedule.epochs_before(epoch), schedule.aligns_recommender(epoch))
        assert (*found, schedule.aligns_tokenizer(cycle)) == expected


def test_schedule_equals_a_walk_through_the_epochs():
    for cycle in (2, 3, 4):
        for warmup in (0, 3, 4, 10):
            schedule = JointSchedule(cycle, warmup)
            kinds = ["tokenizer", *["recommender"] * (cycle - 1)] * 6
            counts = {"tokenizer": 0, "recommender": 0}
            for number, kind in enumerate(kinds):
                if kind == "tokenizer":
                    assert schedule.aligns_tokenizer(counts[kind]) == (number >= warmup)
                else:
                    assert schedule.cycle_of(counts[kind]) == number // cycle
                    assert schedule.aligns_recommender(counts[kind]) == (number >= warmup)
                counts[kind] += 1
                if kind == "recommender":
                    assert schedule.num_tokenizer_epochs(counts[kind]) == counts["tokenizer"]
    assert JointSchedule(2, alternate=False).num_tokenizer_epochs(5) == 0
    assert JointSchedule(2, train_tokenizer=False).num_tokenizer_epochs(5) == 0


def watch_halves(monkeypatch, trainer):
    """Trains; returns (half, what changed in it) in the order of the epochs."""
    found = []

    def watched(half, function):
        def call(*args, **kwargs):
            before = tensors_of(trainer)
            result = function(*args, **kwargs)
            found.append((half, changed(before, tensors_of(trainer))))
            return result

        return call

    of_tokenizer = watched("tokenizer", type(trainer)._begin_cycle.__get__(trainer))
    monkeypatch.setattr(trainer, "_begin_cycle", of_tokenizer)
    run_epoch = RankingTrainer._run_epoch
    monkeypatch.setattr(
        RankingTrainer,
        "_run_epoch",
        lambda self, *args, **kwargs: watched("recommender", run_epoch)(self, *args, **kwargs),
    )
    trainer.train()
    return found


@pytest.mark.parametrize("model", ["t5", "llama-packed-lora", "llama-padded"])
def test_each_half_learns_alone(factories, tmp_path, monkeypatch, model):
    """Four cycles; the epochs 0 to 4 of both kinds are not aligned."""
    trainer = make(factories, tmp_path, model, num_train_epochs=4, schedule={"warmup_epochs": 5})
    found = watch_halves(monkeypatch, trainer)
    tokenizer, recommender = {"encoder", "decoder", "codebooks"}, {"model", "projections"}
    assert found == [
        ("tokenizer", tokenizer),
        ("recommender", {"model"}),
        ("tokenizer", tokenizer),
        ("recommender", {"model"}),
        ("tokenizer", tokenizer),
        ("recommender", recommender),
        ("tokenizer", tokenizer),
        ("recommender", recommender),
    ]
    assert [record["aligned"] for record in trainer.records] == [False, False, True, True]
    assert ["tokenizer_sia" in record for record in trainer.records] == [False, False, False, True]
    assert ["recommender_sia" in record for record in trainer.records] == [False, False, True, True]


def test_longer_cycles(factories, tmp_path, monkeypatch):
    trainer = make(factories, tmp_path, num_train_epochs=5, schedule={"cycle": 4})
    halves = [half for half, _ in watch_halves(monkeypatch, trainer)]
    assert halves == ["tokenizer", *["recommender"] * 3, "tokenizer", *["recommender"] * 2]
    assert [record["epoch"] for record in trainer.records] == [3, 5]
    assert trainer.item_tokenizer.epochs_done == 2


@pytest.mark.parametrize("model", ["t5", "llama-packed-lora", "llama-padded"])
@pytest.mark.parametrize(("loss", "moved"), [("sia", "to_codes"), ("psa", "to_items")])
def test_each_loss_moves_its_own_projection(factories, tmp_path, model, loss, moved):
    weights = {"sia_weight": 0.0, "psa_weight": 0.0, f"{loss}_weight": 0.5}
    trainer = make(factories, tmp_path, model, alignment=weights, num_train_epochs=1)
    before = tensors_of(trainer)["projections"]
    trainer.train()
    after = tensors_of(trainer)["projections"]
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"{moved}.weight",
        f"{moved}.bias",
    }


def gradients(loss, trainer):
    """What a loss gives to each part: the largest gradient, 0 where there is none."""
    module = trainer.item_tokenizer.module
    parts = {
        "projections": trainer.projections,
        "encoder": module.encoder,
        "decoder": module.decoder,
        "codebooks": module.quantizer,
    }
    found = {}
    for name, part in parts.items():
        of_part = torch.autograd.grad(loss, list(part.parameters()), retain_graph=True, allow_unused=True)
        found[name] = max(0.0 if gradient is None else gradient.abs().max().item() for gradient in of_part)
    return found


@pytest.mark.parametrize("recursion", ["codebook", "straight_through"])
def test_what_each_loss_of_the_tokenizers_epoch_reaches(factories, tmp_path, recursion):
    for residual_update in ("straight_through", "codebook"):
        trainer = make(
            factories,
            tmp_path,
            alignment={"recursion": recursion},
            tokenizer_config={"residual_update": residual_update},
        )
        half = trainer.item_tokenizer
        half.start_epoch()
        rows, draws = np.array([3, 0, 7, 5]), torch.Generator().manual_seed(0)
        summaries, preferences = torch.randn(4, 8), torch.randn(4, 12)
        own = torch.stack(list(half.own_losses(rows, draws).values())).sum()
        sia, psa = half.alignment_losses(rows, summaries, preferences, frozen=False)
        reached = {
            name: {part for part, size in gradients(loss, trainer).items() if size > 1e-6}
            for name, loss in (("sq", own), ("sia", sia), ("psa", psa))
        }
        assert reached == {
            "sq": {"encoder", "decoder", "codebooks"},
            "sia": {"encoder", "codebooks"},
            "psa": {"encoder", "decoder"},
        }


@pytest.mark.parametrize("recursion", ["codebook", "straight_through"])
def test_every_level_has_a_say_in_the_tokenizers_alignment(factories, tmp_path, recursion):
    """Each codebook learns, also straight through, where later levels reach nothing but their own codebook."""
    half = make(factories, tmp_path, alignment={"recursion": recursion}).item_tokenizer
    sia, _ = half.alignment_losses(np.arange(6), torch.randn(6, 8), torch.randn(6, 12), frozen=False)
    of_levels = torch.autograd.grad(sia, list(half.module.quantizer.codebooks))
    assert [bool(gradient.any()) for gradient in of_levels] == [True, True]


def test_a_frozen_item_tokenizer_gets_no_gradient(factories, tmp_path):
    half = make(factories, tmp_path).item_tokenizer
    summaries, preferences = torch.randn(4, 8, requires_grad=True), torch.randn(4, 12, requires_grad=True)
    sia, psa = half.alignment_losses(np.array([3, 0, 7, 5]), summaries, preferences, frozen=True)
    (sia + psa).backward()
    assert all(parameter.grad is None for parameter in half.module.parameters())
    assert summaries.grad.any()
    assert preferences.grad.any()


def loss_of(trainer, batch, *, aligns=True, targets=None):
    """The loss of the recommender's epoch of one batch, with its graph."""
    trainer.model.eval()
    trainer._aligns = aligns
    trainer._current_gradient_accumulation_steps = 1
    if targets is None:
        targets = (batch["labels"] >= 0).sum()
    return trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=targets)


def model_gradients(trainer, loss):
    named = [(name, tensor) for name, tensor in trainer.model.named_parameters() if tensor.requires_grad]
    found = torch.autograd.grad(loss, [tensor for _, tensor in named], allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(named, found, strict=True)
    }


@models
def test_the_recommenders_loss_gives_the_item_tokenizer_nothing(factories, tmp_path, model):
    trainer = make(factories, tmp_path, model)
    found = gradients(loss_of(trainer, first_batch(trainer)), trainer)
    assert found.pop("projections") > 1e-4
    assert found == {"encoder": 0.0, "decoder": 0.0, "codebooks": 0.0}


@pytest.mark.parametrize(("loss", "reaches_decoder"), [("sia", False), ("psa", True)])
def test_what_each_alignment_reaches_in_an_encoder_decoder(factories, tmp_path, loss, reaches_decoder):
    weights = {"sia_weight": 0.0, "psa_weight": 0.0, f"{loss}_weight": 1.0}
    trainer = make(factories, tmp_path, alignment=weights)
    batch = first_batch(trainer)
    plain = model_gradients(trainer, loss_of(trainer, batch, aligns=False))
    aligned = model_gradients(trainer, loss_of(trainer, batch))
    moved = {name for name in plain if (plain[name] - aligned[name]).abs().max() > 1e-4}
    of_decoder = {name for name in plain if name.startswith("decoder.")}
    of_encoder = {name for name in plain if name.startswith("encoder.block")}
    assert of_encoder
    assert of_encoder <= moved
    if reaches_decoder:
        # one token is read: nothing is weighed in self-attention, so its queries, keys and biases can't learn
        idle = ("SelfAttention.q.", "SelfAttention.k.", "relative_attention_bias")
        assert moved & of_decoder == {name for name in of_decoder if not any(part in name for part in idle)}
    else:
        assert not moved & of_decoder


# A step


def aligned_by_hand(trainer, pairs, item_tokenizer):
    """Mu SIA + lambda PSA of (prompt, tokens): every different item once, with its first state."""
    first = {}
    for prompt, tokens in pairs:
        first.setdefault(item_of(trainer, tokens), prompt)
    states = [state_alone(trainer, prompt) for prompt in first.values()]
    summaries = trainer.projections.to_codes(torch.stack([summary for summary, _ in states]))
    preferences = trainer.projections.to_items(torch.stack([preference for _, preference in states]))
    vectors = torch.from_numpy(item_tokenizer.embeddings["text"].vectors[list(first)])
    with torch.no_grad():
        output = item_tokenizer.module.eval()(vectors)
    sia = sequence_item_losses(summaries, output.latents, list(item_tokenizer.module.quantizer.codebooks)).mean()
    psa = preference_semantic_losses(preferences, output.reconstruction, temperature=0.5).mean()
    return len(first), sia.item(), psa.item()


@models
def test_an_aligned_step_equals_one_by_hand(factories, tmp_path, model):
    trainer = make(factories, tmp_path, model)
    batch = first_batch(trainer)
    pairs = [pair for sample in rows_in_batch_order(trainer) for pair in prompts_of(trainer, sample)]
    losses = []
    for prompt, target in pairs:
        for level, token in enumerate(target):
            if trainer.is_encoder_decoder:
                before = torch.tensor([[trainer.model.config.decoder_start_token_id, *target[:level]]])
                taken = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": before}
            else:
                taken = {"input_ids": torch.tensor([[*prompt, *target[:level]]])}
            with torch.no_grad():
                logits = trainer.model.eval()(**taken).logits[0, -1]
            losses.append(F.cross_entropy(logits, torch.tensor(token)).item())
    different, sia, psa = aligned_by_hand(trainer, pairs, trainer.item_tokenizer)
    assert 2 < different < len(pairs)
    expected = np.mean(losses) + 0.5 * sia + 0.3 * psa
    assert loss_of(trainer, batch).item() == pytest.approx(expected, rel=1e-4)
    assert loss_of(trainer, batch, aligns=False).item() == pytest.approx(np.mean(losses), rel=1e-4)
    counted = {name: value.item() for name, value in trainer._sums.pending if name != "loss"}
    assert counted == pytest.approx({"sia": sia, "psa": psa}, rel=1e-4)


def test_alignments_of_a_part_of_a_step_count_by_its_share_of_targets(factories, tmp_path):
    trainer = make(factories, tmp_path, "llama-padded", per_device_train_batch_size=3, gradient_accumulation_steps=2)
    batches = list(trainer.get_train_dataloader())[:2]
    counts = [(batch["labels"] >= 0).sum() for batch in batches]
    assert counts[0] != counts[1]
    for batch, count in zip(batches, counts, strict=True):
        of_part = (loss_of(trainer, batch) - loss_of(trainer, batch, aligns=False)).item()
        of_step = loss_of(trainer, batch, targets=sum(counts)) - loss_of(
            trainer, batch, aligns=False, targets=sum(counts)
        )
        assert of_part > 0.01
        assert of_step.item() == pytest.approx(of_part * (count / sum(counts)).item(), rel=1e-3)


@pytest.mark.parametrize("model", ["t5", "llama-packed-lora"])
def test_an_accumulated_step(factories, tmp_path, model):
    """The weights after one step of two forwards, and of the projections' AdamW, by the gradients of the two."""
    settings = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "alignment": {"sia_weight": 2.0, "psa_weight": 1.0},
    }
    trainer, other = (make(factories, tmp_path / name, model, **settings) for name in ("trained", "by_hand"))
    trainer.train()
    other._begin_cycle(0)  # the item tokenizer's epoch; the codes are those of the step from here on
    assert np.array_equal(other.recommender.semantic_ids.codes, trainer.recommender.semantic_ids.codes)
    batches = list(other.get_train_dataloader())[:2]
    total = sum((batch["labels"] >= 0).sum() for batch in batches)
    loss = sum(loss_of(other, batch, targets=total) for batch in batches)
    of_projections = torch.autograd.grad(loss, list(other.projections.parameters()), retain_graph=True)
    of_model = model_gradients(other, loss)
    found = tensors_of(trainer)
    for name, parameter in other.model.named_parameters():
        if name in of_model:
            expected = parameter.detach() - 0.01 * of_model[name]
            torch.testing.assert_close(found["model"][name], expected, rtol=1e-4, atol=1e-6)
    for (name, parameter), gradient in zip(other.projections.named_parameters(), of_projections, strict=True):
        clear = gradient.abs() > 1e-4
        expected = parameter.detach() - 0.01 * gradient.sign()  # AdamW's first step
        torch.testing.assert_close(found["projections"][name][clear], expected[clear], rtol=1e-3, atol=1e-5)
        assert clear.any()
    plain = sum(loss_of(other, batch, aligns=False, targets=total) for batch in batches)
    assert trainer.records[0]["recommender_loss"] == pytest.approx(plain.item(), rel=1e-4)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_batch_without_targets_gives_nothing(factories, tmp_path):
    """As a process has one where a step has fewer rows than processes."""
    trainer = make(factories, tmp_path)
    batch = trainer.data_collator([[], []])
    loss = loss_of(trainer, batch, targets=torch.tensor(6))
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in model_gradients(trainer, loss).values())


# States of items, for the item tokenizer's epoch


def test_covering_samples_cover_all_with_few():
    draws = np.random.default_rng(0)
    counts = draws.integers(0, 12, 60)
    samples = np.repeat(np.arange(60), counts)
    items = draws.integers(0, 100, len(samples))
    found = covering_samples(samples, items, 60, 100, np.random.default_rng(1))
    again = covering_samples(samples, items, 60, 100, np.random.default_rng(1))
    other = covering_samples(samples, items, 60, 100, np.random.default_rng(2))
    assert np.array_equal(found, again)
    assert not np.array_equal(found, other)
    assert (np.diff(found) > 0).all()
    assert found.dtype == np.int64
    for chosen in (found, other):
        assert set(items[np.isin(samples, chosen)]) == set(items)
        assert len(chosen) < 0.8 * (counts > 0).sum()


def test_covering_samples_draw_one_an_item_where_each_has_one_target():
    items = np.array([0, 1, 1, 2, 2, 2, 4, 4])
    drawn = set()
    for seed in range(40):
        found = covering_samples(np.arange(8), items, 8, 6, np.random.default_rng(seed))
        assert sorted(items[found]) == [0, 1, 2, 4]
        drawn |= set(found.tolist())
    assert drawn == set(range(8))  # every one has a chance


def test_covering_samples_of_nothing():
    nothing = np.empty(0, dtype=np.int64)
    assert covering_samples(nothing, nothing, 3, 5, np.random.default_rng(0)).tolist() == []
    assert covering_samples(nothing, nothing, 0, 5, np.random.default_rng(0)).tolist() == []


@models
def test_states_of_items_are_those_of_one_of_their_sequences(factories, tmp_path, model):
    trainer = make(factories, tmp_path, model)
    candidates = {}
    for sample in samples_of(trainer):
        for prompt, tokens in prompts_of(trainer, sample):
            candidates.setdefault(item_of(trainer, tokens), []).append(prompt)
    found = trainer._item_states(0)
    assert sorted(candidates) == torch.nonzero(found.known).flatten().tolist()
    for item, prompts in candidates.items():
        states = [state_alone(trainer, prompt) for prompt in prompts]
        with torch.no_grad():
            projected = [
                torch.cat([trainer.projections.to_codes(summary), trainer.projections.to_items(preference)])
                for summary, preference in states
            ]
        of_item = torch.cat([found.summaries[item], found.preferences[item]])
        distances = [(of_item - candidate).abs().max().item() for candidate in projected]
        assert min(distances) < 1e-4
    again, later = trainer._item_states(0), trainer._item_states(1)
    assert torch.equal(found.summaries, again.summaries)
    assert not torch.allclose(found.summaries, later.summaries, atol=1e-3)  # drawn anew each cycle


def test_items_without_a_sequence_learn_by_their_own_loss_alone(factories, tmp_path):
    """Of items that are no target there are no states; nothing is aligned where there are none at all."""
    from llmrec.tasks.next_item import training_samples

    trainer = make(factories, tmp_path, "llama-padded")
    task, histories = trainer.recommender.task, factories.make_dataset((3, 2, 2), seed=5)
    trainer.plan.samples = training_samples(task, histories)
    found = trainer._item_states(0)
    _, targets = trainer.plan.samples.targets()
    assert 0 < found.known.sum() == len(set(targets.tolist())) < 12
    assert not found.summaries[~found.known].any()
    assert not found.preferences[~found.known].any()
    losses = trainer.item_tokenizer.train_epoch(found)
    assert set(losses) == {"reconstruction", "quantization", "sia", "psa"}
    assert trainer.item_tokenizer.steps_done == 3  # 12 items, 5 at a time


def test_the_tokenizers_epoch_equals_one_by_hand(factories, tmp_path):
    """One batch of all items: AdamW on L_SQ + mu SIA + lambda PSA, the latter of the items that have states."""
    trainer, other = (
        make(factories, tmp_path / name, tokenizer_training={"batch_size": 12, "weight_decay": 0.0})
        for name in ("trained", "by_hand")
    )
    states = trainer._item_states(0)
    states.known[4] = False
    before = trainer.item_tokenizer.module.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    found = trainer.item_tokenizer.train_epoch(states)
    module = other.item_tokenizer.module.train()
    output = module(torch.from_numpy(other.item_tokenizer.embeddings["text"].vectors))
    reconstruction = F.mse_loss(output.reconstruction, output.inputs)
    quantization = (output.quantized.codebook_losses + 0.25 * output.quantized.commitment_losses).mean()
    known = states.known
    codebooks = list(module.quantizer.codebooks)
    sia = sequence_item_losses(states.summaries[known], output.latents[known], codebooks).mean()
    psa = preference_semantic_losses(states.preferences[known], output.reconstruction[known], temperature=0.5).mean()
    expected = {"reconstruction": reconstruction, "quantization": quantization, "sia": sia, "psa": psa}
    assert found == pytest.approx({name: loss.item() for name, loss in expected.items()}, rel=1e-4)
    total = reconstruction + quantization + 0.5 * sia + 0.3 * psa
    names = [name for name, _ in module.named_parameters()]
    of_total = torch.autograd.grad(total, list(module.parameters()))
    after = trainer.item_tokenizer.module.state_dict()
    for name, gradient in zip(names, of_total, strict=True):
        clear = gradient.abs() > 1e-5
        expected = before[name] - 0.02 * gradient.sign()
        torch.testing.assert_close(after[name][clear], expected[clear], rtol=1e-3, atol=1e-4)


def test_learning_rate_of_the_tokenizer_falls_as_a_cosine(factories, tmp_path):
    trainer = make(factories, tmp_path, tokenizer_training={"passes": 2}, schedule={"cycle": 3}, num_train_epochs=3)
    half = trainer.item_tokenizer  # cycles of two epochs of the recommender: two of them
    assert half.steps_per_epoch == 6
    assert half.total_steps == 12
    rates = []
    step = half.optimizer.step
    half.optimizer.step = lambda: (rates.append(half.optimizer.param_groups[0]["lr"]), step())
    half.train_epoch(None)
    half.train_epoch(None)
    assert rates == pytest.approx([0.01 * (1 + np.cos(np.pi * done / 12)) for done in range(12)])


# Codes that change


def shaken(trainer):
    """Gives the item tokenizer other weights, so that many items change their codes."""
    draws = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in trainer.item_tokenizer.module.encoder.parameters():
            parameter += torch.randn(parameter.shape, generator=draws)


def codes_by_hand(item_tokenizer):
    """Codes with a counter, item by item."""
    module, seen, codes = item_tokenizer.module.eval(), {}, []
    for vector in item_tokenizer.embeddings["text"].vectors:
        with torch.no_grad():
            latents = module.latents(torch.from_numpy(vector)[None])
            of_item = tuple(residual_codes(latents, list(module.quantizer.codebooks))[0].tolist())
        codes.append([*of_item, seen.get(of_item, 0)])
        seen[of_item] = seen.get(of_item, 0) + 1
    return codes


@pytest.mark.parametrize("model", ["t5", "llama-packed-lora", "llama-padded"])
def test_items_that_change_their_codes_leave_no_stale_path(factories, tmp_path, model):
    trainer = make(factories, tmp_path, model, evaluation=True, loss_scope="trie")
    recommender, samples = trainer.recommender, trainer.plan.samples
    before = recommender.semantic_ids.codes.copy()
    _, targets = samples.targets()
    of_eval = trainer.eval_dataset.targets()[1]
    shaken(trainer)
    record = {}
    trainer.encode_items(record)
    codes = recommender.semantic_ids.codes
    assert codes.tolist() == codes_by_hand(trainer.item_tokenizer)
    share = np.mean([old.tolist() != new.tolist() for old, new in zip(before, codes, strict=True)])
    assert record["share_changed"] == pytest.approx(share)
    assert share > 0.5
    # samples of training and validation
    tokens = trainer.vocabulary.token_ids(codes)
    for made, rows in ((samples, targets), (trainer.eval_dataset, of_eval)):
        learned = [token for sample in made for token in sample["labels"] if token >= 0]
        assert learned == tokens[rows].ravel().tolist()
    shown = {
        token for sample in samples for token in sample["input_ids"] if token >= trainer.vocabulary.first_token_id
    }
    assert shown <= set(tokens.ravel().tolist())
    # trie and item lookup
    assert trainer.trie.fingerprint == ItemTrie.from_codes(codes, recommender.semantic_ids.codebook_sizes).fingerprint
    assert trainer._rows_of(torch.from_numpy(codes).long()).tolist() == list(range(12))
    # an exhaustive search finds every item under its new codes, with the likelihood of these
    history = [f"item-{row}" for row in (2, 5, 2, 9)]
    trainer.model.eval()
    answers = recommender.recommend(history, 12, num_beams=192, exclude_seen=False, scope="vocabulary")
    assert sorted(answer.item_id for answer in answers) == sorted(recommender.semantic_ids.item_ids)
    prompt = recommender.task.prompt([2, 5, 2, 9])
    in_prompt = [token for token in prompt if token >= trainer.vocabulary.first_token_id]
    assert in_prompt == tokens[[2, 5, 2, 9]].ravel().tolist()
    for answer in answers[:3] + answers[-2:]:
        target = tokens[recommender.semantic_ids.item_ids.index(answer.item_id)].tolist()
        score = 0.0
        for level, token in enumerate(target):
            if trainer.is_encoder_decoder:
                start = [trainer.model.config.decoder_start_token_id, *target[:level]]
                taken = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([start])}
            else:
                taken = {"input_ids": torch.tensor([[*prompt, *target[:level]]])}
            with torch.no_grad():
                score += trainer.model(**taken).logits[0, -1].log_softmax(dim=0)[token].item()
        assert answer.score == pytest.approx(score, abs=1e-3)


def test_every_batch_of_a_run_has_the_codes_of_its_cycle(factories, tmp_path, monkeypatch):
    """Also those that workers make, which begin anew each epoch."""
    trainer = make(factories, tmp_path, num_train_epochs=3, dataloader_num_workers=1)
    run_step, seen = trainer.training_step, []

    def watched(model, inputs, *args, **kwargs):
        labels = inputs["labels"]
        seen.append((len(trainer.records), labels[labels >= 0].view(-1, 3).tolist()))
        return run_step(model, inputs, *args, **kwargs)

    codes, encode = [], trainer.encode_items

    def encoded(record):
        encode(record)
        codes.append(trainer.vocabulary.token_ids(trainer.recommender.semantic_ids.codes).tolist())

    monkeypatch.setattr(trainer, "training_step", watched)
    monkeypatch.setattr(trainer, "encode_items", encoded)
    trainer.train()
    assert codes[0] != codes[1] != codes[2]
    _, targets = trainer.plan.samples.targets()
    for cycle in (1, 2, 3):
        learned = sorted(tokens for of, batch in seen if of == cycle for tokens in batch)
        assert learned == sorted(codes[cycle - 1][row] for row in targets)


def test_item_tokenizer_and_codes_agree_after_training(factories, tmp_path):
    trainer = make(factories, tmp_path, num_train_epochs=3)
    trainer.train()
    assert trainer.recommender.semantic_ids.codes.tolist() == codes_by_hand(trainer.item_tokenizer)
    assert trainer.recommender.item_tokenizer is trainer.item_tokenizer.tokenizer


def test_min_cost_gives_every_item_codes_of_its_own(factories, tmp_path):
    trainer = make(factories, tmp_path, policy="min_cost", num_train_epochs=3)
    trainer.train()
    assert trainer.vocabulary.num_levels == 2
    assert trainer.recommender.semantic_ids.num_distinct == 12
    assert all(0 <= record["collision_rate"] < 1 for record in trainer.records)


# What can't work


def test_shared_codes_are_refused(factories, tmp_path):
    with pytest.raises(SettingsError, match="2 items share their codes"):
        make(factories, tmp_path, policy="allow")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"torch_compile": True}, "torch_compile is on"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "dataloader_persistent_workers is on"),
    ],
)
def test_settings_that_cannot_work_are_refused(factories, tmp_path, settings, message):
    with pytest.raises(SettingsError, match=message):
        make(factories, tmp_path, **settings)


def test_fp16_is_refused(factories, tmp_path):
    trainer = make(factories, tmp_path)
    trainer.args.fp16 = True  # which TrainingArguments wouldn't take on a CPU
    with pytest.raises(SettingsError, match="fp16 is on"):
        type(trainer)(
            trainer.recommender,
            trainer.args,
            item_tokenizer=trainer.item_tokenizer,
            make_unique=trainer.make_unique,
            schedule=trainer.schedule,
            train_dataset=trainer.plan.samples,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["next_item", "item_search"]}, "only 'next_item' is trained"),
        ({"chat": True}, "chat is true"),
        ({"cycle": 1}, "cycle is 1"),
        ({"sia_distance_sign": "minus"}, "sia_distance_sign is 'minus'"),
        ({"sia_recursion": "none"}, "sia_recursion is 'none'"),
        ({"uniqueness": "allow"}, "uniqueness is 'allow'"),
        ({"psa_temperature": 0.0}, "psa_temperature is 0.0"),
        ({"sia_weight": -0.1}, "sia_weight is -0.1"),
        ({"tokenizer_batch_size": 0}, "tokenizer_batch_size is 0"),
        ({"alignment_warmup_epochs": -1}, "alignment_warmup_epochs is -1"),
    ],
)
def test_arguments_that_cannot_work_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        JointArguments(item_tokenizer="letter.yaml", **settings)


def test_a_loss_that_is_no_number_stops_the_run(factories, tmp_path):
    trainer = make(factories, tmp_path)
    with torch.no_grad():
        trainer.item_tokenizer.module.decoder[0].weight.fill_(float("nan"))
    with pytest.raises(LlmrecError, match="lower tokenizer_learning_rate"):
        trainer.train()


# To compare with


@pytest.mark.parametrize("model", ["t5", "llama-packed-lora"])
def test_a_frozen_item_tokenizer_trains_as_fine_tuning_does(factories, tmp_path, model):
    settings = {"evaluation": True, "eval_strategy": "epoch", "num_train_epochs": 2, "loss_scope": "trie"}
    trainer, other = (
        make(factories, tmp_path / name, model, schedule={"train_tokenizer": False}, **settings)
        for name in ("joint", "plain")
    )
    plain = RankingTrainer(
        other.recommender.model,
        other.args,
        vocabulary=other.vocabulary,
        text_tokenizer=other.recommender.text_tokenizer,
        train_dataset=other.plan.samples,
        eval_dataset=other.eval_dataset,
        trie=ItemTrie.from_semantic_ids(other.recommender.semantic_ids),
    )
    before, codes = tensors_of(trainer), trainer.recommender.semantic_ids.codes
    trainer.train()
    plain.train()
    after = tensors_of(trainer)
    assert changed(before, after) == {"model"}
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(after["model"][name], tensor), name
    assert trainer.recommender.semantic_ids.codes is codes
    assert trainer.records == []
    for left, right in zip(trainer.state.log_history, plain.state.log_history, strict=True):
        assert {k: v for k, v in left.items() if "runtime" not in k and "per_second" not in k} == {
            k: v for k, v in right.items() if "runtime" not in k and "per_second" not in k
        }


@pytest.mark.parametrize("model", ["t5", "llama-packed-lora"])
def test_both_at_once(factories, tmp_path, monkeypatch, model):
    trainer = make(factories, tmp_path, model, num_train_epochs=3, schedule={"alternate": False, "warmup_epochs": 1})
    steps_of_epoch = trainer.plan.num_steps
    in_steps, encodings = [], []
    run_step = trainer.step_projections
    encode = trainer.encode_items

    def watched():
        before = tensors_of(trainer)
        run_step()
        in_steps.append(changed(before, tensors_of(trainer)))

    def encoded(record):
        encode(record)
        encodings.append((trainer.state.global_step, codes_by_hand(trainer.item_tokenizer)))
        assert trainer.recommender.semantic_ids.codes.tolist() == encodings[-1][1]

    monkeypatch.setattr(trainer, "step_projections", watched)
    monkeypatch.setattr(trainer, "encode_items", encoded)
    before = tensors_of(trainer)
    trainer.train()
    assert changed(before, tensors_of(trainer)) == set(HALVES)
    of_tokenizer = {"encoder", "decoder", "codebooks"}
    assert in_steps[:steps_of_epoch] == [of_tokenizer] * steps_of_epoch
    assert in_steps[steps_of_epoch:] == [{*of_tokenizer, "projections"}] * (2 * steps_of_epoch)
    assert [step for step, _ in encodings] == [steps_of_epoch, 2 * steps_of_epoch]
    assert encodings[0][1] != encodings[1][1]
    assert trainer.item_tokenizer.steps_done == 3 * steps_of_epoch == trainer.item_tokenizer.total_steps
    assert [record["cycle"] for record in trainer.records] == [0, 1, 2]
    assert [record["aligned"] for record in trainer.records] == [False, True, True]


def test_a_step_of_both_at_once(factories, tmp_path):
    """L_REC + L_SQ + mu SIA + lambda PSA, the last three of the batch's different items; in warm-up the first two."""
    trainer = make(factories, tmp_path, "llama-packed", schedule={"alternate": False})
    trainer.item_tokenizer.start_epoch()
    batch = first_batch(trainer)
    pairs = [pair for sample in rows_in_batch_order(trainer) for pair in prompts_of(trainer, sample)]
    items = list(dict.fromkeys(item_of(trainer, tokens) for _, tokens in pairs))
    _, sia, psa = aligned_by_hand(trainer, pairs, trainer.item_tokenizer)
    output = trainer.item_tokenizer.module(torch.from_numpy(trainer.item_tokenizer.embeddings["text"].vectors[items]))
    own = F.mse_loss(output.reconstruction, output.inputs)
    own = own + (output.quantized.codebook_losses + 0.25 * output.quantized.commitment_losses).mean()
    labels, plain = batch["labels"], make(factories, tmp_path / "plain", "llama-packed")
    of_recommender = loss_of(plain, batch, aligns=False).item()
    assert (labels >= 0).any()
    found = loss_of(trainer, batch)
    assert found.item() == pytest.approx(of_recommender + own.item() + 0.5 * sia + 0.3 * psa, rel=1e-4)
    assert all(size > 1e-5 for size in gradients(found, trainer).values())
    in_warmup = loss_of(trainer, batch, aligns=False)
    assert in_warmup.item() == pytest.approx(of_recommender + own.item(), rel=1e-4)
    reached = {part for part, size in gradients(in_warmup, trainer).items() if size > 0}
    assert reached == {"encoder", "decoder", "codebooks"}


def test_the_last_phase_trains_the_model_alone(factories, tmp_path):
    trainer = make(factories, tmp_path / "joint", num_train_epochs=2)
    trainer.train()
    before, codes = tensors_of(trainer), trainer.recommender.semantic_ids.codes.copy()
    arguments = JointArguments(
        item_tokenizer="letter.yaml", sample_form="prefix", final_epochs=2, final_learning_rate=0.003
    )
    splits = leave_one_out(factories.make_dataset())
    item_codes = ItemCodes(trainer.recommender.semantic_ids, trainer.item_tokenizer.tokenizer, "here")
    last = _train_final(*(trainer.recommender, trainer, splits, item_codes, arguments, ModelArguments()), resumed=None)
    after = tensors_of(trainer)
    assert changed(before, after) == {"model"}
    assert np.array_equal(trainer.recommender.semantic_ids.codes, codes)
    learned = [token for sample in last.plan.samples for token in sample["labels"] if token >= 0]
    assert learned == trainer.vocabulary.token_ids(codes)[last.plan.samples.targets()[1]].ravel().tolist()
    rates = [line["learning_rate"] for line in last.state.log_history if "learning_rate" in line]
    assert rates[0] == pytest.approx(0.003)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.001
    assert last.state.epoch == 2
    assert not isinstance(last, type(trainer))
    assert trainer.args.learning_rate == 0.01


# Kill and resume

RESUMED = {
    "num_train_epochs": 3,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "evaluation": True,
    "eval_strategy": "epoch",
    "save_strategy": "steps",
}


def without_seconds(records):
    return [{name: value for name, value in record.items() if "seconds" not in name} for record in records]


def outcome(trainer):
    """All that must not depend on how often a run was stopped."""
    moments = {
        f"{number}.{name}": value.clone()
        for number, of in trainer._projections_optimizer.state_dict()["state"].items()
        for name, value in of.items()
    }
    halves = {**tensors_of(trainer), "tokenizer": trainer.item_tokenizer.state(), "moments": moments}
    done = (trainer.item_tokenizer.epochs_done, trainer.item_tokenizer.steps_done)
    return halves, trainer.recommender.semantic_ids.codes.tolist(), without_seconds(trainer.records), done


def assert_same(found, expected):
    assert found[1:] == expected[1:]
    for part, tensors in expected[0].items():
        assert found[0][part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found[0][part][name], tensor), (part, name)


CASES = {
    "t5": {"model": "t5"},
    "llama-packed-lora": {"model": "llama-packed-lora", "lora_dropout": 0.1, "per_device_train_batch_size": 2},
    "llama-cycle-of-3": {"model": "llama-padded", "schedule": {"cycle": 3}, "per_device_train_batch_size": 4},
    "at-once": {"model": "llama-padded", "schedule": {"alternate": False, "warmup_epochs": 1}},
    "accumulated": {
        "model": "llama-padded",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_at_any_step(factories, tmp_path, case):
    """Every checkpoint of a run, at the end of an epoch or within one, leads to the same end."""
    # Evaluated before each save: what an evaluation draws after one, the random state of the resumed run lacks.
    settings = {**RESUMED, "eval_strategy": "steps", "eval_steps": 1, **CASES[case]}
    whole = make(factories, tmp_path / "whole", save_steps=1, **settings)
    whole.train()
    steps = whole.state.max_steps
    per_epoch = whole.plan.num_steps
    assert per_epoch > 1
    expected = outcome(whole)
    for step in sorted({1, per_epoch, per_epoch + 1, steps}):
        folder = tmp_path / f"from-{step}"
        folder.mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        resumed = make(factories, folder, save_steps=1000, **settings)
        resumed.train("latest")
        assert resumed.state.global_step == steps
        assert_same(outcome(resumed), expected)


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("model", ["t5", "llama-packed-lora"])
@pytest.mark.parametrize("place", ["step", "encoding", "states"])
def test_killed_in_the_tokenizers_half(factories, tmp_path, monkeypatch, model, place):
    settings = {**RESUMED, "save_strategy": "epoch"}
    whole = make(factories, tmp_path / "whole", model, **settings)
    whole.train()
    stopped = make(factories, tmp_path / "stopped", model, **settings)
    names = {"step": (JointTokenizer, "step"), "encoding": (JointTokenizer, "quantize")}
    owner, name = names.get(place, (type(stopped), "_item_states"))
    function = getattr(owner, name)

    def kill(self, *args, **kwargs):
        half = stopped.item_tokenizer
        if half.epochs_done == (2 if place == "encoding" else 1) and (place != "step" or half.steps_done == 4):
            raise KilledError
        return function(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill)
        with pytest.raises(KilledError):
            stopped.train()
    assert stopped.state.global_step == stopped.plan.num_steps
    resumed = make(factories, tmp_path / "stopped", model, **settings)
    resumed.train("latest")
    assert_same(outcome(resumed), outcome(whole))


def test_histories_of_a_resumed_run_are_those_of_the_whole_run(factories, tmp_path):
    histories = {"whole": [], "resumed": []}

    def keep(name):
        return lambda records: histories[name].append(json.loads(json.dumps(records)))

    settings = {**RESUMED, "save_strategy": "epoch", "model": "llama-padded", "per_device_train_batch_size": 4}
    whole = make(factories, tmp_path, on_cycle=keep("whole"), **settings)
    whole.train()
    shutil.rmtree(tmp_path / f"checkpoint-{whole.state.max_steps}")
    shutil.rmtree(tmp_path / f"checkpoint-{2 * whole.plan.num_steps}")
    make(factories, tmp_path, on_cycle=keep("resumed"), **settings).train("latest")
    assert len(histories["whole"]) == 3
    last = [without_seconds(histories[name][-1]) for name in ("whole", "resumed")]
    assert last[0] == last[1]


def test_a_checkpoint_without_its_joint_part_is_not_resumed_from(factories, tmp_path, caplog):
    settings = {**RESUMED, "save_strategy": "epoch", "num_train_epochs": 2}
    trainer = make(factories, tmp_path, **settings)
    trainer.train()
    first, last = (tmp_path / f"checkpoint-{epoch * trainer.plan.num_steps}" for epoch in (1, 2))
    names = sorted(path.name for path in (last / JOINT_FOLDER).iterdir())
    assert names == ["joint_state.json", "joint_state.safetensors", "semantic_ids.safetensors"]
    for name in names:
        hidden = last / JOINT_FOLDER / name
        hidden.rename(tmp_path / "hidden")
        with pytest.raises(MissingPartError, match=f"{JOINT_FOLDER}/{name} is missing"):
            make(factories, tmp_path, **settings).train(str(last))
        (tmp_path / "hidden").rename(hidden)
    shutil.rmtree(last / JOINT_FOLDER)
    resumed = make(factories, tmp_path, **settings)
    resumed.train("latest")
    assert f"{last.name} is not whole" in caplog.text
    assert_same(outcome(resumed), outcome(trainer))
    assert first.is_dir()


def test_a_checkpoint_of_fine_tuning_is_refused(factories, tmp_path):
    settings = {"save_strategy": "epoch", "num_train_epochs": 1}
    other = make(factories, tmp_path, **settings)
    plain = RankingTrainer(
        other.recommender.model,
        other.args,
        vocabulary=other.vocabulary,
        text_tokenizer=other.recommender.text_tokenizer,
        train_dataset=other.plan.samples,
    )
    plain.train()
    with pytest.raises(LlmrecError, match="joint"):
        make(factories, tmp_path, **{**settings, "num_train_epochs": 2}).train("latest")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"schedule": {"cycle": 3}}, "cycle was 2, is 3"), ({"schedule": {"warmup_epochs": 4}}, "warmup_epochs was 0")],
)
def test_a_run_of_another_schedule_is_refused(factories, tmp_path, change, message):
    settings = {"save_strategy": "epoch", "num_train_epochs": 1}
    make(factories, tmp_path, **settings).train()
    with pytest.raises(SettingsError, match=message):
        make(factories, tmp_path, **{**settings, "num_train_epochs": 2, **change}).train("latest")


def test_a_checkpoint_of_another_item_tokenizer_is_refused(factories, tmp_path):
    settings = {"save_strategy": "epoch", "num_train_epochs": 1}
    make(factories, tmp_path, **settings).train()
    other = make(factories, tmp_path, tokenizer_config={"hidden_sizes": (9,)}, **{**settings, "num_train_epochs": 2})
    with pytest.raises(LlmrecError, match="another item tokenizer"):
        other.train("latest")


@pytest.mark.parametrize("model", ["t5", "llama-packed-lora"])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_best_model_has_item_tokenizer_and_codes_of_its_step(factories, tmp_path, model, resumed):
    """The second of three cycles is the best."""
    values = iter([0.2, 0.9, 0.4])
    seen = []

    def item_metrics(_):
        seen.append(outcome(trainer))
        return {"ndcg@10": next(values)}

    settings = {
        **RESUMED,
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "ndcg@10",
        "greater_is_better": True,
        "item_metrics": item_metrics,
        "tokenizer_training": {"learning_rate": 0.05},
    }
    trainer = make(factories, tmp_path, model, **settings)
    trainer.train()
    if resumed:
        shutil.rmtree(tmp_path / f"checkpoint-{trainer.state.max_steps}")
        values = iter([0.4])
        trainer = make(factories, tmp_path, model, **settings)
        trainer.train("latest")
    assert [record["eval_ndcg@10"] for record in trainer.records] == [0.2, 0.9, 0.4]
    assert trainer.best_record == trainer.records[1]
    best, last = seen[1], seen[2]
    assert best[1] != last[1]
    found = outcome(trainer)
    for part, tensors in best[0].items():
        for name, tensor in tensors.items():
            assert torch.equal(found[0][part][name], tensor), (part, name)
    assert found[1] == best[1] == codes_by_hand(trainer.item_tokenizer)
    assert trainer.trie.fingerprint == ItemTrie.from_semantic_ids(trainer.recommender.semantic_ids).fingerprint
    tokens = trainer.vocabulary.token_ids(np.array(best[1]))
    learned = [token for sample in trainer.plan.samples for token in sample["labels"] if token >= 0]
    assert learned == tokens[trainer.plan.samples.targets()[1]].ravel().tolist()


# What is measured


def test_records(factories, tmp_path, monkeypatch):
    given = []
    trainer = make(
        factories,
        tmp_path,
        evaluation=True,
        eval_strategy="epoch",
        num_train_epochs=3,
        schedule={"warmup_epochs": 3},
        item_metrics=lambda _: {"ndcg@10": 0.03, "recall@10": 0.06},
        on_cycle=lambda records: given.append(json.loads(json.dumps(records))),
    )
    codes, quantized = [trainer.recommender.semantic_ids.codes.copy()], []
    encode, quantize = trainer.encode_items, trainer.item_tokenizer.quantize

    def encoded(record):
        encode(record)
        codes.append(trainer.recommender.semantic_ids.codes.copy())

    def watched():
        quantized.append(quantize())
        return quantized[-1]

    monkeypatch.setattr(trainer, "encode_items", encoded)
    monkeypatch.setattr(trainer.item_tokenizer, "quantize", watched)
    trainer.train()
    assert [len(records) for records in given] == [1, 2, 3]
    assert given[-1] == trainer.records
    always = {
        *("cycle", "epoch", "share_changed", "collision_rate", "largest_group", "utilisation", "aligned"),
        *("tokenizer_quantization", "tokenizer_reconstruction", "recommender_loss"),
        *("tokenizer_seconds", "encoding_seconds", "recommender_seconds"),
        *("eval_ndcg@10", "eval_recall@10", "eval_loss", "eval_perplexity"),
    }
    of_tokenizer, of_recommender = {"tokenizer_sia", "tokenizer_psa"}, {"recommender_sia", "recommender_psa"}
    assert [set(record) for record in trainer.records] == [
        always,
        always | of_recommender,
        always | of_recommender | of_tokenizer,
    ]
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    steps = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    per_epoch = trainer.plan.num_steps
    for cycle, record in enumerate(trainer.records):
        assert record["cycle"] == cycle
        assert record["epoch"] == cycle + 1
        different = [
            left.tolist() != right.tolist() for left, right in zip(codes[cycle], codes[cycle + 1], strict=True)
        ]
        assert record["share_changed"] == pytest.approx(sum(different) / 12)
        raw = quantized[cycle].semantic_ids.codes.tolist()
        groups = [raw.count(of_item) for of_item in raw]
        assert record["largest_group"] == max(groups)
        assert record["collision_rate"] == pytest.approx(1 - len({tuple(of_item) for of_item in raw}) / 12)
        assert record["utilisation"] == [len({of_item[level] for of_item in raw}) / 4 for level in range(2)]
        assert record["eval_loss"] == losses[cycle]
        assert 0 < record["recommender_seconds"] < 60
        # the logged loss is all that a step minimised
        of_steps = np.mean(steps[cycle * per_epoch : (cycle + 1) * per_epoch])
        minimised = record["recommender_loss"]
        if record["aligned"]:
            minimised += 0.5 * record["recommender_sia"] + 0.3 * record["recommender_psa"]
        assert of_steps == pytest.approx(minimised, rel=1e-4)
    assert any(record["share_changed"] > 0 for record in trainer.records)


def test_projections_learn_at_the_rate_of_the_model(factories, tmp_path):
    trainer = make(factories, tmp_path, lr_scheduler_type="linear", num_train_epochs=2, code_learning_rate_factor=7.0)
    rates, step = [], trainer._projections_optimizer.step
    trainer._projections_optimizer.step = lambda: (
        rates.append(trainer._projections_optimizer.param_groups[0]["lr"]),
        step(),
    )
    trainer.train()
    total = trainer.state.max_steps
    assert rates == pytest.approx([0.01 * (1 - done / total) for done in range(total)])


def test_gradients_of_an_earlier_fit_are_gone(factories, tmp_path):
    """Where both learn at once the first step would add them."""
    module = make(factories, tmp_path, schedule={"alternate": False}).item_tokenizer.module
    assert all(parameter.grad is None for parameter in module.parameters())
