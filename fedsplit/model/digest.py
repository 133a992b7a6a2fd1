"""A backbone's digest, which all ends of a run compare: two with one digest compute one function of one input.

64 hexadecimal digits in two halves of 32, each a shortened sha256: the model (its manifest's config.json and tensors;
manifest.py), and what its files make of an input. The second is a digest of the effect, not of files: the resolved image
settings, or the vocabulary and what the tokenizer makes of some texts. So a re-saved file that does the same is the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedsplit.core.errors import BackboneError
from fedsplit.core.foreign import printable
from fedsplit.model.families import InputKind
from fedsplit.model.files import MANIFEST, Stamp, is_partial, stamp
from fedsplit.model.manifest import HALF, Manifest, read_manifest, stored_files, stored_tensors
from fedsplit.model.preprocess import Preprocess, read_positions, read_preprocess
from fedsplit.model.tokenizer import read_tokenizer

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


def digest(path: Path, kind: InputKind) -> str:
    """The digest of a model directory for inputs of this kind. Raises BackboneError where its files cannot be read."""
    return manifest_of(path, kind).sha256


def manifest_of(path: Path, kind: InputKind) -> Manifest:
    """The manifest of a model directory, read once for each state of its files. Raises BackboneError."""
    return _manifest(path, kind, stamp(path))


@functools.lru_cache(maxsize=8)
def _manifest(path: Path, kind: InputKind, state: Stamp) -> Manifest:
    files = stored_files(path)
    said = json.dumps(_inputs(path, kind), sort_keys=True)
    inputs = hashlib.sha256(said.encode()).hexdigest()[:HALF]
    if is_partial(path):
        own = read_manifest(path)
        if odd := sorted({f.name for f in {*own.files} ^ {*files}}):
            raise BackboneError(
                f"backbone {path}: {', '.join(odd)} is not what its {MANIFEST} says; fetch the folder again "
                f"(fedsplit site fetch), or copy it again"
            )
        tensors = own.tensors
    else:
        tensors = stored_tensors(path)
    if stamp(path) != state:
        raise BackboneError(
            f"backbone {path} changed while it was read; wait until its files are all there"
        )
    try:
        return Manifest(inputs=inputs, files=files, tensors=tensors)
    except ValidationError as err:
        raise BackboneError(
            f"backbone {path} cannot be used ({printable(err.errors()[0]['msg'])}); a folder in Hugging Face format is wanted"
        ) from err


def difference(mine: str, other: str, kind: InputKind) -> str:
    """What two digests say differs, in words; empty where nothing does."""
    inputs = "image preprocessing" if kind == "image" else "tokenizer"
    parts = ("config.json or weights", inputs)
    halves = ((d[:HALF], d[HALF:]) for d in (mine, other))
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
