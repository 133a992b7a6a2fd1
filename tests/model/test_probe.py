"""What is found out about a backbone before a run starts, and that no code of its folder ever runs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError
from fedsplit.model.backbone import Backbone
from fedsplit.model.families import FAMILIES
from fedsplit.model.files import SINGLE
from fedsplit.model.module import ModuleSpec
from fedsplit.model.probe import check_backbone
from fedsplit.model.split import device_part
from fedsplit.training.data import ImageTransform, TextTransform
from tests.model.copies import add_tokenizer, change_tensors, copy_of
from tests.tiny import CONFIGS

TEXTS = [f for f, family in FAMILIES.items() if family.kind == "text"]
SPEC = ModuleSpec(classes=("a", "b"))


@pytest.fixture
def copy(tiny: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    def make(family: str = "vit", **config: Any) -> Path:
        folder = copy_of(
            tiny[family], tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}", **config
        )
        return add_tokenizer(folder) if family in TEXTS else folder

    return make


def check(folder: Path) -> None:
    check_backbone(Backbone.find(str(folder)))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_sound_one_passes(family: str, copy: Callable[..., Path]) -> None:
    check(copy(family))


def test_real_ones_pass(vit_tiny: Path, minilm: Path) -> None:
    check(vit_tiny)
    check(minilm)
    check_backbone(Backbone.find("vit-glyphs"), image_size=64)


@pytest.mark.parametrize(
    ("family", "config", "says"),
    [
        ("vit", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantization_config"),
        ("bert", {"is_decoder": True}, "is_decoder .*only as encoders with attention to both sides"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, r"rope_type is 'dynamic'"),
        ("modernbert", {"add_cross_attention": True}, "add_cross_attention"),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}}, r"rope_type is 'dynamic'.*such as default"),
        ("modernbert", {"layer_types": ["full_attention", "chunked_attention"] * 2}, r"layer_types include 'chunked_attention'; fedsplit runs"),
        ("roberta", {"add_cross_attention": True, "is_decoder": True}, "add_cross_attention"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("vit", {"num_channels": 1}, r"pictures of 1 channels .*for RGB"),
        ("vit", {"image_size": 32}, r"position_embeddings has shape .* belong to another model"),
        ("bert", {"vocab_size": 60}, r"has shape .*50.*, config\.json wants .*60"),
        ("bert", {"vocab_size": 8}, r"tokenizer has 12 tokens, its embeddings have 8 rows"),
    ],
)  # fmt: skip
def test_a_config_that_is_refused(
    family: str, config: dict[str, Any], says: str, copy: Callable[..., Path]
) -> None:
    with pytest.raises(BackboneError, match=says):
        check(copy(family, **config))


def spoilt(value: float) -> Callable[[str, torch.Tensor], torch.Tensor]:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "encoder.layer.2.intermediate.dense.weight":
            tensor[0, 0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (spoilt(float("nan")), r"layers\.2.*fc1\.weight holds NaN or infinite"),
        (spoilt(float("inf")), r"holds NaN or infinite"),
        (lambda _, t: t.to(torch.int8), r"is stored as int8; float16, .* checkpoint that they were made from"),
        (lambda _, t: t.to(torch.float8_e4m3fn), r"is stored as float8_e4m3fn"),
        (lambda n, t: None if "layer.3" in n else t, r"lacks \d+ tensors .*layers\.3"),
    ],
)  # fmt: skip
def test_weights_that_are_refused(change: Any, says: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    change_tensors(folder, change)
    with pytest.raises(BackboneError, match=says):
        check(folder)
    # And where no look was taken before: at a device that holds the block.
    with pytest.raises(BackboneError, match=says):
        device_part(Backbone.find(str(folder)), Cut(4, 4), SPEC)


def test_weights_that_are_replaced_are_looked_at_again(copy: Callable[..., Path]) -> None:
    folder = copy()
    check(folder)
    change_tensors(folder, spoilt(float("nan")))
    with pytest.raises(BackboneError, match="NaN"):
        check(folder)


def test_bert_without_a_pooler(copy: Callable[..., Path]) -> None:
    folder = copy("bert")
    change_tensors(folder, lambda n, t: None if "pooler" in n else t)
    with pytest.raises(BackboneError, match=r"has no pooler .*saved from a model without one"):
        check(folder)


@pytest.mark.parametrize("name", ["config.json", SINGLE, "tokenizer.json"])
def test_git_lfs_pointers(name: str, copy: Callable[..., Path]) -> None:
    folder = copy("bert")
    (folder / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 90868376\n"
    )
    with pytest.raises(BackboneError, match=rf"{name} is a git-lfs pointer.*run git lfs pull"):
        Backbone.find(str(folder))


def test_a_text_backbone_without_tokenizer(tiny: dict[str, Path]) -> None:
    with pytest.raises(BackboneError, match=r"beside config\.json"):
        check(tiny["bert"])


def test_what_padding_means_to_a_decoder_is_told(copy: Callable[..., Path]) -> None:
    """The tokenizer here pads with 0."""
    (note,) = Backbone.find(str(copy("llama"))).notes
    assert "has pad_token_id 1, the tokenizer pads with 0: set pad_token_id to 0" in note
    folder = copy("llama", pad_token_id=0)
    assert Backbone.find(str(folder)).notes == ()
    add_tokenizer(folder, pad_token="[SEP]")
    _, note = Backbone.find(str(folder)).notes
    assert "ends each text with its padding token" in note
    assert Backbone.find(str(copy("bert"))).notes == ()


def test_type_ids_that_a_family_has_not(copy: Callable[..., Path]) -> None:
    """A tokenizer folder without tokenizer_class gives DistilBERT the type ids of BERT."""
    folder = add_tokenizer(
        copy("distilbert"), model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )
    inputs = TextTransform.from_backbone(folder)("pump leaks oil")
    assert "token_type_ids" in inputs
    backbone = Backbone.find(str(folder))
    check_backbone(backbone)
    part = device_part(backbone, Cut(4, 4), SPEC)
    without = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    assert torch.equal(part.ends.embed(inputs), part.ends.embed(without))


# Code in the folder.

TRAP = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
from transformers import {base}
class Own({base}):
    model_type = "own"
"""


