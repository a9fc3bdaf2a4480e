"""How far is a training step of each script from what the machine can do? (`make bench`)

Timed in turns, so that a noisy machine disturbs all alike:

- a training step as the script runs it, the loader included,
- the loader alone,
- the floor: the step's bare matrix products, forward and backward, in the same precision.

A table is printed, and written with more numbers to results/bench/.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

START = time.perf_counter()

import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
N_ROUNDS = 15
TIMED = ("step", "loader", "floor")


def vae(device):
    """Returns the script's train function for n steps, its loader and networks, and its epochs."""
    import a3_vae_template as script

    train, _, _ = script.bmnist(batch_size=64, device=device)
    model = script.VAE().to(device)
    optimizer = script.make_optimizer(model, lr=3e-3)
    model.train()
    return (
        lambda n: script.epoch_iter(model, itertools.islice(train, n), optimizer),
        train, [model], 40,
    )  # fmt: skip


def nf(device):
    """The same for the flow."""
    import a3_nf_template as script

    train, _, _ = script.mnist(device=device)
    model = script.Model([784]).to(device)
    optimizer = script.make_optimizer(model, lr=1e-3)
    model.train()
    return (
        lambda n: script.epoch_iter(model, itertools.islice(train, n), optimizer),
        train, [model], 40,
    )  # fmt: skip


def gan(device):
    """The same for the GAN."""
    import a3_gan_template as script

    train, _, _ = script.mnist(batch_size=64, n_train=50_000, shift=False, device=device)
    generator, discriminator = script.Generator().to(device), script.Discriminator().to(device)
    adam = [
        torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
        for network in (generator, discriminator)
    ]
    return (
        lambda n: script.train(itertools.islice(train, n), discriminator, generator, *adam),
        train, [generator, discriminator], 200,
    )  # fmt: skip


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


def measure(name, precision):
    """Returns the row of one model: quartiles of the times in milliseconds, and what follows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_steps, loader, networks, n_epochs = {"vae": vae, "nf": nf, "gan": gan}[name](device)
    start_up = time.perf_counter() - START
    if precision == "auto":
        precision = sys.modules[f"a3_{name}_template"].fast_precision(device)
    dtype = getattr(torch, precision)
    with torch.autocast(device, dtype, precision != "float32", cache_enabled=False):
        floor = bare_products(record_products(train_steps, networks), dtype, device)
        n_steps = 5 if name == "nf" else 40
        work = {
            "step": (lambda: train_steps(n_steps), n_steps),
            "loader": (lambda: list(map(len, loader)), len(loader)),
            "floor": (lambda: floor(n_steps), n_steps),
        }
        times = {key: [] for key in TIMED}
        for _ in range(N_ROUNDS + 1):
            for key, (function, n) in work.items():
                begin = time.perf_counter()
                function()
                if device == "cuda":
                    torch.cuda.synchronize()
                times[key].append(1000 * (time.perf_counter() - begin) / n)
    times = {key: values[1:] for key, values in times.items()}  # the first round warms up
    median = {key: statistics.median(values) for key, values in times.items()}
    ratios = [step / bare for step, bare in zip(times["step"], times["floor"], strict=True)]
    return {
        "model": name,
        "device": f"CPU, {torch.get_num_threads()} threads"
        if device == "cpu"
        else torch.cuda.get_device_name(),
        "precision": precision,
        **{key: statistics.quantiles(values, n=4) for key, values in times.items()},
        "step_over_floor": statistics.median(ratios),
        "loader_share": median["loader"] / median["step"],
        "default_run_minutes": n_epochs * len(loader) * median["step"] / 60_000,
        "start_up_seconds": start_up,
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def main():
    parser = argparse.ArgumentParser(description="Times the training steps of the scripts.")
    parser.add_argument(
        "--only", choices=["vae", "nf", "gan"], help="print one model's row as JSON"
    )
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.precision)))
        return
    rows = []
    for name in ("vae", "nf", "gan"):  # a process each: start-up and peak memory are its own
        command = [sys.executable, __file__, "--only", name, "--precision", args.precision]
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
