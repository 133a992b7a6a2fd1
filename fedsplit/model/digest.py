"""A backbone's digest, which all ends of a run compare: two with one digest compute one function of one input.

64 hexadecimal digits in two halves of 32, each a shortened sha256: the model (config.json and weight files, byte by
byte), and what its files make of an input. The second is a digest of the effect, not of files: the resolved image
settings, or the vocabulary and what the tokenizer makes of some texts. So a re-saved file that does the same is the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from fedsplit.core.errors import BackboneError
from fedsplit.model.checkpoint import weight_files
from fedsplit.model.families import InputKind
from fedsplit.model.preprocess import Preprocess, read_positions, read_preprocess
from fedsplit.model.tokenizer import read_tokenizer

_HALF = 32
# Case, accents, widths, numbers, scripts without spaces, line ends, what is no word.
_TEXTS = (
    "", "The pump leaks oil at 3.5 bar; replace the seal!", "PUMP pump Pump", "Café naïve Ærø straße İstanbul",
    "ポンプから油が漏れています。シールを交換してください。", "ﾎﾟﾝﾌﾟ ポンプ ポンプ \uff11\uff12\uff13 123 ① ㎏", "製造ライン\uff12号機の点検結果は良好", "检查第三号机器 기계 점검",
    "2024-05-17T08:30:00 1,234,567.89 -40°C 10^-6 0x1F", "tab\there\nnew line\r\n  two  spaces ",
    "a_b-c/d\\e@f.example http://example.com?q=1&r=#2 <b> [MASK] </s> {\"k\": [1]}", "🙂 👩‍🔧 ½ € \u200b \ufffd",
    "unbelievablyantidisestablishmentarianismlongword" * 3,
)  # fmt: skip
# As many words of the vocabulary itself: they show the merges that the texts do not need.
_WORDS = 512


@functools.lru_cache(maxsize=8)
def digest(path: Path, kind: InputKind) -> str:
    """The digest of a model directory for inputs of this kind. Raises BackboneError where its files cannot be read."""
    model = hashlib.sha256()
    for file in (path / "config.json", *weight_files(path)):
        with file.open("rb") as handle:
            model.update(hashlib.file_digest(handle, "sha256").digest())
    said = json.dumps(_inputs(path, kind), sort_keys=True)
    return model.hexdigest()[:_HALF] + hashlib.sha256(said.encode()).hexdigest()[:_HALF]


def difference(mine: str, other: str, kind: InputKind) -> str:
    """What two digests say differs, in words; empty where nothing does."""
    inputs = "image preprocessing" if kind == "image" else "tokenizer"
    parts = ("config.json or weights", inputs)
    halves = ((d[:_HALF], d[_HALF:]) for d in (mine, other))
    differ = [p for p, one, two in zip(parts, *halves, strict=True) if one != two]
    return " and ".join(differ) + " differ" if differ else ""


def _inputs(path: Path, kind: InputKind) -> Any:
    # Who prepares inputs says why files are unusable; an encoder needs none of them.
    try:
        if kind == "image":
            return _image_settings(read_preprocess(path))
        return _tokens(read_tokenizer(path), read_positions(path))
    except BackboneError:
        return None


def _image_settings(found: Preprocess) -> list[Any]:
    numbers = (found.rescale_factor, *found.mean, *found.std)
    # To float32's digits: 1/255 is written in several ways.
    return [found.output, found.size, found.shortest, found.resample, [f"{n:.6g}" for n in numbers]]


def _tokens(tokenizer: Any, positions: int) -> list[Any]:
    vocabulary = sorted(tokenizer.get_vocab().items())
    step = max(1, len(vocabulary) // _WORDS)
    words = " ".join(word for word, _ in vocabulary[::step])
    encoded = tokenizer([*_TEXTS, words], verbose=False)
    cut = tokenizer(_TEXTS[1], truncation=True, max_length=6)["input_ids"]
    return [
        vocabulary, encoded["input_ids"], encoded.get("token_type_ids"), cut,
        tokenizer.pad_token_id, min(tokenizer.model_max_length, positions),
    ]  # fmt: skip
