"""Train a small ResNet on a packed data set: the feature extractor that stands in for Inception where images are tiny.

    python classify.py --dataset digits         # out/classifier-digits/ckpt.pt, 20 s, 98 % on held-out digits

It trains on the balanced training set (or a long-tailed draw of it, --ir) and reports accuracy on the test set.
`evaluate.py --features FILE` takes its checkpoint; numbers made with it are Frechet distances "FD", never "FID".
"""
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

import runtime
from data import Batches, NoSuchSplit, add_data_flags, load, load_long_tailed, to_float
from runtime import Parser, integer, number, run

WIDTHS = {"digits": 16}         # channels of the first stage; every other set: 64, which is ResNet-18


def make_resnet(channels, num_classes, width=64):
    """ResNet-18 for small images: a 3x3 stem without max-pool, torchvision's blocks and keys, `width` ... 8 x width wide."""
    net = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    net.inplanes = width
    net.conv1, net.bn1 = nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
    net.maxpool = nn.Identity()
    for stage in range(4):
        layer = net._make_layer(BasicBlock, width << stage, 2, stride=2 if stage else 1)
        setattr(net, f"layer{stage + 1}", layer)
    net.fc = nn.Linear(8 * width, num_classes)
    return net


def features_and_logits(net, x):
    """Penultimate features (N, 8 width) and logits (N, num_classes) of images x (N, C, H, W) in [-1, 1]."""
    *body, fc = net.children()
    features = nn.Sequential(*body)(x).flatten(1)
    return features, fc(features)


def load_classifier(path, device, flag="--features"):
    """The network of a checkpoint in eval mode and its record {"data", "config", "accuracy"}. Raises UserError."""
    ckpt = runtime.load(path, "classifier", flag)
    net = make_resnet(**ckpt["network"])
    net.load_state_dict(ckpt["model"])
    return net.to(device).eval().requires_grad_(False), ckpt


def random_shift(x, pad, g):
    """Shift each image by up to `pad` pixels either way, filling with the background -1: x (N, C, H, W)."""
    N, _, H, W = x.shape
    padded = F.pad(x, (pad,) * 4, value=-1.0)
    dy, dx = torch.randint(2 * pad + 1, (2, N, 1, 1), generator=g, device=x.device)
    rows, columns = torch.arange(H, device=x.device)[:, None] + dy, torch.arange(W, device=x.device) + dx
    return padded[torch.arange(N, device=x.device)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(net, images, rt, batch_size=500):
    """Share of an ImageSet whose class the network (in eval mode) names."""
    hits = 0
    for rows in np.array_split(np.arange(len(images.labels)), max(1, len(images.labels) // batch_size)):
        x = to_float(torch.from_numpy(images.images[rows]).to(rt.device))
        hits += int((net(x).argmax(1).cpu().numpy() == images.labels[rows]).sum())
    return hits / len(images.labels)


def main():
    parser = Parser(__doc__)
    add_data_flags(parser, dataset="digits", ir=1)
    g = parser.add_argument_group("training")
    g.add_argument("--epochs", type=integer(1), default=30, help="default: 30")
    g.add_argument("--batch-size", type=integer(1), default=128, help="default: 128")
    g.add_argument("--lr", type=number(above=0), default=0.1, help="peak of the one-cycle schedule (default: 0.1)")
    g.add_argument("--width", type=integer(1), help="channels of the first stage (default: 64; digits: 16)")
    parser.add_argument("--if-needed", action="store_true", help="do nothing where --out was made with these settings already")
    parser.add_common("folder of the result (default: out/classifier-DATASET)")
    args = parser.parse_args()
    rt = runtime.setup(args.device, args.dtype)
    images = load_long_tailed(args)
    try:
        test = load(args.dataset, args.data_dir, "test", args.resolution, args.class_order, args.pack_dir)
    except NoSuchSplit:
        test = None
    width = args.width or WIDTHS.get(args.dataset, 64)
    out = Path(args.out or f"out/classifier-{args.dataset}")
    network = {"channels": images.images.shape[3], "num_classes": len(images.class_names), "width": width}
    settings = {**{k: v for k, v in vars(args).items() if k not in ("device", "out", "if_needed", "data_dir")}, **network}
    if args.if_needed and runtime.up_to_date(out / "result.json", settings) and (out / "ckpt.pt").exists():
        return rt.print(f"{out}: up to date")

    start = time.time()
    torch.manual_seed(runtime.seed_of(args.seed, "init"))
    net = make_resnet(**network).to(rt.device, memory_format=torch.channels_last)
    batches = Batches(images, args.batch_size, args.seed, rt.device)
    steps = max(1, args.epochs * len(images.labels) // args.batch_size)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps + 1)
    bar = runtime.progress(range(steps), desc="training the classifier", unit="step")
    for step in bar:
        x, y = batches.at(step)
        g = runtime.generator(rt.device, args.seed, "augment", step)
        x = random_shift(x, max(1, x.shape[-1] // 8), g)
        if images.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=g, device=x.device) < 0.5, x.flip(3), x)
        with rt.autocast():
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    net.eval()
    result = {"train": accuracy(net, images, rt), "test": accuracy(net, test, rt) if test else None}
    runtime.save(out / "ckpt.pt", {"kind": "classifier", "network": network, "model": net.state_dict(), "accuracy": result,
                                   "config": settings, "data": {"dataset": args.dataset, "class_names": images.class_names}})
    runtime.write_json(out / "result.json", {"settings": settings, "accuracy": result, "seconds": round(time.time() - start, 1)})
    print(f"wrote {out / 'ckpt.pt'}: accuracy {result['train']:.1%} on {len(images.labels):,} training images"
          + (f", {result['test']:.1%} on {len(test.labels):,} test images" if test else "; the set has no test images"))


if __name__ == "__main__":
    run(main)
