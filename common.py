"""What every run needs: command line, run folder, checkpoints, several processes, and the frozen backbones.

Read `Run.steps` first: it is the loop under every training loop. Nothing of a method hides here.
Letters: B batch, H W pixels, p patch, h w patches (h = H / p), N = h * w, D backbone width, K code width, C
classes.
"""
import argparse
import ast
import collections
import contextlib
import difflib
import fcntl
import functools
import gc
import hashlib
import http.client
import io
import json
import math
import operator
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

# ---------------------------------------------------------------- command line
# Before torch, which takes seconds to load: --help answers at once.

METHODS = ("stego", "hp", "cause", "vice", "san")


class Parser(argparse.ArgumentParser):
    def error(self, message):                                     # one line instead of the whole usage
        unknown = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
        near = [n for u in unknown for n in difflib.get_close_matches(u, self._option_string_actions, 1)]
        hint = f"did you mean {', '.join(near)}?" if near else f"python {self.prog} --help lists the options"
        self.exit(2, f"error: {message}; {hint}\n")


def whole(low):
    """An argparse type: a whole number of at least `low`."""
    def convert(text):
        if not re.fullmatch(r"-?\d+", text) or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} should be a whole number of at least {low}")
        return int(text)
    return convert


def parser(doc):
    """The options that all methods share. Where the default is None, PRESETS of the method's file counts."""
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = p.add_argument_group("data and backbone").add_argument
    add("--data", default="scenes", metavar="NAME|DIR",
        help="data set (python data.py lists them) or a folder of your own images; scenes needs no file")
    add("--root", metavar="DIR", help="where the data set lies; python data.py NAME --root DIR checks it")
    add("--protocol", help="how images are resized and cropped; the default is the published one")
    add("--size", type=whole(8), metavar="PIXELS", help="side of a training image; a multiple of the patch")
    add("--arch", default="dct8",
        help="frozen backbone: dct8 (no weights), vits8, vitb8, dinov2_vits14, ...")
    add("--weights", metavar="FILE|none",
        help="weights from a file instead of the download; none = untrained")
    add("--depth", type=whole(1), metavar="K", help="keep the first K blocks of a ViT, then its final norm; "
        "try it where the last block was fine-tuned for something else")
    add("--clusters", type=whole(2),
        help="number of clusters; default: number of classes, 27 without labels")
    add = p.add_argument_group("training").add_argument
    add("--steps", type=whole(1), help="optimiser steps of the main phase")
    add("--batch-size", type=whole(1), help="images per step over all processes together")
    add("--lr", type=float, help="learning rate of the head")
    add("--seed", type=whole(0), default=0, help="same seed, same weights, bit for bit on a CPU")
    add("--skip-bad-steps", type=whole(0), default=0, metavar="N",
        help="go on after at most N steps whose loss is NaN or infinite; 0 stops at the first")
    add = p.add_argument_group("run").add_argument
    add("--out", metavar="RUN", help="run folder; default runs/METHOD-DATA-ARCH-SEED")
    add("--resume", metavar="RUN", help="continue the run in this folder with its own options")
    add("--save-every", type=whole(1), default=100, metavar="N", help="steps between checkpoints")
    add("--device", help="cuda, cuda:1, cpu; default: the accelerator if there is one")
    add("--workers", type=whole(0), help="processes that read images; default: 2, or 0 for scenes")
    add("--cache-features", metavar="DIR|ram|gpu", help="compute the frozen features once and keep them as "
        "fp16, so that later epochs cost only the head; needs bytes = images x D x N x 2")
    add("--compile", action="store_true", help="torch.compile the backbone; pays on CUDA in runs of minutes")
    add("--smoke", action="store_true", help="ten steps that touch everything, to see that it runs")
    add("--bench", type=whole(1), metavar="N", help="time N steps on data held in memory, then stop")
    add("--json", metavar="FILE", help="where --bench writes its figures")
    return p


def parse(arguments, presets, argv=None):
    """Options as given, else of the presets smoke, DATA+CHOICE, DATA/ARCH, DATA, default, else the defaults.

    With --resume the options of that run; only those that do not change the result may be given anew.
    """
    p = arguments()
    options = vars(p.parse_args([]))
    untouched = argparse.Namespace(**dict.fromkeys(options, parse))  # any object that no option can give
    given = {k: v for k, v in vars(p.parse_args(argv, untouched)).items() if v is not parse}
    if "resume" in given:
        folder = Path(given["resume"])
        saved = read_args(folder)
        free = {"resume", "root", "weights", "device", "workers", "save_every", "cache_features", "compile"}
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(set(given) - free))
        if names:
            raise ValueError(f"--resume continues {folder} with the options it was started with; "
                             f"drop {names}")
        return argparse.Namespace(**options | saved | given | {"out": str(folder)})
    data, arch = given.get("data", options["data"]), given.get("arch", options["arch"])
    chosen = ["default", "folder" if os.path.isdir(data) else data]
    chosen += [key for key in presets if "/" in key and f"{data}/{arch}".startswith(key)]
    chosen += [f"{data}+{choice}" for choice in given.values()]   # "coco27+tr": where --head tr is given
    chosen += ["smoke"] * ("smoke" in given)
    for key in chosen:
        options |= presets.get(key, {})
    return argparse.Namespace(**options | given)


def read_args(folder):
    """The options a run was started with: RUN/args.json."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no run folder {folder}")
    try:
        saved = json.loads((folder / "args.json").read_text())
        if not isinstance(saved, dict) or not {"seed", "batch_size"} <= set(saved):
            raise ValueError
        return saved
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no args.json, so it is no run folder") from None
    except ValueError:
        raise ValueError(f"{folder / 'args.json'} is damaged; start the run again") from None


def nearest(name, names):
    """A hint for an error message: `; did you mean 'vits8'?`, or the list of names."""
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def quick_help(script):
    """Print a method's help. Loading torch takes seconds, so only its `arguments` function is executed."""
    tree = ast.parse(Path(script).read_text())
    scope = {"common": sys.modules[__name__], "argparse": argparse, "__doc__": ast.get_docstring(tree)}
    keep = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "arguments"
            or isinstance(n, ast.Assign) and n.targets[0].id.isupper()]
    exec(compile(ast.Module(keep, []), script, "exec"), scope)
    scope["arguments"]().print_help()
    sys.exit(0)


if {"-h", "--help"} & set(sys.argv[1:]) and Path(sys.argv[0]).stem in METHODS and Path(sys.argv[0]).is_file():
    quick_help(sys.argv[0])

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torchvision  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402


def main(arguments, presets, train):
    """Run a method from the command line. A mistake to expect ends in one line on stderr and an exit code."""
    sys.__stdout__.reconfigure(errors="backslashreplace")         # a file's name may be no text
    try:
        code = train(parse(arguments, presets))
    except (ValueError, OSError, ArithmeticError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        code = report(error)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):        # killed from outside, mostly for memory
            raise
        code = report(ChildProcessError(f"{error} Take fewer --workers, or 0".replace("\n", " ")))
    gc.collect()  # the error held the loader's processes; Python's exit, if left to end them, complains
    sys.exit(code)


