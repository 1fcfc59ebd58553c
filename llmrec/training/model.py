"""The model that is trained: the base loaded, code tokens given to it, and what of it learns.

`trained` says what learns: "lora" (LoRA layers and the rows of the code tokens), "rows" (these rows alone) or "full"
(every weight). Whatever it is, the rows are float32 parameters of their own (`llmrec.vocabulary`), and in the first
two the base stays as it is to the last bit, in 32, 16, 8 or 4 bits. Nothing here knows of data, losses or the loop.
"""

import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrec.adapter import add_lora, freeze_base
from llmrec.errors import SettingsError
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.pretrained import load_base_model, load_text_tokenizer, resolve_pretrained
from llmrec.processes import gathered
from llmrec.training.arguments import ModelArguments
from llmrec.training.config import RecFinetuneConfig
from llmrec.training.gathering import loaded_whole
from llmrec.training.row_initialization import check_code_init, initialize_rows
from llmrec.vocabulary import CodeVocabulary, add_code_rows

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

    from llmrec.item_tokenizers.base import ItemTokenizer

logger = logging.getLogger(__name__)


def prepare_model(
    arguments: ModelArguments,
    training: RecFinetuneConfig,
    codes: SemanticIds,
    *,
    titles: Sequence[str | None] | None = None,
    item_tokenizer: "ItemTokenizer | None" = None,
) -> tuple[Any, "PreTrainedTokenizerBase", CodeVocabulary]:
    """Loads the base model, adds the codes to its vocabulary, and makes trainable what `trained` says.

    Args:
        arguments: Which model, in which precision, and what of it is trained.
        training: `seed`, `code_init_scale`, and the precision of the run.
        codes: Of the catalogue; their codebook sizes make the code tokens.
        titles: Title of each item, in the order of `codes`; needed by `code_init` "titles" and "codebook".
        item_tokenizer: What made the codes; needed by `code_init` "codebook".

    Returns:
        The model (a `peft.PeftModel` with LoRA, else a `transformers.PreTrainedModel`), the text tokenizer with the
        code tokens, and where they are in it.

    Raises:
        SettingsError: A precision in which these weights can't be trained; `code_init` lacks what it starts from.
    """
    check_precision(arguments, training)
    check_code_init(arguments.code_init, codes, titles=titles, item_tokenizer=item_tokenizer)
    name, revision = str(arguments.model_name_or_path), arguments.model_revision
    text_tokenizer = load_text_tokenizer(name, revision=revision)
    vocabulary = CodeVocabulary.add_to(text_tokenizer, codes.codebook_sizes)
    # A large base is shared out by ZeRO-3 while it loads; a GGUF file, or one that is quantised, can't be.
    whole = arguments.load_in_4bit or arguments.load_in_8bit or resolve_pretrained(name).gguf_file is not None
    with loaded_whole() if whole else nullcontext():
        model = _load(arguments, training)
    add_code_rows(model, vocabulary, init_scale=training.code_init_scale, seed=training.seed)
    with gathered([model.get_input_embeddings().weight, model.get_output_embeddings().weight]):
        initialize_rows(
            model,
            arguments.code_init,
            vocabulary=vocabulary,
            codes=codes.codes,
            text_tokenizer=text_tokenizer,
            titles=titles,
            item_tokenizer=item_tokenizer,
            init_scale=training.code_init_scale,
            seed=training.seed,
        )
    model = _set_trained(model, arguments, training)
    logger.info("%s, trained %s: %s", name, arguments.trained, describe_trained(model))
    return model, text_tokenizer, vocabulary


def _set_trained(model: Any, arguments: ModelArguments, training: RecFinetuneConfig) -> Any:
    if arguments.trained == "lora":
        encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        return add_lora(model, lora_config(arguments, encoder_decoder=encoder_decoder), seed=training.seed)
    if arguments.trained == "rows":
        freeze_base(model)
    return model


