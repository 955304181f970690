"""The feature extractor of the paper's metrics: Inception-v3 of TensorFlow's 2015-12-05 graph, its FID variant.

    net = load_inception()                          # weights from --inception-weights, the cache, or a download
    features, logits = net(images)                  # uint8 (N, 3, H, W) -> (N, 2048), (N, 1008)

Names and shapes are those of the published weight file (566 entries), which loads unchanged. It differs from
torchvision's Inception-v3 in the resize (TensorFlow 1's), the 1,008 outputs, average pools that leave the padding out,
and the maximum pool in the last block.
"""
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import runtime
from runtime import UserError

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIZE = 299


def resize_matrix(size_in, size_out, device):
    """TensorFlow 1's bilinear interpolation of one axis as a matrix (size_out, size_in): position i reads i in / out.

    No half-pixel centres and no antialiasing: pixel 0 stays pixel 0, and the last ones repeat the border.
    """
    position = torch.arange(size_out, device=device) * (size_in / size_out)
    low = position.long().clamp(max=size_in - 1)
    high, weight = (low + 1).clamp(max=size_in - 1), (position - low).float()
    matrix = torch.zeros(size_out, size_in, device=device)
    rows = torch.arange(size_out, device=device)
    matrix.index_put_((rows, low), 1 - weight, accumulate=True)
    return matrix.index_put_((rows, high), weight, accumulate=True)


def resize(x, size=SIZE):
    """Float images (N, C, H, W) -> (N, C, size, size), as the graph's ResizeBilinear."""
    H, W = x.shape[-2:]
    rows, columns = resize_matrix(H, size, x.device), resize_matrix(W, size, x.device)
    return rows @ x @ columns.T


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU; a stride of 2 goes without padding, as do the stem's 3x3."""

    def __init__(self, in_ch, out_ch, kernel, stride=1, padded=True):
        super().__init__()
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = tuple(k // 2 for k in kernel) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(in_ch, out_ch, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_ch, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def average(x):
    """3 x 3 average that leaves padding out of its count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x):
    """3 x 3 maximum at every position."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x):
    """3 x 3 maximum with stride 2."""
    return F.max_pool2d(x, 3, stride=2)


class Mixed(nn.Module):
    """An Inception block: parallel paths, their results concatenated.

    paths: {name: list of (channels, kernel, stride)}; a list in place of a triple forks the path in two. Convolutions
    are named NAME (where a path has one), NAME_1, NAME_2 ... and NAME_3a, NAME_3b. pool: what the path "branch_pool"
    begins with, or all of it where that has no convolution.
    """

    def __init__(self, in_ch, pool, paths):
        super().__init__()
        self.pool, self.paths, self.out_ch = pool, {}, 0
        for path, layers in paths.items():
            self.paths[path], ch = [], in_ch
            for i, layer in enumerate(layers, 1):
                fork = layer if isinstance(layer, list) else [layer]
                name = path if len(layers) == 1 else f"{path}_{i}"
                names = [name] if len(fork) == 1 else [name + letter for letter in "ab"]
                for n, (out, *rest) in zip(names, fork):
                    self.add_module(n, ConvNorm(ch, out, *rest))
                self.paths[path].append(names)
                ch = sum(out for out, *_ in fork)
            self.out_ch += ch

    def forward(self, x):
        results = []
        for path, stages in self.paths.items():
            h = self.pool(x) if path == "branch_pool" else x
            for names in stages:
                h = torch.cat([getattr(self, n)(h) for n in names], 1)
            results.append(h)
        return torch.cat(results, 1)


def block_a(in_ch, pool_ch):
    return Mixed(in_ch, average, {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
                                  "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": [(pool_ch, 1)]})


def block_b(in_ch):
    return Mixed(in_ch, halve, {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)], "branch_pool": []})


def block_c(in_ch, ch):
    return Mixed(in_ch, average, {
        "branch1x1": [(192, 1)], "branch7x7": [(ch, 1), (ch, (1, 7)), (192, (7, 1))],
        "branch7x7dbl": [(ch, 1), (ch, (7, 1)), (ch, (1, 7)), (ch, (7, 1)), (192, (1, 7))], "branch_pool": [(192, 1)]})


def block_d(in_ch):
    return Mixed(in_ch, halve, {"branch3x3": [(192, 1), (320, 3, 2)],
                                "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], "branch_pool": []})


def block_e(in_ch, pool):
    fork = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(in_ch, pool, {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork],
                               "branch3x3dbl": [(448, 1), (384, 3), fork], "branch_pool": [(192, 1)]})


class Inception(nn.Module):
    """Images uint8 (N, 3, H, W) -> pooled features (N, 2048) and logits without the bias (N, 1008), float32."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b, self.Mixed_6c = block_c(768, 128), block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = block_c(768, 160), block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b, self.Mixed_7c = block_e(1280, average), block_e(2048, maximum)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):
        x = (resize(images.float()) - 128) / 128                        # (N, 3, 299, 299)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))            # (N, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))       # (N, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))        # (N, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))              # (N, 2048, 8, 8)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def find_weights(path=None):
    """The weight file: `path`, or the one in torch.hub's cache (which torch-fidelity shares), downloaded if need be."""
    if path:
        if not Path(path).is_file():
            raise UserError(f"--inception-weights {path}: there is no such file; it can be had from {URL}")
        return Path(path)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not cached.is_file():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(cached), hash_prefix=SHA256)
        except (OSError, RuntimeError) as e:
            raise UserError(f"--inception-weights: {FILE} is not there and cannot be downloaded ({e}); put it, from {URL}, "
                            f"into {cached.parent}, or name it with --inception-weights; or measure in a classifier's features with --features FILE, which "
                            f"classify.py makes")
    return cached


def load_inception(path=None, device="cpu", trust=False):
    """(the network in eval mode, the SHA-256 of its weights). Raises UserError unless they are the published ones.

    trust: take a file with another hash, if it fits.
    """
    path = find_weights(path)
    digest = runtime.sha256(path)
    if digest != SHA256 and not trust:
        raise UserError(f"--inception-weights {path}: its SHA-256 is {digest[:16]}..., not the published {SHA256[:16]}...: cut "
                        f"short, or other weights; numbers made with it compare with nobody's. --trust-weights takes it as it is")
    net = Inception()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:      # whatever a file that is not a state dict of this network makes torch.load raise
        raise UserError(f"--inception-weights {path}: not the weights of the 2015 Inception graph "
                        f"({type(e).__name__}); get them from {URL}")
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), digest