def report(error):
    """One line for an error, and its exit code: 2 bad input, 1 the run went wrong, 130 Ctrl-C."""
    if os.environ.get("TRACEBACK"):  # for developers: TRACEBACK=1 python cause.py
        raise error
    if isinstance(error, KeyboardInterrupt):
        return 130
    # a loader worker's error carries its traceback, whose last part counts; names may have line breaks
    text = re.split(r"^\w+(?:Error|Exception): ", str(error).strip(), flags=re.M)[-1].replace("\n", "\\n")
    text = text or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        text = "the GPU's memory is full; take a smaller --batch-size or --size"
    print(f"error: {text}", file=sys.stderr, flush=True)
    return 1 if isinstance(error, ArithmeticError) else 2


# ---------------------------------------------------------------- several processes (torchrun)
# Every process holds the same weights and the same random state, and takes a contiguous share of the global
# batch. Random numbers are drawn for the global batch, keys and negatives are gathered, gradients are
# averaged: N processes compute what one process computes with the same global batch.

def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def start_processes(device=None):
    """Join the other processes of `torchrun`, if any, and choose this process's device."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = torch.device(device or accelerator or "cpu")
    except RuntimeError:
        raise ValueError(f"--device {device} is no device; cpu, cuda, cuda:1 are") from None
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type
                                 or (device.index or 0) >= torch.accelerator.device_count()):
        raise ValueError(f"--device {device}: this machine has no such device; --device cpu always works")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    backward = forward                                            # every process's loss depends on the sum


def reduce_sum(x):
    """Sum over all processes, with gradient."""
    return _Sum.apply(x) if world() > 1 else x


def gather(x):
    """Rows of all processes in rank order, with gradient: (b, ...) -> (world * b, ...)."""
    if world() == 1:
        return x
    rows = x.new_zeros(world(), *x.shape)
    rows[rank()] = x                                              # the others fill in theirs
    return reduce_sum(rows).flatten(0, 1)


def rand_rows(rows, *shape, device=None):
    """Uniform numbers (rows, *shape) for this process's images: its share of a draw for the global batch."""
    return torch.rand(world() * rows, *shape, device=device)[rank() * rows:(rank() + 1) * rows]


def dropout(x, p, training, channels=False):
    """Dropout on x (B, ...) by `rand_rows`; `channels`: of whole channels of (B, C, ...), as nn.Dropout2d."""
    if not training or p == 0:
        return x
    shape = (x.shape[1],) + (1,) * (x.dim() - 2) if channels else x.shape[1:]
    return (x * rand_rows(len(x), *shape, device=x.device).ge_(p).to(x.dtype)).div_(1 - p)


def average_gradients(*modules):
    """Mean of the gradients over all processes, in one message. Call it between backward() and step()."""
    if world() == 1:
        return
    gradients = [p.grad for m in modules for p in m.parameters() if p.grad is not None]
    flat = nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / world(), gradients)


# ---------------------------------------------------------------- a run

