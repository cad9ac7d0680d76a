"""SAN, Semantic Attention Network (Zhang et al., AAAI 2023, arXiv 2211.14513).

Each pixel gets an embedding Q from its 3x3 neighbourhood. A ViT over 8x8 patches makes semantic
embeddings S for the whole batch, and gates say which of them an image holds. Each pixel attends to
the semantics; one decoder has to paint the image from Q, and the same picture from the mixture of
semantics. The attention is the segmentation. Nothing is pretrained. No code was published: what
the paper leaves open is marked [1] to [18] where it is settled.

    python san.py                                      # generated scenes, no download, 40 s
    python san.py --data camvid --root data/camvid
    python san.py --data coco15 --root data/cocostuff  # paper: accuracy 55.7 %, not run here
    python eval.py runs/san-scenes-scratch-0 --images photos --out segmented

The first gives accuracy 76.4 +- 1.0 %, mIoU 54.2 +- 1.1 % (seeds 0, 1, 2; one thread, torch 2.14),
K-means on average patch colours 71.2 and 50.7. SAN is a learned palette: colour and 3x3 texture,
not objects. Seed 0 has 76.0 / 54.3, with --no-reconstruction (the collapse) 49.4 / 25.8, with
--normalise set 59.9 / 35.2 (K-means 50.0 / 26.6), and --gates softmax beside it 49.5 / 18.9.

The paper's tables, accuracy in % (theirs, not run here), and what `python san.py` takes for them:

    2, 3  --data coco3 80.3, potsdam6 60.5, coco15 55.7, coco27 52.0, cityscapes27 51.0
    4  --data coco3 --layers 4: 79.9. ResNet-18 and U-Net as encoder or generator cannot be run
    5  --data coco3 and --no-reconstruction 34.2, --semantics image --gates none 74.4,
       --semantics image 79.2, --gates none 76.7, nothing 80.3

    paper                                  here
    P, length of the embeddings            --dim; `width` in shapes
    N semantics                            --clusters; `semantics` in shapes
    pixel-wise encoder F_Q                 Model.perceptron, Model.encoder
    Q or zeta_d, Theta_d                   q, theta
    semantic-wise generator F_S, K tokens  Generator; N = h*w tokens
    multi-head generator, S or zeta_n      Generator.semantics
    token matcher or rematcher, p_n        Generator.gates
    Gamma_d = p_n x zeta_n                 Model.gamma
    SEAT; consistency sustainer F_G        semantic_attention; Model.sustainer

Departures from the paper:

    test time    semantics averaged in training, not those of the test batch: who else is in it must
                 not change a prediction (--semantics batch: the paper's)
    gates        sigmoid (Fig. 3), for a simplex (text) flattens the attention
    uniformity   eq. 6, 7 are left out, as by the paper in the end; S^T S = E needs semantics >= P
    Potsdam      three channels of four: infrared is dropped
    scores       mIoU, too; val alone, whole (IIC: crops, of train too); COCO-27, Cityscapes: 128 px
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2

import common
import data
import eval


# ---------------------------------------------------------------- model

alone = nn.Identity()  # a sum over one process; for several `train` passes common.reduce_sum


def attention_logits(q, s):
    """Q S^T / sqrt(P): q (B,width,H,W), s (B,semantics,width) -> (B,semantics,H,W)."""
    return torch.einsum("bsp,bphw->bshw", s, q) * q.shape[1] ** -0.5


def semantic_attention(q, s):
    """SEAT (eq. 3), softmax(Q S^T / sqrt(P)) S: q (B,width,H,W), s (B,semantics,width)
    -> attention (B,semantics,H,W), alignment embeddings Theta (B,width,H,W)."""
    attention = attention_logits(q, s).softmax(1)
    return attention, torch.einsum("bshw,bsp->bphw", attention, s)


def positions(width, h, w, device):
    """Sinusoidal positions (h*w,width): half the channels for rows, half for columns."""
    rate = 10000 ** -torch.linspace(0, 1, width // 4, device=device)
    y, x = (torch.arange(side, device=device)[:, None] * rate for side in (h, w))
    y, x = (torch.cat([a.sin(), a.cos()], 1) for a in (y, x))  # (h,width/2), (w,width/2)
    return torch.cat([y[:, None].expand(h, w, -1), x.expand(h, w, -1)], -1).flatten(0, 1)


class Generator(nn.Module):
    """Semantic-wise generator F_S: images (B,3,H,W) -> tokens (B,N,width) of 8x8 patches, from
    which `semantics` makes the semantic embeddings and `gates` tells which an image holds."""
    def __init__(self, width, semantics, layers, gates, patch=8):
        super().__init__()
        self.gate, self.embed = gates, nn.Conv2d(3, width, patch, patch)
        # [1] the transformer: heads of 64, hidden width 4P, GELU, norms first and one last,
        # no dropout, no class token, sinusoidal positions, which fit images of any size
        layer = nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, 0.0, F.gelu,
                                           batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width),
                                            enable_nested_tensor=False)
        for p in self.blocks.parameters():  # PyTorch copies one layer: draw each anew
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        # [2] multi-head generator: one MLP of two layers, P -> P -> P, for each semantic
        shape = semantics, width, width
        self.W1, self.W2 = (nn.Parameter(torch.randn(shape) * width ** -0.5) for _ in range(2))
        self.b1, self.b2 = (nn.Parameter(torch.zeros(semantics, width)) for _ in range(2))
        # [3] "the normalization layer" that orthogonalises them: batch norm over the semantics,
        # which takes away what they share; without running statistics, for all are always there
        self.norm = nn.InstanceNorm1d(width, affine=True)
        # [4] token matcher, sizes not given: the mean of an image's tokens -> P/2 -> semantics
        self.matcher = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(),
                                     nn.Linear(width // 2, semantics))

    def forward(self, images):
        t = self.embed(images)  # (B,width,h,w)
        return self.blocks(t.flatten(2).mT + positions(*t.shape[1:], t.device))

    def semantics(self, tokens, batchwise=True, total=alone):
        """Tokens (B,N,width) -> S (semantics,width) of the batch, eq. 4, or (B,...)."""
        # [5] "merge all the output information": the mean over tokens and images
        g = tokens.mean(1)  # (B,width)
        if batchwise:
            g = total(g.sum(0)) / total(g.new_full((), len(g)))  # (width,)
        z = F.gelu(torch.einsum("...p,sqp->...sq", g, self.W1) + self.b1)
        z = torch.einsum("...sp,sqp->...sq", z, self.W2) + self.b2
        return self.norm(z.mT).mT  # (...,semantics,width)

    def gates(self, tokens):
        """Tokens (B,N,width) -> p (B,semantics) in [0,1]: how much of each an image holds."""
        if self.gate == "none":
            return tokens.new_ones(len(tokens), len(self.b1))
        # [6] simplex (text) or sigmoid (Fig. 3): rows scaled by 1/semantics flatten the attention
        p = self.matcher(tokens.mean(1))
        return p.sigmoid() if self.gate == "sigmoid" else p.softmax(-1)


def prepare(images, normalise):
    """Images of the data set (...,3,H,W) -> the network's input, which it must also paint."""
    # [7] the range of the target. set: by ImageNet's mean and deviation, as the data set gives it;
    # image (scenes, CamVid): by each photo's own, else much of the painting is light and cast
    if normalise == "image":
        images = images - images.mean((-2, -1), keepdim=True)
        images = images / images.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=0.1)
    return images


