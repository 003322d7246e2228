"""Pre-train Florence2-nano, SmolVLM-nano or CLIP-nano on the public emoji corpus, to the folder that ships.

    python tools/assets/build_emoji.py          # the corpus, once
    python tools/assets/pretrain_nano.py        # vision, text, folder; killed and started again, it resumes
    python tools/assets/pretrain_nano.py --model smolvlm-nano
    python tools/assets/pretrain_nano.py --model clip-nano      # behind SmolVLM-nano, whose tower it takes
    python tools/assets/nano_report.py          # how good it is, into the model card

Only training concepts in public styles are learned from; validation concepts in public styles choose nothing but are
logged; the clients' pictures are not read here. First the vision tower and the projector learn to tell groups,
subgroups, concepts and English keywords apart, with linear heads that are thrown away. Then the text half learns to
answer questions on the frozen tower's features of several augmented copies of every picture. CLIP-nano takes
SmolVLM-nano's tower, and its text model learns to tell which texts are true of a picture.
"""

from __future__ import annotations

from fedvlm_jax.utils.malloc_settings import restart_with_kept_memory

if __name__ == "__main__":
    restart_with_kept_memory()  # before what takes long to import

import clip_nano
import jax
import nano_tokenizer
import numpy as np
import pyarrow.parquet as pq
import smolvlm_nano
import tyro
from emoji_texts import CLIENT_QUESTIONS, NEUTRAL_QUESTIONS
from nano_contrast import begin, train_contrast
from nano_corpus import load_corpus
from nano_text import train_text
from nano_training import Pretrain, log
from nano_vision import centre_tokens, train_vision

from fedvlm_jax.models import open_model, save_checkpoint

MAKERS = {"florence2-nano": nano_tokenizer, "smolvlm-nano": smolvlm_nano, "clip-nano": clip_nano}
"""Model -> the module that makes its tokenizer and the files of its folder."""


def main(run: Pretrain) -> None:
    run.state.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((run.work / "xla").resolve()))
    classes, corpus, valid = load_corpus(run.corpus)
    if not (run.folder / "tokenizer.json").is_file():
        rows = pq.read_table(run.corpus, columns=["split", "concept", "names"]).to_pylist()
        asked = [*NEUTRAL_QUESTIONS.values(), *(q for asked in CLIENT_QUESTIONS.values() for q in asked)]
        maker, around = MAKERS[run.model], clip_nano.FRAMES if run.model == "clip-nano" else asked
        maker.write_folder(run.folder, maker.train_tokenizer(nano_tokenizer.corpus_texts(rows, around)))
    vlm, processor = open_model(run.folder)
    params = jax.jit(vlm.init)(jax.random.key(run.seed))
    log(run, phase="start", train=len(corpus.names), valid=len(valid.names), **classes.sizes)
    if run.model == "clip-nano":
        params = begin(vlm.config, params, processor, corpus)
        params = train_contrast(run, vlm, params, processor, classes, corpus, valid)
    else:
        params = train_vision(run, vlm, params, classes, corpus, valid)
        params = centre_tokens(vlm, params, corpus)
        params = train_text(run, vlm, params, processor, corpus, valid)
    save_checkpoint(vlm, params, run.folder, np.float16)
    log(run, phase="saved")


if __name__ == "__main__":
    main(tyro.cli(Pretrain))