class Drawn(torch.utils.data.Dataset):
    """A data set whose random draws depend on (seed, step, place in the batch), not on the worker process."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        (index, seed), error = key, ""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for step in range(len(self.dataset)):                 # unreadable: the next image takes its place
                item = self.dataset[(index + step) % len(self.dataset)]
                if not item["error"]:
                    return {**item, "error": error}
                error = error or f"{item['path']}: {item['error']}"
        raise OSError(f"no image could be read; the last one: {item['path']}: {item['error']}")


@functools.lru_cache(1)
def shuffled(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def together(items):
    """Items as a batch. ValueError where their images have several shapes, as with --protocol whole."""
    shapes = sorted({tuple(item["image"].shape[-2:]) for item in items})
    if len(shapes) > 1:
        raise ValueError(f"images of {shapes[0]} and {shapes[1]} pixels (height, width) cannot share a "
                         "batch; --protocol stego, picie or squash makes them equal")
    return torch.utils.data.default_collate(items)


def order(n, batch, start, steps, seed):
    """Batches of (index, seed) for this process: shuffled epochs, chained, so that every batch is full."""
    share = batch // world()
    for first in range(start * batch + rank() * share, steps * batch, batch):
        yield [(shuffled(n, seed + place // n)[place % n], (seed * 1_000_003 + place) % 2 ** 63)
               for place in range(first, first + share)]


def quiet_worker(_):
    for number in (signal.SIGINT, signal.SIGTERM):                # sent to the whole group: the parent acts
        signal.signal(number, signal.SIG_IGN)


class Run:
    """One training run: its device, processes, random state, folder, log, checkpoints and progress bar.

    The folder is made when the first step begins: bad input leaves nothing behind. It holds args.json,
    log.jsonl and last.pt: {"method", "args", "model" (what scoring needs), "phase", "step", "state" (what
    resuming needs), "rng"}. Raises ValueError where it already holds a run, or another process writes there.
    """

    def __init__(self, method, args):
        self.method, self.args, self.device = method, args, start_processes(args.device)
        self.rank, self.world = rank(), world()
        if args.batch_size % self.world:
            raise ValueError(f"--batch-size {args.batch_size} cannot be shared by {self.world} processes")
        if args.workers is None:
            args.workers = 0 if args.data == "scenes" else 2
        torch.manual_seed(args.seed)
        torch.backends.cudnn.benchmark = True
        self.state, self.phase, self.step, self.terms, self.benched = {}, -1, 0, {}, {}
        self.bad, self.stop, self.stepping, self.reported, self.timer = 0, 0, False, set(), None
        self.lock = self.log = None
        self.folder = self._choose_folder()
        self.loaded = load_checkpoint(self.folder, method) if args.resume else None
        signal.signal(signal.SIGINT, self._signal)
        signal.signal(signal.SIGTERM, self._signal)

    def _choose_folder(self):
        args = self.args
        name = Path(args.data).resolve().name if os.path.isdir(args.data) else args.data
        folder = Path(args.out or f"runs/{self.method}-{name}-{args.arch}-{args.seed}")
        if args.out and not args.resume and (folder / "last.pt").exists():
            raise ValueError(f"{folder} already holds a run; continue it with --resume {folder} or choose "
                             "another --out")
        number, base = 2, folder
        while not args.out and folder.exists():                   # nothing is written over: the next number
            folder, number = Path(f"{base}-{number}"), number + 1
        box = [folder]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def _open_folder(self):
        if self.phase == 0:
            where = "" if self.args.bench else f", folder {self.folder}"
            self.say(f"{self.method} on {self.args.data} with {self.args.arch}, seed {self.args.seed}, "
                     f"{self.device}, {self.world} process{'es' * (self.world > 1)}, torch "
                     f"{torch.__version__}{where}")
        if self.lock or self.rank or self.args.bench:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.folder)
        write(self.folder / "args.json", json.dumps(vars(self.args), indent=1).encode())
        log = self.folder / "log.jsonl"

        def is_done(line):                                        # steps after the checkpoint are done again
            try:
                entry = json.loads(line)
                return (entry["number"], entry["step"]) <= (self.loaded["phase"], self.loaded["step"])
            except (ValueError, KeyError, TypeError):             # a line that a power failure cut off
                return False
        lines = log.read_text(errors="replace").splitlines() if self.loaded and log.exists() else []
        write(log, "".join(line + "\n" for line in lines if is_done(line)).encode())
        self.log = open(log, "a", buffering=1)

    def _signal(self, number, frame):
        if self.stop or not self.stepping:                        # second Ctrl-C, or no step is under way
            self.say(f"stopped{self._how_to_resume()}")
            os._exit(128 + number)
        self.stop = number
        self.say("stopping after this step; press Ctrl-C again to stop at once")

    def _how_to_resume(self):
        if not (self.folder / "last.pt").exists() or self.args.bench:
            return "; there is no checkpoint yet"
        return f"; continue with: python {self.method}.py --resume {self.folder}"

    def say(self, text):
        """One line above the progress bar, from the first process only."""
        if self.rank == 0:
            tqdm.write(text.replace("\n", "\\n"), file=sys.stderr)

    def autocast(self):
        """bf16 on CUDA, where fp16 could overflow unseen; fp32 on a CPU."""
        cuda = self.device.type == "cuda"
        return torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()

    def steps(self, phase, total, dataset, **state):
        """Yield (step, batch) for one phase of training; everything named in `state` is saved and restored.

        phase: name for log and progress bar. total: steps. dataset: items as data.Images gives them. state:
        modules, optimizers (anything with state_dict) and tensors. A phase that a resumed run had finished
        restores its state and yields nothing. With --bench, three batches are held in memory and timed.
        """
        self.state.update(state)
        self.phase, self.step, self.name = self.phase + 1, 0, phase
        self._open_folder()
        if self.loaded:
            self._restore(state)
            if self.loaded["phase"] > self.phase:
                return
            self.step = self.loaded["step"]
            set_rng(self.loaded["rng"])
            self.loaded = None
        else:
            self.save()                                           # resumable from its first step on
        bench = self.args.bench
        keys = order(len(dataset), self.args.batch_size, self.step, 3 if bench else total,
                     self.args.seed * 10_000_019 + self.phase * 1_000_003)
        loader = torch.utils.data.DataLoader(
            Drawn(dataset), batch_sampler=keys, num_workers=0 if bench else self.args.workers,
            pin_memory=self.device.type == "cuda", worker_init_fn=quiet_worker, collate_fn=together,
            generator=torch.Generator())                          # its own: ours stays untouched
        if bench:
            yield from self._bench(phase, [self._move(batch) for batch in loader])
            return
        bar = tqdm(total=total, initial=self.step, desc=phase, unit="step", dynamic_ncols=True,
                   disable=self.rank > 0)
        last, last_step = time.perf_counter(), self.step
        self.stepping = True
        try:
            for batch in loader:
                yield self.step, self._move(batch)
                self.step += 1
                bar.update()
                if self.step % 10 == 0 or self.step == total:
                    now = time.perf_counter()
                    rate = (self.step - last_step) * self.args.batch_size / (now - last)
                    last, last_step = now, self.step
                    self._log(images_per_second=round(rate, 1), memory_gb=round(peak_memory(self.device), 3))
                    bar.set_postfix_str(f"loss {self.terms.get('loss', math.nan):.3f}, {rate:.0f} images/s")
                if self.stop or self.step % self.args.save_every == 0 or self.step == total:
                    self.save()
                if self.stop:
                    bar.close()
                    self.say(f"stopped at step {self.step} of {total} ({phase}){self._how_to_resume()}")
                    sys.exit(128 + self.stop)
        finally:
            self.stepping = False
            bar.close()

    def _move(self, batch):
        for text in set(batch.get("error", ())) - {""} - self.reported:
            self.reported.add(text)
            self.say(f"skipped an unreadable image: {text}")
        return {name: x.to(self.device, non_blocking=True) if torch.is_tensor(x) else x
                for name, x in batch.items()}

    def finite(self, batch, **terms):
        """Note the terms of the loss for the log. False: one is not finite, so the step must not be taken.

        Raises FloatingPointError with the step, the term and the files once more than --skip-bad-steps were
        bad. Reading the terms is the one synchronisation of a step; the next batch is being loaded meanwhile.
        """
        values = [torch.as_tensor(term, device=self.device).detach().float() for term in terms.values()]
        values = torch.stack(values).tolist()
        bad = [name for name, value in zip(terms, values) if not math.isfinite(value)]
        if self.world > 1:  # all processes skip, and stop, at the same step
            flags = torch.tensor([len(bad), self.stop], device=self.device)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            bad, self.stop = bad or ["another process's loss"] * int(flags[0] > 0), int(flags[1])
        if not bad:
            self.terms = dict(zip(terms, values))
            return True
        self.bad += 1
        text = (f"step {self.step} ({self.name}): {', '.join(bad)} is not finite; images: "
                f"{', '.join(batch['path'])}")
        if self.bad > self.args.skip_bad_steps:
            self.save()  # the weights are those of the last good step
            raise FloatingPointError(f"{text}; the state before it is in {self.folder / 'last.pt'}; lower "
                                     f"--lr, or leave such steps out with --skip-bad-steps")
        self.say(f"left out {text}")
        return False

    def _log(self, **more):
        if self.log:
            entry = {"phase": self.name, "number": self.phase, "step": self.step, **self.terms, **more}
            self.log.write(json.dumps(entry) + "\n")

    def save(self):
        """Write RUN/last.pt: to a temporary file, then renamed, so that a whole checkpoint always exists."""
        if self.rank or self.args.bench:
            return
        saved = {name: trained(x) if hasattr(x, "state_dict") else x for name, x in self.state.items()}
        save({"method": self.method, "args": vars(self.args), "model": saved.get("model"), "state": saved,
              "phase": self.phase, "step": self.step, "rng": get_rng()}, self.folder / "last.pt")

    def _restore(self, state):
        path = self.folder / "last.pt"
        for name, x in state.items():
            if name not in self.loaded["state"]:                  # going on would train it from the start
                raise ValueError(f"{path} does not fit: {name} is missing")
            saved = self.loaded["state"][name]
            if isinstance(x, nn.Module):
                load_trained(x, saved, path)
                continue
            try:
                x.load_state_dict(saved) if hasattr(x, "load_state_dict") else x.data.copy_(saved)
            except Exception as error:                            # torch raises many kinds for damage
                raise ValueError(f"{path} does not fit: {name}: {type(error).__name__}: {error}") from None

    # -------------------------------- frozen features
    def features(self, backbone, dataset):
        """-> function (images, index) -> (B,D,h,w) of the frozen backbone; --cache-features looks it up."""
        if dataset.size:                                          # refused before the run folder is made
            getattr(backbone, "backbone", backbone).grid(torch.empty(0, 3, dataset.size, dataset.size))
        if self.args.compile:
            backbone = torch.compile(backbone)
        if self.args.cache_features and not self.args.bench:
            return FeatureCache(self, backbone, dataset)

        def compute(images, index=None):
            with torch.no_grad(), self.autocast():
                return backbone(images).float()
        return compute

    # -------------------------------- --bench
    def mark(self, part):
        """The time since the last mark was spent on `part`. Costs nothing without --bench."""
        if self.timer is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.timer[part] = self.timer.get(part, 0) + now - self.since
            self.since = now

    def _bench(self, phase, batches, warm_up=2):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for step in range(self.args.bench + warm_up):
            if step in (0, warm_up):
                self.timer, self.since = {}, time.perf_counter()
            yield step, batches[step % len(batches)]
            self.mark("rest")
        ms = {part: 1000 * seconds / self.args.bench for part, seconds in self.timer.items()}
        self.timer, total = None, sum(ms.values())
        rate = 1000 * self.args.batch_size / total
        ratio = total / ms["backbone"] if ms.get("backbone") else None
        figures = {"phase": phase, "method": self.method, "arch": self.args.arch, "size": self.args.size,
                   "batch_size": self.args.batch_size, "device": str(self.device),
                   "threads": torch.get_num_threads(), "ms": {**ms, "step": total}, "images_per_second": rate,
                   "step_over_backbone": ratio, "peak_gb": peak_memory(self.device)}
        self.benched[phase] = figures
        parts = ", ".join(f"{part} {x:.1f} ms ({x / total:.0%})" for part, x in ms.items())
        self.say(f"{phase}: {total:.1f} ms a step, {rate:.1f} images/s, peak {figures['peak_gb']:.2f} GB; "
                 + parts + (f"; step / backbone {ratio:.2f}" if ratio else ""))
        if self.args.json and self.rank == 0:                     # the phase "head" first, where there is one
            main_phase = self.benched.get("head", figures)
            write(Path(self.args.json), json.dumps({**main_phase, "phases": self.benched}, indent=1).encode())


class FeatureCache:
    """Frozen features of a data set as fp16 (n,D,h,w), computed once: kept in memory, on the GPU or in DIR.

    Only for data without random pre-processing. In DIR the file name is a hash of weights, images and their
    sizes, so that a stale file is never used. Raises ValueError where the features would not fit.
    """

    def __init__(self, run, backbone, dataset):
        self.run, where = run, run.args.cache_features
        loader = torch.utils.data.DataLoader(dataset, 16, num_workers=run.args.workers, collate_fn=together,
                                             worker_init_fn=quiet_worker, generator=torch.Generator())
        with torch.no_grad(), run.autocast():
            shape = (len(dataset), *backbone(dataset[0]["image"][None].to(run.device)).shape[1:])
        size, room = 2 * math.prod(shape), self._room(where)
        if size > 0.9 * room:
            raise ValueError(f"--cache-features {where}: {size / 1e9:.1f} GB of features, but only "
                             f"{room / 1e9:.1f} GB are free; take another place, or none")
        if where in ("ram", "gpu"):
            place = run.device if where == "gpu" else "cpu"
            self.table = torch.empty(shape, dtype=torch.float16, device=place)
            self._fill(backbone, loader)
        else:
            file = Path(where) / f"features-{fingerprint(backbone, dataset)}.f16"
            if not file.exists() or file.stat().st_size != size:
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_suffix(f".{os.getpid()}.part")
                self.table = map_file(part, shape, shared=True)
                self._fill(backbone, loader)
                os.replace(part, file)
            self.table = map_file(file, shape, shared=False)
        run.say(f"features of {len(dataset)} images: {size / 1e6:.0f} MB, {size // len(dataset)} bytes an "
                f"image ({where})")
        # their files are not opened again, so the data set must know which rows hold no features
        dataset.unreadable = set(self.table[:, 0, 0, 0].isnan().nonzero().flatten().tolist())
        dataset.read_images = False

    def _room(self, where):
        if where == "gpu":
            if self.run.device.type != "cuda":
                raise ValueError("--cache-features gpu needs a GPU; on a CPU take ram or a folder")
            return torch.cuda.mem_get_info(self.run.device)[0]
        if where == "ram":
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        folders = [Path(where), *Path(where).resolve().parents]
        return shutil.disk_usage(next(folder for folder in folders if folder.exists())).free

    def _fill(self, backbone, loader):
        for batch in tqdm(loader, "features", unit="batch", disable=self.run.rank > 0, dynamic_ncols=True):
            with torch.no_grad(), self.run.autocast():
                feats = backbone(batch["image"].to(self.run.device))
            if not torch.isfinite(feats).all():
                raise FloatingPointError(f"the backbone's features are not finite; images: "
                                         f"{', '.join(batch['path'])}")
            feats[torch.tensor([bool(error) for error in batch["error"]])] = math.nan
            self.table[batch["index"].to(self.table.device)] = feats.half().to(self.table.device)

    def __call__(self, images, index):
        feats = self.table[index.to(self.table.device)].to(self.run.device, non_blocking=True).float()
        return feats.nan_to_num()                                 # an unreadable image is like no other


def map_file(path, shape, shared):
    """A file of fp16 numbers as a tensor; the system reads what is used. shared: writing reaches the file."""
    size = math.prod(shape)
    return torch.from_file(str(path), shared=shared, size=size, dtype=torch.float16).view(shape)


# ---------------------------------------------------------------- files

CHECKPOINT = {"method": str, "args": dict, "model": (dict, type(None)), "phase": int, "step": int,
              "state": dict, "rng": list}


def fingerprint(backbone, dataset):
    """A name for (weights, images, pre-processing): 16 hex digits that change with any of them."""
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode() + tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(repr((type(backbone).__name__, sorted((k, v) for k, v in vars(dataset).items()
                        if isinstance(v, (str, int, float, tuple, type(None)))))).encode())
    for path in getattr(dataset, "paths", ()):
        stat = os.stat(path) if os.path.exists(path) else None
        digest.update(os.fsencode(f"{path} {stat and (stat.st_size, stat.st_mtime_ns)}"))    # any bytes
    return digest.hexdigest()[:16]


def lock(folder):
    """Hold RUN/.lock as long as this process lives; the system frees it however the process ends."""
    handle = open(folder / ".lock", "w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"another run is writing to {folder}; wait for it or choose another --out") from None
    return handle


def write(path, data):
    """Bytes -> file, by way of a temporary one that is renamed: a reader finds the old or the new whole."""
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"could not write {path} ({error.strerror}); what it held before is intact") from None


def save(content, path):
    buffer = io.BytesIO()  # in memory first: torch.save may abort on a full disk
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def load_checkpoint(folder, method=None):
    """The dictionary in RUN/last.pt, tensors and plain values only. Raises ValueError for anything else."""
    path = Path(folder) / "last.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} holds no trained run")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, a pickle with code, no checkpoint at all
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}); it is damaged or "
                         "not ours") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(k, ...), v)
                                                for k, v in CHECKPOINT.items()):
        raise ValueError(f"{path} is not a checkpoint of this project")
    if method and content["method"] != method:
        raise ValueError(f"{path} is a run of {content['method']}.py, not of {method}.py")
    return content


def trained(x):
    """state_dict without the frozen backbone, which is loaded from its own file."""
    return {k: v for k, v in x.state_dict().items() if not str(k).startswith("backbone.")}


def load_trained(module, saved, path):
    """Inverse of `trained`. Raises ValueError naming the first key that does not fit."""
    own = trained(module)
    if not isinstance(saved, dict):
        raise ValueError(f"{path} does not fit: it holds no weights for {type(module).__name__}")
    for key in sorted(set(own) ^ set(saved), key=str):
        wrong = "missing" if key in own else "unknown to this model"
        raise ValueError(f"{path} does not fit: {key} is {wrong}")
    for key, x in own.items():
        found = saved[key]
        whole = torch.is_tensor(found) and found.layout is torch.strided and found.device.type == "cpu"
        if not whole or (found.dtype, found.shape) != (x.dtype, x.shape):
            raise ValueError(f"{path} does not fit: {key} should be {x.dtype} {tuple(x.shape)}")
    module.load_state_dict(saved, strict=False)


def get_rng():
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def set_rng(states):
    try:
        torch.set_rng_state(states[0])
        if len(states) > 1 and torch.cuda.is_available():
            torch.cuda.set_rng_state(states[1])
    except (TypeError, IndexError, RuntimeError) as error:
        raise ValueError(f"the checkpoint's random state is damaged ({error}); start the run again") from None


def peak_memory(device):
    """Peak memory in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024                # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def versions(device):
    """What a figure depends on: versions, hardware, commit."""
    command = ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:                                               # no git on this machine
        commit = "unknown"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores"
    return {"python": sys.version.split()[0], "torch": torch.__version__, "commit": commit, "device": machine}


