"""What every run needs: command line, processes, the loop under every training loop, checkpoints,
and the frozen backbones with their weights. Read `Run.loop` first.
"""
import argparse
import contextlib
import difflib
import fnmatch
import functools
import gc
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
import urllib.request
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

CELLS = 160  # random ones of an image's feature map, on which clusters are fitted
DATA = ("scenes camvid coco27 coco15 coco3 coco81 coco171 cityscapes27 cityscapes19 potsdam3 "
        "potsdam6 voc21").split()


# ---------------------------------------------------------------- command line
def number(low=1, high=10 ** 6, kind=int):
    """An argparse type: a finite number from low to high, whole or, by kind, float."""
    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low:g} to {high:g}")
    return convert


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # a default of None says nothing
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with one option on one line; a mistake is a ValueError of one line."""
    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False)

    def add(self, name, default, help, group=None, **more):
        """The default says the type: bool gives --x and --no-x, int a whole number of at least 1,
        float a finite one of at least 0, a tuple as many of these. low, high: other limits."""
        limits = {k: more.pop(k) for k in ("low", "high") if k in more}
        if isinstance(default, bool):
            more.setdefault("action", argparse.BooleanOptionalAction)
        elif isinstance(default, (int, float, tuple)):
            kind = {} if isinstance(default, int) else {"low": 0.0, "kind": float}
            more["type"] = number(**kind | limits)
        if isinstance(default, tuple):
            more["nargs"] = len(default)
        (group or self).add_argument(name, default=default, help=help, **more)

    def parse_args(self, args=None, namespace=None):
        if "" in (sys.argv[1:] if args is None else args):
            self.error("an empty word; is a variable of the shell unset?")
        return super().parse_args(args, namespace)

    def group(self, title):
        return functools.partial(self.add, group=self.add_argument_group(title))

    def error(self, message):
        unknown = re.search(r"unrecognized.*?(--[\w-]+)", message)
        raise ValueError(message + (did_you_mean(unknown[1], self._option_string_actions)
                                    if unknown else f"; {self.prog} --help lists the options"))


def parser(doc):
    """The options that all methods share. None: the preset, the data or the machine decide."""
    p, many = Parser(doc), number(1, 2 ** 31 - 1)
    p.set_defaults(classes=None, epochs=None)  # filled in by `train` and by presets
    add = p.group("data and backbone")
    add("--data", "scenes", "data set (python data.py lists them), or a directory of images")
    add("--root", None, "where the data set lies", metavar="DIR")
    add("--protocol", None, "how images are resized and cropped; else the published way")
    add("--size", 224, "side of a training image, a multiple of the patch", low=8, high=8192)
    add("--arch", "dct8", "frozen backbone: dct8 (no weights), vits8, vitb8, dinov2_vits14, ...")
    add("--weights", None, "a file in place of the download; none: untrained", metavar="FILE|none")
    add("--depth", None, "first K blocks of a ViT, then its norm", type=number(), metavar="K")
    add("--clusters", None, "else the number of classes, 27 without labels", type=number(2, 65536))
    add = p.group("training")
    add("--steps", None, "steps of the main phase; else the preset's epochs", type=many)
    add("--batch-size", 16, "images per step over all processes together")
    add("--lr", 5e-4, "learning rate")
    add("--seed", 0, "same seed and threads, same weights, on a CPU", low=0, high=2 ** 31 - 1)
    add = p.group("run")
    add("--out", None, "run folder; else runs/METHOD-DATA-ARCH-SEED", metavar="RUN")
    add("--resume", None, "go on with the run in this folder, with its options", metavar="RUN")
    add("--save-every", None, "steps between checkpoints; else ten minutes", type=many)
    add("--device", None, "cuda, cuda:1, cpu; else the accelerator if there is one")
    add("--workers", None, "processes that read images", type=number(0, 1024))
    add("--cache-features", False, "keep frozen features in RAM (fp16): later epochs cost the head")
    add("--smoke", False, "ten steps that touch everything, to see that it runs")
    add("--bench", None, "time that many steps on data held in memory, then stop", type=many)
    add("--json", None, "where --bench writes its figures", metavar="FILE")
    add("--show", False, "print the options that this would run with as JSON, and stop")
    return p


# what does not change a run's result is never taken from a saved one
ONLY_TYPED = "resume out bench json show device workers save_every".split()


def parse(arguments, presets, argv=None):
    """Options as typed, else of the presets that apply, else the defaults. A key of `presets` is a
    data set, `folder` or `smoke`, and conditions option=pattern. With --resume the options of that
    run; none that changes its result may be typed anew."""
    p = arguments()
    args = p.parse_args(argv)
    if args.resume:
        content = load_checkpoint(args.resume)
        whose = f"{args.resume}, a run of {content['method']}.py"
        saved = check_args(p, content["args"], whose)
        saved = {k: x for k, x in saved.items() if k not in ONLY_TYPED}
        p.set_defaults(**saved)
        args = p.parse_args(argv)
        other = [k for k in saved if vars(args)[k] != saved[k] and k not in ("root", "weights")]
        if other := other + [k for k in ("bench", "json", "out") if vars(args)[k]]:
            raise ValueError(f"--resume has its own options; drop {', '.join(map(flag, other))}")
        return args
    folder = args.data not in DATA and os.path.isdir(args.data)
    known = ["folder" if folder else args.data] + ["smoke"] * args.smoke
    options = [f"{k}={x}" for k, x in vars(args).items()]
    for key, preset in presets.items():
        data, *rules = key.split()
        if data in known and all(fnmatch.filter(options, rule) for rule in rules):
            p.set_defaults(**({"steps": None} if "epochs" in preset else {}) | preset)
    args = p.parse_args(argv)
    if args.root and (folder or args.data == "scenes"):
        raise ValueError(f"--data {args.data} takes no --root")
    if args.json and not args.bench:
        raise ValueError("--json is where --bench N writes")
    if folder:
        args.data = os.path.abspath(args.data)  # a run may be resumed from elsewhere
    elif vars(args).get("remove_position", False) is None:
        args.remove_position = False
    vit = NAME.fullmatch(args.arch)  # a network that is trained takes any size
    patch = 1 if args.arch not in ARCHS else int(vit[3]) if vit else 8
    for name in ("size", "eval_size", "codebook_size"):  # the last is CAUSE's
        if (pixels := vars(args).get(name) or 0) % patch:
            vars(args)[name] = pixels + -pixels % patch
            say(f"{flag(name)} {pixels} becomes {vars(args)[name]}: patches have {patch} pixels")
    return args


def flag(name):
    return f"--{name}".replace("_", "-")


def check_args(p, saved, folder):
    """Options of a checkpoint -> the same. ValueError unless each could have been typed."""
    words, kept = [], {}
    try:
        for name, default in vars(p.parse_args([])).items():
            x = kept[name] = saved[name]
            if flag(name) not in p._option_string_actions:
                continue  # presets and `train` fill it in
            if isinstance(x, bool):
                words.append(flag(name if x else f"no_{name}"))
            elif isinstance(x, (list, tuple)):
                words += [flag(name), *map(str, x)]
            elif x is not None or default is not None:
                words.append(f"{flag(name)}={x}")
        found = vars(p.parse_args(words, argparse.Namespace(**kept)))
        if json.dumps(found) != json.dumps(kept):
            raise ValueError("they are no options")
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: its options are damaged: {error}") from None


def did_you_mean(name, names):
    """A hint for an error message: `; did you mean 'vits8'?`, or the list of names."""
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def main(arguments, presets, schedule, train, count):
    """A method's command line; count(args) -> images for schedule, train(args) -> exit code."""
    def run():
        args = parse(arguments, presets)
        if args.show:
            schedule(args, count(args))
            return print(json.dumps(vars(args), indent=1))
        if args.data == "scenes" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # two that wait for each other cost four times the CPU time
        return train(args)
    command(run)


