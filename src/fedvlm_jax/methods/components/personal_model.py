"""A second model for each client beside the federated one: it is what the client uses."""

from collections.abc import Callable
from dataclasses import replace

from jaxtyping import PyTree

from fedvlm_jax import lora
from fedvlm_jax.methods.base import Client, ClientUpdate, Context, Key, Method, Number, Setup, Updated, is_factor


def with_personal_model(
    federated: Method,
    setup: Setup,
    update: ClientUpdate,
    *,
    start: Callable[[lora.Adapter], PyTree] = lambda adapter: adapter,
    trained: Callable[[str], bool] = is_factor,
    use: Callable[[PyTree, lora.Adapter], lora.Adapter] = lambda own, adapter: own,
) -> Method:
    """Put a model per client beside a method's.

    State: a client holds the method's personal state as `federated`, its model as `own`, and the latter's `optimizer`.

    Args:
        federated, setup: the method, and what it is made for.
        update: `client_update` of that state, whose optimiser is a fresh one where the client keeps none.
        start: (the client's adapter in the method) -> own.
        trained: (path) -> whether the leaf of `own` is trained.
        use: (own, the client's adapter in the method) -> the adapter that the client uses.
    """

    def init_client(key: Key, server: PyTree, number: Number) -> PyTree:
        state = federated.init_client(key=key, server=server, number=number)
        own = start(federated.personalise(server=server, personal=state))
        return {"federated": state, "own": own, **setup.kept(setup.start_optimizer(own, trained))}

    def client_update(ctx: Context, server: PyTree, personal: PyTree, client: Client, key: Key) -> Updated:
        if not setup.keep_optimizer:
            personal = {**personal, "optimizer": setup.start_optimizer(personal["own"], trained)}
        state, message, metrics = update(ctx, server=server, personal=personal, client=client, key=key)
        return {name: state[name] for name in ("federated", "own")} | setup.kept(state["optimizer"]), message, metrics

    def personalise(server: PyTree, personal: PyTree) -> lora.Adapter:
        return use(personal["own"], federated.personalise(server=server, personal=personal["federated"]))

    def trained_adapter(server: PyTree, personal: PyTree, message: PyTree) -> lora.Adapter:
        adapter = federated.trained(server=server, personal=personal["federated"], message=message)
        return use(personal["own"], adapter)

    return replace(
        federated, init_client=init_client, client_update=client_update, personalise=personalise,
        trained=trained_adapter,
    )  # fmt: skip
