"""Random two-layer encoder-decoder models of the T5 family, and what they answer."""

import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

START = 3  # starts a decoder, and pads


def make_t5(family: str = "t5", *, vocab_size: int = 16, seed: int = 0, **settings):
    """A tied model of width 32 without dropout whose logits differ a lot between tokens."""
    common = {
        "vocab_size": vocab_size,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "pad_token_id": START,
        "eos_token_id": 2,
        "decoder_start_token_id": START,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING[family](**{**common, **settings})).eval()


def untied(model, folder):
    """The same model with a head of its own, as a checkpoint that holds both matrices (FLAN-T5, mT5) is loaded."""
    tensors = {"shared.weight": model.shared.weight}
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    generator = torch.Generator().manual_seed(7)
    tensors["lm_head.weight"] = torch.randn(model.lm_head.weight.shape, generator=generator)
    model.save_pretrained(folder)
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return AutoModelForSeq2SeqLM.from_pretrained(folder)


@torch.no_grad()
def logits(model, input_ids, targets):
    """Logits [B, T, V] that predict the targets [B, T] after a prompt, by a plain forward."""
    start = torch.full_like(targets[:, :1], START)
    return model(input_ids=input_ids, decoder_input_ids=torch.cat([start, targets[:, :-1]], dim=1)).logits