# parts of errors that are no mistakes of the code -> what to do
EXPECTED = {"DataLoader worker|process pool": "a process that reads images died; fewer --workers",
            "equal size": "images of several shapes; --protocol stego or squash makes them equal",
            "C compiler|triton": "torch.compile has no compiler here; set TORCH_COMPILE_DISABLE=1",
            "out of memory|allocate|MemoryError": "the memory is full; take smaller sizes"}


def command(run):
    """Exit with run()'s code; a mistake to expect is one line on stderr, without a traceback:
    2 bad input, 1 the run went wrong, 130 Ctrl-C, 141 the reader of its output left."""
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
    try:
        code = run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        text = str(error).strip() or type(error).__name__
        if isinstance(error, (MemoryError, RuntimeError)):
            text = next((advice for part, advice in EXPECTED.items() if re.search(part, text)), "")
        if not text or os.environ.get("TRACEBACK"):  # a mistake of the code; for developers
            raise
        # a loader process's error carries its traceback, whose last part counts
        say("error: " + re.split(r"^\w+(?:Error|Exception): ", text, flags=re.M)[-1])
        code = 1 if isinstance(error, ArithmeticError) else 2
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # the error held the loader's processes, which Python's exit would complain of
    sys.exit(code)


def say(text):
    """One line on stderr, above a progress bar, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text.replace("\n", "\\n"), file=sys.stderr)


# ---------------------------------------------------------------- processes (torchrun)
# Each holds the same weights and takes its share of the batch; gradients are averaged.

def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def start_processes(device=None):
    """Join the other processes of `torchrun`, if any -> this process's device. ValueError."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    found = torch.accelerator.current_accelerator(check_available=True)
    name, _, index = str(device or found or "cpu").partition(":")
    if name != "cpu":
        name += ":" + (os.environ["LOCAL_RANK"] if several else index or "0")
        if name not in [f"{found}:{i}" for i in range(torch.accelerator.device_count())]:
            raise ValueError(f"this machine has no {name}; --device cpu always works")
        torch.accelerator.set_device_index(torch.device(name).index)
        torch.set_float32_matmul_precision("high")
    if several and not dist.is_initialized():
        dist.init_process_group("gloo" if name == "cpu" else "nccl")
    return torch.device(name)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    backward = forward  # every process's loss depends on the sum


def reduce_sum(x):
    """Sum over all processes, with gradient."""
    return _Sum.apply(x) if world() > 1 else x


def gather(x):
    """Rows of all processes in rank order, with gradient: (b, ...) -> (world * b, ...)."""
    if world() == 1:
        return x
    rows = x.new_zeros(world(), *x.shape)
    rows[rank()] = x  # the others fill in theirs
    return reduce_sum(rows).flatten(0, 1)


