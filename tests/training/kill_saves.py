"""Kill a training run with SIGKILL while it saves, again and again, and check what is left each time.

Run as ``python -m tests.training.kill_saves FOLDER KILLS SEED PROCESSES``. Each run continues from the checkpoints
that the killed one left, so that its first line says which one it took. Of several processes a random one is killed,
and the others have to end by themselves. Prints one line of JSON.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from lockstep.config import ConfigContainer, Origin, resolve
from lockstep.training import Command, run
from lockstep.training import checkpoint_files as files
from tests.parallel.spawn import free_port

_SETTINGS = {
    "model.num_layers": 1,
    "model.hidden_size": 16,
    "model.num_attention_heads": 2,
    "model.ffn_hidden_size": 32,
    "model.seq_length": 256,
    "model.max_position_embeddings": 256,
    "train.micro_batch_size": 1,
    "train.global_batch_size": 2,
    "train.train_iters": 20000,
    "validation.eval_iters": 0,
    "dataset.mock": True,
    "tokenizer.tokenizer_type": "NullTokenizer",
    "tokenizer.vocab_size": 4000,
    "optimizer.lr": 1e-3,
    "run.device": "cpu",
    "checkpoint.save_interval": 1,
    "checkpoint.most_recent_k": 2,
}


def main(folder: Path, kills: int, seed: int, processes: int) -> None:
    """Kill ``kills`` runs and print what they left."""
    draw = random.Random(seed)
    root, cut_off = folder / "ckpt", 0
    taken: list[int] = []
    for trial in range(kills):
        log = folder / f"{trial}.log"
        before = files.tracked_iteration(root) if trial else 0
        children = _start(folder / f"run{trial}", root, log, processes, asynchronous=trial % 2 == 1)
        _wait_for_save(root, before, log)
        time.sleep(draw.uniform(0.0, 0.08))
        least = files.tracked_iteration(root)
        victim = children.pop(draw.randrange(processes))
        os.kill(victim, signal.SIGKILL)
        _, status = os.waitpid(victim, 0)
        assert os.WIFSIGNALED(status), f"the run ended by itself: {log.read_text()}"
        for child in children:
            _wait_for_end(child, log)
        cut_off += bool(files.unfinished(root))
        found = files.find(root, None)
        files.verify(found, files.read_manifest(found))
        iteration = files.tracked_iteration(root)
        assert iteration >= least, "the tracker went back"
        if trial:
            first = log.read_text().splitlines()[0]
            assert first.endswith(f"; resuming from {root} at iteration {taken[-1]}"), first
        taken.append(iteration)
    print(json.dumps({"kills": kills, "while_writing": cut_off, "taken": taken}))


def _start(run_dir: Path, root: Path, log: Path, processes: int, *, asynchronous: bool) -> list[int]:
    """Start the processes of a run and return their ids."""
    where = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    log.touch()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ.update({name: str(value) for name, value in {**where, "RANK": rank, "LOCAL_RANK": rank}.items()})
            _train(run_dir, root, log, asynchronous=asynchronous)
        children.append(child)
    return children


def _train(run_dir: Path, root: Path, log: Path, *, asynchronous: bool) -> None:
    """Train in this process, which is killed on the way."""
    output = log.open("a")
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    config = ConfigContainer()
    loading = {"checkpoint.load": str(root)} if files.holds_checkpoints(root) else {}
    changes = {"checkpoint.save": str(root), "run.dir": str(run_dir), "checkpoint.async_save": asynchronous}
    for path, value in {**_SETTINGS, **changes, **loading}.items():
        config.set(path, value, Origin("python"))
    try:
        world_size = int(os.environ["WORLD_SIZE"])
        run(resolve(config, world_size), door="python", command=Command(["kill_saves"]), name="kill_saves")
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(1)


def _wait_for_end(child: int, log: Path) -> None:
    """Wait until a process whose neighbour was killed has ended."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        ended, _ = os.waitpid(child, os.WNOHANG)
        if ended:
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    raise AssertionError(f"a process hangs after its neighbour was killed: {log.read_text()}")


def _wait_for_save(root: Path, before: int, log: Path) -> None:
    """Wait until a run has saved anew, and is saving again."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        if (root / files.TRACKER).is_file() and files.tracked_iteration(root) > before and files.unfinished(root):
            return
        time.sleep(0.001)
    raise AssertionError(f"the run did not save: {log.read_text()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
