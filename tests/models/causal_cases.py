"""Tiny models of the decoder-only families: folders as transformers has them, without weights."""

import json
import re
from pathlib import Path

SENTENCES = [
    "what is this? is it a red car, or two?",
    "yes it is one. a car, a long answer of many words",
    "User: Assistant:",
]
LLAMA = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 160,
    "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 3, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
SIGLIP = {
    "hidden_size": 18, "intermediate_size": 30, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def write_json(file: Path, values) -> None:
    file.write_text(json.dumps(values))


def write_tokenizer(
    folder: Path, special: list[str], bos: str, eos: str, pad: str, *, last: tuple[str, ...] = ()
) -> dict[str, int]:
    """A byte-level tokenizer whose first, and last, ids are the special tokens; returns its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=312, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.add_special_tokens({"additional_special_tokens": list(last)})
    fast.save_pretrained(folder)
    return fast.get_vocab()


def write_llama_tokenizer(folder: Path, special: list[str]) -> dict[str, int]:
    """A tokenizer as Llama's: words begin with ▁, texts are begun with one, and unknown letters become bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    made = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in made["merges"]]
    fast = LlamaTokenizer(vocab=made["vocab"], merges=merges, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": special})
    fast.save_pretrained(folder)
    return fast.get_vocab()


def write_llava(
    folder: Path, *, tower: str = "clip", vision=(), text=(), template: str | None = None, **config
) -> None:
    """Configuration, tokenizer and image processor of a tiny LLaVA; its template is the hub's, or there is none."""
    ids = write_llama_tokenizer(folder, ["<image>"])
    text = {**LLAMA, "vocab_size": 430, "eos_token_id": 2, "pad_token_id": ids["<pad>"], **dict(text)}
    write_json(folder / "config.json", {
        "model_type": "llava", "image_token_index": ids["<image>"], "text_config": text,
        "vision_config": {"model_type": f"{tower}_vision_model", **SIGLIP, **dict(vision)}, **config,
    })  # fmt: skip
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": ids["<pad>"]})
    side = {"shortest_edge": 32} if tower == "clip" else {"height": 32, "width": 32}
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}[tower],
        "size": side, "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        **({"do_center_crop": True, "crop_size": {"height": 32, "width": 32}} if tower == "clip" else {}),
        "resample": 3, "rescale_factor": 1 / 255, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.3, 0.4],
    })  # fmt: skip
    write_json(folder / "processor_config.json", {
        "processor_class": "LlavaProcessor", "patch_size": 8, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1, "image_token": "<image>",
    })  # fmt: skip
    if template is not None:
        write_json(folder / "chat_template.json", {"chat_template": template})


LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As llava-1.5-7b-hf has it: no token ends its answers."""


def write_onevision(folder: Path, **text) -> None:
    """Configuration, tokenizer and image processor of a tiny LLaVA-OneVision, whose side is no whole patches."""
    special = ["<unk>", "<|endoftext|>", "<pad>", "<|im_end|>", "<|im_start|>", "<image>"]
    ids = write_tokenizer(folder, special, "<|endoftext|>", "<|im_end|>", "<pad>")
    text = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True, **text}
    del text["head_dim"]
    write_json(folder / "config.json", {
        "model_type": "llava_onevision", "image_token_index": ids["<image>"], "video_token_index": 319,
        "text_config": text, "image_grid_pinpoints": [[30, 30], [30, 60], [60, 30]],
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP, "image_size": 30},
    })  # fmt: skip
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 2})
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 30, "width": 30},
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "do_pad": True,
        "image_grid_pinpoints": [[30, 30], [30, 60], [60, 30]], "resample": 3, "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    })  # fmt: skip


def write_smolvlm(folder: Path, *, kind: str = "smolvlm", tied: bool = False, **text) -> None:
    """Configuration, tokenizer and image processor of a tiny SmolVLM or Idefics3."""
    special = [
        "<unk>",
        "<|im_start|>",
        "<pad>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
    ]
    ids = write_tokenizer(folder, special, "<|im_start|>", "<end_of_utterance>", "<pad>")
    write_json(folder / "config.json", {
        "model_type": kind, "scale_factor": 2, "image_token_id": ids["<image>"], "tie_word_embeddings": tied,
        "text_config": {**LLAMA, "tie_word_embeddings": tied, **text},
        "vision_config": {"model_type": f"{kind}_vision", **SIGLIP},
    })  # fmt: skip
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 2})
    name = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[kind]
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": f"{name}ImageProcessor", "do_image_splitting": True,
        "size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "do_resize": True, "do_rescale": True,
        "do_normalize": True, "do_pad": True, "do_convert_rgb": True, "resample": 1, "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    })  # fmt: skip


def write_internvl(folder: Path, *, vision=(), rope=(), text=(), **config) -> None:
    """Configuration, tokenizer and image processor of a tiny InternVL."""
    special = ["<unk>", "<|endoftext|>", "<pad>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    ids = write_tokenizer(folder, special, "<|endoftext|>", "<|im_end|>", "<pad>")
    text = {**LLAMA, "model_type": "qwen2", **dict(text)}
    text["rope_parameters"] = {**text["rope_parameters"], **dict(rope)}
    del text["head_dim"]
    write_json(folder / "config.json", {
        "model_type": "internvl", "image_token_id": ids["<IMG_CONTEXT>"], "text_config": text,
        "vision_config": {
            "model_type": "internvl_vision", **SIGLIP, "image_size": [32, 32], "patch_size": [8, 8],
            "attention_bias": True, **dict(vision),
        },
        **config,
    })  # fmt: skip
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 2})
    write_pictures(folder, "GotOcr2ImageProcessorFast", crop_to_patches=True, min_patches=1, max_patches=12)


GEMMA = {
    "vocab_size": 312, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 160, "rms_norm_eps": 1e-6,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
GEMMA2 = {"model_type": "gemma2", "query_pre_attn_scalar": 5, "sliding_window": 6, "attn_logit_softcapping": 3.0}


def write_pictures(folder: Path, kind: str, **settings) -> None:
    """Settings of an image processor that brings pictures to one size."""
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": kind, "size": {"height": 32, "width": 32}, "do_resize": True, "do_rescale": True,
        "do_normalize": True, "do_convert_rgb": None, "resample": 3, "rescale_factor": 1 / 255, "image_seq_length": 16,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], **settings,
    })  # fmt: skip


def write_paligemma(folder: Path, **text) -> None:
    """Configuration, tokenizer and image processor of a tiny PaliGemma, whose image token is not in the vocabulary."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    ids = write_tokenizer(folder, special, "<bos>", "<eos>", "<pad>", last=("<image>",))
    assert ids["<image>"] >= GEMMA["vocab_size"]
    write_json(folder / "config.json", {
        "model_type": "paligemma", "image_token_index": ids["<image>"], "projection_dim": 24,
        "text_config": {**GEMMA, **text}, "vision_config": {
            "model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP
        },
    })  # fmt: skip
    write_json(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0})
    write_pictures(folder, "SiglipImageProcessor")


GEMMA3_TEMPLATE = (
    "{{ bos_token }}\n{%- if messages[0]['role'] == 'system' -%}\n"
    "    {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}\n"
    '    {%- set loop_messages = messages[1:] -%}\n{%- else -%}\n    {%- set first_user_prefix = "" -%}\n'
    "    {%- set loop_messages = messages -%}\n{%- endif -%}\n{%- for message in loop_messages -%}\n"
    "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}\n"
    '        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}\n'
    "    {%- endif -%}\n    {%- if (message['role'] == 'assistant') -%}\n        {%- set role = \"model\" -%}\n"
    "    {%- else -%}\n        {%- set role = message['role'] -%}\n    {%- endif -%}\n"
    "    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else \"\") }}\n"
    "    {%- if message['content'] is string -%}\n        {{ message['content'] | trim }}\n"
    "    {%- elif message['content'] is iterable -%}\n        {%- for item in message['content'] -%}\n"
    "            {%- if item['type'] == 'image' -%}\n                {{ '<start_of_image>' }}\n"
    "            {%- elif item['type'] == 'text' -%}\n                {{ item['text'] | trim }}\n"
    "            {%- endif -%}\n        {%- endfor -%}\n    {%- else -%}\n"
    "        {{ raise_exception(\"Invalid content type\") }}\n    {%- endif -%}\n    {{ '<end_of_turn>\n' }}\n"
    "{%- endfor -%}\n{%- if add_generation_prompt -%}\n    {{'<start_of_turn>model\n'}}\n{%- endif -%}\n"
)
"""As Gemma 3's folders have it."""