# ---------------------------------------------------------------- frozen backbones

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]         # of ImageNet: all backbones here expect it
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class Backbone(nn.Module):
    """What all backbones share: eval mode for good, sides that are multiples of the patch, an attention.
    .dim is D, .patch the side of a patch in pixels, .prefix the number of tokens before the patches."""
    prefix = 0

    def train(self, mode=True):                   # inside a model that trains, batch norm must not follow
        return super().train(False)

    def grid(self, images):
        (H, W), p = images.shape[-2:], self.patch
        if H % p or W % p or not H or not W:
            raise ValueError(f"an image of {H}x{W} pixels does not divide into patches of {p}; "
                             f"take a multiple of {p} for --size")
        return H // p, W // p

    def forward_with_attention(self, images):
        """(B,3,H,W) -> features (B,D,h,w), attention (B,1,N,N). Where a network has no attention of its own,
        the soft-max over the cosines of its features stands for it: one head, no prefix tokens."""
        feats = self(images)
        unit = F.normalize(feats.flatten(2), dim=1)               # (B,D,N)
        return feats, (unit.transpose(1, 2) @ unit).softmax(-1)[:, None]


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def queries_keys_values(self, x, rotary):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)      # (B,heads,T,d)
        return (q, k, v) if rotary is None else (rotate(q, *rotary), rotate(k, *rotary), v)

    def forward(self, x, rotary=None):
        x = F.scaled_dot_product_attention(*self.queries_keys_values(x, rotary))
        return self.proj(x.transpose(1, 2).flatten(2))

    def map(self, x, rotary=None):
        q, k, _ = self.queries_keys_values(x, rotary)             # fused attention never forms this matrix
        return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)                    # (B,heads,T,T)