@pytest.fixture
def no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def set_trap(folder: Path, file: str, key: str, base: str, **others: Any) -> None:
    (folder / "own.py").write_text(TRAP.format(base=base))
    path = folder / file
    said = json.loads(path.read_text()) if path.exists() else {}
    entry = ["own.Own", "own.Own"] if key == "AutoTokenizer" else "own.Own"
    path.write_text(json.dumps(said | {"auto_map": {key: entry}} | others))


def assert_nothing_ran(folder: Path) -> None:
    assert not list(folder.rglob("ran"))
    assert not [n for n in sys.modules if n.startswith("transformers_modules") and "own" in n]


@pytest.mark.usefixtures("no_questions")
@pytest.mark.parametrize("model_type", ["vit", "own"])
def test_code_of_a_config_never_runs(model_type: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    set_trap(folder, "config.json", "AutoConfig", "PretrainedConfig", model_type=model_type)
    if model_type == "own":
        with pytest.raises(BackboneError, match="never runs code from a backbone's folder"):
            Backbone.find(str(folder))
    else:
        check(folder)
    assert_nothing_ran(folder)


@pytest.mark.usefixtures("no_questions")
@pytest.mark.parametrize("tokenizer_class", ["Own", "BertTokenizer", None])
def test_code_of_a_tokenizer_never_runs(
    tokenizer_class: str | None, copy: Callable[..., Path]
) -> None:
    folder = copy("bert")
    set_trap(
        folder, "tokenizer_config.json", "AutoTokenizer", "PreTrainedTokenizerFast", tokenizer_class=tokenizer_class
    )  # fmt: skip
    # Read without it, or refused; which of the two is transformers' to say.
    with contextlib.suppress(BackboneError):
        check(folder)
        TextTransform.from_backbone(folder)
    assert_nothing_ran(folder)


@pytest.mark.usefixtures("no_questions")
def test_code_of_an_image_processor_never_runs(copy: Callable[..., Path]) -> None:
    folder = copy()
    set_trap(
        folder, "preprocessor_config.json", "AutoImageProcessor", "BaseImageProcessor", image_processor_type="Own"
    )  # fmt: skip
    with pytest.raises(BackboneError, match=r"leaves size, .* to its class 'Own'"):
        ImageTransform.from_backbone(folder)
    assert_nothing_ran(folder)
