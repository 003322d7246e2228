"""Options of a run: one frozen dataclass per choice, nested into `Run`. The command line is read off them.

The FedVLM paper (arXiv 2507.17088) does not give its rank, rounds, rates and the like. Fields of that kind say so in
their help; their defaults are this project's. No heavy package is imported here, so that `--help` answers at once.
"""

import ast
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Ge, Gt, Le

from fedvlm_jax.config.audit_options import AuditOptions
from fedvlm_jax.data.config import KINDS, DataOptions, Partition, Split
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.data.sources.registry import find_options, find_partition
from fedvlm_jax.errors import UserError
from fedvlm_jax.federation.config import ParticipationOptions
from fedvlm_jax.messages.config import MessageOptions
from fedvlm_jax.methods.config import (
    SHARE,
    LocalOptions,
    MethodOptions,
    ServerOptions,
    find_method_options,
    name_module,
)
from fedvlm_jax.objectives.config import PreferenceOptions
from fedvlm_jax.privacy.config import PrivacyOptions
from fedvlm_jax.utils.option_ranges import Amount, Chance, Count, NonNegative, Positive, Seed, Share
from fedvlm_jax.utils.serialization import decode, encode

PACKAGE = Path(__file__).parent.parent
METHOD = "plora"
"""The method where none is named."""