def rotate(x, sin, cos):
    """Rotary positions for the last N of (B,heads,T,d) tokens: channel c with c + d/2; sin, cos (N,d)."""
    prefix, x = x.split((x.shape[2] - len(sin), len(sin)), dim=2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((prefix, (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)), dim=2)


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, heads, mlp, scale, eps):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim, eps), Attention(dim, heads), scale(dim)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim, eps), mlp(dim, 4 * dim), scale(dim)

    def forward(self, x, rotary=None):
        x = x + self.ls1(self.attn(self.norm1(x), rotary))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(Backbone):
    """(B,3,H,W) -> (B,D,h,w): the patch tokens after the last block and the final norm.

    Parameters carry the names of DINO's state dict. The stored table of positions has side x side patches
    (default: 224 pixels); `position` is the authors' rule for another grid: offset (DINO: (h + 0.1) / side),
    size, antialias, or rotary (DINOv3, no table). SelfPatch has neither class token nor final norm.
    """
    def __init__(self, dim, depth, heads, patch, side=None, position="offset", cls=True, registers=0,
                 layer_scale=False, swiglu=False, norm=True, eps=1e-6):
        super().__init__()
        self.dim, self.patch, self.position, self.prefix = dim, patch, position, int(cls) + registers
        self.side = side or 224 // patch
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})

        def tokens(n):
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, n, dim), std=0.02)) if n else None
        self.cls_token, self.register_tokens = tokens(int(cls)), tokens(registers)
        self.pos_embed = None if position == "rotary" else tokens(int(cls) + self.side ** 2)
        if position == "rotary":                                  # wavelengths in units of half an image side
            n = dim // heads // 4
            self.register_buffer("periods", 100 ** (torch.arange(n) / n))
        mlp, scale = SwiGLU if swiglu else MLP, LayerScale if layer_scale else nn.Identity
        self.blocks = nn.ModuleList(Block(dim, heads, mlp, scale, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps) if norm else nn.Identity()

    def positions(self, h, w):
        """The stored table for a grid of h x w patches, by the authors' own rule: (1, cls + h*w, D)."""
        n = self.side
        if h == w == n:
            return self.pos_embed
        cls, table = self.pos_embed.float().tensor_split([-n * n], dim=1)
        how = {"scale_factor": ((h + 0.1) / n, (w + 0.1) / n)} if self.position == "offset" else \
            {"size": (h, w), "antialias": self.position == "antialias"}
        table = F.interpolate(table.transpose(1, 2).unflatten(2, (n, n)), mode="bicubic", **how)
        return torch.cat((cls, table.flatten(2).transpose(1, 2)), dim=1)

    def rotary(self, h, w):
        """sin and cos (N, D/heads) of the angles: y of a patch centre first, then x, both in (-1, 1)."""
        y, x = (((torch.arange(n, device=self.periods.device) + 0.5) / n * 2 - 1) for n in (h, w))
        centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)        # (N,2)
        angles = (2 * torch.pi * centres[:, :, None] / self.periods).flatten(1).repeat(1, 2)
        return angles.sin(), angles.cos()

    def tokens(self, images, with_map=False):
        """-> tokens (B, prefix + N, D) after the final norm, attention of the last block or None, (h, w)."""
        h, w = self.grid(images)
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)                     # (B,N,D)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        rotary = self.rotary(h, w) if self.position == "rotary" else None
        if rotary is None:
            x = x + self.positions(h, w)
        if self.register_tokens is not None:                      # after the class token, without position
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)
        for block in self.blocks[:-1]:
            x = block(x, rotary)
        last = self.blocks[-1]
        attention = last.attn.map(last.norm1(x), rotary) if with_map else None
        return self.norm(last(x, rotary)), attention, (h, w)

    def forward(self, images):
        tokens, _, grid = self.tokens(images)
        return tokens[:, self.prefix:].transpose(1, 2).unflatten(2, grid)

    def forward_with_attention(self, images):
        """-> features (B,D,h,w), soft-maxed attention of the last block (B,heads,prefix+N,prefix+N)."""
        tokens, attention, grid = self.tokens(images, with_map=True)
        return tokens[:, self.prefix:].transpose(1, 2).unflatten(2, grid), attention


