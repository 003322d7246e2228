"""A model on the devices with all that depends on it alone, which the runs of a comparison share.

What is computed with the frozen base (image features, reference log-probabilities) may be kept on disk, in a folder
that is named by all that decides its bits. With several processes each computes what it needs on its own devices, and
keeps it in a folder of its own.
"""

import gc
import hashlib
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import PIL
from jax.sharding import Mesh

import fedvlm_jax
from fedvlm_jax.config.method_checks import check_rule
from fedvlm_jax.config.method_setup import count_vectors, make_spec
from fedvlm_jax.config.run_options import Run, SystemOptions
from fedvlm_jax.data.classes import list_classes
from fedvlm_jax.data.config import DataOptions
from fedvlm_jax.data.federated_dataset import Federation, federate
from fedvlm_jax.data.image_decoding import DECODING
from fedvlm_jax.data.sources.registry import read_table
from fedvlm_jax.data.table import Table
from fedvlm_jax.data.tokenization import require_pairs
from fedvlm_jax.distributed import processes, sharding
from fedvlm_jax.distributed.mesh import connect, make_mesh, refuse_split_groups
from fedvlm_jax.distributed.mesh_option import parse_mesh
from fedvlm_jax.errors import format_count
from fedvlm_jax.evaluation.answer_generation import SEARCHES
from fedvlm_jax.evaluation.evaluator import make_answer
from fedvlm_jax.evaluation.knn_per import Neighbours, make_neighbours
from fedvlm_jax.federation.compiled import Programs
from fedvlm_jax.federation.inputs import feature_cache
from fedvlm_jax.federation.inputs.feature_cache import FeatureStore
from fedvlm_jax.federation.inputs.reference_log_probs import ReferenceStore, make_score
from fedvlm_jax.federation.inputs.view_features import WIDTH, Features, open_features
from fedvlm_jax.models import Params, Processor, Vlm, load_weights, open_model, resolve_folder
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.run_dir.absolute_paths import anchor
from fedvlm_jax.run_dir.fingerprints import describe_model
from fedvlm_jax.training.round_setup import build_programs, check_frozen, check_room, choose_arithmetic
from fedvlm_jax.utils.cache_folders import find_cache, read_bound, trim
from fedvlm_jax.utils.compilation_cache import describe_processor
from fedvlm_jax.utils.memoized import forget, memoized