def optional(metavar: str, otherwise: str, *aliases: str) -> Any:
    """Describe an option that may stay unset: the help then says what happens instead of "None"."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {otherwise})", aliases=aliases or None)


def methods_available() -> tuple[str, ...]:
    """Name the federated methods: one per public file in `methods/zoo/`, found without importing jax."""
    return tuple(stem.replace("_", "-") for stem in _list_files("methods/zoo"))


def describe_method(name: str) -> str:
    """Return the first sentence of a method's file, read without importing it; empty for a name without a file.

    >>> describe_method("local")
    'Local training: ...'
    """
    if name not in (*methods_available(), SHARE):
        return ""
    file = PACKAGE.joinpath(*name_module(name).split(".")[1:]).with_suffix(".py")
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def objectives_available() -> tuple[str, ...]:
    """Name the training objectives: one per public file in `objectives/`; `sft_dpo` is both of them.

    >>> objectives_available()
    ('classify', 'dpo', 'reward', 'sft', 'sft+dpo')
    """
    parts = ("answer_rewards", "base", "config", "log_probs", "reward_tables")
    stems = [stem for stem in _list_files("objectives") if stem not in parts]
    return tuple(stem.replace("_", "+") for stem in stems)


def _list_files(folder: str) -> list[str]:
    # By name: to import the files would import jax, which `--help` must not wait for.
    return sorted(path.stem for path in (PACKAGE / folder).glob("*.py") if not path.stem.startswith("_"))


@dataclass(frozen=True)
class LoraOptions:
    """The low-rank adapter that each client trains"""

    rank: Annotated[Count, tyro.conf.arg(aliases=("--rank",))] = 8
    """Rank of the adapter (not given by the paper)."""
    alpha: Positive = 16.0
    """The adapter's output is scaled by alpha / rank (not given by the paper)."""
    targets: Annotated[str, optional("REGEX", "the model's text layers")] = ""
    """Regular expression over parameter paths: which weights get an adapter (not given by the paper)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """How A is drawn; B starts at zero (not given by the paper)."""
    ranks: tuple[int, ...] = ()
    """Ranks that are dealt to the clients in turn, client k getting the k-th of them, over and over; the largest must
    be --lora.rank, whose scale holds for all. All clients have that rank by default."""
    dropout: Chance = 0.0
    """During local training leave out this share of what enters A, drawn anew in every step (LoRA dropout; not given
    by the paper)."""
    private_a: Literal["common", "per-client"] = "common"
    """Do clients start from one common A, or does each draw its own (not given by the paper)?"""


@dataclass(frozen=True)
class PromptOptions:
    """The soft prompt of a model that chooses among classes (CLIP), of methods that train one"""

    vectors: Annotated[Count | None, optional("INT", "4 where the method trains a soft prompt, else none")] = None
    """Vectors of the soft prompt, which stand before a class's name: they are added to the words of
    --data.class-prompt, of which CLIP's has 4, and to an X for each word that is lacking (papers take 16). Low-rank
    factors are trained beside it where --lora.targets names weights."""


@dataclass(frozen=True)
class TrainOptions:
    """Rounds and local training"""

    rounds: Annotated[Count, tyro.conf.arg(aliases=("--rounds",))] = 10
    """Federated rounds (not given by the paper)."""
    local_steps: Count = 4
    """Optimiser steps of a client in a round (not given by the paper)."""
    local_epochs: Annotated[Positive | None, optional("E", "all clients take --train.local-steps")] = None
    """In place of --train.local-steps: every client takes ceil(E * its examples / batch) steps, or ceil(E) where it
    has less than a batch. All wait for the largest (not given by the paper)."""
    batch_size: Annotated[Count, tyro.conf.arg(aliases=("--batch-size",))] = 16
    """Examples per local step (not given by the paper)."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The clients' optimiser (not given by the paper)."""
    learning_rate_a: NonNegative = 5e-3
    """Learning rate of the factors A; --lr X sets those of A and B (not given by the paper)."""
    learning_rate_b: NonNegative = 2e-3
    """Learning rate of the factors B (not given by the paper)."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of AdamW (not given by the paper)."""
    clip_norm: Positive = 1.0
    """Clip a client's gradient to this global norm (not given by the paper)."""
    optimizer_state: Literal["kept", "fresh"] = "kept"
    """Does a client keep its optimiser state from round to round (not given by the paper)? On validation, with five
    seeds, the two are not told apart; with fresh a client's state of plora is a fifth as large."""
    decay: Annotated[float, Gt(0), Le(1)] = 0.3
    """Learning rates are multiplied by this once, late in training (not given by the paper)."""
    decay_at: Share = 0.6
    """The fraction of the rounds after which they are (not given by the paper)."""
    warmup_rounds: Amount = 0
    """In the first so many rounds N learning rates rise: in round r they are r / (N + 1) of what they would be (not
    given by the paper)."""
    weighting: Literal["examples", "uniform"] = "examples"
    """How clients count in the average: by their number of examples, or all alike (not given by the paper)."""
    finetune_steps: Amount = 0
    """Local steps of every client on its own after the last round; so many for all, with --train.local-epochs too."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluation of every client's own model, when and how"""

    every: Count = 4
    """Evaluate on validation every so many rounds, and after the last."""
    decoding: Literal["greedy", "folder"] = "greedy"
    """How answers are generated: greedily and with no token banned, or as the model folder's generation_config.json
    says, with its beams and its ban on repeated n-grams."""
    max_answer_tokens: Annotated[
        Count | None, optional("INT", "what the gold answers take, at most --data.max-answer-tokens")
    ] = None
    """Longest answer that is generated, in tokens; never more than the gold answers take, rounded up to 16."""
    clients: Annotated[Count | None, optional("INT", "all, but 64 of more than 128")] = None
    """Evaluate the models of so many clients, in the rounds and at the end, drawn by the seed; and of so many of those
    that are held out."""
    batch_size: Annotated[int, Ge(1), Le(2**16)] = 32  # all batches are filled up to it, so it is memory, too
    """Examples of one client that are answered at a time."""
    metrics: tuple[str, ...] = ("exact_match", "token_f1", "rouge_l", "cider", "vqa_accuracy")
    """Metrics of generated answers."""
    select_by: Annotated[str, optional("METRIC", "exact_match; preference_accuracy for dpo, reward for reward")] = ""
    """Keep the models of the round that is best on validation by this metric, ties broken by the loss."""
    global_model: bool = True
    """At the end, evaluate also the shared part with the initial private one, as a newcomer would have it."""
    cross_clients: bool = False
    """At the end, try every client's model on every client's test data."""
    cold_start: Literal["initial", "mean", "nearest"] = "initial"
    """Private part of clients that never trained, held out or not drawn yet: the initial one, the mean of all that
    did, or that of the client with the most similar images (not given by the paper)."""
    before_redistribution: bool = True
    """Validate also what clients had before the server's average replaced their shared part."""
    neighbours: Amount = 0
    """At the end, mix every client's model with so many nearest neighbours of its own training answers, with a share
    that is chosen on its validation answers: kNN-Per (arXiv 2111.09360), which takes 10."""
    neighbour_temperature: Positive = 1.0
    """Distance at which a neighbour counts 1/e as much as one at no distance; 1 in kNN-Per."""
    neighbour_kernel: Literal["validation", "distance", "squared"] = "validation"
    """How a neighbour counts by its distance d: exp(-d), as the paper of kNN-Per has it, or exp(-d^2 / width of the
    states), as its authors' code has it; by default what makes the validation answers likelier, and the results say
    which."""
    neighbour_capacity: Count = 4096
    """Most training tokens that a client remembers."""
    examples: Annotated[int, Ge(0), Le(48)] = 12  # 48 pictures of at most 25 KiB keep the page below 2 MB
    """At the end, store so many test examples with picture and answers for the report; 0 for none."""
    test: Annotated[bool, tyro.conf.Fixed, tyro.conf.Suppress] = True
    """From Python only: False leaves the test split alone, for runs that serve to choose options."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that are scored at the end of a run."""
        return ("validation", "test") if self.test else ("validation",)


