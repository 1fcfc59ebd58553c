"""Starts training in processes of its own, with accelerate where a file of it is given, and reads what they wrote."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "training" / "train_in_processes.py"
ROOT = SCRIPT.parents[2]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def begin(folder, plan, *, config_file=None, options=(), **environment):
    """Starts the script on a plan; its output goes to `output-*.txt` in the folder."""
    plan_file = folder / "plan.json"
    plan_file.write_text(json.dumps({"output_dir": str(folder), **plan}))
    command = [sys.executable, str(SCRIPT), str(plan_file)]
    if config_file is not None:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config_file)]
        port = [] if "--main_process_port" in options else ["--main_process_port", str(free_port())]
        command[1:1] = [*launcher, *port, *options]
    with open(folder / f"output-{len(list(folder.glob('output-*')))}.txt", "w") as output:
        return subprocess.Popen(
            command,
            # The package that stands beside these tests, whatever is installed.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def start(folder, plan, **options):
    """Runs the script on a plan to its end."""
    process = begin(folder, plan, **options)
    try:
        process.wait(timeout=280)  # the first DeepSpeed run of a machine compiles an extension
    finally:
        process.kill()
    return process


def results_of(folder, *, num_processes=2, name=""):
    """What each process wrote. Judged by files: gloo sometimes aborts at exit, after all work is done."""
    files = [folder / name / f"result-{rank}.json" for rank in range(num_processes)]
    missing = [file.name for file in files if not file.is_file()]
    written = "\n".join(path.read_text()[-4000:] for path in sorted(folder.glob("output-*")))
    assert not missing, f"{missing} not written; the end of what was printed:\n{written}"
    return [json.loads(file.read_text()) for file in files]


def same_steps(found, expected, tolerance=1e-5):
    """Whether loss and gradient norm of every step are the same."""
    assert len(found) == len(expected) > 0
    return all(
        abs(left[name] - right[name]) <= tolerance * abs(right[name])
        for left, right in zip(found, expected, strict=True)
        for name in ("loss", "grad_norm")
    )
