"""The texts of images: released captions, or made of class names; numbered, drawn, and encoded.

    captions = captions_of(images, args, "train")       # a list of texts for each image
    table = Table(captions, images.labels)              # all of them, numbered
    text = Words(vocabulary_of(table.texts))            # trained with the network; or FrozenCLIP
    encoder, text_ch = text.encoder(ch=192)
    states = Texts(encoder, text.ids(table.texts))(y)   # (N, L, text_ch) of the texts number y

Class labels stay what they are: the long-tail draw, Eq. (3) and the groups look at those.
"""
import re
from functools import cached_property
from unicodedata import normalize

import numpy as np
import torch
from torch import nn

from disk import read_pairs
from latent.autoencoder import content_hash, load_part, packages
from runtime import UserError, generator
from sets.readers import READERS
from variants.dit import heads_of

FORM = "a photo of a {}"        # where a set has no captions; {} is the class
PAD = 0             # numbers of what is no word of the vocabulary: nothing,
UNKNOWN = 1         # and a word that no text had in training
LENGTH = 32         # words of a text that are read; a released caption has 15 on average


# --------------------------------------------------------------------------------------------------
# Texts, and which of them an image gets

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


# --------------------------------------------------------------------------------------------------
# Texts as numbers, and their encoders

def words_of(text):
    """The words of a text, in lower case, without punctuation: a list."""
    return re.findall(r"\w+", text.lower().replace("_", " "))


def vocabulary_of(texts):
    """All words of these texts, each once, in alphabetical order: a list."""
    return sorted({word for text in texts for word in words_of(text)})


class Words:
    """A text encoder that is trained with the network, on the words of a vocabulary, a list."""
    sha256 = None

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary
        self.number = {word: k for k, word in enumerate(vocabulary, UNKNOWN + 1)}

    def ids(self, texts):
        """M texts and, at the end, the empty one, as numbers of words: (M + 1, LENGTH) int64.

        Longer texts are cut. The empty text is PAD throughout.
        """
        ids = torch.full((len(texts) + 1, LENGTH), PAD)
        for row, text in zip(ids, texts):
            found = [self.number.get(word, UNKNOWN) for word in words_of(text)[:LENGTH]]
            row[:len(found)] = torch.tensor(found, dtype=torch.int64)
        return ids

    def encoder(self, ch):
        """(a module that encodes such numbers, the width of what it gives); ch: the network's."""
        return WordEncoder(len(self.vocabulary) + 2, ch), ch


class WordEncoder(nn.Module):
    """A transformer over the words of a text, trained from scratch: (N, LENGTH) -> (N, LENGTH, ch).

    size: numbers that a word can have. It has no dropout. PAD is a word like any other, so that the
    empty text is encoded as well.
    """

    def __init__(self, size, ch, depth=2):
        super().__init__()
        self.words = nn.Embedding(size, ch)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, ch))
        self.layers = nn.ModuleList([
            nn.TransformerEncoderLayer(ch, heads_of(ch), 4 * ch, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(ch)

    def forward(self, ids):
        x = self.words(ids) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class FrozenCLIP(nn.Module):
    """The text encoder of a Stable Diffusion as it is, tokens (N, L) -> hidden states (N, L, D).

    It has the methods of Words, too. flag, name: see load_part. Raises UserError.
    """
    vocabulary = None

    def __init__(self, flag, name):
        super().__init__()
        clip = load_part(flag, name, packages()[1].CLIPTextModel, "text_encoder")
        self.clip = clip.float().eval().requires_grad_(False)
        self.tokenizer = load_part(flag, name, packages()[1].CLIPTokenizer, "tokenizer")

    @cached_property
    def sha256(self):
        """A hash of all that it computes with."""
        return content_hash([self.clip], torch.empty(0), self.tokenizer.model_max_length)

    def ids(self, texts):
        """As Words.ids; texts are cut after what the model takes, 77 tokens."""
        return self.tokenizer([*texts, ""], padding="max_length", truncation=True,
                              max_length=self.tokenizer.model_max_length,
                              return_tensors="pt").input_ids

    def encoder(self, ch):
        """As Words.encoder."""
        return self, self.clip.config.hidden_size

    def forward(self, ids):
        return self.clip(ids)[0]


class Texts(nn.Module):
    """y -> the encoded texts number y: (N,) int64 -> (N, L, D).

    encoder: (N, L) numbers -> (N, L, D). ids: (M + 1, L), those of M texts, the empty text at the
    end: it is what y = -1, Null, means. They are no part of a checkpoint.
    """

    def __init__(self, encoder, ids):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, y):
        return self.encoder(self.ids[y])