@dataclass(frozen=True)
class SystemOptions:
    """Devices, memory and speed; none of it changes what is learned beyond floating-point tolerance"""

    mesh: Annotated[str, optional("clients=N[,model=M]", "clients=all there are", "--mesh")] = ""
    """Clients are spread over N groups of M devices; the M devices of a group share one copy of the frozen model."""
    wave: Annotated[Count | None, optional("INT", "as many as fit, at most 16 a device", "--wave")] = None
    """Clients trained at the same time; what is chosen is stored with the run."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen model's arithmetic. Norms, softmax and adapters stay float32."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    unroll: Amount = 3
    """Write out stacks of up to so many layers one after another; longer ones are a scan. 6, Florence-2-base's: a
    twentieth less time on a CPU, half as long again to compile."""
    cache: Literal["auto", "memory", "disk", "off"] = "auto"
    """Where the frozen image features are kept, which are computed once per image; auto: on disk above 2 GiB."""
    cache_gib: Annotated[float, Gt(0), Le(1e18)] = 20.0
    """Keep at most so many GiB of them; what does not fit is computed each time."""
    cache_dir: Annotated[Path | None, optional("DIR", "fedvlm-jax in your cache folder")] = None
    """Folder of the disk cache."""


@dataclass(frozen=True)
class Run:
    """Everything that decides what a run does."""

    method: Annotated[
        str, optional(f"{{{','.join(methods_available())}}}", f"{METHOD}, or what --share REGEX makes of a rule")
    ] = METHOD
    """`train` only: the federated method, that is, what clients share and what stays theirs; `fedvlm explain` tells
    what each does."""
    model: Annotated[str, tyro.conf.arg(metavar="NAME|DIR|HUB_ID")] = "florence2-nano"
    """The frozen base: a shipped model's name, a Hugging Face folder, or a hub id."""
    image_size: Annotated[Count | None, optional("PIXELS", "as the model's processor has it")] = None
    """Side of the square that pictures are brought to, whole, where the model leaves the choice (Qwen-VL, by default
    448): more pixels are more image tokens in every prompt."""
    image_tiles: Annotated[Count | None, optional("INT", "none")] = None
    """Tiles along a picture's longer side that it is cut into beside the whole of it, where the model cuts pictures
    (SmolVLM, whose own processor makes 4: up to 17 times the image tokens)."""
    image_pixels: Annotated[Count | None, optional("PIXELS", "all have one size")] = None
    """Pixels that a picture has at most, each on a grid of its own as its processor makes it, where the model has such
    grids (Qwen-VL) and its tower is frozen: pictures keep their proportions and differ in image tokens."""
    out: Annotated[Path | None, optional("DIR", "runs/<time>-<name>")] = None
    """Folder to write to."""
    resume: Annotated[Path | None, optional("RUN", "start anew")] = None
    """`train` only: go on with the run in this folder, with the options stored there; a finished one trains longer if
    --train.rounds says how many rounds there shall be in all."""
    start: Annotated[Path | None, optional("PEFT_DIR", "a fresh adapter")] = None
    """Begin with the adapter in this folder of PEFT's; rank, alpha and targets are then its own."""
    seed: Seed = 0
    """Decides every random choice: partition, adapters, cohorts, batches."""
    cohort: Annotated[Count | None, optional("INT", "all of them")] = None
    """Clients drawn each round (not given by the paper)."""
    objective: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(objectives_available())}}}")] = "sft"
    """What local training minimises: cross-entropy of the chosen answers, or a preference loss, or both; or reward, a
    mix of two rewards of answers that the model draws. Of a model that chooses among classes sft is classify, which
    refuses other models."""
    checkpoint_every: Count = 1
    """Rounds between checkpoints."""
    method_options: Annotated[MethodOptions, tyro.conf.arg(name="method")] = field(default_factory=MethodOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    data: DataOptions = field(default_factory=emoji.Options)
    lora: LoraOptions = field(default_factory=LoraOptions)
    soft_prompt: Annotated[PromptOptions, tyro.conf.arg(name="prompt")] = field(default_factory=PromptOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    participation: ParticipationOptions = field(default_factory=ParticipationOptions)
    local: LocalOptions = field(default_factory=LocalOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    preference: PreferenceOptions = field(default_factory=PreferenceOptions)
    messages: MessageOptions = field(default_factory=MessageOptions)
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)
    audit: AuditOptions = field(default_factory=AuditOptions)
    system: SystemOptions = field(default_factory=SystemOptions)

    def __post_init__(self) -> None:
        """Give the method its default numbers where none are given."""
        if type(self.method_options) is MethodOptions:  # the default: which class it has depends on the method
            object.__setattr__(self, "method_options", find_method_options(self.method)())


def without_extras(run: Run) -> Run:
    """Return the federation alone, without the local fine-tuning and the neighbours that may come after it."""
    return dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, finetune_steps=0),
        evaluation=dataclasses.replace(run.evaluation, neighbours=0),
    )