class Model(nn.Module):
    """images (B,3,H,W) -> code (B,semantics,H,W), logits of the attention, at full resolution."""
    patch, alpha = 8, 5  # ours: the CRF gets log-softmax(5 * cosine)

    def __init__(self, args):
        super().__init__()
        width, semantics = args.dim, args.clusters
        self.mode, self.normalise = args.semantics, args.normalise
        # [8] per-pixel perceptron, "a superficial 3x3 Conv layer" to P/2, with BN and GELU
        self.perceptron = nn.Sequential(nn.Conv2d(3, width // 2, 3, padding=1, bias=False),
                                        nn.BatchNorm2d(width // 2), nn.GELU())
        # [9] pixel-to-pixel encoder: a 1x1 convolution to P, with BN
        self.encoder = nn.Sequential(nn.Conv2d(width // 2, width, 1, bias=False),
                                     nn.BatchNorm2d(width))
        self.generator = Generator(width, semantics, args.layers, args.gates, self.patch)
        # [10] consistency sustainer F_G, "a shallow 1x1 convolution neural network": P -> P/4 -> 3
        self.sustainer = nn.Sequential(nn.Conv2d(width, width // 4, 1), nn.GELU(),
                                       nn.Conv2d(width // 4, 3, 1))
        # [11] which S at test time: the momentum average of training's; see Departures
        self.register_buffer("average", torch.zeros(semantics, width))
        self.register_buffer("seen", torch.zeros(()))
        self.cluster = eval.ClusterProbe(semantics, semantics).requires_grad_(False)
        nn.init.eye_(self.cluster.clusters)  # the nearest centre is the largest attention
        self.linear = eval.LinearProbe(semantics, args.classes) if args.classes else None

    def gamma(self, tokens, total=alone):
        """Tokens (B,N,width) -> Gamma (B,semantics,width): semantics scaled by the gates."""
        s = self.average
        if self.training or self.mode != "average":
            s = self.generator.semantics(tokens, self.mode != "image", total)
        if self.training and self.mode == "average":  # it moves on
            self.seen += 1
            self.average.lerp_(s.detach(), (1 / self.seen).clamp(min=0.1))  # a plain mean at first
        # [12] where p acts: on the rows of Gamma, which is key and value alike
        return self.generator.gates(tokens)[:, :, None] * s

    def reconstruct(self, images, tokens, total=alone):
        """`prepare`d images (B,3,H,W) and their tokens (B,N,width) -> code (B,semantics,H,W),
        F_G(Q) and F_G(Theta), both (B,3,H,W)."""
        q = self.encoder(self.perceptron(images))  # (B,width,H,W)
        gamma = self.gamma(tokens, total)
        _, theta = semantic_attention(q, gamma)
        return attention_logits(q, gamma), self.sustainer(q), self.sustainer(theta)

    def forward(self, images):
        images = prepare(images, self.normalise)
        return reconstruct_folded(self, images, self.generator(images), paint=False)[0]


# ---------------------------------------------------------------- loss

def reconstruction_loss(rec_q, images):
    """L_Rec (eq. 8): mean square difference of F_G(Q) and the network's input, both (B,3,H,W)."""
    return (rec_q - images).square().mean()


def consistency_loss(rec_theta, rec_q, images, target="decoded"):
    """L_Con (eq. 9): mean square difference of F_G(Theta) and F_G(Q), or the image."""
    # [13] which pairs of the three arguments of d in eq. 9: F_G(Theta) and F_G(Q), for only so can
    # the loss vanish without reconstruction, which is the collapse in Table 5
    # [14] nothing keeps a semantic from staying empty, nor in the paper; a class is then missed
    return (rec_theta - (images if target == "image" else rec_q)).square().mean()


# ---------------------------------------------------------------- training

class Crops(torch.utils.data.Dataset):
    """Random square crops of `size` pixels; augment, as IIC: mirrored, jittered colours or grey."""
    def __init__(self, images, size, normalise="set", augment=False):
        self.images, self.size, self.normalise, self.augment = images, size, normalise, augment
        self.colour = v2.Compose([v2.ColorJitter(0.1, 0.1, 0.1, 0.1), v2.RandomGrayscale(0.2)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        item = self.images[index]
        image, label = item["image"], item["label"]
        if self.augment:
            image = (self.colour(image * common.STD + common.MEAN) - common.MEAN) / common.STD
            if torch.rand(()) < 0.5:
                image, label = image.flip(-1), label.flip(-1)
        image = prepare(image, self.normalise)
        bottom, right = (max(self.size - side, 0) for side in label.shape)  # a long, narrow photo
        image = F.pad(image[None], (0, right, 0, bottom), mode="replicate")[0]
        label = F.pad(label, (0, right, 0, bottom), value=-1)
        y, x = (int(torch.randint(side - self.size + 1, ())) for side in label.shape)
        box = (..., slice(y, y + self.size), slice(x, x + self.size))
        return {**item, "image": image[box], "label": label[box]}


def schedule(args, n):
    """Steps of the paper's 30 epochs over n images; every batch is full, so epochs are chained."""
    args.steps = args.steps or max(1, round(args.epochs * n / args.batch_size))


def train(args):
    if args.arch != "scratch" or args.weights or args.depth or args.cache_features:
        raise ValueError("SAN trains its own network, of width --dim and depth --layers: leave "
                         "out --arch, --weights, --depth and --cache-features")
    if args.dim % 64 or args.size % 8 or args.size > args.eval_size:
        raise ValueError(f"--dim {args.dim} should be a multiple of 64, --size {args.size} one of "
                         f"8 and no larger than --eval-size {args.eval_size}")
    # [15] photos are shrunk to a shorter side of --eval-size, as IIC does, then cropped
    # [16] what is scored: the val split at that size; see Departures
    images = data.load(args.data, args.root, "train", size=args.eval_size, protocol=args.protocol)
    val = data.load(args.data, args.root, "val", size=args.eval_size, protocol=args.protocol)
    schedule(args, len(images))
    args.classes, args.clusters = images.classes, args.clusters or images.classes or 27
    run = common.Run("san", args, images, val)
    model = Model(args).to(run.device).train()
    reconstruct = Model.reconstruct if args.plain else reconstruct_folded
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters()
                                  if not name.startswith(("linear.", "cluster."))], args.lr)
    probe = torch.optim.Adam([{"params": model.linear.parameters() if model.linear else []}], 0.01)
    run.keep(model=model, optimizer=optimizer, probe=probe)
    crops = Crops(images, args.size, args.normalise, args.augment)
    for step, batch in run.loop("head", crops, args.steps):
        image = batch["image"]
        with run.autocast():
            tokens = model.generator(image)  # (B,N,width)
        code, rec_q, rec_theta = reconstruct(model, image, tokens.float(), common.reduce_sum)
        rec = reconstruction_loss(rec_q, image)
        con = consistency_loss(rec_theta, rec_q, image, args.target)
        loss = rec + con if args.reconstruction else con  # [17] no weights given: 1 and 1
        linear_loss = eval.probe_losses(model, code, batch["label"])[1]
        run.log(loss=loss, rec=rec, con=con, linear=linear_loss)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        probe.zero_grad(set_to_none=True)
        linear_loss.backward()
        probe.step()
    patch_colours = lambda x: F.avg_pool2d(prepare(x, args.normalise), model.patch)  # noqa: E731
    return eval.finish(run, model, images, val, encode=patch_colours)


# ---------------------------------------------------------------- fast forms: the same numbers

# `reconstruct_folded` equals Model.reconstruct: 0.22 GB an image in place of 0.63, and 5.5 s for a
# step of one in place of 8.7 (P = 1024, 128x128, float32, one CPU thread, torch 2.14). Nothing P
# wide is stored for a pixel. A batch norm folds into the convolution before it, for the mean and
# variance of W x follow from those of x. Then Q = V h + c, and what reads Q or Theta is linear:
#     Q Gamma^T = h (Gamma V)^T + Gamma c,  A Q = (A V) h + A c,  A Theta = attention (Gamma A^T)
# with A, the first layer of F_G. Images go through in chunks, computed again in the backward pass;
# chunks of 16 at batch 128: 2,500 launches and no wait for the device in place of 17,100 and 257.

def chunk(images):
    """Images at a time: 2^18 pixels on CUDA, so that launches are few; one on a CPU."""
    return max(1, 2 ** 18 // images[0, 0].numel()) if images.is_cuda else 1


def by_chunks(function, images, *rows):
    """[function(images, rows) of each chunk], computed again in the backward pass."""
    parts = zip(*(x.split(chunk(images)) for x in (images, *rows)))
    return [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False)
            for part in parts]


def moments(x):
    """x (B,d,pixels) -> number of its columns (), their sum (d,), their sum of products (d,d)."""
    count = x.new_full((), len(x) * x.shape[2])  # new_tensor would wait for the device
    return count, x.sum((0, 2)), torch.einsum("bdp,bep->de", x, x)


def fold(convolution, norm, found=None, total=alone):
    """A convolution W and the nn.BatchNorm2d after it -> weight (m,d) and bias (m,) of one map.

    found: `moments` of what W multiplies, in training; None: the running statistics serve."""
    W, mean, var = convolution.weight.flatten(1), norm.running_mean, norm.running_var
    if found is not None:
        count, sums, products = (total(x) for x in found)
        mu = sums / count  # (d,)
        covariance = products / count - mu[:, None] * mu  # (d,d)
        mean, var = W @ mu, ((W @ covariance) * W).sum(1).clamp(min=0)  # diag W cov W^T
        norm.running_mean.lerp_(mean.detach(), norm.momentum)
        norm.running_var.lerp_(var.detach() * count / (count - 1), norm.momentum)  # unbiased
        norm.num_batches_tracked += 1
    scale = norm.weight * (var + norm.eps).rsqrt()
    return scale[:, None] * W, norm.bias - scale * mean


def reconstruct_folded(model, images, tokens, total=alone, paint=True):
    """Equals Model.reconstruct; without paint only its code."""
    def hidden(x):  # perceptron with its batch norm folded in: (B,3,H,W) -> h (B,width/2,H,W)
        return F.gelu(F.conv2d(x, U.view(-1, 3, 3, 3), b, padding=1))
    gamma, found = model.gamma(tokens, total), None
    if model.training:
        found = moments(F.unfold(images, 3, padding=1))  # 27 a pixel
    U, b = fold(*model.perceptron[:2], found, total)
    if model.training:
        parts = by_chunks(lambda x: moments(hidden(x).flatten(2)), images)
        found = [sum(terms) for terms in zip(*parts)]
    V, c = fold(*model.encoder, found, total)
    first, *rest = model.sustainer
    A, a = first.weight.flatten(1), first.bias[:, None, None]  # (width/4,width), (width/4,1,1)

    def one(x, s):
        h = hidden(x)
        code = torch.einsum("bsm,bmhw->bshw", s @ V, h) + (s @ c)[..., None, None]
        code = code * len(c) ** -0.5
        if not paint:
            return code,
        q = torch.einsum("km,bmhw->bkhw", A @ V, h) + (A @ c)[:, None, None] + a
        theta = torch.einsum("bshw,bsk->bkhw", code.softmax(1), s @ A.T) + a
        return code, *(nn.Sequential(*rest)(y) for y in (q, theta))

    return [torch.cat(part) for part in zip(*by_chunks(one, images, gamma))]


# ---------------------------------------------------------------- command line

def arguments():
    p = common.parser(__doc__)
    # [18] batch size not given: 32 for each of the paper's four GPUs
    p.set_defaults(arch="scratch", protocol="whole", size=128, epochs=30, batch_size=128, lr=1e-4)
    add = p.group("SAN")
    add("--dim", 1024, "length of all embeddings, a multiple of 64; 64 serves scenes", low=64)
    add("--layers", 6, "layers of the transformer")
    add("--eval-size", 128, "shorter side of a photo before it is cropped, or scored", low=8)
    add("--normalise", "set", "mean, deviation of ImageNet or each photo", choices=["set", "image"])
    add("--augment", False, "mirror, jitter and drop colours; the paper's, for Potsdam only")
    add("--semantics", "average", "to predict: the average of training's, or, as published, the "
        "batch's; image: each image has its own, always", choices=["average", "batch", "image"])
    add("--gates", "sigmoid", "output of the token matcher; softmax, the text's, is worse",
        choices=["sigmoid", "softmax", "none"])
    add("--target", "decoded", "what the mixture of semantics must paint: what Q paints, or x",
        choices=["decoded", "image"])
    add("--reconstruction", True, "L_Rec; without it training collapses, unless --target image")
    add("--plain", False, "store Q and Theta; equal in one process")
    return p


PRESETS = {
    "scenes": dict(eval_size=96, size=48, dim=64, steps=300, batch_size=16, lr=5e-4,
                   normalise="image"),
    "camvid": dict(size=64, dim=64, steps=1000, batch_size=16, lr=5e-4, normalise="image"),
    "folder": dict(steps=12000),
    "coco3": dict(eval_size=160), "coco15": dict(eval_size=160),  # a third of 640 x 480, cropped
    "coco27": dict(protocol="picie"), "cityscapes27": dict(protocol="picie"),  # central squares
    "potsdam6": dict(eval_size=200, augment=True),
    "smoke": dict(steps=10, batch_size=4, dim=64, layers=2),
}

if __name__ == "__main__":
    common.main(arguments, PRESETS, schedule, train, data.count)
