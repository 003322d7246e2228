"""Rounds of the prompt methods through the real compiled round, live against their papers in PyTorch (parity).

Three clients of unequal weight train on a tiny CLIP with SGD, the third not in the second of three rounds. What is
compared after every round is what each client's model says to pictures that nobody trained on, and the server's part.
"""

import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import clip_cases
from toy import run_round, start_states

from fedvlm_jax import lora
from fedvlm_jax.distributed.mesh import make_mesh
from fedvlm_jax.federation.client_round import start_personal
from fedvlm_jax.federation.local_training import make_local_trainer
from fedvlm_jax.federation.round import make_round
from fedvlm_jax.methods import Client, Setup, load_method
from fedvlm_jax.methods.config import find_method_options
from fedvlm_jax.models import load_weights, open_model
from fedvlm_jax.objectives import load_objective
from fedvlm_jax.utils import tree

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None, reason="needs the extra `parity`: pip install -e '.[parity]'"
    ),
]
CLIENTS, ROWS, STEPS, BATCH, ROUNDS = 3, 6, 3, 4, 3
WEIGHTS = np.asarray([0.2, 0.3, 0.5], np.float32)
THERE = ((1, 1, 1), (1, 1, 0), (1, 1, 1))
RATES = {"a": 0.05, "b": 0.4}
VECTORS = 3
PROMPT = "text_model/token_embedding/prompt"
KEY = 3


class World:
    """The model, both ways; the data; a method's rounds."""

    def __init__(self, folder, name, **numbers):
        from methods.pytorch_prompts import Clip
        from models.test_clip_parity import make_model

        clip_cases.CASES["clip"](folder)
        make_model(folder, 4)
        patches = name == "fedotp"
        vlm, processor = open_model(folder)
        vlm = vlm.see_patches() if patches else vlm
        self.vlm, processor = vlm.bind(processor, clip_cases.CLASSES, "a photo of a {}.", VECTORS)
        self.params = load_weights(self.vlm, folder)
        self.torch = Clip(folder, processor.prompted_ids)
        self.plain = Clip(folder, processor.prompt_ids)
        self.trainer = make_local_trainer(self.vlm, load_objective("classify"), optimizer="sgd", clip_norm=None)
        parallel = 3 if name == "pfedmma" else 0
        self.spec = lora.LoRA(
            targets=(), prompt=0 if parallel else VECTORS, prompt_at=self.vlm.prompt_at, parallel=parallel,
            parallel_at=self.vlm.layers,
        )  # fmt: skip
        self.options = find_method_options(name)(**numbers)
        setup = Setup(
            sites=self.vlm.sites, spec=self.spec, start_optimizer=self.trainer.start, population=CLIENTS,
            cohort=CLIENTS, places=CLIENTS, rounds=ROUNDS, local_steps=STEPS, options=self.options,
            texts=self.vlm.texts, width=self.vlm.image_width,
        )  # fmt: skip
        self.method = load_method(name, setup)
        self.start = lora.init(jax.random.key(9), self.vlm.sites, self.spec)
        rng = np.random.default_rng(5)
        self.pixels = rng.normal(size=(CLIENTS, ROWS, 32, 32, 3)).astype(np.float32)
        self.labels = rng.integers(0, len(clip_cases.CLASSES), (CLIENTS, ROWS, 1)).astype(np.int32)
        self.indices = rng.integers(0, ROWS, (ROUNDS, CLIENTS, STEPS, BATCH)).astype(np.int32)
        self.probe = rng.normal(size=(4, 32, 32, 3)).astype(np.float32)

    def steps(self, round_, client):
        return [(self.pixels[client][rows], self.labels[client][rows, 0]) for rows in self.indices[round_, client]]

    def shares(self, round_):
        there = WEIGHTS * np.asarray(THERE[round_])
        return there / there.sum()

    def say(self, adapter):
        batch = {"pixel_values": self.probe, "labels": np.zeros((len(self.probe), 1), np.int32)}
        return np.asarray(self.vlm.logits(self.params, adapter, batch)[:, 0])

    def run(self):
        """-> after every round: each client's logits, the server's state."""
        program = make_round(self.method, self.trainer, make_mesh(1))
        server, known = self.method.init(adapter=self.start), np.zeros(CLIENTS, bool)
        states, history = start_states(self.method, server, CLIENTS), []
        rates = {name: jnp.float32(rate) for name, rate in RATES.items()}
        for round_ in range(ROUNDS):
            shares = self.shares(round_).astype(np.float32)
            cohort = Client(
                examples={"pixel_values": self.pixels, "labels": self.labels}, indices=self.indices[round_],
                mask=np.ones((CLIENTS, STEPS, BATCH), bool), weight=shares, number=np.arange(CLIENTS, dtype=np.int32),
                new=~known, share=shares,
            )  # fmt: skip
            out, new = run_round(
                program, self.params, server, cohort, shares, states, round_=round_ + 1, key=KEY, rates=rates
            )
            server, there = out.server, shares > 0
            states = jax.tree.map(
                lambda x, old, there=there: np.where(there.reshape(-1, *[1] * (x.ndim - 1)), x, old), new, states
            )
            known |= there
            each = [jax.tree.map(lambda x, k=k: x[k], states) for k in range(CLIENTS)]
            said = [self.say(self.method.personalise(server=server, personal=state)) for state in each]
            history.append(SimpleNamespace(said=said, server=server, states=each))
        return history

    def begin(self, number):
        """The state that a client begins with."""
        server = self.method.init(adapter=self.start)
        return start_personal(self.method, jax.random.key(KEY), server, jnp.int32(number))


