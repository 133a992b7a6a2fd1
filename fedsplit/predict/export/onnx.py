"""A module as an ONNX file that onnxruntime runs, and its copy in int8. The only file that imports onnxruntime.

The file is traced by torch's exporter. Batch and length are free; an image has the size that the module's run had.
Inputs: `pixel_values` [N, 3, H, W], or `input_ids`, `attention_mask` and maybe `token_type_ids`, int64 [N, T]. Output:
`logits` [N, C], or `number` [N, 1] in its own unit.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsplit.core.errors import ConfigError
from fedsplit.core.extras import extra
from fedsplit.core.scores import Scale
from fedsplit.model.split import SplitModel
from fedsplit.predict.predictor import Predictor
from fedsplit.training.data.transform import Prepared

OPSET = 17
MAX_BYTES = 1900 * 2**20
"""One ONNX file holds 2 GiB."""
_PURPOSE = "an ONNX file"


class _Whole(nn.Module):
    """The model as torch's exporter takes one: plain tensors in a fixed order."""

    def __init__(self, model: SplitModel, names: list[str], scale: Scale | None) -> None:
        super().__init__()
        self.inner = model.part.model
        self._model, self._names, self._scale = model, names, scale

    def forward(self, *values: Tensor) -> Tensor:
        """[N, C]"""
        inputs = dict(zip(self._names, values, strict=True))
        mask = inputs.get("attention_mask")
        outputs = self._model(inputs, None if mask is None else mask.bool())
        scale = self._scale
        return outputs if scale is None else outputs * scale.deviation + scale.mean


def save_onnx(
    file: Path, model: SplitModel, predictor: Predictor, example: list[Prepared]
) -> list[str]:
    """Write `model` as one file; `example` is a batch of at least two. Gives the names of the inputs.

    Raises ConfigError where onnx is not installed or the model is too large for one file.
    """
    size = predictor.backbone.weight_bytes()
    if size > MAX_BYTES:
        raise ConfigError(
            f"the backbone has {size / 2**30:.1f} GiB of weights, one ONNX file holds less than 2; use --to merged"
        )
    with extra("export", _PURPOSE):
        import onnx  # noqa: F401
    inputs, _ = predictor.transform.assemble(example)
    names = list(inputs)
    free = {0: "batch", 1: "tokens"} if predictor.kind == "text" else {0: "batch"}
    output = output_name(predictor)
    whole = _Whole(model, names, predictor.spec.numbers).eval()
    with torch.no_grad(), _quiet():
        # torch's other exporter takes ten times as long and gives a slower file: docs/adr/0025.
        torch.onnx.export(
            whole,
            tuple(inputs.values()),
            str(file),
            dynamo=False,
            input_names=names,
            output_names=[output],
            dynamic_axes=dict.fromkeys(names, free) | {output: {0: "batch"}},
            opset_version=OPSET,
        )
    return names


def output_name(predictor: Predictor) -> str:
    """What the file calls its output."""
    return "logits" if predictor.spec.numbers is None else "number"


def save_int8(source: Path, file: Path) -> None:
    """The same model with the weights of its matrix products in int8 (onnxruntime's dynamic quantisation)."""
    with extra("export", "int8"):
        from onnxruntime.quantization import QuantType, quantize_dynamic
    with _quiet():
        quantize_dynamic(source, file, weight_type=QuantType.QInt8)


def runner(file: Path, predictor: Predictor) -> Callable[[list[Prepared]], NDArray[np.float32]]:
    """Answers of a file as `Predictor.outputs` gives them: logits, or a number on the module's scale."""
    with extra("export", _PURPOSE):
        import onnxruntime
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    scale = predictor.spec.numbers

    def answer(batch: list[Prepared]) -> NDArray[np.float32]:
        inputs, _ = predictor.transform.assemble(batch)
        outputs: NDArray[np.float32] = session.run(None, {n: inputs[n].numpy() for n in names})[0]
        if scale is None:
            return outputs
        scaled = (outputs.astype(np.float64) - scale.mean) / scale.deviation
        return scaled.astype(np.float32)

    return answer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's word that it traces, and onnxruntime's that shapes could be worked out before."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
