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


class StartedError(Exception):
    """A script has come to its first training step."""


def start(script, function, options):
    """Runs a script until it calls the named function; returns that function's arguments."""

    def stop(*arguments):
        raise StartedError(arguments)

    original = getattr(script, function)
    setattr(script, function, stop)
    sys.argv[1:] = options
    script.ARGS = script.parse_options()
    try:
        script.main()
    except StartedError as started:
        return started.args[0]
    finally:
        setattr(script, function, original)


def set_up(script, options):
    """Starts a script; returns its training for n steps as a function, its loader and networks."""
    if hasattr(script, "Generator"):
        loader, discriminator, generator, *adam = start(script, "train", options)
        networks = [discriminator, generator]
        return (
            lambda n: script.train(itertools.islice(loader, n), *networks, *adam),
            loader,
            networks,
        )
    model, (loader, _), optimizer = start(script, "run_epoch", options)
    model.train()
    return (
        lambda n: script.epoch_iter(model, itertools.islice(loader, n), optimizer),
        loader,
        [model],
    )


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


def time_in_turns(train_steps, loader, networks, device, precision):
    """Returns the milliseconds of each round, by what is `TIMED`."""
    dtype = getattr(torch, precision)
    times = {name: [] for name in TIMED}
    with torch.autocast(device, dtype, precision != "float32", cache_enabled=False):
        floor = bare_products(record_products(train_steps, networks), dtype, device)
        begin = time.perf_counter()
        train_steps(3)
        n_steps = max(5, round(0.15 / (time.perf_counter() - begin)))  # about half a second
        work = {
            "step": (lambda: train_steps(n_steps), n_steps),
            "loader": (lambda: list(map(len, loader)), len(loader)),
            "floor": (lambda: floor(n_steps), n_steps),
        }
        for _ in range(N_ROUNDS + 1):
            for name, (function, n) in work.items():
                begin = time.perf_counter()
                function()
                if device == "cuda":
                    torch.cuda.synchronize()
                times[name].append(1000 * (time.perf_counter() - begin) / n)
    return {name: values[1:] for name, values in times.items()}  # the first round warms up


def measure(name, options):
    """Returns the row of one model: quartiles of the times in milliseconds, and what follows."""
    script = importlib.import_module(f"a3_{name}_template")
    with tempfile.TemporaryDirectory() as folder:
        steps = set_up(script, [*options, "--results_dir", folder])
        start_up = time.perf_counter() - START
        args = script.ARGS
        precision = args.precision
        if precision == "auto":
            precision = script.fast_precision(args.device)
        times = time_in_turns(*steps, args.device, precision)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = [step / bare for step, bare in zip(times["step"], times["floor"], strict=True)]
    n_steps = len(steps[1]) * vars(args).get("epochs", vars(args).get("n_epochs"))
    device, memory = f"CPU, {torch.get_num_threads()} threads", resource.RUSAGE_SELF
    peak_bytes = 1024 * resource.getrusage(memory).ru_maxrss
    if args.device == "cuda":
        device, peak_bytes = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    return {
        "model": name,
        "device": device,
        "precision": precision,
        **{name: statistics.quantiles(values, n=4) for name, values in times.items()},
        "step_over_floor": statistics.median(ratios),
        "loader_share": median["loader"] / median["step"],
        "default_run_minutes": n_steps * median["step"] / 60_000,
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