def check_precision(arguments: ModelArguments, training: RecFinetuneConfig) -> None:
    """Refuses precisions in which the weights that are trained would not learn.

    Raises:
        SettingsError: Weights of 16 bits are to be trained by an engine that keeps no copy of them in 32, or 4 or 8
            bits are asked of a compiled run.
    """
    dtype = base_dtype(arguments, training)
    keeps_copies = training.deepspeed_plugin is not None
    if arguments.trained == "full" and dtype in ("float16", "bfloat16") and not keeps_copies:
        precision = "fp16" if dtype == "float16" else "bf16"
        raise SettingsError(
            f"trained is 'full' and dtype {dtype!r}: the small steps of a learning rate are lost in weights of 16"
            f" bits. Leave dtype out (float32) and set {precision}: true, which computes in 16 bits all the same"
        )
    if training.torch_compile and (arguments.load_in_4bit or arguments.load_in_8bit):
        raise SettingsError("torch_compile can't go with load_in_4bit or load_in_8bit: leave one of them out")


def base_dtype(arguments: ModelArguments, training: RecFinetuneConfig) -> str:
    """Type that the base's weights are loaded in.

    `dtype` where it is set. Else that of the computation (`bf16`, `fp16`) for weights that are frozen: autocast would
    cast them again in every forward, and they would take twice the memory; float32 for weights that are trained.
    """
    if arguments.dtype is not None:
        return str(arguments.dtype)
    if arguments.trained == "full" or not (training.bf16 or training.fp16):
        return "float32"
    return "bfloat16" if training.bf16 else "float16"


def _load(arguments: ModelArguments, training: RecFinetuneConfig) -> Any:
    name, revision = str(arguments.model_name_or_path), arguments.model_revision
    options: dict[str, Any] = {"dtype": base_dtype(arguments, training)}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    if not (arguments.load_in_4bit or arguments.load_in_8bit):
        return load_base_model(name, revision=revision, **options)
    quantized = {**options, "quantization_config": quantization_config(arguments, training)}
    if resolve_pretrained(name).gguf_file is None:
        return load_base_model(name, revision=revision, **quantized)
    with TemporaryDirectory() as folder:  # transformers won't quantise what it reads from a GGUF file
        load_base_model(name, **options).save_pretrained(folder)
        return load_base_model(folder, **quantized)


def quantization_config(arguments: ModelArguments, training: RecFinetuneConfig) -> "BitsAndBytesConfig":
    """Settings of a base of 4 or 8 bits. Its products are computed in the precision of the run.

    bitsandbytes' own default computes them in float32, several times slower on a GPU. PEFT's
    `prepare_model_for_kbit_training` is not called: it freezes what `add_lora` and `freeze_base` freeze, and casts
    embedding and head to float32, 2.5 GB more for a Qwen3-8B.
    """
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=arguments.load_in_4bit,
        load_in_8bit=arguments.load_in_8bit,
        bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=arguments.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=arguments.bnb_4bit_quant_storage,
    )


def lora_config(arguments: ModelArguments, *, encoder_decoder: bool = False) -> "LoraConfig":
    """LoRA's settings, rsLoRA and DoRA among them."""
    from peft import LoraConfig

    modules: Any = arguments.lora_target_modules
    if isinstance(modules, str) and re.fullmatch(r"[\w.]+", modules):
        modules = [modules]  # TRL makes a list of one name a string, which PEFT takes for a pattern of whole paths
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=modules,
        target_parameters=arguments.lora_target_parameters,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        task_type="SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM",
    )


def describe_trained(model: nn.Module) -> str:
    """One line: how many parameters are trained, their share, and the bytes that AdamW keeps about them.

    Example:
        >>> describe_trained(model)  # doctest: +SKIP
        '5,474,304 of 140,579,136 parameters (3.89 %), AdamW keeps 43.8 MB about them'
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    count, total = sum(map(_numel, trained)), sum(map(_numel, parameters))
    optimizer_bytes = sum(2 * _numel(parameter) * parameter.element_size() for parameter in trained)
    return (
        f"{count:,} of {total:,} parameters ({100 * count / total:.2f} %), AdamW keeps {optimizer_bytes / 1e6:.1f} MB"
        " about them"
    )


def _numel(parameter: nn.Parameter) -> int:
    """Number of weights; of 4-bit ones two lie in a byte, and under ZeRO-3 the parameter itself is empty."""
    if hasattr(parameter, "ds_numel"):
        return int(parameter.ds_numel)
    if hasattr(parameter, "quant_state") and parameter.quant_state is not None:
        return int(parameter.quant_state.shape.numel())
    return parameter.numel()
