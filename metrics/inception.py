"""The feature extractor of the paper's metrics: the FID variant of Inception-v3.

    net, sha256 = load_inception()      # weights from a file, the cache, or a download
    features, logits = net(images)      # uint8 (N, 3, H, W) -> (N, 2048), (N, 1008)

It is TensorFlow's graph of 2015-12-05. Names and shapes are those of the published weight file (566
entries), which loads unchanged. The differences from torchvision's Inception-v3 are the resize
(that of TensorFlow 1), the 1,008 outputs, average pools that do not count the padding, and the
maximum pool in the last block.
"""
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import disk
from runtime import UserError

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIZE = 299          # height and width that images are resized to


# --------------------------------------------------------------------------------------------------
# Resize

def resize_matrix(size_in, size_out, device):
    """TensorFlow 1's bilinear interpolation of one axis as a matrix (size_out, size_in).

    Output position i reads the input at i * size_in / size_out, without half-pixel centres and
    without antialiasing. Pixel 0 stays pixel 0, and the last positions repeat the border.
    """
    position = torch.arange(size_out, device=device) * (size_in / size_out)
    low = position.long().clamp(max=size_in - 1)
    high = (low + 1).clamp(max=size_in - 1)
    weight = (position - low).float()
    matrix = torch.zeros(size_out, size_in, device=device)
    rows = torch.arange(size_out, device=device)
    matrix.index_put_((rows, low), 1 - weight, accumulate=True)
    matrix.index_put_((rows, high), weight, accumulate=True)
    return matrix


def resize(x, size=SIZE):
    """Float images (N, C, H, W) -> (N, C, size, size), like the graph's ResizeBilinear."""
    H, W = x.shape[-2:]
    rows = resize_matrix(H, size, x.device)
    columns = resize_matrix(W, size, x.device)
    return rows @ x @ columns.T


def graphs_input(images):
    """uint8 (N, 3, H, W) -> what the graph's first layer gets, and torch-fidelity's."""
    return (resize(images.float()) - 128) / 128


def pytorch_fids_input(images):
    """uint8 (N, 3, H, W) -> what the first layer gets in pytorch-fid: half-pixel centres."""
    return 2 * F.interpolate(images.float() / 255, (SIZE, SIZE), mode="bilinear") - 1


INPUTS = {"inception": graphs_input, "inception:pytorch-fid": pytorch_fids_input}   # of --features


# --------------------------------------------------------------------------------------------------
# Layers and blocks