# ---------------------------------------------------------------- a run
@functools.lru_cache(1)
def shuffled(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


class Seeded(Dataset):
    """Shuffled epochs of a data set, chained. An item and its random draws depend on the seed and
    its place, not on who draws them."""
    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, place):
        n, error = len(self.dataset), ""
        index = int(shuffled(n, self.seed + place // n)[place % n])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self.seed * 1_000_003 + place) % 2 ** 63)
            for step in range(n):  # unreadable: the next image takes its place
                item = self.dataset[(index + step) % n]
                if not item["error"]:
                    return {**item, "error": error}
                error = error or f"{item['path']}: {item['error']}"
        raise OSError(f"no image could be read; the first one: {error}")


def quiet_worker(_):
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the parent acts
        signal.signal(number, signal.SIG_IGN)


def data_loader(dataset, workers, **more):
    """A DataLoader with a random state of its own: torch's stays untouched."""
    return DataLoader(dataset, num_workers=workers, worker_init_fn=quiet_worker,
                      pin_memory=torch.cuda.is_available(), generator=torch.Generator(), **more)


class Run:
    """One training run. The folder is made when its first step begins, so that bad input leaves
    nothing behind. `shared` is a generator that all processes hold alike; torch's own, which
    dropout takes, differs between them."""
    def __init__(self, method, args, images, val):
        self.method, self.args, self.device = method, args, start_processes(args.device)
        self.rank, self.world, self.folder = rank(), world(), Path(args.resume or args.out or "")
        if args.batch_size % self.world:
            raise ValueError(f"--batch-size {args.batch_size} does not divide by {self.world}")
        if args.out and self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"--out {args.out} already holds a run or other files; take a new "
                             f"folder, or go on with --resume {args.out}")
        args.root = args.root and os.path.abspath(args.root)  # typed with --resume, too
        if (args.clusters or 0) > CELLS * len(images):
            raise ValueError(f"--clusters {args.clusters} are too many for {len(images)} images")
        if args.workers is None:
            cores = (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            few = self.device.type == "cpu"  # it computes as well
            args.workers = 0 if args.data == "scenes" else min(2 if few else 16, cores)
        if args.arch == "dct8" and args.data not in DATA:
            say("dct8 is useless on photographs; take a ViT, such as --arch dinov2_vits14")
        torch.manual_seed(args.seed)
        self.shared = torch.Generator(self.device).manual_seed(args.seed)
        self.generators = [torch.default_generator, self.shared]
        if self.device.type == "cuda":
            self.generators.append(torch.cuda.default_generators[self.device.index])
        self.loaded = load_checkpoint(args.resume, method) if args.resume else None
        self.files = {"train": images.files(), "val": val.files()}
        self.phase, self.stop, self.reported, self.seconds = -1, 0, set(), 0.0

    def autocast(self):
        """bf16 on CUDA, where fp16 could overflow unseen; fp32 on a CPU."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")

    def rand(self, rows, *shape):
        """Uniform numbers (rows, *shape): this process's rows of a draw for the global batch."""
        shape = self.world, rows, *shape
        return torch.rand(shape, generator=self.shared, device=self.device)[self.rank]

    def keep(self, **state):
        """What checkpoints hold from now on and --resume restores: modules, optimisers, tensors.
        Every backward() leaves the mean of the modules' gradients over all processes."""
        def average(p):
            dist.all_reduce(p.grad)
            p.grad /= self.world
        self.kept = state
        modules = nn.ModuleList(x for x in state.values() if isinstance(x, nn.Module))
        for p in modules.parameters() if self.world > 1 else ():
            if p.requires_grad and not hasattr(p, "averaged"):
                p.averaged = p.register_post_accumulate_grad_hook(average)

    def loop(self, phase, dataset, steps):
        """Yield (step, batch on the device) for one phase; nothing if a resumed run had finished
        it. SIGINT and SIGTERM are caught here alone: the step ends, a checkpoint is written."""
        args, every = self.args, self.args.save_every
        self.phase, self.step, self.name = self.phase + 1, 0, phase
        if self.phase == 0:
            self._begin()
        if self.loaded:
            self._restore()
            if self.loaded["phase"] > self.phase:
                return
            self.step, self.loaded = self.loaded["step"], None
        elif self.phase == 0:
            self.save()  # resumable from its first step on
        items = Seeded(dataset, args.seed * 10_000_019 + self.phase * 1_000_003)
        size, share = args.batch_size, args.batch_size // self.world
        ends = self.step * size + self.rank * share, (3 if args.bench else steps) * size
        keys = (range(first, first + share) for first in range(*ends, size))  # steps may be many
        loader = data_loader(items, args.workers, batch_sampler=keys)
        if args.bench:
            yield from self._bench([self._move(batch) for batch in loader])
            return
        self.saved, self.logged = time.monotonic(), (self.step, time.monotonic())
        self.bar = tqdm(loader, phase, steps, initial=self.step, disable=self.rank > 0)

        def stop(number, frame):
            self.stop = number
            signal.signal(number, old[number])  # the second one acts at once
            say("stopping after this step; once more to stop at once")
        alone = self.world == 1 and threading.current_thread() is threading.main_thread()
        old = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM) if alone}
        try:
            for batch in self.bar:
                yield self.step, self._move(batch)
                self.step += 1
                due = self.step % every == 0 if every else time.monotonic() > self.saved + 600
                if due or self.stop or self.step == steps:
                    self.save()
                if self.stop:
                    say(f"stopped; go on with: python {self.method}.py --resume {self.folder}")
                    raise KeyboardInterrupt if self.stop == signal.SIGINT else SystemExit(143)
        finally:
            self.bar.close()
            for number, handler in old.items():
                signal.signal(number, handler)

    def _begin(self):
        """Choose the folder and make it, or take up the resumed one; process 0 writes."""
        args, model = self.args, self.kept["model"]
        self.backbone = digest(model.backbone) if hasattr(model, "backbone") else ""
        name = args.out or f"runs/{self.method}-{Path(args.data).name}-{args.arch}-{args.seed}"
        if self.world > 1:
            torch.manual_seed(args.seed + 1_000_003 * self.rank)  # each draws its own dropout
        writes = self.rank == 0 and not args.bench
        for k in itertools.count(1) if writes and not self.loaded else ():
            self.folder = Path(f"{name}-{k}" if k > 1 else name)
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(*[FileExistsError] * (not args.out)):
                (self.folder / "args.json").touch(exist_ok=False)  # the first free name is claimed
                break
        say(f"{self.method} on {args.data} with {args.arch}, seed {args.seed}, {self.device}, "
            f"{self.world} process(es), torch {torch.__version__}, folder {self.folder}")
        if self.loaded:
            other = differences(self.loaded, self.backbone, **self.files)
            if other and self.loaded["done"]:
                raise ValueError(f"{self.folder} is finished and stays as it is, but {other[0]}; "
                                 f"score it with: python eval.py {self.folder}")
        if writes:
            with open(self.folder / "log.jsonl", "ab") as file:  # later steps are done again
                file.truncate(min(file.tell(), self.loaded["log"] if self.loaded else 0))
            write(self.folder / "args.json", json.dumps(vars(args), indent=1).encode())

    def _move(self, batch):
        for text in set(batch["error"]) - {""} - self.reported:
            self.reported.add(text)
            say(f"skipped an unreadable image: {text}")
        self.paths = batch.get("path", ())
        return {name: x.to(self.device, non_blocking=True) if torch.is_tensor(x) else x
                for name, x in batch.items()}

    def log(self, **terms):
        """Scalars of this step, their mean over the processes, every tenth time to the bar and to
        log.jsonl. FloatingPointError before a step that is not finite. The one wait in a step."""
        values = torch.stack([torch.as_tensor(x, device=self.device).detach().float()
                              for x in terms.values()])
        values = reduce_sum(values)  # and all stop at the same step
        terms = dict(zip(terms, (values / self.world).tolist()))
        if bad := [name for name, value in terms.items() if not math.isfinite(value)]:
            self.save()  # the weights are those of the last good step
            raise FloatingPointError(f"step {self.step} ({self.name}): {', '.join(bad)} is not "
                                     f"finite; lower --lr; images: {', '.join(self.paths)}")
        step = self.step + 1
        if self.args.bench or step % 10 and step < self.bar.total:
            return
        (before, begin), self.logged = self.logged, (step, time.monotonic())
        rate = (step - before) * self.args.batch_size / max(self.logged[1] - begin, 1e-6)
        self.bar.set_postfix_str(f"loss {terms.get('loss', 0):.3f}, {rate:.0f} images/s")
        if self.rank == 0:
            line = {"phase": self.name, "step": step, **terms, "images_per_second": rate,
                    "memory_gb": peak_memory(self.device)}
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def save(self, done=False):
        """Write RUN/last.pt. FloatingPointError in its place where a weight is not finite."""
        if self.rank or self.args.bench:
            return
        state = {k: trained(x) if hasattr(x, "state_dict") else x for k, x in self.kept.items()}
        for name, x in state.items():
            tensors = x.values() if isinstance(x, dict) else [x]
            if not all(t.isfinite().all() for t in tensors if torch.is_tensor(t)):
                raise FloatingPointError(f"step {self.step} ({self.name}): {name} is not finite; "
                                         f"lower --lr; {self.folder} keeps its last good state")
        log = self.folder / "log.jsonl"
        save({"method": self.method, "args": vars(self.args), "model": state.pop("model"),
              "state": state, "phase": self.phase, "step": self.step, "done": done,
              "rng": [generator.get_state() for generator in self.generators],
              "log": log.stat().st_size if log.exists() else 0,
              "backbone": self.backbone, "images": self.files}, self.folder / "last.pt")
        self.saved = time.monotonic()

    def _restore(self):
        """Put back what is kept; in an earlier phase, what the checkpoint still holds of it."""
        content, name = self.loaded, ""
        saved = content["state"] | {"model": content["model"]}
        finished = content["phase"] > self.phase or content["done"]
        try:
            for name, x in self.kept.items():
                if name in saved or not finished:
                    load_trained(x, saved[name])
            name = "random state"
            for generator, state in zip(self.generators, content["rng"], strict=True):
                generator.set_state(state)
        except Exception as error:  # torch raises many kinds for damage
            raise ValueError(f"{self.folder}/last.pt does not fit: {name}: {error}") from None
        if self.rank:  # the checkpoint holds process 0's
            torch.manual_seed(content["step"] * self.world + self.rank + self.args.seed)

    def clock(self):
        """Seconds; with --bench the device's work is waited for."""
        if self.args.bench and self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _bench(self, loaded, warm_up=2):
        args = self.args
        for step in range(args.bench + warm_up):
            if step == warm_up:
                begin, self.seconds = self.clock(), 0.0
            yield step, loaded[step % len(loaded)]
        whole, backbone = self.clock() - begin, self.seconds
        figures = {
            "phase": self.name, "method": self.method, "arch": args.arch, "size": args.size,
            "batch_size": args.batch_size, "device": str(self.device),
            "threads": torch.get_num_threads(), "peak_gb": peak_memory(self.device),
            "ms": {"backbone": 1000 * backbone / args.bench, "step": 1000 * whole / args.bench},
            "images_per_second": args.bench * args.batch_size / whole,
            "step_over_backbone": whole / backbone if backbone else None}
        say(json.dumps(figures))
        if args.json and self.rank == 0 and self.name != "probe":  # CAUSE's last phase
            write(args.json, json.dumps(figures, indent=1).encode())

    def features(self, backbone, dataset):
        """-> function batch -> frozen features (B,D,h,w) of batch["image"] (B,3,H,W), without
        gradient, bf16 on CUDA; (batch, "positive"): of batch["positive"]. Makes `WithoutPlace`
        ready, and with --cache-features a table of images x D x N x 2 bytes in RAM."""
        table = None

        @torch.no_grad()
        def features(batch, name="image"):
            if table is not None:
                index = batch["index" if name == "image" else f"{name}_index"]
                return table[index.cpu()].to(self.device, non_blocking=True).float()
            begin = self.clock()
            with self.autocast():
                feats = backbone(batch[name].to(self.device)).float()
            self.seconds += self.clock() - begin
            return feats
        if self.args.bench:
            return features
        unknown = [m for m in backbone.modules() if isinstance(m, WithoutPlace) and not m.known]
        measure = bool(unknown) and not self.loaded
        if self.args.cache_features or measure:  # raw: a place not known yet is zero
            table, *moments = self._pass(features, dataset, measure)
        for module in unknown:
            if self.loaded:
                load_trained(module.place, self.loaded["model"].get("backbone.place"))
            else:
                module.measure(*moments, self.args.remove_position)
            module.known = True
            for part in () if table is None else table[:, :module.dim].split(16):
                part.copy_(module.less(part.to(module.place)))
        return features

    def _pass(self, features, dataset, measure):
        """Over all images, or over 2,000 without --cache-features -> table (images,D,h,w) or None;
        if measured, how many were read, sums of features (D,h,w) and of their squares (D,)."""
        keep, size, table = self.args.cache_features, len(dataset), None
        n, total, squares = 0, 0.0, 0.0
        some = range(size) if keep else torch.linspace(0, size - 1, min(2000, size)).long().tolist()
        loader = data_loader(Subset(dataset, some), self.args.workers, batch_size=16)
        for batch in tqdm(loader, "features", disable=self.rank > 0):
            index, feats = batch["index"], features(batch).cpu()
            good = torch.tensor([not error for error in batch["error"]])
            if keep:
                if table is None:
                    table = torch.empty(size, *feats.shape[1:], dtype=torch.float16)
                    say(f"--cache-features: {table.nbytes / 1e6:,.0f} MB for {size:,} images")
                table[index] = feats.half()
                dataset.unreadable = {*dataset.unreadable, *index[~good].tolist()}
            if measure:
                feats = feats[good].double()
                n, total = n + len(feats), total + feats.sum(0)
                squares = squares + feats.square().sum((0, 2, 3))
        dataset.read_images = not keep  # the loaders to come need not open the files again
        return table, n, total, squares