SOURCES = (
    *("models/**/*.py", "objectives/*.py", "utils/products.py", "data/image_decoding.py", "data/unique_images.py"),
    *(f"federation/inputs/{name}.py" for name in ("feature_cache", "view_features", "reference_log_probs")),
)
"""The code between a row's bytes and what is kept of it: where it changes, so may the numbers."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model on the devices.

    Attributes:
        vlm, params, processor: the base; `params` on the mesh, cut over its axis `model`.
        mesh: the devices.
        system: the options that it was loaded with, of which precision, remat and unrolling decide its numbers.
        digests: of its files (`run_dir.fingerprints`).
        tables: the data sources that were read beside it.
        learner: of a model that is bound to classes: the same one, bound to those that it trains among, which come
            first; otherwise None.
        unbound: the model that it was bound from, which keeps what does not depend on classes.
        bindings: of that one: the models that were bound.
    """

    vlm: Vlm
    params: Params
    processor: Processor
    mesh: Mesh
    system: SystemOptions
    digests: Mapping[str, Any]
    tables: dict[tuple[Any, ...], Table] = field(default_factory=dict)
    learner: Vlm | None = None
    unbound: "LoadedModel | None" = None
    bindings: "list[LoadedModel]" = field(default_factory=list)

    def bind(
        self, options: DataOptions, seed: int, *, pairs: bool, vectors: int = 0, patches: bool = False
    ) -> "LoadedModel":
        """Return the model of these data: itself, unless it chooses among their answers.

        Args:
            options, seed: of the federation.
            pairs: whether rejected answers are learnt from.
            vectors: of a soft prompt that the classes' prompts are to have room for.
            patches: whether image features are to hold those of all patches.

        Raises:
            UserError: there are too many answers to choose among, or none that can be asked about; or one that is none
                of the classes agreed on.
        """
        if self.vlm.bind is None:
            return self
        classes = list_classes(self.table(options), self.federation(options, seed), options, pairs=pairs)
        seen = self._see_patches() if patches else self
        return seen._choose_among(*classes, options.class_prompt, vectors)

    @memoized
    def _see_patches(self, /) -> "LoadedModel":
        assert self.vlm.see_patches is not None
        seen = replace(self, vlm=self.vlm.see_patches(), bindings=[])
        self.bindings.append(seen)
        return seen

    @memoized
    def _choose_among(
        self, trained: tuple[str, ...], others: tuple[str, ...], prompt: str, vectors: int, /
    ) -> "LoadedModel":
        learner, vlm, processor = choose_among(self.vlm, self.processor, trained, others, prompt, vectors)
        bound = replace(self, vlm=vlm, processor=processor, learner=learner, unbound=self, bindings=[])
        self.bindings.append(bound)
        return bound

    def table(self, options: DataOptions) -> Table:
        """Return a data source, which is read once however its rows are cut.

        Raises:
            UserError: as `read_table`.
        """
        if options.place not in self.tables:
            self.tables[options.place] = read_table(options)
        return self.tables[options.place]

    def sources(self, options: DataOptions) -> dict[str, Any]:
        """Return the digests of the files that a run with these data reads."""
        return {"data": self.table(options).digest, **self.digests}

    @memoized
    def federation(self, options: DataOptions, seed: int, /) -> Federation:
        """Cut the data into clients, before anything is tokenised."""
        if self.unbound is not None:
            return self.unbound.federation(options, seed)
        return federate(self.table(options), options, seed)

    @memoized
    def programs(
        self, run: Run, clients: int, cohort: int, places: int, steps: int, trainable: int | None = None, /
    ) -> Programs:
        """Make a method's programs; arguments and errors are those of `build_programs`."""
        return build_programs(self.learner or self.vlm, self.mesh, run, clients, cohort, places, steps, trainable)

    def drop_programs(self) -> None:
        """Free what the programs of all methods take: they fill memory once their methods are done with."""
        self._forget_programs()
        gc.collect()  # traced functions and what they close over refer to each other

    def _forget_programs(self) -> None:
        forget(self, LoadedModel.programs)
        for model in self.bindings:
            model._forget_programs()

    @memoized
    def neighbours(self, count: int, temperature: float, /) -> Neighbours:
        """Make the programs that ask so many neighbours."""
        return make_neighbours(self.vlm, count, temperature)

    @memoized
    def answer_program(self, tokens: int, decoding: str, count: int, temperature: float, /) -> Callable[..., Any]:
        """Make the program that answers in at most so many tokens, and asks `count` neighbours."""
        vlm = self.neighbours(count, temperature).vlm if count else self.vlm
        return make_answer(vlm, tokens, SEARCHES[decoding])

    @cached_property
    def reference_scorer(self) -> Callable[..., dict[str, Any]]:
        """Make the program that scores pairs with the bare base."""
        return make_score(self.vlm)

    @memoized
    def reference_store(self, shapes: tuple[int, ...], on_disk: bool, cache_dir: Path | None, /) -> ReferenceStore:
        """Open the store of log-probabilities that programs of these shapes compute."""
        if not on_disk:
            return ReferenceStore()
        weights = feature_cache.fingerprint_params(sharding.local_base(self.params))
        return ReferenceStore(self.name_folder(cache_dir, "reference", weights, *shapes))

    @cached_property
    def _features(self) -> Features:
        return open_features(self.vlm, sharding.local_base(self.params), self.processor)

    @memoized
    def feature_store(self, limit: int, on_disk: bool, cache_dir: Path | None, /) -> FeatureStore:
        """Open the store of frozen image features, of at most `limit` bytes."""
        if self.unbound is not None:
            return self.unbound.feature_store(limit, on_disk, cache_dir)
        folder = None
        if on_disk:
            weights = feature_cache.fingerprint_vision(self.vlm, sharding.local_base(self.params))
            folder = self.name_folder(cache_dir, "features", weights, WIDTH)
        store = FeatureStore(self._features, limit=limit, folder=folder)
        if on_disk:
            trim(read_bound())  # this one, now in use, stays
        return store

    def name_folder(self, cache_dir: Path | None, kind: str, weights: str, *computing: Hashable) -> Path:
        """Name the folder of what is computed from these weights, by all else that decides the bits of a number.

        A program for other devices, another number of cores or another version may round otherwise, and numbers of two
        kinds in one run would make it another run. The same weights are another model in another configuration, or
        with a processor that makes other pixels. Of several processes each has its own folder.
        """
        device, system = jax.local_devices()[0], self.system
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        hashed = (
            (f"{self.vlm.fingerprint} {self.processor.fingerprint}", *computing),
            (system.compute, system.remat, system.unroll),
            DECODING,
            (jax.__version__, jax.lib.__version__, device.client.platform_version, PIL.__version__, _hash_sources()),
            (os.environ.get("XLA_FLAGS"), jax.config.values["jax_default_matmul_precision"]),
            device.device_kind,
            describe_processor(),
            cores,
        )
        digest = hashlib.blake2b(repr(hashed).encode(), digest_size=12).hexdigest()
        process = f"-{jax.process_index()}of{processes.count()}" if processes.count() > 1 else ""
        return (cache_dir or find_cache()) / f"{kind}-{weights}-{digest}{process}"


