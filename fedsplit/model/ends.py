"""What comes before a backbone's first block and after its last one: embeddings, norm, pooling, classifier.

The blocks are trunk.py's. Shapes: B batch, T tokens, D width, P pooled width, F width of what enters the last
linear layer, C classes.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor

from fedsplit.model.families import Family
from fedsplit.model.layers import PROMPT, widen_mask, without_prompt


class Ends:
    """The ends of a part. A part that was made without them has them on the meta device, where they compute nothing."""

    def __init__(self, model: Any, family: Family) -> None:
        self._model = model
        self.base = getattr(model, family.base)
        self._family = family
        self.prompt_tokens = 0
        """Tokens that the module puts behind the first one; `module.attach` sets them."""

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        """Model inputs -> embeddings [B, T, D], a prompt among them. The attention mask is not an input of this."""
        embeddings = self.base.get_submodule(self._family.embeddings)
        device = next(embeddings.parameters()).device
        given = {name: value.to(device) for name, value in inputs.items()}
        first = given.pop("pixel_values" if self._family.kind == "image" else "input_ids")
        # Tokenizers may give type ids, all 0 for one text, to a family that has none.
        taken = signature(embeddings.forward).parameters
        known = {name: value for name, value in given.items() if name in taken}
        out: Tensor = embeddings(first, **known, **dict(self._family.embed_kwargs))
        return getattr(self.base, PROMPT)(out) if self.prompt_tokens else out

    def mask(self, mask_BT: Tensor | None) -> Tensor | None:
        """The inputs' mask as blocks and pooling want it: with ones for the prompt's tokens."""
        if mask_BT is None or not self.prompt_tokens:
            return mask_BT
        return widen_mask(mask_BT, self.prompt_tokens)

    def pool(self, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Final norm and pooling: [B, T, D] -> [B, P]; `mask_BT` is that of the blocks. A prompt's tokens are not pooled."""
        if self.prompt_tokens:
            h_BTD = without_prompt(h_BTD, self.prompt_tokens)
            mask_BT = None if mask_BT is None else without_prompt(mask_BT, self.prompt_tokens)
        return self._family.pool(self.base, h_BTD, mask_BT)

    def features(self, pooled_BP: Tensor) -> Tensor:
        """Pooled features [B, P] -> what enters the last linear layer, [B, F]."""
        return self._family.features(self._model, pooled_BP)

    def classify(self, pooled_BP: Tensor) -> Tensor:
        """Pooled features [B, P] -> logits [B, C]."""
        last = self._model.get_submodule(self._family.final_linear)
        logits: Tensor = last(self.features(pooled_BP))
        return logits