# ---------------------------------------------------------------- files
def write(path, content):
    """Bytes -> file, by way of a temporary one that is renamed: at any time it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.urandom(8).hex()}.part")
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}); the old one is intact") from None
    finally:
        part.unlink(missing_ok=True)


def save(content, path):
    torch.save(content, buffer := io.BytesIO())  # straight to a file it may abort on a full disk
    write(path, buffer.getbuffer())


def load_checkpoint(folder, method=None):
    """The dictionary in RUN/last.pt: tensors and plain values. ValueError for anything else."""
    path = Path(folder) / "last.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} holds no trained run")
    kinds = dict(method=str, args=dict, model=dict, state=dict, phase=int, step=int, done=bool,
                 rng=list, log=int, backbone=str, images=dict)
    try:
        content = read(path)
        fits = [isinstance(content[k], kind) for k, kind in kinds.items()]
        fits += [isinstance(x, list) for x in content["images"].values()]
        if not all(fits) or content["step"] < 0:
            raise TypeError
    except Exception as error:  # truncated, a pickle with code, no checkpoint at all
        raise ValueError(f"{path} is no checkpoint of ours ({type(error).__name__})") from None
    if method and content["method"] != method:
        raise ValueError(f"{path} is a run of {content['method']}.py, not of {method}.py")
    return content


def read(path):
    """A file of torch.save: tensors and plain values. An Exception for anything else."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as parts:
            if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
                raise ValueError("it unfolds to more than it is long")
    return torch.load(path, map_location="cpu", weights_only=True)