def choose_among(
    vlm: Vlm, processor: Processor, trained: Sequence[str], others: Sequence[str], prompt: str, vectors: int = 0
) -> tuple[Vlm, Vlm, Processor]:
    """Bind a model to classes: to those that it trains among, and with its processor to all, those first.

    Each is asked by `prompt`, with room for a soft prompt of so many vectors.

    Raises:
        UserError: there are too many, or none that can be asked about.
    """
    assert vlm.bind is not None
    learner, _ = vlm.bind(processor, trained, prompt, vectors)
    return learner, *vlm.bind(processor, (*learner.classes, *others), prompt, vectors)


@cache
def _hash_sources() -> str:
    root, digest = Path(fedvlm_jax.__file__).parent, hashlib.blake2b(digest_size=16)
    for file in sorted(file for pattern in SOURCES for file in root.glob(pattern)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def load_model(
    run: Run,
    note: Callable[[str], None] = lambda text: None,
    check: Callable[[Mapping[str, Any]], None] = lambda sources: None,
) -> LoadedModel:
    """Load the model of a run and open its data; everything that can be refused is, before weights are read.

    `check` judges the digests of their files.

    Raises:
        UserError: files are missing or do not fit, there are fewer devices than asked for, or no weight can be cut.
    """
    table = read_table(run.data)  # first: it is quick to fail
    pairs = load_objective(run.objective, run.preference).pairs
    if pairs:
        require_pairs(table)
    mesh = make_mesh(*(parse_mesh(run.system.mesh) or ()))
    refuse_split_groups(mesh)
    if processes.count() > 1:
        processes.wait_for_all()
        connect(mesh)
    vlm, processor = open_model(
        run.model, image_size=run.image_size, image_tiles=run.image_tiles, image_pixels=run.image_pixels,
        **choose_arithmetic(run.system),
    )  # fmt: skip
    if vlm.bind is not None:  # for its errors
        classes = list_classes(table, federate(table, run.data, run.seed), run.data, pairs=pairs)
        choose_among(vlm, processor, *classes, run.data.class_prompt, count_vectors(run))
    make_spec(run, vlm)  # for its errors
    check_room(run, vlm)
    if processor.grids is not None:
        check_frozen(run, vlm, "--image-pixels")
    check_rule(run, vlm)
    folder = resolve_folder(run.model)
    digests = describe_model(folder)
    check({"data": table.digest, **digests})
    note(f"loading {run.model}: {_describe_pictures(processor, run.image_tiles)}")
    params = load_weights(vlm, folder, mesh=mesh)
    return LoadedModel(vlm, params, processor, mesh, run.system, digests, {anchor(run).data.place: table})


def _describe_pictures(processor: Processor, tiles: int | None) -> str:
    if (grids := processor.grids) is not None:
        most = format_count(grids.most, "image token")
        return f"pictures of up to {grids.pixels:,} pixels on grids of their own, at most {most} each"
    (height, width), tokens = processor.size, format_count(processor.image_tokens, "image token")
    cut = f", cut into tiles, up to {tiles} along the longer side" if processor.cut else ""
    return f"pictures of {width}x{height} pixels{cut}, {tokens} each"
