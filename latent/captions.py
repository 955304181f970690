"""The captions of a set of images: those that it is released with, or texts made of class names.

    captions = captions_of(images, args, "train")       # a list of texts for each image
    table = Table(captions, images.labels)              # all of them, numbered

Class labels stay what they are: the long-tail draw, Eq. (3) and the groups look at those.
"""
from unicodedata import normalize

import numpy as np
import torch

from disk import read_pairs
from runtime import UserError, generator
from sets.readers import READERS

FORM = "a photo of a {}"        # where a set has no captions; {} is the class


def read_prompt(prompt):
    """What --prompt says: a text with {} for the class, or {class: text} of the lines of a .csv.

    Raises UserError for a text without {}: it would be the same one for all classes.
    """
    if prompt.endswith(".csv"):
        pairs = read_pairs(prompt, "--prompt")
        return {normalize("NFC", name): text for name, text in pairs.items()}
    if "{}" not in prompt:
        raise UserError(f"--prompt {prompt!r}: must hold {{}}, which stands for the class")
    return prompt


def texts_of(prompt, class_names):
    """The text of each class, a list. prompt: of read_prompt. Raises UserError."""
    if isinstance(prompt, str):
        return [prompt.replace("{}", name.replace("_", " ")) for name in class_names]
    if lacking := [name for name in class_names if name not in prompt]:
        raise UserError(f"--prompt: no line {lacking[0]},TEXT in the file, and it is a class")
    return [prompt[name] for name in class_names]


def captions_of(images, args, split):
    """The captions of an ImageSet's images: a list of N lists of texts, at least one each.

    args: the data flags, and args.prompt: of read_prompt, in place of the released captions, or
    None. split: of the images. Raises UserError.
    """
    captions, source = None, READERS[args.dataset]
    if source.captions and not args.prompt:
        paths, _, _ = source.read(args.data_dir, split)     # in the order of the pack
        captions = source.captions(args.data_dir, paths)
    if captions is None:
        texts = texts_of(args.prompt or FORM, images.class_names)
        return [[texts[c]] for c in images.labels]
    return captions if images.rows is None else [captions[row] for row in images.rows]


class Table:
    """All captions of a set, numbered: those of image i are starts[i] ... starts[i + 1] - 1.

    captions: a list of texts for each of N images. labels: (N,), their classes. What is drawn is a
    pure function of (seed, step), on the CPU.
    """

    def __init__(self, captions, labels):
        sizes = torch.tensor([len(texts) for texts in captions])
        self.texts = [text for texts in captions for text in texts]
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        # The captions class by class, and where each class begins
        classes = torch.as_tensor(np.asarray(labels)).repeat_interleave(sizes)
        self.by_class = classes.argsort(stable=True)
        self.class_sizes = classes.bincount()
        self.class_starts = self.class_sizes.cumsum(0) - self.class_sizes

    def of_images(self, rows, u):
        """One caption of each image: rows (B,), u (B,) in [0, 1) chooses it. Numbers (B,)."""
        first = self.starts[rows]
        return first + (u * (self.starts[rows + 1] - first)).long()

    def of_classes(self, y, u):
        """One caption of some image of each class y (B,), u (B,) in [0, 1). Numbers (B,)."""
        return self.by_class[self.class_starts[y] + (u * self.class_sizes[y]).long()]

    def condition(self, rows, seed, step):
        """The `condition` of Objective.draw_batch: the texts of a step, its own and those of y'."""
        g = generator("cpu", seed, "captions", step)
        u = torch.rand(2, len(rows), generator=g, dtype=torch.float64)
        own = self.of_images(torch.as_tensor(rows), u[0])

        def numbers(y_other):
            other = self.of_classes(y_other.cpu(), u[1])
            return own.to(y_other.device), other.to(y_other.device)
        return numbers