def trained(x):
    """state_dict without the frozen backbone, which is loaded from its own file."""
    return {k: v for k, v in x.state_dict().items()
            if not k.startswith("backbone.") or k == "backbone.place"}


@torch.no_grad()
def load_trained(x, saved):
    """Inverse of `trained`, for a module, a tensor or an optimiser. An Exception where they do not
    fit, ValueError for a module or a tensor, which stay as they were."""
    if not isinstance(x, (nn.Module, torch.Tensor)):
        x.load_state_dict(saved)
        for p, state in x.state.items() if isinstance(x, torch.optim.Adam) else ():
            if not state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape:
                raise ValueError("its moments have not the shapes of its parameters")
        return
    own, saved = ({"it": x}, {"it": saved}) if torch.is_tensor(x) else (trained(x), saved)
    for k in [*own, *saved]:
        if k not in own or saved.get(k) is None:
            raise ValueError(f"no {k}" if k in own else f"unknown {k}")
        size, right = ("x".join(map(str, t.shape)) for t in (saved[k], own[k]))
        if size != right:
            raise ValueError(f"{k} is {size} instead of {right}")
        kinds = {(t.layout, t.is_floating_point()) for t in (saved[k], own[k])}
        if len(kinds) > 1 or not saved[k].isfinite().all():
            raise ValueError(f"{k} does not hold finite numbers")
    for k, tensor in own.items():
        tensor.copy_(saved[k])


def digest(module):
    """A hash, 16 hex digits, of a module's weights, but for a backbone's place."""
    found = hashlib.sha256()
    for name, x in module.state_dict().items():
        if not name.endswith("place"):
            found.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def differences(checkpoint, backbone="", **files):
    """Tell and list what is not what the run was made with: the backbone's weights, images."""
    found = []
    if backbone and checkpoint["backbone"] != backbone:
        found.append("the backbone's weights are not those that the run was trained with")
    for split, now in files.items():
        if other := set(now) ^ set(map(str, checkpoint["images"].get(split, now))):
            found.append(f"{len(other):,} {split} images are new, gone or changed: {min(other)}")
    for text in found:
        say(f"note: {text}")
    return found


def peak_memory(device):
    """Peak memory in GB: of the GPU, or of this process (Windows does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(ImportError):
        import resource
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return 0.0


def versions(device):
    """What a figure depends on."""
    cuda, cores = device.type == "cuda", f"cpu, {os.cpu_count()} cores"
    return {"python": sys.version.split()[0], "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if cuda else cores}


# ---------------------------------------------------------------- frozen backbones

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # of ImageNet, as all backbones expect
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class Backbone(nn.Module):
    """What backbones share: eval mode for good; .dim = D, .patch: its pixels, .prefix: tokens."""
    prefix = 0

    def train(self, mode=True):  # inside a model that trains, batch norm must not follow
        return super().train(False)

    def grid(self, images):
        (H, W), p = images.shape[-2:], self.patch
        if H % p or W % p or not H or not W:
            raise ValueError(f"{H}x{W} pixels make no patches; --size takes a multiple of {p}")
        return H // p, W // p

    def forward(self, images):
        return self.forward_with_attention(images, False)[0]

    def forward_with_attention(self, images, with_map=True):
        """(B,3,H,W) -> features (B,D,h,w), soft-max (B,1,N,N) of the cosines between them."""
        self.grid(images)
        feats, attention = self.describe(images), None
        if with_map:
            unit = F.normalize(feats.flatten(2), dim=1)  # (B,D,N)
            attention = (unit.mT @ unit).softmax(-1)[:, None]
        return feats, attention


class WithoutPlace(Backbone):
    """A backbone less what the place of a patch alone explains: the mean over the train images at
    each place is taken out, the overall mean kept. `run.features` fills in `place` (D,h,w), for a
    grid of `size` pixels; for other grids it is interpolated."""
    def __init__(self, backbone, size):
        super().__init__()
        self.backbone, self.dim, self.patch = backbone, backbone.dim, backbone.patch
        self.prefix, side, self.known = backbone.prefix, -(-size // backbone.patch), False
        self.register_buffer("place", torch.zeros(self.dim, side, side))

    def less(self, feats):
        return feats - F.interpolate(self.place[None], feats.shape[2:], mode="bilinear")

    def forward_with_attention(self, images, with_map=True):
        feats, attention = self.backbone.forward_with_attention(images, with_map)
        return self.less(feats), attention

    def measure(self, n, total, squares, wanted=None):
        """Take out the place if wanted, or if it explains little of the variance -> its share.
        n, total, squares: of `Run._pass`."""
        mean = total[:self.dim] / n  # hp's window stands behind the D channels
        overall = mean.mean((1, 2), keepdim=True)
        place, overall = mean - overall, overall.square().sum() * mean[0].numel()
        variance = (squares[:self.dim].sum() / n - overall).clamp(min=1e-12)
        share = (place.square().sum() / variance).item()
        wanted = wanted or share < 1 / 3
        place = F.interpolate(place[None], self.place.shape[1:], mode="bilinear")[0]
        self.place.copy_(place * wanted)
        say(f"the place of a patch explains {share:.0%} of the features' variance and "
            f"{'is taken out' if wanted else 'stays in'} (--[no-]remove-position)")
        return share


def rotate(x, sin, cos):
    """Rotary positions of x (B,heads,n,width), channel c with c + half; sin, cos (n,width)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