def write_gemma3(folder: Path, *, template: str | None = None, **text) -> None:
    """Configuration, tokenizer and image processor of a tiny Gemma 3, with the fields that its first folders have."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    special += ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    ids = write_tokenizer(folder, special, "<bos>", "<eos>", "<pad>")
    write_json(folder / "config.json", {
        "model_type": "gemma3", "image_token_index": ids["<image_soft_token>"], "mm_tokens_per_image": 4,
        "boi_token_index": ids["<start_of_image>"], "eoi_token_index": ids["<end_of_image>"], "eos_token_id": [1, 5],
        "text_config": {
            "model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 5, "query_pre_attn_scalar": 3,
            "sliding_window": 8, "sliding_window_pattern": 3,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, **text,
        },
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP},
    })  # fmt: skip
    write_json(folder / "generation_config.json", {
        "bos_token_id": 2, "eos_token_id": [1, 5], "pad_token_id": 0, "do_sample": True, "top_k": 64, "top_p": 0.95,
    })  # fmt: skip
    write_pictures(folder, "Gemma3ImageProcessor")
    if template is not None:
        write_json(folder / "chat_template.json", {"chat_template": template})


def write_qwen(folder: Path, kind: str, vision: dict, *, tied: bool = True, **text) -> None:
    """Configuration, tokenizer and image processor of a tiny Qwen-VL; pictures of 40 pixels, 5 x 5 image tokens."""
    special = ["<unk>", "<|endoftext|>", "<pad>", "<|im_start|>", "<|im_end|>"]
    special += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    ids = write_tokenizer(folder, special, "<|endoftext|>", "<|im_end|>", "<pad>")
    llama = {name: value for name, value in LLAMA.items() if name not in ("bos_token_id", "rope_parameters")}
    write_json(folder / "config.json", {
        "model_type": kind, "tie_word_embeddings": tied, "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"], "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "text_config": {**llama, "model_type": f"{kind}_text", "eos_token_id": 4, **text},
        "vision_config": {
            "model_type": kind, "depth": 4, "hidden_size": 32, "intermediate_size": 44, "num_heads": 4,
            "in_channels": 3, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "out_hidden_size": 24, **vision,
        },
    })  # fmt: skip
    write_json(folder / "generation_config.json", {"eos_token_id": [4, 1], "pad_token_id": 1})
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "Qwen2VLImageProcessorFast", "size": {"shortest_edge": 64, "longest_edge": 1600},
        "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "resample": 3, "do_resize": True,
        "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    })  # fmt: skip


def write_qwen3(folder: Path, **changes) -> None:
    """A tiny Qwen3-VL: learned positions of another grid than the pictures', two deep layers."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {"num_position_embeddings": 36, "deepstack_visual_indexes": [1, 2], "hidden_act": "gelu_pytorch_tanh"}
    text = {"head_dim": 8, "num_hidden_layers": 4, "rope_parameters": rope}  # a layer reads what the two deep ones add
    write_qwen(folder, "qwen3_vl", vision, **text | changes)


