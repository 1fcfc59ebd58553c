"""Started by test_processes.py, alone or by `accelerate launch`: fits small item tokenizers, writes what came out."""

import importlib.util
import json
import sys
from pathlib import Path

import torch.distributed
from accelerate import PartialState

from llmrec.processes import Processes


def load_small():
    spec = importlib.util.spec_from_file_location("small", Path(__file__).with_name("small.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(output: str, names: list[str]) -> None:
    small, processes = load_small(), Processes.launched()
    assert str(processes.device) == "cpu"
    result = {"count": processes.count, "distributed_type": str(PartialState().distributed_type.value)}
    for name in names:
        embeddings = small.embeddings(count=151, gaps=True)
        tokenizer = small.MAKE[name](**small.TOGETHER.get(name, {}))
        tokenizer.fit(embeddings, progress=False, processes=processes)
        codes = tokenizer.quantize_catalogue(embeddings, processes=processes).semantic_ids.codes
        state = {key: tensor.double().sum().item() for key, tensor in tokenizer._state().items()}
        result[name] = {"history": tokenizer.fit_history, "codes": codes.tolist(), "state": state}
    Path(f"{output}-{processes.index}.json").write_text(json.dumps(result))
    if processes.count > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