class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU.

    There is no padding where the stride is 2, or where `padded` is False (twice in the stem).
    """

    def __init__(self, in_ch, out_ch, kernel, stride=1, padded=True):
        super().__init__()
        if not isinstance(kernel, tuple):
            kernel = (kernel, kernel)
        padding = tuple(k // 2 for k in kernel) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(in_ch, out_ch, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_ch, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = partial(F.max_pool2d, kernel_size=3, stride=2)


class Mixed(nn.Module):
    """An Inception block: parallel paths, whose results are concatenated.

    paths: {name of the path: its stages, one after the other}. A stage is one convolution, a tuple
    (channels, kernel) or (channels, kernel, stride), or a fork: a list of two convolutions of the
    same input, whose results are concatenated.
    pool: applied to the input of the path "branch_pool". A path without stages returns its input.

    The convolutions of path P are named P where it has one stage, else P_1, P_2 ...; those of a
    fork in stage 3 are P_3a and P_3b.
    """

    def __init__(self, in_ch, pool, paths):
        super().__init__()
        self.pool = pool
        self.paths = {}         # {path: for each stage the names of its convolutions}
        for path, stages in paths.items():
            self.paths[path] = []
            ch = in_ch
            for number, stage in enumerate(stages, 1):
                name = path if len(stages) == 1 else f"{path}_{number}"
                fork = isinstance(stage, list)
                convolutions = dict(zip((name + "a", name + "b"), stage)) if fork else {name: stage}
                for conv_name, (out_ch, *kernel_and_stride) in convolutions.items():
                    self.add_module(conv_name, ConvNorm(ch, out_ch, *kernel_and_stride))
                ch = sum(out_ch for out_ch, *_ in convolutions.values())
                self.paths[path].append(list(convolutions))

    def forward(self, x):
        results = []
        for path, stages in self.paths.items():
            h = self.pool(x) if path == "branch_pool" else x
            for names in stages:
                h = torch.cat([getattr(self, name)(h) for name in names], 1)
            results.append(h)
        return torch.cat(results, 1)


def block_a(in_ch, pool_ch):
    """35 x 35 positions; 224 + pool_ch channels."""
    return Mixed(in_ch, average, {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [(pool_ch, 1)],
    })


def block_b(in_ch):
    """From 35 x 35 to 17 x 17 positions; in_ch + 480 channels."""
    return Mixed(in_ch, halve, {
        "branch3x3": [(384, 3, 2)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)],
        "branch_pool": [],
    })


def block_c(in_ch, ch):
    """17 x 17 positions; 768 channels."""
    return Mixed(in_ch, average, {
        "branch1x1": [(192, 1)],
        "branch7x7": [(ch, 1), (ch, (1, 7)), (192, (7, 1))],
        "branch7x7dbl": [(ch, 1), (ch, (7, 1)), (ch, (1, 7)), (ch, (7, 1)), (192, (1, 7))],
        "branch_pool": [(192, 1)],
    })


def block_d(in_ch):
    """From 17 x 17 to 8 x 8 positions; in_ch + 512 channels."""
    return Mixed(in_ch, halve, {
        "branch3x3": [(192, 1), (320, 3, 2)],
        "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
        "branch_pool": [],
    })


def block_e(in_ch, pool):
    """8 x 8 positions; 2048 channels."""
    fork = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(in_ch, pool, {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), fork],
        "branch3x3dbl": [(448, 1), (384, 3), fork],
        "branch_pool": [(192, 1)],
    })


# --------------------------------------------------------------------------------------------------
# The network

class Inception(nn.Module):
    """Images uint8 (N, 3, H, W) -> features (N, 2048) and logits (N, 1008), float32.

    Features are averaged over the positions; logits are without the bias. to_input: of INPUTS.
    """

    def __init__(self, to_input=graphs_input):
        super().__init__()
        self.to_input = to_input
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)                        # (N, 64, 147, 147)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padded=False)         # (N, 192, 71, 71)
        self.Mixed_5b = block_a(192, 32)
        self.Mixed_5c = block_a(256, 64)
        self.Mixed_5d = block_a(288, 64)                                # (N, 288, 35, 35)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(768, 128)
        self.Mixed_6c = block_c(768, 160)
        self.Mixed_6d = block_c(768, 160)
        self.Mixed_6e = block_c(768, 192)                               # (N, 768, 17, 17)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280, average)
        self.Mixed_7c = block_e(2048, maximum)                          # (N, 2048, 8, 8)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):
        x = self.to_input(images).contiguous(memory_format=torch.channels_last)
        *layers, _ = self.named_children()
        for name, layer in layers:
            x = layer(halve(x) if name in ("Conv2d_3b_1x1", "Mixed_5b") else x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


# --------------------------------------------------------------------------------------------------
# The weights

def load_published(url, sha256, flag, path=None, trust=False):
    """(the content, the SHA-256) of a published weight file: `path`, or that in torch.hub's cache.

    It is downloaded where the cache lacks it. sha256: its hash, or the beginning. trust: accept a
    file with another one. Raises UserError, which names `flag`.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path is None and not cached.is_file():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(cached), hash_prefix=sha256)
        except (OSError, RuntimeError) as e:
            raise UserError(
                f"{flag}: {cached.name} is not there and cannot be downloaded ({e}); download it "
                f"from {url} and put it into {cached.parent}; or measure with --features "
                "FILE, a checkpoint of `python -m recognition.classify`") from e
    path = Path(path or cached)
    if not path.is_file():
        raise UserError(f"{flag} {path}: there is no such file; get it from {url}")
    digest = disk.sha256(path)
    if not digest.startswith(sha256) and not trust:
        raise UserError(f"{flag}: the SHA-256 of {path} is {digest[:16]}..., and the published "
                        f"file's begins with {sha256[:16]}: it is incomplete, or numbers made with "
                        f"it compare with no others; get it from {url}, or for Inception say "
                        "--trust-weights")
    return torch.load(path, map_location="cpu", weights_only=True), digest


def load_inception(path=None, trust=False, features="inception"):
    """(the network in eval mode, the SHA-256 of its weights); features: a key of INPUTS.

    path, trust: as load_published's; torch-fidelity takes the weights from the same cache.
    """
    state, digest = load_published(URL, SHA256, "--inception-weights", path, trust)
    net = Inception(INPUTS[features])
    net.load_state_dict(state)
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False), digest
