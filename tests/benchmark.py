"""How far is a training step of each script from what the machine can do? (`make bench`)

Each script is started as a user starts it and stopped at its first training step. Then are timed,
in turns, so that a noisy machine disturbs all alike:

- a training step with all that the script does in it, the loader included,
- the loader alone,
- the operators of that step, called one by one without the script, autograd and autocast,
- the floor: the step's bare matrix products, forward and backward, in the same precision.

A table is printed, and written with more numbers to results/bench/.
"""

import argparse
import importlib
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START = time.perf_counter()

import torch
from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
N_ROUNDS = 15
TIMED = ("step", "loader", "operators", "floor")


class TimedError(Exception):
    """A script has come to its first training step, and was timed there."""


class Recorder(TorchDispatchMode):
    """Keeps what is called inside it: every operator with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.calls.append((operator, args, kwargs))
        return operator(*args, **kwargs)


def training(script, train, arguments):
    """Returns n steps of a script's training as a function, its loader, networks and optimizer.

    `arguments` are those with which the script calls its training function `train`; the optimizer
    is the one that ends a step.
    """
    if train.__name__ == "run_epoch":
        model, (loader, _), optimizer = arguments
        model.train()

        def steps(n):
            return script.epoch_iter(model, itertools.islice(loader, n), optimizer)

        return steps, loader, [model], optimizer
    loader, *others = arguments  # two networks and their optimizers, the generator's first
    return lambda n: train(itertools.islice(loader, n), *others), loader, others[:2], others[2]


def record_step(train_steps, optimizer):
    """Returns (operator, arguments, named arguments) of what computes in one step, loader included.

    Left out are views, which compute nothing, and the marks that an optimizer sets for a profiler.
    """
    recorder, ends = Recorder(), []
    hook = optimizer.register_step_post_hook(lambda *_: ends.append(len(recorder.calls)))
    with torch.compiler.set_stance("force_eager"), recorder:
        train_steps(2)
    hook.remove()
    step = recorder.calls[ends[0] : ends[1]]
    return [call for call in step if call[0].namespace == "aten" and not call[0].is_view]


@torch.no_grad()
def matrix_products(calls):
    """Returns the bare matrix products among the calls, each into memory of its own."""
    aten = torch.ops.aten
    factors = [args[-2:] for operator, args, _ in calls
               if operator in (aten.mm.default, aten.addmm.default)]  # fmt: skip
    return [(torch.mm, (a, b), {"out": torch.mm(a, b)}) for a, b in factors]


@torch.no_grad()
def repeat(calls, n, device):
    """Makes the calls in their order n times."""
    with torch.autocast(device, enabled=False):
        for _ in range(n):
            for operator, args, kwargs in calls:
                operator(*args, **kwargs)


def time_in_turns(train_steps, loader, networks, optimizer, device):
    """Returns the peak memory of training, and the milliseconds of each round by name."""
    begin = time.perf_counter()
    train_steps(3)
    n_steps = max(5, round(0.15 / (time.perf_counter() - begin)))
    peak = peak_memory(device)
    calls = record_step(train_steps, optimizer)
    products = matrix_products(calls)
    work = {
        "step": (lambda: train_steps(n_steps), n_steps),
        "loader": (lambda: list(map(len, loader)), len(loader)),
        "operators": (lambda: repeat(calls, n_steps, device), n_steps),
        "floor": (lambda: repeat(products, n_steps, device), n_steps),
    }
    times = {name: [] for name in TIMED}
    weights = [weight.detach() for network in networks for weight in network.parameters()]
    start = [weight.clone() for weight in weights]
    for _ in range(N_ROUNDS + 1):
        for name, (function, n) in work.items():
            begin = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - begin) / n)
        # The recorded optimizer takes the same step again and again, which would lead astray.
        for weight, value in zip(weights, start, strict=True):
            weight.copy_(value)
    # The first round warms up.
    return peak, {name: ms[1:] for name, ms in times.items()}


def peak_memory(device):
    """Returns the most bytes that the process, or on a GPU its tensors, had at once so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def time_script(script, train, options):
    """Starts a script and times it where it first calls its function of the name `train`.

    Returns the seconds until then, the batches of an epoch, the precision, the peak memory and the
    times.
    """
    original = getattr(script, train)

    def time_instead(*arguments):
        start_up, device = time.perf_counter() - START, script.ARGS.device
        train_steps, loader, *parts = training(script, original, arguments)
        fast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if fast else torch.float32
        timed = time_in_turns(train_steps, loader, *parts, device)
        raise TimedError(start_up, len(loader), str(dtype).removeprefix("torch."), *timed)

    setattr(script, train, time_instead)
    with tempfile.TemporaryDirectory() as folder:
        sys.argv[1:] = [*options, "--results_dir", folder]
        script.ARGS = script.parse_options()
        try:
            script.main()
        except TimedError as timed:
            return timed.args


def measure(name, options):
    """Returns the row of one model: quartiles of the times in milliseconds, and what follows."""
    script = importlib.import_module(f"a3_{name}_template")
    train = "train" if name == "gan" else "run_epoch"
    start_up, n_batches, precision, peak, times = time_script(script, train, options)
    median = {key: statistics.median(values) for key, values in times.items()}
    ratios = [step / bare for step, bare in zip(times["step"], times["floor"], strict=True)]
    n_epochs = script.ARGS.n_epochs if name == "gan" else script.ARGS.epochs
    cpu = f"CPU, {torch.get_num_threads()} threads"
    return {
        "model": name,
        "device": torch.cuda.get_device_name() if script.ARGS.device == "cuda" else cpu,
        "precision": precision,
        **{key: statistics.quantiles(values, n=4) for key, values in times.items()},
        "step_over_floor": statistics.median(ratios),
        "loader_share": median["loader"] / median["step"],
        "default_run_minutes": n_epochs * n_batches * median["step"] / 60_000,
        "start_up_seconds": start_up,
        "peak_gigabytes": peak / 1e9,
    }


def main():
    parser = argparse.ArgumentParser(
        description="Times the training steps of the scripts; other options are passed on to them."
    )
    parser.add_argument("--only", choices=["vae", "nf", "gan"], help="one model's row, as JSON")
    args, options = parser.parse_known_args()
    if args.only:
        print(json.dumps(measure(args.only, options)))
        return
    rows = []
    for name in ("vae", "nf", "gan"):  # a process each: start-up and peak memory are its own
        command = [sys.executable, __file__, "--only", name, *options]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    device = rows[0]["device"]
    print(f"{device}, torch {torch.__version__}; ms a step, median (quartiles)\n")
    names = ["model", "precision", *TIMED, "step / floor", "default run", "memory"]
    print("|", " | ".join(names), "|")
    print("|---" * len(names) + "|")
    for row in rows:
        times = ("{1:.2f} ({0:.2f}–{2:.2f})".format(*row[key]) for key in TIMED)
        run, memory = f"{row['default_run_minutes']:.1f} min", f"{row['peak_gigabytes']:.1f} GB"
        cells = [row["model"], row["precision"], *times, f"{row['step_over_floor']:.2f}"]
        print("|", " | ".join([*cells, run, memory]), "|")
    path = REPOSITORY / "results" / "bench" / f"{device.replace(', ', '_').replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\nwritten to {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