@pytest.fixture
def make_world(tmp_path):
    return lambda name, **numbers: World(tmp_path, name, **numbers)


def tensor(array):
    import torch

    return torch.tensor(np.array(array, np.float32))


def entropy(logits, labels):
    import torch

    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels).long())


def mean(shares, values):
    return sum(float(share) * value for share, value in zip(shares, values, strict=True) if share)


def assert_rounds(history, wanted, shared=None):
    """`wanted` has each client's logits after every round and the server's numbers."""
    for number, (found, (said, server)) in enumerate(zip(history, wanted, strict=True), start=1):
        for client in range(CLIENTS):
            np.testing.assert_allclose(
                found.said[client], said[client].detach().numpy(), atol=5e-4, err_msg=f"round {number}, client {client}"
            )
        if shared:
            got = tree.flatten(found.server["shared"])[shared]
            np.testing.assert_allclose(got, server.detach().numpy(), atol=2e-5, err_msg=f"round {number}")
    moved = max(np.abs(found.said[0] - history[0].said[0]).max() for found in history[1:])
    assert moved > 1e-2, "nothing was learned, so nothing was compared"


def test_promptfl(make_world):
    from methods.pytorch_prompts import descend

    world = make_world("promptfl")
    clip = world.torch
    words, shared, wanted = clip.words(VECTORS).detach(), tensor(np.zeros((VECTORS, 16))), []

    def say(prompt, pixels):
        return clip.scale * clip.images(pixels)[:, 0] @ clip.texts(words + prompt).T

    for round_ in range(ROUNDS):
        sent = []
        for client in range(CLIENTS):
            ended = descend(
                {"p": shared}, lambda name: RATES["b"], world.steps(round_, client),
                lambda values, step: entropy(say(values["p"], step[0]), step[1]),
            )  # fmt: skip
            sent.append(ended["p"])
        shared = mean(world.shares(round_), sent)
        wanted.append(([say(shared, world.probe)] * CLIENTS, shared))
    assert_rounds(world.run(), wanted, PROMPT)