def to_json(run: Run) -> dict[str, Any]:
    """Turn a run into what `json.dumps` takes.

    >>> from_json(to_json(Run(cohort=4))).cohort
    4
    """
    return encode(run)


def from_json(stored: Any) -> Run:
    """Rebuild the run that `to_json` turned into JSON.

    Raises:
        UserError: an option is unknown, missing, or of the wrong type.
    """
    if not isinstance(stored, Mapping):
        return decode(Run, stored)
    if "hyper" in stored:  # `decode` would call it unknown, which says less
        raise UserError(
            "the stored configuration is of a development state of fedvlm-jax 0.1, whose methods shared one record of "
            "numbers: the commit that its config.json names reads it"
        )
    # The file may be a stranger's: any of these may be missing, or of another type, which `decode` then reports.
    data = stored["data"] if isinstance(stored.get("data"), Mapping) else {}
    cut = data["partition"] if isinstance(data.get("partition"), Mapping) else {}
    source, method = data.get("source"), stored.get("method")
    form = data.get("form") if isinstance(data.get("form"), str) else None
    kind = find_options(source, form) if isinstance(source, str) else DataOptions
    if "method" in stored:  # of folders from before there were these options
        stored = {"start": None, "image_pixels": None, "messages": encode(MessageOptions()), "privacy": {}, **stored}
        stored = {"audit": encode(AuditOptions()), "soft_prompt": encode(PromptOptions()), **stored}
        stored |= {"data": {"novel_classes": 0.0, "agreed_classes": [], "agreed_novel": [], **data}} if data else {}
        groups = {
            "privacy": PrivacyOptions(), "participation": ParticipationOptions(), "preference": PreferenceOptions(),
        }  # fmt: skip
        for group, default in groups.items():
            if isinstance(given := stored.get(group), Mapping):
                stored[group] = {**encode(default), **given}
    chosen = {
        "method_options": find_method_options(method) if isinstance(method, str) else MethodOptions,
        "data": kind,
        "data.partition": find_partition(kind, cut["kind"]) if cut.get("kind") in KINDS else Partition,
    }
    return decode(Run, stored, chosen=chosen)
