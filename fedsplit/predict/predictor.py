"""A module in use: it prepares inputs exactly as the run prepared them, and says what the model makes of them.

Who gives the inputs is inputs.py's (files and folders), judge/'s (labelled data) or serve/'s affair; what becomes of the
outputs is answers.py's. Shapes: N samples, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Encoder
from fedsplit.core.errors import ConfigError, DataError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.families import InputKind
from fedsplit.model.inputs import Inputs
from fedsplit.model.module import ModuleSpec
from fedsplit.model.part import Weights
from fedsplit.model.split import SplitModel, device_part
from fedsplit.model.threads import limit_threads
from fedsplit.predict.backbones import find_backbone_of
from fedsplit.predict.found import FoundModule, find_module
from fedsplit.predict.images import checked_pixels, read_image
from fedsplit.training import pipeline
from fedsplit.training.data import ImageTransform, TextTransform, batches
from fedsplit.training.data.examples import Examples
from fedsplit.training.data.transform import Prepared
from fedsplit.training.task import CLASSIFICATION, Regression, Task

__all__ = ["Predictor", "Prepared", "Progress", "Sample", "load_predictor"]

Sample = str | Path | bytes | NDArray[np.uint8]
"""A text, or an image: its path, its encoded bytes, or its pixels, uint8 [H, W, 3]."""
Progress = Callable[[int, int], None]
"""(samples done, samples in all), after each batch."""


@dataclass(frozen=True, eq=False)
class Predictor:
    """Backbone and module in one model, and what turns a sample into its input."""

    found: FoundModule
    spec: ModuleSpec
    inputs: Inputs
    backbone: Backbone
    model: SplitModel
    transform: ImageTransform | TextTransform

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the outputs; ("number",) where the module predicts a number."""
        return self.spec.classes

    @property
    def kind(self) -> InputKind:
        """What a sample is: an image or a text."""
        return self.backbone.family.kind

    @property
    def task(self) -> Task:
        """What the outputs mean."""
        return CLASSIFICATION if self.spec.numbers is None else Regression(self.spec.numbers)

    def prepare(self, sample: Sample) -> Prepared:
        """One sample as `outputs` takes it: a resized image, or the ids of a text's tokens.

        Raises DataError for what cannot be read, and for an image of which nothing says which value is white.
        """
        if isinstance(self.transform, TextTransform):
            if not isinstance(sample, str):
                raise DataError(
                    f"{type(sample).__name__} given, this module reads texts; give a str"
                )
            if not sample.strip():
                raise DataError("the text is empty; give one with words in it")
            return self.transform.tokens([sample])[0]
        if isinstance(sample, np.ndarray):
            return self.transform.resize(checked_pixels(sample))
        return self.transform.resize(read_image(sample, self.inputs).pixels)

    def outputs(self, prepared: Sequence[Prepared]) -> NDArray[np.float32]:
        """One batch through the model: float32 [N, C], the logits of the classes or a number on `spec.numbers`' scale.

        Texts are padded to the longest of them, and which others are in the batch changes the last digits.
        """
        if not prepared:
            return np.zeros((0, len(self.classes)), np.float32)
        inputs, mask = self.transform.assemble(prepared)
        with torch.no_grad():
            outputs: NDArray[np.float32] = self.model(inputs, mask).float().cpu().numpy()
        return outputs

    def over(
        self, examples: Examples, *, batch_size: int = 32, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """The outputs of labelled samples in their order, float32 [N, C], computed as the tests of a run compute them.

        Equal to them bit for bit at the run's batch-size. Raises DataError for a sample that cannot be read.
        """
        if examples.kind != self.kind:
            raise DataError(
                f"the samples of {printed(examples)} are {examples.kind}s, the module {self.found.name} reads {self.kind}s; "
                f"give a source of {self.kind}s"
            )
        order = np.arange(len(examples))
        found = [np.zeros((0, len(self.classes)), np.float32)]
        done = 0
        steps = batches(examples, order, self.transform, batch_size=batch_size)
        with torch.no_grad():
            for batch, z in pipeline.ahead(self.model, steps, pipeline.Flow()):
                found.append(pipeline.tail(self.model, z, batch.mask).cpu().numpy())
                done += len(batch)
                if progress is not None:
                    progress(done, len(examples))
        return np.concatenate(found)

    def probabilities(self, outputs: NDArray[np.float32]) -> NDArray[np.float64]:
        """[N, C] -> softmax, float64 [N, C]; of a number [N, 1] -> the number in its unit, float64 [N, 1]."""
        wide = np.asarray(outputs, dtype=np.float64)
        if self.spec.numbers is not None:
            return wide * self.spec.numbers.deviation + self.spec.numbers.mean
        raised = np.exp(wide - wide.max(axis=1, keepdims=True)) if wide.size else wide
        shares: NDArray[np.float64] = raised / raised.sum(axis=1, keepdims=True)
        return shares

    def predict(self, sample: Sample) -> dict[str, float]:
        """Class -> its probability, the largest first; or {"number": its value in the data's unit}."""
        values = self.probabilities(self.outputs([self.prepare(sample)]))[0]
        return dict(
            sorted(zip(self.classes, values.tolist(), strict=True), key=lambda one: -one[1])
        )


def printed(examples: Examples) -> str:
    """Where samples come from, by their first one."""
    return examples.origin(0) if len(examples) else "an empty source"


def load_predictor(
    module_: str | Path | FoundModule,
    *,
    backbone: str = "",
    pixel_max: float = 0,
    threads: int = 0,
    registry: Path | None = None,
    middle: Encoder | None = None,
    cut: Cut | None = None,
    weights: Callable[[Backbone], Weights] | None = None,
) -> Predictor:
    """The module of a folder, a run or a registry, on the backbone that it was trained on.

    `backbone` names it where it does not lie where it is looked for (backbones.py). `pixel_max` is the value of white in
    the images here, where it is another than at the run's sites. `threads`: torch's; 0 leaves its choice, within the CPUs
    of this process. With a `cut` this machine holds head and tail, and `middle` is the encoder between them. `weights`
    gives the backbone's tensors where another part of this process has them already.

    Raises ConfigError where the module is not found, BackboneError where it or its backbone cannot be used.
    """
    found = (
        module_
        if isinstance(module_, FoundModule)
        else find_module(str(module_), registry=registry)
    )
    limit_threads(threads)
    its_backbone = find_backbone_of(found.folder, backbone)
    spec, tensors = module.load_exported(found.folder, its_backbone)
    inputs = module.load_inputs(found.folder)
    if pixel_max:
        inputs = replace(inputs, pixel_max=_checked_white(pixel_max))
    transform: ImageTransform | TextTransform
    if its_backbone.family.kind == "image":
        transform = ImageTransform.from_backbone(its_backbone.path, inputs.image_size)
    else:
        transform = TextTransform.from_backbone(its_backbone.path, inputs.max_length)
    here = cut or Cut(its_backbone.blocks, its_backbone.blocks)
    shared = weights(its_backbone) if weights else None
    part = device_part(its_backbone, here, spec, weights=shared)
    module.load(part, tensors)
    return Predictor(found, spec, inputs, its_backbone, SplitModel(part, here, middle), transform)


def _checked_white(pixel_max: float) -> float:
    if not 0 < pixel_max < 2**32:
        raise ConfigError(
            f"pixel-max={pixel_max:g} is no value of white; give the value of a white pixel, e.g. 4095 for 12 bits"
        )
    return pixel_max
