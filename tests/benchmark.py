"""How far is a training step of each script from what the machine can do? (`make bench`)

Each script is started as a user starts it and stopped at its first training step. Then are timed,
in turns, so that a noisy machine disturbs all alike:

- a training step with all that the script does in it, the loader included,
- the loader alone,
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
from torch import nn

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
N_ROUNDS = 15
TIMED = ("step", "loader", "floor")


class TimedError(Exception):
    """A script has come to its first training step, and was timed there."""


def training(script, train, arguments):
    """Returns n steps of a script's training as a function, its loader and its networks.

    `arguments` are those with which the script calls its training function `train`.
    """
    if train.__name__ == "run_epoch":
        model, (loader, _), optimizer = arguments
        model.train()
        epoch = script.epoch_iter
        return lambda n: epoch(model, itertools.islice(loader, n), optimizer), loader, [model]
    loader, *others = arguments  # two networks and their optimizers
    return lambda n: train(itertools.islice(loader, n), *others), loader, others[:2]


def record_products(train_steps, networks):
    """Returns (rows, n_in, n_out, backward to the input?, to the weight?) of a step's layers."""
    products = []

    def record(layer, inputs, output):
        entry = [*inputs[0].shape, layer.out_features, inputs[0].requires_grad, False]
        products.append(entry)
        # The weight's gradient is computed if the output's gradient arrives and the weight's
        # hook fires; the GAN's generator step leaves out the discriminator's.
        pending.setdefault(layer, []).append(entry)

    pending = {}
    layers = [m for network in networks for m in network.modules() if isinstance(m, nn.Linear)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    hooks += [
        layer.weight.register_hook(lambda _, layer=layer: pending[layer][-1].__setitem__(4, True))
        for layer in layers
    ]
    with torch.compiler.set_stance("force_eager"):
        train_steps(1)
    for hook in hooks:
        hook.remove()
    return products


def bare_products(products, dtype, device):
    """Returns a function that runs the products n times, into memory that is there already."""
    work = []
    for rows, n_in, n_out, to_input, to_weight in products:
        x, w, y = (
            torch.randn(shape, dtype=dtype, device=device)
            for shape in ((rows, n_in), (n_out, n_in), (rows, n_out))
        )
        work.append((x, w.T, torch.empty_like(y)))
        if to_weight:
            work.append((y.T, x, torch.empty_like(w)))
        if to_input:
            work.append((y, w, torch.empty_like(x)))

    @torch.no_grad()
    def run(n):
        for _ in range(n):
            for a, b, out in work:
                torch.mm(a, b, out=out)

    return run


def time_in_turns(train_steps, loader, networks, device):
    """Returns the precision that the script has set, and each round's milliseconds by `TIMED`."""
    fast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if fast else torch.float32
    floor = bare_products(record_products(train_steps, networks), dtype, device)
    begin = time.perf_counter()
    train_steps(3)
    n_steps = max(5, round(0.15 / (time.perf_counter() - begin)))
    work = {
        "step": (lambda: train_steps(n_steps), n_steps),
        "loader": (lambda: list(map(len, loader)), len(loader)),
        "floor": (lambda: floor(n_steps), n_steps),
    }
    times = {name: [] for name in TIMED}
    for _ in range(N_ROUNDS + 1):
        for name, (function, n) in work.items():
            begin = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - begin) / n)
    # The first round warms up.
    return str(dtype).removeprefix("torch."), {name: ms[1:] for name, ms in times.items()}


def time_script(script, train, options):
    """Starts a script and times it where it first calls its function of the name `train`.

    Returns the seconds until then, the batches of an epoch, the precision and the times.
    """
    original = getattr(script, train)

    def time_instead(*arguments):
        start_up = time.perf_counter() - START
        train_steps, loader, networks = training(script, original, arguments)
        timed = time_in_turns(train_steps, loader, networks, script.ARGS.device)
        raise TimedError(start_up, len(loader), *timed)

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
    start_up, n_batches, precision, times = time_script(script, train, options)
    median = {key: statistics.median(values) for key, values in times.items()}
    ratios = [step / bare for step, bare in zip(times["step"], times["floor"], strict=True)]
    n_epochs = script.ARGS.n_epochs if name == "gan" else script.ARGS.epochs
    device = f"CPU, {torch.get_num_threads()} threads"
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if script.ARGS.device == "cuda":
        device, peak_bytes = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    return {
        "model": name,
        "device": device,
        "precision": precision,
        **{key: statistics.quantiles(values, n=4) for key, values in times.items()},
        "step_over_floor": statistics.median(ratios),
        "loader_share": median["loader"] / median["step"],
        "default_run_minutes": n_epochs * n_batches * median["step"] / 60_000,
        "start_up_seconds": start_up,
        "peak_gigabytes": peak_bytes / 1e9,
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
    print("| model | precision | step | loader | floor | step / floor | default run | memory |")
    print("|---|---|---|---|---|---|---|---|")
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