class ResNet50(Backbone):
    """torchvision's ResNet-50 with its last two stages dilated to stride 8: (B,3,H,W) -> (B,2048,H/8,W/8)."""
    dim, patch = 2048, 8

    def __init__(self):
        super().__init__()
        net = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=(False, True, True))
        for name, child in list(net.named_children())[:-2]:       # without avgpool and fc, names unchanged
            self.add_module(name, child)

    def forward(self, images):
        self.grid(images)
        for child in self.children():
            images = child(images)
        return images


class DCT8(Backbone):
    """A backbone without weights: what the 8x8 DCT says about a patch. (B,3,H,W) -> (B,2*C,H/8,W/8).

    C = 12: mean colour, log energy of nine bands of the luminance (three octaves, three orientations); the
    other half is their average over the 5x5 patches around. The constant makes the energies of drawn scenes
    zero on average, so that cosines between patches take both signs.
    """
    patch = 8

    def __init__(self):
        super().__init__()
        k = torch.arange(8.0)
        basis = torch.cos(torch.pi * k[:, None] * (k + 0.5) / 8)
        basis = basis * torch.where(k == 0, 0.125, 0.25)[:, None].sqrt()          # orthonormal rows
        self.register_buffer("basis", torch.einsum("uy,vx->uvyx", basis, basis).reshape(64, 1, 8, 8))
        v, u = k.repeat(8), k.repeat_interleave(8)
        octave = torch.bucketize(torch.maximum(u, v), torch.tensor([0.5, 1.5, 3.5]))   # of 0, 1, 2..3, 4..7
        lean = (u > 2 * v).long() - (v > 2 * u).long()            # change mostly downwards, diagonal, across
        band = torch.where(octave > 0, (octave - 1) * 3 + lean + 1, -1)
        self.register_buffer("bands", F.one_hot(band + 1, 10)[:, 1:].float().T.reshape(9, 64, 1, 1))
        self.register_buffer("grey", torch.tensor([0.299, 0.587, 0.114])[:, None, None] * STD)
        self.dim = 2 * 12

    def forward(self, images):
        self.grid(images)
        grey = (images * self.grey).sum(1, keepdim=True)          # (B,1,H,W)
        energy = F.conv2d(F.conv2d(grey, self.basis, stride=8) ** 2, self.bands)            # (B,9,h,w)
        colour = F.avg_pool2d(images, 8)
        own = torch.cat((colour, (energy + 1e-3).log() / 2 + 2.5), 1)
        around = F.avg_pool2d(own, 5, 1, 2, count_include_pad=False)
        return torch.cat((own, around), 1)


# ---------------------------------------------------------------- names of backbones

SIZES = {"s": (384, 12), "b": (768, 12), "l": (1024, 24)}         # width, blocks; heads of 64 channels
V2 = dict(side=37, layer_scale=True)
V3 = dict(position="rotary", registers=4, layer_scale=True, eps=1e-5)
FAMILIES = {"dino": {}, "ibot": {}, "msn": dict(position="size"), "mae": dict(position="size"),
            "selfpatch": dict(cls=False, norm=False),
            "dinov2": V2, "dinov2_reg": V2 | dict(registers=4, position="antialias"),
            "dinov3": V3, "dinov3_plus": V3 | dict(swiglu=True)}

META = "https://dl.fbaipublicfiles.com/"
DINO = META + "dino/dino_{0}_pretrain/dino_{0}_pretrain.pth"
DINOV2 = META + "dinov2/dinov2_{0}/dinov2_{0}{1}_pretrain.pth"
IBOT = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/{}/checkpoint_teacher.pth"
DINOV3 = "https://github.com/facebookresearch/dinov3 (accept the licence, take dinov3_{}.pth)"
ARCHS = {  # name: (address, bytes, sha256 or its first digits; None: unpublished), or where to get it by hand
    "dct8": None,
    "vits16": (DINO.format("deitsmall16"), None, None),
    "vits8": (DINO.format("deitsmall8_300ep"), 86728949,          # the file of STEGO and HP, not the hub's
              "10fee18a0e7714de9005f9d56975ca8993d5fb87dab867868e528132d2be176c"),
    "vitb16": (DINO.format("vitbase16"), None, None),
    "vitb8": (DINO.format("vitbase8"), 343279349,
              "575f0efc4838938314afa09897a62ed2b87919928b5edcd133abb907328995eb"),
    "resnet50": ("https://download.pytorch.org/models/resnet50-0676ba61.pth", None, "0676ba61"),
    "dino_vits8_hub": (DINO.format("deitsmall8"), 86728949,
                       "55c8b267f479b614ec20858947ce361ba804846c193e20be74263a096bb6d75e"),
    "dino_resnet50": (DINO.format("resnet50"), None, None),
    "mocov2_resnet50": (META + "moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
                        None, None),
    "dinov2_vits14": (DINOV2.format("vits14", ""), 88283115,
                      "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "dinov2_vitb14": (DINOV2.format("vitb14", ""), 346378731,
                      "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "dinov2_vitl14": (DINOV2.format("vitl14", ""), 1217586395,
                      "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    "dinov2_vits14_reg": (DINOV2.format("vits14", "_reg4"), None,
                          "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb"),
    "dinov2_vitb14_reg": (DINOV2.format("vitb14", "_reg4"), None,
                          "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71"),
    "dinov2_vitl14_reg": (DINOV2.format("vitl14", "_reg4"), None,
                          "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51"),
    "ibot_vits16": (IBOT.format("vits_16"), None, None), "ibot_vitb16": (IBOT.format("vitb_16"), None, None),
    "msn_vits16": (META + "msn/vits16_800ep.pth.tar", None, None),
    "msn_vitb16": (META + "msn/vitb16_600ep.pth.tar", None, None),
    "mae_vitb16": (META + "mae/pretrain/mae_pretrain_vit_base.pth", None, None),
    "selfpatch_vits16": "https://drive.google.com/file/d/19eeQrK-nl4B9ksFQ_QnewGHVKYDQF4Yw",
    "dinov3_vits16": DINOV3.format("vits16_pretrain_lvd1689m-08c60483"),
    "dinov3_vits16plus": DINOV3.format("vits16plus_pretrain_lvd1689m-4057cbaa"),
    "dinov3_vitb16": DINOV3.format("vitb16_pretrain_lvd1689m-73cec8be"),
}


