"""A run's trained module with its backbone, ready to use: inputs are prepared exactly as the run prepared them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedsplit.core.errors import DataError
from fedsplit.model.backbone import Backbone
from fedsplit.model.inputs import Inputs
from fedsplit.model.module import ModuleSpec, ModuleTensors, load_exported, load_inputs
from fedsplit.model.split import SplitModel, whole_model
from fedsplit.training.data import ImageTransform, TextTransform
from fedsplit.training.data.examples import Request
from fedsplit.training.data.image_files import ImageFiles
from fedsplit.training.task import CLASSIFICATION, Regression, Task

Sample = str | Path | NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class TrainedModule:
    """Backbone and module in one model, and what turns a sample into its input."""

    backbone: Backbone
    spec: ModuleSpec
    tensors: ModuleTensors
    inputs: Inputs
    model: SplitModel
    transform: ImageTransform | TextTransform

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the model's outputs; ("number",) where it predicts a number."""
        return self.spec.classes

    def prepare(self, sample: Sample) -> dict[str, torch.Tensor]:
        """The inputs of a batch of one: of a text, or of an image's path or its pixels, uint8 [H, W, 3].

        Raises DataError for an image that cannot be read, or of which nothing says which value is white.
        """
        if isinstance(self.transform, TextTransform):
            if not isinstance(sample, str):
                raise DataError(
                    f"{type(sample).__name__} given, this module reads texts; give a str"
                )
            return self.transform(sample)
        if isinstance(sample, np.ndarray):
            if sample.dtype != np.uint8 or sample.ndim != 3 or sample.shape[2] != 3:
                raise DataError(
                    f"an array of {sample.dtype} {sample.shape} given, uint8 [H, W, 3] is wanted; give the file's "
                    f"path, so that it is read as the run read its own"
                )
            return {"pixel_values": self.transform(sample)[None]}
        white, request = self.inputs.pixel_max, Request(site="here")
        seen = ImageFiles(request, [str(sample)]).look(0)
        if seen.fault is not None:
            raise seen.fault
        if seen.deep and not white:
            raise request.fault(
                sample,
                f"pixels go up to {seen.largest:g}, and neither the file nor the module says which value is white; give it "
                f"as load_trained(..., pixel_max=...)",
            )
        # Up to 1 is the range of floats; a file of 8 bits has its own.
        items = ImageFiles(request, [str(sample)], white if seen.deep or white > 1 else 0.0)
        return {"pixel_values": self.transform(items.get(0))[None]}

    @property
    def task(self) -> Task:
        """What the outputs mean."""
        return CLASSIFICATION if self.spec.numbers is None else Regression(self.spec.numbers)

    def logits(self, sample: Sample) -> torch.Tensor:
        """[C], one number a class; or [1], a number on the scale of `spec.numbers`."""
        with torch.no_grad():
            # A batch of one is never padded, so there is no mask.
            return self.model(self.prepare(sample), None)[0]

    def predict(self, sample: Sample) -> dict[str, float]:
        """Class -> its share, the largest first; or {"number": its value in the data's unit}."""
        return self.task.prediction(self.logits(sample), self.classes)


def load_trained(
    folder: Path | str, backbone: Backbone | str, *, pixel_max: float = 0
) -> TrainedModule:
    """What a run left in its `module` folder, on the backbone that it was trained on. Raises BackboneError.

    `pixel_max` is the value of white in the images here, where it is another than at the run's sites.
    """
    found = Backbone.find(backbone) if isinstance(backbone, str) else backbone
    spec, tensors = load_exported(Path(folder), found)
    inputs = load_inputs(Path(folder))
    if pixel_max:
        inputs = replace(inputs, pixel_max=pixel_max)
    transform: ImageTransform | TextTransform
    if found.family.kind == "image":
        transform = ImageTransform.from_backbone(found.path, inputs.image_size)
    else:
        transform = TextTransform.from_backbone(found.path, inputs.max_length)
    model = whole_model(found, spec, tensors)
    return TrainedModule(found, spec, tensors, inputs, model, transform)