def test_fedpgp(make_world):
    """The contrast is not clipped here, nor is anything else."""
    import torch
    from methods.pytorch_prompts import descend

    world = make_world("fedpgp", rank=2, mu=0.7, temperature=0.5)
    clip, cosine = world.torch, torch.nn.CosineSimilarity(dim=-1)
    words, sigma, wanted = clip.words(VECTORS).detach(), tensor(np.zeros((VECTORS, 16))), []
    begun = tree.flatten(world.begin(0)["own"])
    u, v = (tensor(next(leaf for path, leaf in begun.items() if path.endswith(f"/{name}"))) for name in "uv")
    own, written = [{"u": u, "v": v}] * CLIENTS, world.plain.texts().detach()

    def say(sigma, part, pixels):
        return clip.scale * clip.images(pixels)[:, 0] @ clip.texts(words + sigma + part["u"] @ part["v"]).T

    def loss(values, step):
        general = clip.texts(words + values["s"])
        mine = clip.texts(words + values["s"] + values["u"] @ values["v"])
        likeness = torch.stack([cosine(written, general), cosine(general, mine)], dim=1) / 0.5
        contrast = torch.nn.functional.cross_entropy(likeness, torch.zeros(len(likeness)).long())
        return entropy(clip.scale * clip.images(step[0])[:, 0] @ mine.T, step[1]) + 0.7 * contrast

    for round_ in range(ROUNDS):
        shares, sent = world.shares(round_), []
        for client in range(CLIENTS):
            ended = descend({"s": sigma, **own[client]}, lambda name: RATES["b"], world.steps(round_, client), loss)
            sent.append(ended.pop("s"))
            own[client] = ended if shares[client] else own[client]
            own = list(own)
        sigma = mean(shares, sent)
        wanted.append(([say(sigma, part, world.probe) for part in own], sigma))
    assert_rounds(world.run(), wanted, PROMPT)


@pytest.mark.parametrize(("balanced", "share"), [(False, 1.0), (False, 0.7), (True, 1.0)])
def test_fedotp(make_world, balanced, share):
    import torch
    from methods.pytorch_prompts import descend, transport_logits

    world = make_world("fedotp", balanced=balanced, share=share)
    clip = world.torch
    words, shared, wanted = clip.words(VECTORS).detach(), tensor(np.zeros((VECTORS, 16))), []
    begun = tree.flatten(world.begin(0)["own"])
    own = [tensor(next(leaf for path, leaf in begun.items() if path.endswith("/private")))] * CLIENTS

    def say(shared, private, pixels):
        texts = torch.stack([clip.texts(words + shared), clip.texts(words + private)])
        return transport_logits(clip.images(pixels)[:, 1:], texts, 0.1, share, balanced, clip.scale)

    for round_ in range(ROUNDS):
        shares, sent = world.shares(round_), []
        for client in range(CLIENTS):
            ended = descend(
                {"s": shared, "q": own[client]}, lambda name: RATES["b"], world.steps(round_, client),
                lambda values, step: entropy(say(values["s"], values["q"], step[0]), step[1]),
            )  # fmt: skip
            sent.append(ended["s"])
            if shares[client]:
                own[client] = ended["q"]
        shared = mean(shares, sent)
        wanted.append(([say(shared, private, world.probe) for private in own], shared))
    assert_rounds(world.run(), wanted, PROMPT)


def test_pfedmma(make_world):
    """One matrix in both towers gets the gradients of both."""
    from methods.pytorch_prompts import descend

    world = make_world("pfedmma", scale=0.3, layers=1)
    clip, begun = world.torch, tree.flatten(world.begin(0)["own"])
    shared, wanted = tensor(world.method.init(adapter=world.start)["shared"]["shared"]["middle"]), []
    towers = ("text_model", "vision_tower")
    first = {
        f"{tower}/{name}": tensor(begun[f"{tower}/layers/beside/{name}"])
        for tower in towers
        for name in ("into", "back")
    }
    own = [first] * CLIENTS

    def say(values, middle, pixels):
        pairs = {tower: list(zip(values[f"{tower}/into"], values[f"{tower}/back"], strict=True)) for tower in towers}
        remove = clip.beside(pairs, middle, 0.3)
        said = clip.scale * clip.images(pixels)[:, 0] @ clip.texts().T
        remove()
        return said

    for round_ in range(ROUNDS):
        shares, sent = world.shares(round_), []
        for client in range(CLIENTS):
            ended = descend(
                {"m": shared, **own[client]}, lambda name: RATES["b"], world.steps(round_, client),
                lambda values, step: entropy(say(values, values["m"], step[0]), step[1]),
            )  # fmt: skip
            sent.append(ended.pop("m"))
            if shares[client]:
                own[client] = ended
        shared = mean(shares, sent)
        wanted.append(([say(values, shared, world.probe) for values in own], shared))
    assert_rounds(world.run(), wanted, "shared/middle")


