"""Two gloo processes against one with the same global batch, and a rank that dies."""

import os
import subprocess
import sys
import time

import pytest
import torch

WORKER = '''
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook
import brfx
from brfx.data import BatchLoader, load_dataset, Preprocessing
from brfx.distributed import rank, world_size
from brfx.train import fit

folder, number, count, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[5])
torch.set_num_threads(1)
if count > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=count)
digits = load_dataset("digits", data_dir=Path("unused"))


class Doubles(BatchLoader):
    """In float64, so that no code falls on the other side of a rounding boundary."""

    def __iter__(self):
        for _ in range(self.rounds):
            for images, labels in super().__iter__():
                yield images.double(), labels

    def __len__(self):
        return steps

    rounds = 1


torch.manual_seed(0)
model = brfx.build_model("resnet20", 10)
qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=2))
loader = Doubles(digits.train, digits.preprocessing, 16, augment=True, seed=3, rank=rank(), world_size=world_size())
whole = BatchLoader(digits.train, digits.preprocessing, 16, augment=True, seed=3)
brfx.calibrate(qmodel, [next(iter(whole))[0]])
qmodel.double()
loader.rounds = steps
seen = []
names = {parameter: name for name, parameter in qmodel.named_parameters()}


def record(optimizer, *rest):
    (folder / f"started-{number}").touch()
    seen.append({
        names[p]: p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    })


register_optimizer_step_pre_hook(record)
config = brfx.TrainConfig(epochs=1, warmup_epochs=0, lr=0.01, compile=sys.argv[4], clip_grad=100.0)
lambdas = (0.1, 0.05) if sys.argv[6] == "mean" else (0.01, 1e-5)
penalty = brfx.BinPenalty(qmodel, *lambdas, form=sys.argv[6])
val = Doubles(digits.val, digits.preprocessing, 256)
result = fit(qmodel, loader, val, config, penalty=penalty, run_dir=folder if rank() == 0 else folder / "other")
norm = qmodel.get_submodule("layer2.0.bn1")
assert type(norm) is torch.nn.BatchNorm2d
saved = {"gradients": seen, "terms": result.history[0].train.terms, "mean": norm.running_mean, "var": norm.running_var}
torch.save(saved, folder / f"seen-{number}-of-{count}.pt")
'''


def start(script, folder, number, count, compile="off", steps=3, form="mean"):
    command = [sys.executable, str(script), *map(str, (folder, number, count, compile, steps, form))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ.copy())


@pytest.mark.parametrize(
    ("compile", "form"),
    [("off", "mean"), ("off", "per_value"), pytest.param("kernels", "mean", marks=pytest.mark.slow)],
)
def test_two_processes_train_as_one_does(digits, tmp_path, compile, form):
    """ResNet-20, W2A2, both regularizers, augmentation: every parameter's gradient at every step."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    for count in (1, 2):
        (tmp_path / f"{count}").mkdir()
    processes = [start(script, tmp_path / f"{c}", n, c, compile, form=form) for n, c in ((0, 1), (0, 2), (1, 2))]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    one = torch.load(tmp_path / "1" / "seen-0-of-1.pt", weights_only=True)
    for number in (0, 1):
        two = torch.load(tmp_path / "2" / f"seen-{number}-of-2.pt", weights_only=True)
        assert len(one["gradients"]) == len(two["gradients"]) == 3
        for alone, process_group in zip(one["gradients"], two["gradients"], strict=True):
            assert alone.keys() == process_group.keys() and len(alone) > 60
            for name, expected in alone.items():
                torch.testing.assert_close(process_group[name], expected, rtol=1e-6, atol=1e-9, msg=name)
        torch.testing.assert_close((two["mean"], two["var"]), (one["mean"], one["var"]))
        for name, expected in one["terms"].items():
            assert two["terms"][name] == pytest.approx(expected, rel=1e-9)
    assert (tmp_path / "2" / "metrics.jsonl").is_file() and not (tmp_path / "2" / "other").exists()


def test_a_rank_that_dies_stops_the_others_with_a_message(digits, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    processes = [start(script, tmp_path, number, 2, steps=10_000) for number in (0, 1)]
    try:
        while not (tmp_path / "started-0").exists():
            assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
            time.sleep(0.1)
        processes[1].kill()
        killed = time.monotonic()
        output, _ = processes[0].communicate(timeout=60)
        assert processes[0].returncode != 0
        assert "TrainingError: rank 0: another process of this run has stopped" in output
        assert time.monotonic() - killed < 30
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_one_process_needs_no_group():
    from brfx import distributed

    values = torch.tensor([1.0], requires_grad=True)
    assert distributed.all_reduce_sum(values) is values and distributed.world_size() == 1 and distributed.rank() == 0
    assert (
        distributed.broadcast_object("x") == "x"
        and distributed.all_gather_object(3) == [3]
        and distributed.all_reduce_max(2.0) == 2.0
    )
    with distributed.process_group("cpu") as device:
        assert device == "cpu"
