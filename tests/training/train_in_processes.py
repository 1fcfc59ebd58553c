"""Started by test_processes.py: trains on the small catalogue as the plan file says, and writes what happened.

    accelerate launch --config_file <yaml> tests/training/train_in_processes.py <plan.json>

The plan holds `output_dir`, the `settings` of `make_trainer`, and may hold `kill_at_step` (this process ends by
SIGKILL after that step), `resume_from` (a second trainer starts from that checkpoint) and `num_evaluated`.
"""

import json
import os
import signal
import sys
from pathlib import Path

from torch.utils.data import Subset
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import factories


class Killer(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(plan: dict) -> None:
    folder, settings = Path(plan["output_dir"]), plan["settings"]
    callbacks = [Killer(plan["kill_at_step"])] if "kill_at_step" in plan else []
    trainer = factories.make_trainer(folder, callbacks=callbacks, **settings)
    trainer.train()
    tensors = factories.trained_tensors(trainer)
    result = {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type.value),
        "wrapped_by": type(trainer.model_wrapped).__name__,
        "log": factories.step_log(trainer),
        "checksums": {name: tensor.double().sum().item() for name, tensor in tensors.items()},
    }
    if "num_evaluated" in plan:
        result["evaluation"] = trainer.evaluate(Subset(trainer.train_dataset, range(plan["num_evaluated"])))
    if "resume_from" in plan:
        resumed = factories.make_trainer(folder, **settings)
        resumed.train(resume_from_checkpoint=str(folder / plan["resume_from"]))
        result["resumed_log"] = factories.step_log(resumed)
    (folder / f"result-{trainer.args.process_index}.json").write_text(json.dumps(result))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
