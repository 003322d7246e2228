def make_generate(config, module, injected, gc):
    def generate(*a, **k):
        raise NotImplementedError

    return generate


def resolve_config(config, gc):
    from transformers import GenerationConfig

    return gc if gc is not None else GenerationConfig.from_model_config(config)
