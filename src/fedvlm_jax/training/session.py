"""What a run computes once of the frozen base and then keeps: image features, and the reference's log-probabilities.

A `Session` holds them, with the base itself, for all runs that share model and data. With several processes each
computes what it needs on its own devices, and keeps it in a folder of its own.
"""

import gc
import hashlib
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import PIL
from jax.sharding import Mesh

import fedvlm_jax
from fedvlm_jax.config.run_options import Run, SystemOptions
from fedvlm_jax.data.image_decoding import DECODING
from fedvlm_jax.data.table import Table
from fedvlm_jax.data.tokenization import Examples
from fedvlm_jax.data.unique_images import Images
from fedvlm_jax.distributed import processes
from fedvlm_jax.distributed.sharding import own_base, own_mesh
from fedvlm_jax.federation.inputs.batch_reader import Inputs
from fedvlm_jax.federation.inputs.feature_cache import GIB, WIDTH, FeatureStore, fingerprint_params, fingerprint_vision
from fedvlm_jax.federation.inputs.reference_log_probs import ReferenceStore, compute_reference, make_score
from fedvlm_jax.models import Params, Processor, Vlm
from fedvlm_jax.utils.cache_folders import find_cache, read_bound, trim
from fedvlm_jax.utils.compilation_cache import describe_processor

Note = Callable[[str], None]

SOURCES = (
    *("models/**/*.py", "objectives/*.py", "data/images.py", "data/image_decoding.py"),
    *("federation/inputs/feature_cache.py", "federation/inputs/reference_log_probs.py"),
)

IN_MEMORY = 2 * GIB
"""More image features than this go to disk, unless the user says otherwise."""


@dataclass
class Session:
    """What runs on the same model, mesh and data source share.

    Attributes:
        vlm, params, processor: the base; `params` on the mesh, cut over its axis `model`.
        mesh: the devices.
        table: the data source.
        sources: digests of the files of both (`runs.fingerprints`).
        memo: compiled programs and results that do not depend on the method, by what they do depend on.
    """

    vlm: Vlm
    params: Params
    processor: Processor
    mesh: Mesh
    table: Table
    sources: Mapping[str, Any]
    memo: dict[Hashable, Any] = field(default_factory=dict)

    def remember(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value made for `key` earlier, or a new one."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def forget(self, kind: str) -> None:
        """Drop what has a key that begins with `kind`: `programs` of a method fill memory once it is done with."""
        for key in [key for key in self.memo if isinstance(key, tuple) and key[0] == kind]:
            del self.memo[key]
        gc.collect()


def reference_of(run: Run, session: Session, examples: Examples, inputs: Inputs, on_disk: bool, note: Note) -> Any:
    """The base's log-probabilities of all answers; clients, seeds and runs that share rows share them."""
    params, mesh = own_base(session.params), own_mesh(session.mesh)
    arrays = (examples.input_ids, examples.labels, examples.rejected)
    # Programs of other shapes round otherwise: what they compute is kept apart, in memory as on disk.
    shapes = (*(array.shape[1] for array in arrays if array is not None), run.evaluation.batch_size, mesh.size)

    def open_store() -> ReferenceStore:
        if not on_disk:
            return ReferenceStore()
        about = (_describe_model(session), *shapes)
        return ReferenceStore(_name_folder(run, "reference", fingerprint_params(params), *about))

    return compute_reference(
        session.remember("score", lambda: make_score(session.vlm)),
        params,
        examples,
        inputs,
        session.remember(("reference store", on_disk, *shapes), open_store),
        batch=run.evaluation.batch_size,
        mesh=mesh,
        note=note,
    )


def choose_store(run: Run, session: Session, images: Images, note: Note) -> FeatureStore | None:
    """Where these images' frozen features are kept; the same store for all runs of a session that choose alike."""
    system = run.system
    if system.cache == "off":
        return None
    limit = int(system.cache_gib * GIB)
    params = own_base(session.params)

    def open_store(kind: str) -> FeatureStore:
        folder, vlm, processor = None, session.vlm, session.processor
        if kind == "disk":
            folder = _name_folder(run, "features", fingerprint_vision(vlm, params), _describe_model(session), WIDTH)
        row = jax.ShapeDtypeStruct((vlm.image_tokens(*processor.size), vlm.image_width), vlm.dtype)
        store = FeatureStore(_make_compute(session, params), processor, limit=limit, row=row, folder=folder)
        if kind == "disk":
            trim(read_bound())  # this one, now in use, stays
        return store

    def open_once(kind: str) -> FeatureStore:
        return session.remember(("features", kind, limit, system.cache_dir), lambda: open_store(kind))

    store = open_once("disk" if system.cache == "disk" else "memory")
    if system.cache == "auto" and len(images) * store.row_bytes > IN_MEMORY:
        store = open_once("disk")
    session.remember(("announced", *images.keys), lambda: note(store.announce(images)))
    store.reserve(images)
    return store


def _make_compute(session: Session, params: Params) -> Callable[[Any], Any]:
    """Pixels [B, H, W, 3] -> features [B, P, D], compiled once for every B."""
    features = jax.jit(lambda params, pixels: session.vlm.image_features(params, None, pixels))
    return partial(features, params)


def _describe_model(session: Session) -> str:
    """What makes the same weights another model: its configuration, and how its processor makes pixels."""
    return f"{session.vlm.fingerprint} {session.processor.fingerprint}"


def _name_folder(run: Run, kind: str, weights: str, *computing: Hashable) -> Path:
    """The folder of what is computed from these weights in this way."""
    return (run.system.cache_dir or find_cache()) / f"{kind}-{weights}-{_describe_computing(run.system, *computing)}"


def _describe_computing(system: SystemOptions, *about: Hashable) -> str:
    """A hash of what decides the bits of a number beside weights and data; and, of several processes, whose it is.

    A program for other devices, another number of cores or another version may round otherwise, and numbers of two
    kinds in one run would make it another run.
    """
    device = jax.local_devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = (jax.__version__, jax.lib.__version__, device.client.platform_version, PIL.__version__, _hash_sources())
    settings = (os.environ.get("XLA_FLAGS"), jax.config.values["jax_default_matmul_precision"])
    options = (system.compute, system.remat, system.unroll)
    told = (about, options, DECODING, versions, settings, device.device_kind, describe_processor(), cores)
    own = f"-{jax.process_index()}of{processes.count()}" if processes.count() > 1 else ""
    return hashlib.blake2b(repr(told).encode(), digest_size=12).hexdigest() + own


@cache
def _hash_sources() -> str:
    """A hash of the code between a row's bytes and what is kept of it: where it changes, so may the numbers."""
    root, digest = Path(fedvlm_jax.__file__).parent, hashlib.blake2b(digest_size=16)
    for file in sorted(file for pattern in SOURCES for file in root.glob(pattern)):
        digest.update(file.read_bytes())
    return digest.hexdigest()
