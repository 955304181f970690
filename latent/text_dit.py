"""The DiT of dit.py conditioned on texts, and a small text encoder that is trained with it.

    words = Words(vocabulary_of(texts))
    net = TextDiT(Texts(WordEncoder(len(words), ch=192), words(texts)), text_ch=192, size=32)
    eps = net(x_t, t, y)            # y: the number of an image's text, or -1 for the empty text

y numbers the texts, as it numbers classes elsewhere, so that losses.py and sample.py need to know
nothing of texts. Text enters by cross-attention in every block; there are no class labels. The
blocks are cut in the middle, and capacity is reserved in the second half, its cross-attention
included; theta and theta^g share the first half and the encoded text.
"""
import re
from types import SimpleNamespace

import torch
from torch import nn

from model import Embedding
from variants.dit import Block, Decoder, Encoder, check_sizes, heads_of

PAD = 0             # numbers of what is no word of the vocabulary: nothing,
UNKNOWN = 1         # and a word that no text had in training
LENGTH = 32         # words of a text that are read; a released caption has 15 on average


# --------------------------------------------------------------------------------------------------
# Texts as numbers

def words_of(text):
    """The words of a text, in lower case, without punctuation: a list."""
    return re.findall(r"\w+", text.lower().replace("_", " "))


def vocabulary_of(texts):
    """All words of these texts, each once, in alphabetical order: a list."""
    return sorted({word for text in texts for word in words_of(text)})


class Words:
    """texts -> their words' numbers (M, LENGTH) int64. The empty text is PAD throughout.

    vocabulary: the known words. Longer texts are cut.
    """

    def __init__(self, vocabulary):
        self.vocabulary = list(vocabulary)
        self.number = {word: k for k, word in enumerate(self.vocabulary, UNKNOWN + 1)}

    def __len__(self):
        return len(self.vocabulary) + 2

    def __call__(self, texts):
        ids = torch.full((len(texts), LENGTH), PAD)
        for row, text in zip(ids, texts):
            found = [self.number.get(word, UNKNOWN) for word in words_of(text)[:LENGTH]]
            row[:len(found)] = torch.tensor(found, dtype=torch.int64)
        return ids


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


# --------------------------------------------------------------------------------------------------
# The network

class TextDiT(nn.Module):
    """eps_theta(x_t, t, y), as dit.DiT, for the texts (N, L, text_ch) that `texts` makes of y.

    The default sizes are those of VQ-Diffusion-S: 18 blocks of width 192 on 32 x 32 tokens. Raises
    ValueError where sizes do not fit.
    """

    def __init__(self, texts, text_ch, channels=4, size=32, ch=192, depth=18, patch=1):
        super().__init__()
        check_sizes(size, ch, depth, patch)
        blocks = [Block(ch, heads_of(ch), 4 * ch, text_ch=text_ch) for _ in range(depth)]
        half = depth // 2
        embedding = Embedding(SimpleNamespace(ch=ch, num_classes=0, augment_dim=0))
        self.encoder = Encoder(channels, size, patch, ch, blocks[:half], embedding, texts)
        self.decoder = Decoder(channels, patch, ch, blocks[half:])

    def encode(self, x_t, t, y, masks=(), a=None):
        """x_t (N, channels, size, size), t and y (N,) -> (tokens, emb, text), what decode takes."""
        return self.encoder(x_t, t, y, masks, a)

    def decode(self, x, emb, text, masks=()):
        """encode's result -> eps (N, channels, size, size)."""
        return self.decoder(x, emb, masks, text)

    def forward(self, x_t, t, y):
        return self.decode(*self.encode(x_t, t, y))

    def draw_masks(self, *_):
        """VQ-Diffusion's transformer has no dropout."""
        return [], []