def build(arch, heads=None):
    """The untrained network of a name in ARCHS."""
    if arch == "dct8":
        return DCT8()
    if arch.endswith("resnet50"):
        return ResNet50()
    family, size, patch, variant = re.fullmatch(r"(?:(\w+)_)?vit([sbl])(\d+)_?(reg|plus|hub)?", arch).groups()
    family = f"{family or 'dino'}_{variant}" if variant in ("reg", "plus") else family or "dino"
    dim, depth = SIZES[size]
    if heads and dim % heads:
        raise ValueError(f"{heads} heads do not divide the width {dim} of {arch}")
    return ViT(dim, depth, heads or dim // 64, int(patch), **FAMILIES[family])


def load_backbone(arch, weights=None, depth=None, heads=None):
    """A frozen backbone in eval mode with .dim and .patch: (B,3,H,W), ImageNet-normalised -> (B,D,h,w).

    arch     a name in ARCHS
    weights  None: the authors' file, downloaded on first use; a file in a published layout; "none": untrained
    depth    keep the first `depth` blocks of a ViT, then its final norm
    heads    heads of a ViT if not D/64 (CAUSE's published heads saw DINO's ViT-S with 12)
    Raises ValueError for an unknown name or for weights that are not the whole of this architecture.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown backbone {arch!r}{nearest(arch, ARCHS)}")
    with torch.random.fork_rng(devices=[]):                       # the caller's draws stay what they were
        torch.default_generator.manual_seed(0)
        backbone = build(arch, heads)
    blocks = len(getattr(backbone, "blocks", ()))
    if depth is not None and not 1 <= depth <= blocks:
        raise ValueError(f"--depth {depth} does not go with {arch}: it has {blocks or 'no'} blocks")
    if arch == "dct8" and weights not in (None, "none"):
        raise ValueError(f"dct8 has no weights; {weights} needs the --arch that it was trained as")
    if arch != "dct8" and weights != "none":
        load_weights(backbone, weights or published(arch), arch)
    if depth is not None:
        del backbone.blocks[depth:]
    return backbone.requires_grad_(False).eval()


# ---------------------------------------------------------------- reading weights

class Inert:
    """Stands for any Python object pickled beside tensors: made from anything, it keeps its .state."""
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        self.state = state


class InertDict:
    """The same for kinds of dictionaries: torch fills in items of plain ones only."""
    def __new__(cls, *args, **kwargs):
        return collections.OrderedDict()


# what trainers leave in checkpoints (options, callbacks, counters); a file that names other things is refused
HARMLESS = re.compile(
    r"(argparse|collections|(pytorch_)?lightning\w*|numpy|omegaconf|pathlib|torch|torchmetrics|typing)\..+|"
    r"builtins\.(bool|complex|dict|float|frozenset|int|list|object|set|str|tuple)")


def read_tensors(path):
    """What a published checkpoint holds: tensors and plain values; a trainer's objects come as Inert.

    Reads torch.save's files (weights_only=True: nothing is run) and safetensors. Raises ValueError or
    FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}" + path.is_dir() * ": it is a directory")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:                                # a file that names more than tensors
        pass
    except Exception as error:
        raise ValueError(f"{path} is no whole file of weights ({type(error).__name__})") from None
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:                                             # before torch 1.6 files were no zips
        raise ValueError(f"{path} is no file of weights, or one of torch's old format with Python objects "
                         "beside its tensors; nothing was run") from None
    alien = [name for name in names if not HARMLESS.fullmatch(name)]
    if alien:
        raise ValueError(f"{path} names {alien[0]}, which has no place in a file of weights; nothing was run")
    dicts = re.compile(r"builtins\.dict|collections\.\w+|.*\.AttributeDict")
    inert = [(InertDict if dicts.fullmatch(name) else Inert, name) for name in names]
    try:
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read without running it ({type(error).__name__})") from None


