"""How many bytes of a backbone does a site store at each cut? `python -m benchmarks.backbone_parts`

Counts, times nothing: the fp32 tensors that a device part holds, which are those that a store of parts has
(tests/model/test_store.py). The last column is arithmetic: the bytes over a line of 10 Mbit/s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsplit.core.cut import Cut
from fedsplit.model.backbone import Backbone, frozen_names, frozen_paths
from fedsplit.model.families import FAMILIES

_SIZES: dict[str, tuple[str, str, dict[str, int]]] = {
    "ViT-Tiny": (
        "vit",
        "ViTConfig",
        {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    ),
    "ViT-B/16": ("vit", "ViTConfig", {}),
    "BERT-base": ("bert", "BertConfig", {}),
}
_LINE_BYTES_S = 10e6 / 8


def run() -> list[dict[str, Any]]:
    """A row a backbone and cut."""
    import transformers

    rows = []
    for name, (family, config, sizes) in _SIZES.items():
        made = getattr(transformers, config)(**sizes)
        backbone = Backbone(name, Path(name), FAMILIES[family], made)
        last = backbone.blocks
        whole = stored(backbone, Cut(last, last))
        for cut in (Cut(0, last), Cut(1, last - 1), Cut(last, last)):
            size = stored(backbone, cut)
            rows.append({"backbone": name, "cut": str(cut), "bytes": size, "share": size / whole})
    return rows


def stored(backbone: Backbone, cut: Cut) -> int:
    """Bytes of the tensors that a device with this cut holds of the backbone."""
    model = backbone.skeleton(1)
    paths = frozen_paths(
        backbone.family, cut.device_blocks(backbone.blocks), pool=not cut.pooled(backbone.blocks)
    )
    return sum(4 * model.get_parameter(name).numel() for name in frozen_names(model, paths))


def main() -> None:
    """Print the rows as a Markdown table."""
    print("| backbone | cut | stored | of the whole | at 10 Mbit/s |\n|---|---|---|---|---|")
    for row in run():
        print(
            f"| {row['backbone']} | `{row['cut']}` | {row['bytes'] / 1e6:.1f} MB | {row['share']:.1%} | "
            f"{row['bytes'] / _LINE_BYTES_S:,.0f} s |"
        )


if __name__ == "__main__":
    main()