def write_qwen25(folder: Path, **changes) -> None:
    """A tiny Qwen2.5-VL: windows of 4 patches a side, which do not divide the pictures' 10."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 1]}
    vision = {"window_size": 16, "fullatt_block_indexes": [1, 3], "hidden_act": "silu"}
    write_qwen(folder, "qwen2_5_vl", vision, **{"rope_parameters": rope, "rms_norm_eps": 1e-6, **changes})


CASES = {
    "smolvlm": lambda folder: write_smolvlm(folder),
    "smolvlm-tied": lambda folder: write_smolvlm(folder, tied=True, num_hidden_layers=4, num_key_value_heads=1),
    "idefics3": lambda folder: write_smolvlm(
        folder,
        kind="idefics3",
        num_key_value_heads=4,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    ),
    "llava": lambda folder: write_llava(folder, template=LLAVA_TEMPLATE),
    "llava-full": lambda folder: write_llava(
        folder,
        vision={"num_hidden_layers": 3},
        vision_feature_layer=1,
        vision_feature_select_strategy="full",
        text={"model_type": "mistral", "sliding_window": None, "num_hidden_layers": 4, "head_dim": 8},
    ),
    "llava-siglip": lambda folder: write_llava(
        folder,
        tower="siglip",
        vision={"vision_use_head": True, "patch_size": 16},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        multimodal_projector_bias=False,
        projector_hidden_act="relu",
        text={"model_type": "qwen2", "tie_word_embeddings": True},
    ),
    "llava_onevision": write_onevision,
    "paligemma2": lambda folder: write_paligemma(folder, **GEMMA2, final_logit_softcapping=12.0),
    "paligemma": lambda folder: write_paligemma(folder, model_type="gemma", num_hidden_layers=4, num_key_value_heads=1),
    "gemma3": lambda folder: write_gemma3(folder, template=GEMMA3_TEMPLATE),
    # A window shorter than a picture, and no template.
    "gemma3-narrow": lambda folder: write_gemma3(folder, sliding_window=3, sliding_window_pattern=4),
    "internvl": lambda folder: write_internvl(
        folder, tie_word_embeddings=True, rope={"rope_type": "dynamic", "factor": 2.0}, text={"num_hidden_layers": 4}
    ),
    # Neither part says whether the head is the token table; the tower's states are normed; patches are joined 4 x 4.
    "internvl-untied": lambda folder: write_internvl(
        folder, vision={"use_mean_pooling": False}, downsample_ratio=0.25, projector_hidden_act="relu"
    ),
    "qwen3-vl": write_qwen3,
    "qwen2.5-vl": lambda folder: write_qwen25(folder, tied=False),
}
"""Name -> what writes a folder of it."""

# name -> generation options, as transformers' generate takes them; a quarter of all tokens end answers of the last
SEARCHES = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 3, "early_stopping": True},
    "beams_ends": {"num_beams": 3, "early_stopping": True, "eos_token_id": [*range(3, 312, 4)]},
}


def write_model(name: str, folder: Path, seed: int = 5, cases=CASES) -> None:
    """A folder of a case with random weights, strong enough that answers depend on everything."""
    import jax

    from fedvlm_jax.models import read_vlm, save_checkpoint

    cases[name](folder)
    vlm = read_vlm(folder)
    paths, structure = jax.tree.flatten_with_path(jax.jit(vlm.init)(jax.random.key(seed)))
    drawn = []
    for (path, leaf), key in zip(paths, jax.random.split(jax.random.key(seed + 1), len(paths)), strict=True):
        noise = jax.random.normal(key, leaf.shape)
        drawn.append(noise / count_inputs(leaf) ** 0.5 if path[-1].key == "kernel" else leaf + 0.2 * noise)
    save_checkpoint(vlm, jax.tree.unflatten(structure, drawn), folder)


def write_sharp_model(name: str, folder: Path, cases=CASES) -> None:
    """A folder of a case with weights that are the same on every machine, for answers that are kept.

    They are so strong that answers do not repeat a token, as those of `write_model` do where token embeddings are tied
    or large: norms behind sub-layers, where a model has them, multiply by 2 more.
    """
    import jax
    import numpy as np

    from fedvlm_jax.models import read_vlm, save_checkpoint
    from fedvlm_jax.utils import tree

    cases[name](folder)
    vlm, rng = read_vlm(folder), np.random.default_rng(5)
    shapes = tree.flatten(vlm.shapes())

    def start():
        """All that begins as a constant, so that nothing is compiled that draws."""
        drawn = ("kernel", "embedding", "image_newline")
        return tree.partition(vlm.init(jax.random.key(0)), lambda path: not path.endswith(drawn))[0]

    starts = tree.flatten(jax.device_get(jax.jit(start)()))
    behind = any("post_feedforward" in path for path in shapes)
    drawn = {}
    for path, shape in shapes.items():
        noise = np.asarray(rng.standard_normal(shape.shape, np.float32))
        if path.endswith("kernel"):
            drawn[path] = 1.5 * noise / count_inputs(shape) ** 0.5
        else:
            drawn[path] = starts.get(path, 0) + 0.2 * noise
            if behind and re.search("/post_(attention|feedforward)_layernorm/", path):
                drawn[path] += 2
    save_checkpoint(vlm, tree.unflatten(drawn), folder)


def count_inputs(kernel) -> float:
    """Numbers that each output of a product, one of a stack of them, is a sum of."""
    return kernel.size / kernel.shape[-1] / (kernel.shape[0] if kernel.ndim == 3 else 1)