def test_pfedmoap(make_world):
    """Each begins with its own gate (not the one trained before it), and experts are the nearest of the others."""
    from methods.pytorch_prompts import Attention, descend, moap_logits

    world = make_world("pfedmoap", experts=2, gate_heads=3, gate_width=6)
    clip = world.torch
    words, shared, wanted = clip.words(VECTORS).detach(), tensor(np.zeros((VECTORS, 16))), []
    gates = [Attention(6, 3, 10.0).load(world.begin(k)["own"]["head"]["moap"]["gate"]) for k in range(CLIENTS)]
    gates = [{name: value.detach() for name, value in gate.named_parameters()} for gate in gates]
    assert any((one != two).any() for one, two in zip(gates[0].values(), gates[1].values(), strict=True))
    prompts, gated = [None] * CLIENTS, [False] * CLIENTS

    def say(prompt, gate, experts, pixels):
        from torch.func import functional_call

        image = clip.images(pixels)[:, 0]
        texts = [clip.texts(words + prompt), *(clip.texts(words + expert).detach() for expert in experts)]

        def gating(queries, keys):
            return functional_call(module, gate, (queries, keys))

        module = Attention(6, 3, 10.0)
        gating.maps = module.maps
        return moap_logits(image, texts, gating, 0.5, clip.scale)

    def select(client):
        others = [k for k in range(CLIENTS) if k != client and prompts[k] is not None]
        if prompts[client] is None or not others:
            return []
        return [prompts[min(others, key=lambda k: float((prompts[k] - prompts[client]).norm()))]]

    for round_ in range(ROUNDS):
        shares, sent = world.shares(round_), []
        for client in range(CLIENTS):
            experts = select(client)
            ended = descend(
                {"p": shared, **gates[client]}, lambda name: RATES["b" if name == "p" else "a"],
                world.steps(round_, client),
                lambda values, step, experts=experts: entropy(
                    say(values["p"], {k: v for k, v in values.items() if k != "p"}, experts, step[0]), step[1]
                ),
            )  # fmt: skip
            sent.append((ended.pop("p"), ended, bool(experts)))
        for client in range(CLIENTS):
            if shares[client]:
                gates[client] = sent[client][1] if sent[client][2] else gates[client]
                gated[client] = prompts[client] is not None
        for client in range(CLIENTS):
            prompts[client] = sent[client][0] if shares[client] else prompts[client]
        shared = mean(shares, [prompt for prompt, _, _ in sent])
        said = [say(prompts[k], gates[k], select(k) if gated[k] else [], world.probe) for k in range(CLIENTS)]
        wanted.append((said, shared))
    assert_rounds(world.run(), wanted, PROMPT)


def test_pfedmoap_s_forward_is_its_authors_module(make_world):
    """On random weights, with the numbers of parameters that they have: 4 (W² + W) of the gate, n · D of a prompt."""
    from methods.pytorch_prompts import Attention, moap_logits

    world = make_world("pfedmoap", experts=3, gate_heads=3, gate_width=6)
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=(3, VECTORS, 16)).astype(np.float32) / 50
    state = world.begin(0)
    gate = state["own"]["head"]["moap"]["gate"]
    module = Attention(6, 3, 10.0).load(gate)
    assert sum(leaf.size for leaf in gate.values()) == sum(p.numel() for p in module.parameters()) == 4 * (36 + 6)
    leaves = {"gate": gate, "present": np.ones(3), "weight": 0.5, "scaling": 10.0}
    adapter = {**tree.unflatten({PROMPT: prompts}), "head": {"moap": leaves}}
    words = world.torch.words(VECTORS).detach()
    texts = [world.torch.texts(words + tensor(prompt)) for prompt in prompts]
    want = moap_logits(world.torch.images(world.probe)[:, 0], texts, module, 0.5, world.torch.scale).detach().numpy()
    error, largest = np.abs(world.say(adapter) - want).max(), float(np.abs(want).max())
    print(f"largest error {error:.1e}, of logits up to {largest:.1f}")  # noqa: T201
    assert error < 1e-5 * max(1.0, largest)