class Block(nn.Module):
    """A transformer block over tokens (B,n,D); its MLP is a SwiGLU in DINOv3's larger networks."""
    def __init__(self, dim, heads, layer_scale, swiglu, eps):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        first, last = (("w1", "w2"), "w3") if swiglu else (("fc1",), "fc2")
        self.mlp = nn.ModuleDict({name: nn.Linear(dim, 4 * dim) for name in first})
        self.mlp[last] = nn.Linear(4 * dim, dim)
        names = ["gamma"] * layer_scale
        self.ls1, self.ls2 = (nn.ParameterDict({x: torch.ones(dim) for x in names}) for _ in "12")

    def attend(self, x, rotary=None, only_map=False):
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B,heads,n,D/heads) each
        if rotary:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if only_map:  # fused attention never forms this matrix
            return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # (B,heads,n,n)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.attn["proj"](x.transpose(1, 2).flatten(2))

    def forward(self, x, rotary=None):
        x = x + self.attend(x, rotary) * self.ls1.get("gamma", 1)
        y, mlp = self.norm2(x), self.mlp
        if "w1" in mlp:
            y = mlp["w3"](F.silu(mlp["w1"](y)) * mlp["w2"](y))
        else:
            y = mlp["fc2"](F.gelu(mlp["fc1"](y)))
        return x + y * self.ls2.get("gamma", 1)


class ViT(Backbone):
    """(B,3,H,W) -> (B,D,h,w): the patch tokens after the last block and the final norm. `position`
    is the authors' rule for a grid other than side x side: offset (DINO: (h + 0.1) / side), size,
    antialias, or rotary (DINOv3, no table). SelfPatch has neither class token nor final norm."""
    def __init__(self, dim, depth, heads, patch, side=None, position="offset", cls=True,
                 registers=0, layer_scale=False, swiglu=False, norm=True, eps=1e-6):
        super().__init__()
        self.dim, self.patch, self.position = dim, patch, position
        self.prefix, self.side = int(cls) + registers, side or 224 // patch
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})

        counts = int(cls), registers, 0 if position == "rotary" else int(cls) + self.side ** 2
        for name, n in zip(("cls_token", "register_tokens", "pos_embed"), counts):
            x = nn.init.trunc_normal_(torch.empty(1, n, dim), std=0.02)
            self.register_parameter(name, nn.Parameter(x) if n else None)
        if position == "rotary":  # wavelengths in units of half an image side
            n = dim // heads // 4
            self.register_buffer("periods", 100 ** (torch.arange(n) / n))
        blocks = (Block(dim, heads, layer_scale, swiglu, eps) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps) if norm else nn.Identity()

    def positions(self, h, w):
        """The stored table for a grid of h x w patches, by the authors' rule: (1, cls + N, D)."""
        n = self.side
        if h == w == n:
            return self.pos_embed
        cls, table = self.pos_embed.float().tensor_split([-n * n], dim=1)
        how = {"size": (h, w), "antialias": self.position == "antialias"}
        if self.position == "offset":
            how = {"scale_factor": ((h + 0.1) / n, (w + 0.1) / n)}
        table = F.interpolate(table.mT.unflatten(2, (n, n)), mode="bicubic", **how)
        return torch.cat((cls, table.flatten(2).mT), dim=1)

    def rotary(self, h, w):
        """sin, cos (prefix+N, D/heads) of the angles: y of a patch's centre, then x, in (-1, 1)."""
        y, x = (((torch.arange(n).to(self.periods) + 0.5) / n * 2 - 1) for n in (h, w))
        centres = torch.cartesian_prod(y, x)  # (N,2)
        angles = (2 * torch.pi * centres[:, :, None] / self.periods).flatten(1).repeat(1, 2)
        angles = F.pad(angles, (0, 0, self.prefix, 0))  # tokens without a place do not turn
        return angles.sin(), angles.cos()

    def tokens(self, images, with_map=False):
        """-> tokens (B,prefix+N,D) after the final norm, last block's attention or None, (h, w)."""
        h, w = self.grid(images)
        x = self.patch_embed["proj"](images).flatten(2).mT  # (B,N,D)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        rotary = self.rotary(h, w) if self.position == "rotary" else None
        x = x if rotary else x + self.positions(h, w)
        if self.register_tokens is not None:  # after the class token, without position
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)
        for block in self.blocks:
            before, x = x, block(x, rotary)
        attention = block.attend(before, rotary, only_map=True) if with_map else None
        return self.norm(x), attention, (h, w)

    def forward_with_attention(self, images, with_map=True):
        """-> features (B,D,h,w), last block's attention (B,heads,prefix+N,prefix+N), soft-maxed."""
        tokens, attention, grid = self.tokens(images, with_map)
        return tokens[:, self.prefix:].transpose(1, 2).unflatten(2, grid), attention


class ResNet50(Backbone, nn.Sequential):
    """torchvision's ResNet-50, last two stages dilated to stride 8: (B,3,H,W) -> (B,2048,h,w)."""
    dim, patch = 2048, 8
    describe = nn.Sequential.forward

    def __init__(self):
        net = torchvision.models.resnet50(replace_stride_with_dilation=(False, True, True))
        super().__init__(OrderedDict(list(net.named_children())[:-2]))  # no avgpool, no fc