def read_safetensors(path):
    """Little-endian: 8 bytes of header length, JSON {name: {dtype, shape, data_offsets}}, then the data."""
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    raw, tensors = path.read_bytes(), {}
    start = 8 + int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8:start])
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                if not 0 <= first <= last <= len(raw) - start:
                    raise ValueError
                data = bytearray(raw[start + first:start + last])
                tensors[name] = torch.frombuffer(data, dtype=kinds[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError):
        raise ValueError(f"{path} is no whole safetensors file of floating-point weights") from None
    return tensors


# names of timm and of the transformers library -> DINO's, one after the other
RENAME = [(re.compile(a), b) for a, b in (
    (r"^embeddings\.", ""), (r"^patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^position_embeddings$", "pos_embed"), (r"^(reg_token|storage_tokens)$", "register_tokens"),
    (r"^rope_embed\.periods$", "periods"),
    (r"^(encoder\.layer|model\.layer|layers?)\.(\d+)\.", r"blocks.\2."),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),                    # DINOv2's training files have chunks
    (r"\.attention\.(?:attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.attn\.([qv])_bias$", r".attn.\1.bias"),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),    # before output.dense, which it contains
    (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."), (r"^layernorm\.", "norm."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."), (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"), (r"\.gamma_(\d)$", r".ls\1.gamma"))]
PLAIN = {"up_proj": "fc1", "down_proj": "fc2"}
GATED = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3", "fc1_g": "w1", "fc1_x": "w2", "fc2": "w3"}
# what published files hold beside the backbone: mask tokens, heads, decoders, prototypes
DROP = re.compile(r"(mask_token|masked_embed|local_cls_norm|head|fc|pred|decoder\w*|pooler|classifier|"
                  r"projection_head|prototypes)(\.|$)")


def backbone_tensors(content):
    """The tensors of the backbone in a checkpoint: unwrapped, without common prefixes, heads dropped."""
    content = content if isinstance(content, dict) else {}
    wrappers = "teacher", "target_encoder", "model", "state_dict", "model_ema", "net_model_state_dict"
    content = next((content[key] for key in wrappers if isinstance(content.get(key), dict)), content)
    state = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    for prefix in ("_orig_mod.", "module.", "backbone.", "encoder_q.", "net.model.", "model.", "vit.",
                   "dinov2.", "dinov2_with_registers.", "dinov3_vit."):
        inside = {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}
        if inside and not any(k.startswith("layer.") for k in inside):                 # DINOv3: model.layer.N
            state = inside
    return {k: v for k, v in state.items() if not DROP.match(k)}


def dino_names(state, model):
    """Tensors of a ViT in the names of timm, the transformers library or the authors -> those of `model`."""
    mlp = GATED if any(".w1." in name for name, _ in model.named_parameters()) else PLAIN
    out = {}
    for name, tensor in state.items():
        for pattern, ours in RENAME:
            name = pattern.sub(ours, name)
        out[re.sub(r"(?<=\.mlp\.)\w+", lambda m: mlp.get(m[0], m[0]), name)] = tensor
    out = {k: v for k, v in out.items() if not DROP.match(k)}
    if "reg_token" in state and "pos_embed" in out:               # timm: cls_token includes its position
        out["pos_embed"] = F.pad(out["pos_embed"], (0, 0, 1, 0))
    for i in range(len(model.blocks)):
        at = f"blocks.{i}.attn."
        for kind in ("weight", "bias"):
            parts = {x: out.pop(f"{at}{x}.{kind}") for x in "qkv" if f"{at}{x}.{kind}" in out}
            if parts and (kind == "bias" or len(parts) == 3):     # DINOv3's k has no bias
                zero = torch.zeros_like(next(iter(parts.values())))
                out[f"{at}qkv.{kind}"] = torch.cat([parts.get(x, zero) for x in "qkv"])
        if model.position == "rotary":
            bias = out.get(at + "qkv.bias", torch.zeros(3 * model.dim)).clone()
            bias *= out.pop(at + "qkv.bias_mask", torch.ones(())).nan_to_num(1)             # NaN: not filled
            bias[model.dim:2 * model.dim] = 0
            out[at + "qkv.bias"] = bias
    if model.position == "rotary":
        out.setdefault("periods", model.periods)                  # the authors' own are rounded to bf16
    return out


def traits(state):
    """What tells architectures apart, read from a state dict in DINO's or torchvision's names."""
    shape = {k: tuple(v.shape) for k, v in state.items()}
    conv = shape.get("patch_embed.proj.weight", ())
    if len(conv) != 4:
        return {"kind": "ResNet" if "layer1.0.conv1.weight" in shape else "neither ViT nor ResNet"}
    return {"kind": "ViT", "width": conv[0], "patch": conv[3],
            "blocks": len({k.split(".")[1] for k in shape if k.startswith("blocks.")}),
            "class token": "cls_token" in shape, "registers": (*shape.get("register_tokens", ()), 0, 0)[1],
            "position table": (*shape.get("pos_embed", ()), 0, 0)[1],
            "LayerScale": any("ls1." in k for k in shape),
            "SwiGLU": any(".mlp.w1." in k for k in shape), "final norm": "norm.weight" in shape}


def load_weights(model, path, arch):
    """Fill `model` from a file in any published layout, all of it or nothing; ValueError: what differs."""
    state, wanted = backbone_tensors(read_tensors(path)), model.state_dict()
    try:
        state = dino_names(state, model) if isinstance(model, ViT) else state
    except RuntimeError:                                          # q, k and v that do not fit together
        raise ValueError(f"{path} does not fit {arch}: its attention matrices have other shapes") from None
    optional = {k for k in wanted if k.endswith("num_batches_tracked")}
    wrong = [f"no {k}" for k in wanted if k not in state and k not in optional]
    wrong += [f"unknown {k}" for k in state if k not in wanted]
    wrong += [f"{k} is {'x'.join(map(str, v.shape))} instead of {'x'.join(map(str, wanted[k].shape))}"
              for k, v in state.items() if k in wanted and v.shape != wanted[k].shape]
    if wrong:
        ours, theirs = traits(wanted), traits(state)
        other = [f"{k} {theirs[k]} instead of {v}" for k, v in ours.items() if k in theirs and theirs[k] != v]
        keys = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ValueError(f"{path} does not fit {arch}: {', '.join(other + [keys])}")
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or name not in optional and not (
                tensor.is_floating_point() and tensor.isfinite().all()):
            raise ValueError(f"{path} is no trained {arch}: {name} does not hold finite float numbers")
    model.load_state_dict({k: wanted[k] for k in optional} | state, strict=True)          # fp16 -> float32


# ---------------------------------------------------------------- downloads

def published(arch):
    """The authors' file in torch hub's cache, downloaded on first use, its sha256 checked on every use.

    Where no sha256 is published, that of the first download is kept beside the file, in NAME.sha256.
    """
    if isinstance(ARCHS[arch], str):
        raise ValueError(f"the weights of {arch} cannot be fetched for you; get them from {ARCHS[arch]} "
                         "and give --weights FILE")
    (url, size, sha256), folder = ARCHS[arch], Path(torch.hub.get_dir()) / "checkpoints"
    name = url.rsplit("/", 1)[1]
    path = folder / (f"{arch}_{name}" if name.startswith("checkpoint") else name)           # all of iBOT's
    note = path.with_name(path.name + ".sha256")
    folder.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)                     # the other processes of a run wait
        try:
            download(url, path, sha256 if len(sha256 or "") == 64 else None, size)
        except OSError as error:
            raise OSError(f"{error}, or give --weights FILE") from None
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        expected = sha256 or (note.read_text().strip() if note.exists() else "")
        if not digest.startswith(expected):
            raise ValueError(f"{path} has changed or is another file: its sha256 is {digest[:8]}..., not "
                             f"{expected[:8]}...; delete it and it is fetched again")
        if not expected:
            note.write_text(digest + "\n")
    return path


def download(url, path, sha256=None, size=None):
    """url -> file `path`, by way of `path`.part, which a later call resumes. Renamed only when its length is
    what the server (or `size`) says and its sha256 is right: a file at `path` is whole. OSError otherwise."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    have, total = part.stat().st_size if part.exists() else 0, size
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            have = have if answer.status == 206 else 0          # 200: the server sends it from the start
            length = answer.headers["Content-Length"]
            total = have + int(length) if length else size
            if total is None and sha256 is None or size not in (None, total):
                raise OSError(f"the server says {total} bytes, expected are {size or 'a length or a sha256'}")
            with open(part, "ab" if have else "wb") as file, tqdm(
                    desc=path.name, initial=have, total=total, unit="B", unit_scale=True) as bar:
                while block := answer.read(2 ** 20):
                    bar.update(file.write(block))
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", 0) != 416:             # 416: nothing left to send, `part` is whole or wrong
            raise OSError(f"cannot get {url} ({error}); try again or put the file at {path}") from None
        total = size or int(error.headers.get("Content-Range", "*/-1").split("/")[1])
    have = part.stat().st_size
    if total is not None and have < total:
        raise OSError(f"{url} ended after {have:,} of {total:,} bytes; try again, it resumes")
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if total not in (None, have) or sha256 not in (None, digest):
        part.unlink()
        raise OSError(f"{url} sent a wrong file ({have:,} bytes, sha256 {digest}), now deleted")
    os.replace(part, path)
    return path
