"""Images to features: by Inception, by another public network, or by one's own classifier.

    extractor = Extractor("inception", rt)      # or "dinov2", "torchvision:resnet50", or a FILE
    features, logits = extractor.extract(lambda rows: images[rows], len(images), "features")

Only Inception's distances are FID and KID. All features are computed in float32.
`python -m metrics.features --features NAME` downloads the weights where they are not there yet: for
a machine without network, and to know before hours of training that they can be had.
"""
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch import nn

import runtime
from data import to_float
from metrics.inception import INPUTS, load_inception, load_published
from recognition.resnet import features_and_logits, load_classifier
from runtime import Parser, UserError, run

INCEPTION = "inception-2015-12-05"
DIGITS_CLASSIFIER = "out/classifier-digits/ckpt.pt"
UNFIT = ("googlenet", "inception", "squeezenet")    # other inputs, or no Linear at the end

# {what --features names: (its class in transformers, its weights on the Hugging Face hub, the mean
# and the deviation of the colours)}
TRANSFORMERS = {
    "dinov2": ("Dinov2Model", "facebook/dinov2-large",
               (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ("CLIPVisionModel", "openai/clip-vit-large-patch14",
             (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))}


class Pretrained(nn.Module):
    """Images uint8 (N, 3, H, W) -> what the last Linear of a network gets, and its logits.

    net: a classification network of torchvision. transform: that of its weights, of which the size,
    the mean and the deviation count; an image is stretched to that size, and nothing is cut off.
    """

    def __init__(self, net, transform):
        super().__init__()
        linear = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)]
        parent, _, child = linear[-1].rpartition(".")
        self.last = net.get_submodule(linear[-1])
        setattr(net.get_submodule(parent), child, nn.Identity())
        self.net = net
        self.size = transform.crop_size * (2 // len(transform.crop_size))
        self.register_buffer("mean", torch.tensor(transform.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(transform.std)[:, None, None])

    def forward(self, images):
        x = nn.functional.interpolate(images.float() / 255, self.size, mode="bilinear",
                                      antialias=True)
        features = self.net((x - self.mean) / self.std)
        return features, self.last(features)


def load_pretrained(name):
    """(Pretrained, the SHA-256 of its weights): torchvision's own weights of `name`.

    They come from torch.hub's cache, or are downloaded there. Raises UserError where torchvision
    has no such network, where they cannot be had, or where they are not the published ones.
    """
    flag = f"--features torchvision:{name}"
    if name not in torchvision.models.list_models(torchvision.models) or name.startswith(UNFIT):
        raise UserError(f"{flag}: torchvision has no such network for classification that can be "
                        "used here; torchvision:resnet50 is one")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    prefix = Path(weights.url).stem.rpartition("-")[2]          # as in resnet50-11ad3fa6.pth
    state, digest = load_published(weights.url, prefix, flag)
    net = torchvision.models.get_model(name)
    net.load_state_dict(state)
    return Pretrained(net, weights.transforms()), digest


class VisionTransformer(nn.Module):
    """Images uint8 (N, 3, H, W) -> the class token after the last norm (N, D); no logits (N, 0).

    As dgm-eval (github.com/layer6ai-labs/dgm-eval; Stein et al., 2023) takes DINOv2 and CLIP: an
    image is stretched by Pillow's bicubic filter, and CLIP's projection is left out. net: a model
    of transformers. size: of its input in pixels. mean, std: of each colour, in [0, 1].
    """

    def __init__(self, net, size, mean, std):
        super().__init__()
        self.net = net
        self.size = size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images):
        x = images.float()
        for size in ((x.shape[2], self.size), (self.size, self.size)):
            x = nn.functional.interpolate(x, size, mode="bicubic", antialias=True)
            x = x.clamp(0, 255).round()         # Pillow keeps 8 bits after each axis
        features = self.net((x / 255 - self.mean) / self.std).pooler_output
        return features, features[:, :0]


def resize_positions(net, count):
    """Bring DINOv2's position embeddings to count x count patches as the authors' code does.

    It adds 0.1 to the count in the scale (github.com/facebookresearch/dinov2), transformers does
    not: other features, of the same weights.
    """
    table = net.embeddings.position_embeddings.data                 # (1, 1 + M M, D)
    side = round((table.shape[1] - 1) ** 0.5)
    if side != count:
        patches = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        patches = nn.functional.interpolate(patches, scale_factor=(count + 0.1) / side,
                                            mode="bicubic")         # (1, D, count, count)
        net.embeddings.position_embeddings = nn.Parameter(
            torch.cat([table[:, :1], patches.flatten(2).mT], 1))


def load_transformer(features):
    """(VisionTransformer, the SHA-256 of its weights): "dinov2", "dinov2:FOLDER", or of clip.

    In the place of FOLDER also a name on the Hugging Face hub. Raises UserError.
    """
    kind, _, where = features.partition(":")
    flag = f"--features {features}"
    class_name, usual, mean, std = TRANSFORMERS[kind]
    try:
        import transformers
    except ImportError as e:
        raise UserError(f"{flag} needs one more package: pip install transformers") from e
    transformers.logging.set_verbosity_error()      # else a list of CLIP's weights for texts
    try:
        net, info = getattr(transformers, class_name).from_pretrained(
            where or usual, output_loading_info=True)
        # Without the registers of a DINOv2 that has them, the features would be others
        if info["missing_keys"] or kind == "dinov2" and info["unexpected_keys"]:
            raise ValueError(f"its weights are not those of a {class_name}")
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(
            f"{flag}: {where or usual} cannot be loaded ({' '.join(str(e).split())[:200]}); name a "
            f"folder with its config.json and weights, {kind}:FOLDER; or make features of your "
            "own, a classifier's, by python -m recognition.classify") from e
    net = net.float()
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        digest.update(value.numpy())
    size = net.config.image_size
    if kind == "dinov2":
        size = 224
        resize_positions(net, size // net.config.patch_size)
    return VisionTransformer(net, size, mean, std), digest.hexdigest()


class Features(NamedTuple):
    """Features of images, and what else metrics need of the images."""
    features: np.ndarray                # (n, D) float32
    logits: np.ndarray                  # (n, K) float32
    labels: np.ndarray | None = None    # (n,)

    def take(self, rows):
        """Those of some rows."""
        return Features(*(None if x is None else x[rows] for x in self))


class Extractor:
    """Features and logits by a network in eval mode.

    features: "inception", "inception:pytorch-fid", "torchvision:NAME", "dinov2" or "clip" (see
    load_transformer), or a checkpoint of classify.py. All but the last resize images themselves.
    name, sha256: of the network's file. class_names, size: of a classifier's outputs, and of its
    training images in pixels; else None. Raises UserError where there are no such weights.
    """

    def __init__(self, features, rt, batch_size=64, inception_weights=None, trust_weights=False):
        self.rt = rt
        self.batch_size = batch_size
        kind, _, name = features.partition(":")
        self.inception = features in INPUTS
        self.name = features.replace("inception", INCEPTION) if self.inception else features
        self.resizes = self.inception or kind in ("torchvision", *TRANSFORMERS)
        self.channels = 3
        self.class_names = self.size = None
        with rt.rank_0_first():         # which downloads the weights, and not every process
            if self.inception:
                net, self.sha256 = load_inception(inception_weights, trust_weights, features)
            elif kind == "torchvision":
                net, self.sha256 = load_pretrained(name)
            elif kind in TRANSFORMERS:
                net, self.sha256 = load_transformer(features)
            elif not Path(features).is_file():
                raise UserError(f"--features {features}: there is no such file; make one with: "
                                "python -m recognition.classify --dataset NAME, or name "
                                "inception, torchvision:resnet50, dinov2 or clip")
            else:
                net, ckpt = load_classifier(features, rt.device)
                self.sha256 = ckpt.sha256
                self.channels = ckpt["network"]["channels"]
                self.class_names = ckpt["data"]["class_names"]
                self.size = ckpt["data"].get("resolution")
        self.net = net.to(rt.device).eval().requires_grad_(False)

    def refuse_other_size(self, size, flag):
        """Raise UserError for images that a classifier, which resizes none, was not trained on.

        size: (height, width), or None where it is not known. flag: what names the images.
        """
        if self.size and size and tuple(size) != (self.size, self.size):
            raise UserError(f"--features {self.name}: this classifier was trained on images of "
                            f"{self.size} pixels per side, and those of {flag} have {size[1]} x "
                            f"{size[0]}; train one on such images, or take features that resize")

    @torch.no_grad()
    def batch(self, images):
        """uint8 (n, H, W, 3) -> features (n, D) and logits (n, K), float32 NumPy.

        Raises UserError for images in colour where the classifier takes grey ones.
        """
        if self.channels == 1 and (images != images[..., :1]).any():
            raise UserError("--features: this classifier takes grey images, and these are in "
                            "colour")
        images = np.ascontiguousarray(images[..., :self.channels])
        x = torch.from_numpy(images).to(self.rt.device)
        with runtime.without_tf32():
            if self.resizes:
                features, logits = self.net(x.permute(0, 3, 1, 2))
            else:
                features, logits = features_and_logits(self.net, to_float(x))
        return features.float().cpu().numpy(), logits.float().cpu().numpy()

    def extract(self, at, n, title, shared=True):
        """Features and logits of images at(rows), rows 0 ... n - 1; on rank 0, elsewhere None.

        shared: every process has all images and takes a share of them. If False, each process has
        images of its own, numbered from 0.
        """
        share = np.arange(n)
        if shared:
            share = np.array_split(share, self.rt.world)[self.rt.rank]
        count = max(1, -(-len(share) // self.batch_size))
        parts = []
        with runtime.progress(total=len(share), desc=title, unit="img",
                              disable=self.rt.rank > 0) as bar:
            for rows in np.array_split(share, count):
                if len(rows):           # none where there are more processes than images
                    parts.append(self.batch(at(rows)))
                    bar.update(len(rows))
        return tuple(self.rt.gather([part[k] for part in parts]) for k in (0, 1))

    def of(self, images, title):
        """Features and logits of Images: those that --save-stats kept, or extracted."""
        return images.features or self.extract(images.at, images.n, title)


def main():
    """Find the weights of --features, or say why they cannot be had."""
    parser = Parser(__doc__)
    parser.add_argument("--features", default="inception",
                        help="as evaluate.py's (default: inception)")
    args = parser.parse_args()
    print(f"the weights of {Extractor(args.features, runtime.setup('cpu')).name} are there")


if __name__ == "__main__":
    run(main)
