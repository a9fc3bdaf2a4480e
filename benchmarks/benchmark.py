"""How far is a training step of each script from what the machine can do? (`make bench`)

Each script is started as a user starts it. Its training loader is replaced by one that hands out
the same batches and looks at the clock in between, so that what is timed is the script's own loop.
In turns, so that a noisy machine disturbs all alike:

- step: a training step with all that the script does in it, the loader included,
- loader: the loader alone,
- floor: the bare matrix products and convolutions of that step, forward, backward and in
  Muon, in the same precision; the products into memory of their own, while convolutions allocate
  theirs.

A table is printed, and more numbers are written to benchmarks/DEVICE.json. Options that it does
not know are passed on to the scripts: `benchmark.py --batch_size 256`. It needs a POSIX system, to
read the peak memory.
"""

import argparse
import contextlib
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from datasets import bmnist, mnist

REPOSITORY = Path(__file__).resolve().parent.parent
N_ROUNDS = 15
ROUND_SECONDS = 0.3  # of training steps in each round
TIMED = ("step", "loader", "floor")
RUNS = {
    "vae": "a3_vae_template.py",
    "gan": "a3_gan_template.py",
    "nf": "a3_nf_template.py",
    "nf_mixture": "extension/mixture_flow.py",
}


class TimedError(Exception):
    """The training was timed, and need not go on; carries what was found."""


class Recorder(TorchDispatchMode):
    """Keeps the matrix products and convolutions that are computed inside it, as calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if name in ("mm", "addmm"):
            a, b = args[-2:]
            self.calls.append((torch.mm, (a.detach(), b.detach()), {"out": torch.mm(a, b)}))
        elif name in ("convolution", "convolution_backward"):
            self.calls.append((operator, args, kwargs or {}))
        return result


def time_between(batches, loader):
    """Yields the loader's batches to a training loop, times its steps, then raises TimedError."""
    device = loader.images.device.type
    for _ in range(3):
        yield next(batches)  # warm up
    peak = peak_memory(device)
    recorder = Recorder()
    with recorder:
        yield next(batches)
    begin = time.perf_counter()
    yield next(batches)
    n_steps = max(3, round(ROUND_SECONDS / (time.perf_counter() - begin)))
    rest = itertools.chain(batches, itertools.chain.from_iterable(itertools.repeat(loader)))
    times = {name: [] for name in TIMED}

    def stop(name, begin, n):
        if device == "cuda":
            torch.cuda.synchronize()
        times[name].append(1000 * (time.perf_counter() - begin) / n)

    for _ in range(N_ROUNDS + 1):
        begin = time.perf_counter()
        yield from itertools.islice(rest, n_steps)
        stop("step", begin, n_steps)
        begin = time.perf_counter()
        sum(1 for _ in itertools.islice(rest, n_steps))
        stop("loader", begin, n_steps)
        begin = time.perf_counter()
        with torch.no_grad(), torch.autocast(device, enabled=False):
            for _ in range(n_steps):
                for operator, args, kwargs in recorder.calls:
                    operator(*args, **kwargs)
        stop("floor", begin, n_steps)
    # The first round warms up.
    precision = str(recorder.calls[0][1][0].dtype).removeprefix("torch.")
    raise TimedError(peak, len(loader), precision, {name: ms[1:] for name, ms in times.items()})


def peak_memory(device):
    """Returns the most bytes that the process, or on a GPU its tensors, had at once so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(make):
    """Returns `mnist` or `bmnist` with a training loader that times its first epoch."""

    def loaders(*args, **kwargs):
        train, *others = make(*args, **kwargs)
        plain = type(train)

        class Timed(plain):
            def __iter__(self):
                self.__class__ = plain  # from now on, for the batches that are handed out
                return time_between(iter(self), self)

        train.__class__ = Timed
        return (train, *others)

    return loaders


def measure(name, options):
    """Returns the row of one run: quartiles of the times in milliseconds, and what follows."""
    mnist.mnist, bmnist.bmnist = timed(mnist.mnist), timed(bmnist.bmnist)
    file = REPOSITORY / RUNS[name]
    script = {"__name__": "__main__", "__file__": str(file)}
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [file.name, *options, "--results_dir", folder]
        try:
            exec(compile(file.read_text(), file, "exec"), script)
        except TimedError as found:
            peak, n_batches, precision, times = found.args
    args = vars(script["ARGS"])
    ratios = [step / bare for step, bare in zip(times["step"], times["floor"], strict=True)]
    n_epochs = args.get("epochs") or args["n_epochs"]
    cpu = f"CPU, {torch.get_num_threads()} threads"
    return {
        "run": name,
        "device": torch.cuda.get_device_name() if args["device"] == "cuda" else cpu,
        "precision": precision,
        **{key: statistics.quantiles(values, n=4) for key, values in times.items()},
        "step_over_floor": statistics.median(ratios),
        "default_run_minutes": n_epochs * n_batches * statistics.median(times["step"]) / 60_000,
        "peak_gigabytes": peak / 1e9,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=RUNS, help="one row, as JSON")
    args, options = parser.parse_known_args()
    if args.only:
        with contextlib.redirect_stdout(sys.stderr):
            row = measure(args.only, options)
        print(json.dumps(row))
        return
    rows = []
    for name in RUNS:  # a process each: peak memory is its own
        command = [sys.executable, __file__, "--only", name, *options]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    device = rows[0]["device"]
    print(f"{device}, torch {torch.__version__}; ms a step, median (quartiles)\n")
    names = ["run", "precision", *TIMED, "step / floor", "training, default", "peak memory"]
    print("|", " | ".join(names), "|")
    print("|---" * len(names) + "|")
    for row in rows:
        times = ("{1:.2f} ({0:.2f}–{2:.2f})".format(*row[key]) for key in TIMED)
        run, memory = f"{row['default_run_minutes']:.1f} min", f"{row['peak_gigabytes']:.1f} GB"
        cells = [row["run"], row["precision"], *times, f"{row['step_over_floor']:.2f}"]
        print("|", " | ".join([*cells, run, memory]), "|")
    path = Path(__file__).with_name(f"{device.replace(', ', '_').replace(' ', '_')}.json")
    path.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\nwritten to {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