class DCT8(Backbone):
    """A backbone without weights, what the 8x8 DCT says about a patch: (B,3,H,W) -> (B,24,h,w).
    Mean colour, log energy of nine bands of the luminance (three octaves, three orientations), and
    the average of these 12 over 5x5 patches; energies of drawn scenes are zero on average."""
    dim, patch = 24, 8

    def __init__(self):
        super().__init__()
        k = torch.arange(8.0)
        basis = torch.cos(torch.pi * k[:, None] * (k + 0.5) / 8)
        basis = basis * torch.where(k == 0, 0.125, 0.25)[:, None].sqrt()  # orthonormal rows
        products = torch.einsum("uy,vx->uvyx", basis, basis).reshape(64, 1, 8, 8)
        v, u = k.repeat(8), k.repeat_interleave(8)
        octave = torch.bucketize(torch.maximum(u, v), torch.tensor([0.5, 1.5, 3.5]))
        lean = (u > 2 * v).long() - (v > 2 * u).long()  # change downwards, diagonal, across
        band = 3 * octave + lean - 2  # -2: the mean
        bands = (band == torch.arange(9)[:, None]).float().reshape(9, 64, 1, 1)
        grey = torch.tensor([0.299, 0.587, 0.114])[:, None, None] * STD.to(k.device)
        self.basis, self.bands, self.grey = map(nn.Buffer, (products, bands, grey))

    def describe(self, images):
        grey = (images * self.grey).sum(1, keepdim=True)  # (B,1,H,W)
        energy = F.conv2d(F.conv2d(grey, self.basis, stride=8) ** 2, self.bands)  # (B,9,h,w)
        own = torch.cat((F.avg_pool2d(images, 8), (energy + 1e-3).log() / 2 + 2.5), 1)
        return torch.cat((own, F.avg_pool2d(own, 5, 1, 2, count_include_pad=False)), 1)


# ---------------------------------------------------------------- names of backbones

SIZES = {"s": (384, 12), "b": (768, 12), "l": (1024, 24)}  # width, blocks; heads of 64 channels
V2 = dict(side=37, layer_scale=True)
V3 = dict(position="rotary", registers=4, layer_scale=True, eps=1e-5)
FAMILIES = {"dino": {}, "ibot": {}, "msn": dict(position="size"), "mae": dict(position="size"),
            "selfpatch": dict(cls=False, norm=False),
            "dinov2": V2, "dinov2_reg": V2 | dict(registers=4, position="antialias"),
            "dinov3": V3, "dinov3_plus": V3 | dict(swiglu=True)}

META = "https://dl.fbaipublicfiles.com/"
DINO = META + "dino/dino_{0}_pretrain/dino_{0}_pretrain.pth {1}"
DINOV2 = META + "dinov2/dinov2_{0}/dinov2_{0}{1}_pretrain.pth {2}"
IBOT = ("https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/{}/"
        "checkpoint_teacher.pth")
DINOV3 = "by hand: accept the licence at github.com/facebookresearch/dinov3, take dinov3_{}.pth"
ARCHS = {  # name: "address sha256" (first digits, if known), or how to get it by hand
    "dct8": "by hand: it has no weights",
    "vits16": DINO.format("deitsmall16", ""),
    "vitb16": DINO.format("vitbase16", ""),
    "vits8": DINO.format("deitsmall8_300ep", "10fee18a0e7714de9005f9d56975ca89"),  # STEGO's, HP's
    "dino_vits8_hub": DINO.format("deitsmall8", "55c8b267f479b614ec20858947ce361b"),  # CAUSE's
    "vitb8": DINO.format("vitbase8", "575f0efc4838938314afa09897a62ed2"),
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth 0676ba61",
    "dino_resnet50": DINO.format("resnet50", ""),
    "mocov2_resnet50": META + "moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
    "dinov2_vits14": DINOV2.format("vits14", "", "b938bf1bc15cd2ec0feacfe3a1bb553f"),
    "dinov2_vitb14": DINOV2.format("vitb14", "", "0b8b82f85de91b424aded121c7e1dcc2"),
    "dinov2_vitl14": DINOV2.format("vitl14", "", "d5383ea8f4877b2472eb973e0fd72d55"),
    "dinov2_vits14_reg": DINOV2.format("vits14", "_reg4", "f433177089a681826f849f194ece3bb4"),
    "dinov2_vitb14_reg": DINOV2.format("vitb14", "_reg4", "73182a088cf94833c94b1666d1c99e02"),
    "dinov2_vitl14_reg": DINOV2.format("vitl14", "_reg4", "36e4deffbaef061a2576705b0c36f936"),
    "ibot_vits16": IBOT.format("vits_16"),
    "ibot_vitb16": IBOT.format("vitb_16"),
    "msn_vits16": META + "msn/vits16_800ep.pth.tar",
    "msn_vitb16": META + "msn/vitb16_600ep.pth.tar",
    "mae_vitb16": META + "mae/pretrain/mae_pretrain_vit_base.pth",
    "selfpatch_vits16": "by hand: drive.google.com/file/d/19eeQrK-nl4B9ksFQ_QnewGHVKYDQF4Yw",
    "dinov3_vits16": DINOV3.format("vits16_pretrain_lvd1689m-08c60483"),
    "dinov3_vits16plus": DINOV3.format("vits16plus_pretrain_lvd1689m-4057cbaa"),
    "dinov3_vitb16": DINOV3.format("vitb16_pretrain_lvd1689m-73cec8be"),
}
NAME = re.compile(r"(?:(\w+)_)?vit([sbl])(\d+)_?(reg|plus|hub)?")


