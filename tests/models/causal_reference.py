"""transformers + PyTorch as the reference for decoder-only models. Imported only where torch is."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig


def make_model(folder, seed=0):
    """A random model of a folder's configuration, written into it; its outputs vary, its logits lie in about ±10."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    behind = {name for name, _ in model.named_parameters() if "post_feedforward" in name}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.replace("post_attention", "post_feedforward") in behind:
                parameter.copy_(3 + 0.2 * noise)  # so that Gemma's large embeddings do not decide alone
            elif "norm" in name and name.endswith("weight"):
                parameter.add_(0.2 * noise)  # Gemma's begin at 0, others at 1
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            elif "embed" in name:
                parameter.copy_(noise * 0.5)
            else:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)
    return model


def to_inputs(model, batch, row):
    """A row's pictures as the model takes them, and how many equal rows are asked at once."""
    shown = batch["pixel_values"][row]
    if isinstance(shown, dict):  # patches and grids of a row's pictures, as Qwen-VL's own processor makes them
        return {name: torch.tensor(part) for name, part in shown.items()}, 1
    shown = shown[None] if shown.ndim == 3 else shown
    pixels = torch.tensor(shown).permute(0, 3, 1, 2).to(model.dtype)
    kind = model.config.model_type
    if kind.startswith("qwen"):
        return to_patches(model, shown), 1
    if kind == "llava_onevision":  # among several pictures each is one tile
        count = 1 if len(pixels) > 1 else 2
        number = torch.tensor([len(pixels)] if count == 1 else [2])
        pixels = torch.cat([pixels] * count)
        sizes = torch.tensor([pixels.shape[2:]] * len(pixels))
        return {"pixel_values": pixels, "image_sizes": sizes, "batch_num_images": number}, count
    return {"pixel_values": pixels[None] if kind in ("smolvlm", "idefics3") else pixels}, 1


def to_patches(model, pictures):
    """Pictures [N, H, W, 3] as the patches and the grids that Qwen-VL's image processor makes of them."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vision = model.config.vision_config
    made = [
        Qwen2VLImageProcessorPil().patchify(
            picture.transpose(2, 0, 1), vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        )
        for picture in pictures
    ]
    patches = torch.tensor(np.concatenate([one for one, _, _ in made])).to(model.dtype)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, *grid] for _, *grid in made])}


def find_kinds(model, ids, prompt):
    """Kinds of tokens, by which Gemma's masks are made: PaliGemma's answers are 1, Gemma 3's image tokens.

    `prompt`: tokens of the prompts, of all together or [B, 1].
    """
    if model.config.model_type == "paligemma":
        return {"token_type_ids": (torch.arange(ids.shape[1]) >= prompt).long().expand_as(ids)}
    if model.config.model_type.startswith("qwen"):
        return {"mm_token_type_ids": (ids == model.config.image_token_id).int()}
    if model.config.model_type == "gemma3":
        return {"token_type_ids": (ids == model.config.image_token_id).long()}
    return {}


@torch.no_grad()
def find_logits(model, batch, labels):
    """Logits [B, U, V] that predict the labels, every row alone and unpadded; zeros where labels are ignored."""
    rows = []
    for row, (ids, mask, label) in enumerate(zip(batch["input_ids"], batch["attention_mask"], labels, strict=True)):
        prompt, answer = ids[mask != 0], label[label != -100]
        inputs, count = to_inputs(model, batch, row)
        whole = torch.tensor(np.concatenate([prompt, answer])[None]).long().repeat(count, 1)
        inputs |= find_kinds(model, whole, len(prompt))
        found = model(input_ids=whole, attention_mask=torch.ones_like(whole), **inputs)
        said = found.logits[0, len(prompt) - 1 : len(whole[0]) - 1].float().numpy()
        rows.append(np.pad(said, ((0, len(label) - len(said)), (0, 0))))
    return np.stack(rows)


@torch.no_grad()
def find_features(model, batch):
    """What the text model reads of each row's picture, [B, P, D]; of OneVision's two equal tiles the first.

    Qwen3-VL's have what is added to deeper layers beside them.
    """
    rows = []
    for row in range(len(batch["pixel_values"])):
        inputs, count = to_inputs(model, batch, row)
        made = model.model.get_image_features(**inputs, return_dict=True)
        parts = map(join_tokens, [made.pooler_output, *(getattr(made, "deepstack_features", None) or ())])
        rows.append(torch.cat([part[: len(part) // count] for part in parts], -1).numpy())
    return np.stack(rows)


def join_tokens(found):
    """Image tokens [..., D], or several arrays of them, as one array [N, D]."""
    several = found if isinstance(found, list | tuple) else [found]
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in several])


@torch.no_grad()
def find_loss(model, batch, labels):
    """Cross-entropy as the model computes it of each row alone and unpadded; the mean over all tokens of all rows."""
    total, tokens = 0.0, 0
    for row, (ids, mask, label) in enumerate(zip(batch["input_ids"], batch["attention_mask"], labels, strict=True)):
        prompt, answer = ids[mask != 0], label[label != -100]
        inputs, count = to_inputs(model, batch, row)
        whole = torch.tensor(np.concatenate([prompt, answer])[None]).long().repeat(count, 1)
        wanted = whole.clone()
        wanted[:, : len(prompt)] = -100
        inputs |= find_kinds(model, whole, len(prompt))
        found = model(input_ids=whole, attention_mask=torch.ones_like(whole), labels=wanted, **inputs)
        total, tokens = total + float(found.loss) * len(answer), tokens + len(answer)
    return total / tokens


def generate(model, batch, length, **options):
    """Tokens [B, length] after each prompt alone, padded with the pad token."""
    return search(model, batch, length, **options)[0]


@torch.no_grad()
def search(model, batch, length, **options):
    """Tokens as of `generate`, and of beams the scores [B] by which they are chosen, else None."""
    rows, scores = [], []
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        inputs, count = to_inputs(model, batch, row)
        prompt = torch.tensor(ids[mask != 0][None]).long().repeat(count, 1)
        inputs |= find_kinds(model, prompt, prompt.shape[1])
        found = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, do_sample=False,
            return_dict_in_generate=True, output_scores=True, **inputs, **options,
        )  # fmt: skip
        said = found.sequences[0, prompt.shape[1] :].numpy()
        rows.append(np.pad(said, (0, length - len(said)), constant_values=model.generation_config.pad_token_id))
        scores.append(getattr(found, "sequences_scores", [None])[0])
    return np.stack(rows), None if scores[0] is None else np.array(scores)
