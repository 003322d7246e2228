"""The names that tensors of LLaVA's, Gemma's and InternVL's models have in folders."""

import re

from safetensors.numpy import save_file

SPELLINGS = {
    "transformers 5": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.", ""),
        (r"^lm_head", "language_model.lm_head"),
    ),
    "the hub": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.", ""),
        (r"^lm_head", "language_model.lm_head"),
    ),
    "transformers 4.52": ((r"^model\.vision_tower\.", "model.vision_tower.vision_model."),),
}


def spell(tensors, spelling):
    """The same tensors under other names."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in SPELLINGS[spelling]:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def save(tensors, folder):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