def load_backbone(arch, weights=None, depth=None, heads=None):
    """A frozen backbone in eval mode with .dim and .patch: normalised (B,3,H,W) -> (B,D,h,w).

    weights  None: the authors' file, downloaded on first use; a file in a published layout; "none"
    depth    keep the first `depth` blocks of a ViT, then its final norm
    heads    of a ViT if not D/64 (CAUSE's published heads saw DINO's ViT-S with 12)
    ValueError for an unknown name, or weights that are not the whole of this architecture."""
    if arch not in ARCHS:
        raise ValueError(f"unknown backbone {arch!r}{did_you_mean(arch, ARCHS)}")
    with torch.random.fork_rng(devices=[]):  # the caller's draws stay what they were
        torch.default_generator.manual_seed(0)
        if vit := NAME.fullmatch(arch):
            family, size, patch, variant = vit.groups("dino")
            family += f"_{variant}" * (variant in ("reg", "plus"))
            width, blocks = SIZES[size]
            backbone = ViT(width, blocks, heads or width // 64, int(patch), **FAMILIES[family])
        else:
            backbone = DCT8() if arch == "dct8" else ResNet50()
    blocks = len(getattr(backbone, "blocks", ()))
    if depth is not None and not 1 <= depth <= blocks:
        raise ValueError(f"--depth {depth} does not go with {arch}: it has {blocks or 'no'} blocks")
    if arch == "dct8" and weights not in (None, "none"):
        raise ValueError(f"dct8 has no weights; {weights} needs the --arch that it was trained as")
    if arch != "dct8" and weights != "none":
        load_weights(backbone, weights or fetch(ARCHS[arch], arch), arch)
    if depth is not None:
        del backbone.blocks[depth:]
    return backbone.requires_grad_(False).eval()


# ---------------------------------------------------------------- reading weights
class Inert:
    """Stands for any Python object pickled beside tensors; a plain one is an empty dictionary."""
    def __new__(cls, *args, **kwargs):  # numpy's have several arguments, and a state of their own
        return OrderedDict() if len(args) < 2 else super().__new__(cls)

    def __setstate__(self, state):
        pass


# what trainers leave in checkpoints; files that name anything else are refused
HARMLESS = re.compile(r"(argparse|builtins|collections|(pytorch_)?lightning\w*|numpy|omegaconf|"
                      r"pathlib|torch|torchmetrics|typing)\..+")


def read_tensors(path):
    """A published checkpoint: tensors, plain values, `Inert` for objects; nothing in it is run."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of weights: {path}" + path.is_dir() * " is a directory")
    try:
        new = zipfile.is_zipfile(path)  # in torch's old format objects are refused
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if new else ()
        if alien := [name for name in names if not HARMLESS.fullmatch(name)]:
            raise ValueError(f"it names {alien[0]}, which has no place in a file of weights")
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            return read(path)
    except Exception as error:  # damaged or hostile
        text = str(error) if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path} is no whole file of weights ({text}); nothing was run") from None


WRAPPERS = "teacher target_encoder model state_dict model_ema net_model_state_dict".split()
PREFIXES = "_orig_mod. module. backbone. encoder_q. net.model. model.".split()
# what published files hold beside the backbone: mask tokens, heads, decoders, prototypes
DROP = re.compile(r"(mask_token|masked_embed|local_cls_norm|head|fc|pred|decoder\w*|pooler|"
                  r"classifier|projection_head|prototypes)(\.|$)|.*\.bias_mask$")
# names in DINOv2's and DINOv3's own files -> DINO's; DINOv2's training files have chunks of blocks
RENAME = ((r"^storage_tokens$", "register_tokens"), (r"^rope_embed\.periods$", "periods"),
          (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."))


def load_weights(model, path, arch):
    """Fill `model` from a file in a published layout, or not at all; ValueError: what differs."""
    content, wanted = read_tensors(path), model.state_dict()
    content = content if isinstance(content, dict) else {}
    inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), dict)]
    state = {str(k): v for k, v in (inner or [content])[0].items() if torch.is_tensor(v)}
    for prefix in PREFIXES:
        state = {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)} or state
    state = {k: v for k, v in state.items() if not DROP.match(k)}
    for pattern, name in RENAME:
        state = {re.sub(pattern, name, k): v for k, v in state.items()}
    own = {k: x for k, x in wanted.items() if k.endswith(("num_batches_tracked", "periods"))}
    try:
        load_trained(model, own | state)  # files may lack what is `own`, and be fp16
    except ValueError as error:
        raise ValueError(f"{path} does not fit {arch}: {error}") from None
    for block in model.blocks if "periods" in wanted else ():
        block.attn["qkv"].bias.data.chunk(3)[1].zero_()  # DINOv3's files mask the bias of keys


# ---------------------------------------------------------------- downloads
def fetch(source, arch):
    """`source` as in ARCHS -> file in torch hub's cache, downloaded on first use. On every use its
    sha256 is checked: the published one, else the first download's, kept in NAME.sha256."""
    url, _, sha256 = source.partition(" ")
    if url == "by":
        raise ValueError(f"weights of {arch} are got {source}; then give --weights FILE")
    name = url.rsplit("/", 1)[1].replace("checkpoint_teacher", f"{arch}_checkpoint_teacher")
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    note = path.with_name(name + ".sha256")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the other processes of a run wait
        with open(download(url, path), "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not sha256 and not note.exists():
            write(note, found.encode())
        if not found.startswith(sha256 or note.read_text().strip()):
            raise ValueError(f"{path} has changed or is another file, by its sha256; "
                             "delete it and it is fetched again")
    if world() > 1:
        dist.barrier()
    return path


def download(url, path):
    """url -> file `path`, by way of PATH.part, with which a later call goes on while the server has
    the same file (If-Range). Renamed when the length is right."""
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".tag")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = urllib.request.Request(url)
    if part.exists() and tag.exists():
        asked.headers = {"Range": f"bytes={part.stat().st_size}-", "If-range": tag.read_text()}
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            tag.unlink(missing_ok=True)  # the part belongs to nothing until this is checked
            headers, have = answer.headers, part.stat().st_size if answer.status == 206 else 0
            if have and not f"{headers['Content-Range']}".startswith(f"bytes {have}-"):
                raise OSError("the server sends another part than asked for")
            length = headers["Content-Length"]  # None: sent in chunks, which say when they end
            total = have + int(length) if length else None
            if headers["ETag"]:
                tag.write_text(headers["ETag"])
            with open(part, "ab" if have else "wb") as file, tqdm(
                    desc=path.name, initial=have, total=total, unit="B", unit_scale=True) as bar:
                while block := answer.read(2 ** 20):
                    bar.update(file.write(block))
        if total not in (None, part.stat().st_size):
            raise OSError(f"it broke off after {part.stat().st_size:,} of {total:,} bytes")
    except (OSError, ValueError, http.client.HTTPException) as error:
        if getattr(error, "code", 0) == 416:  # nothing left to send of that: from the start
            tag.unlink()
        raise OSError(f"cannot get {url} ({error}); try again, which resumes, "
                      f"or put the file at {path}") from None
    tag.unlink(missing_ok=True)
    os.replace(part, path)
    return path
