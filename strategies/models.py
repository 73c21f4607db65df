"""The model of a run: its configuration, the sizes of its tensors, and, on a rank, the model itself and its use."""

from yardstick import deepspeed_memory
from yardstick.settings import SettingsError, nearest
from yardstick.shapes import MODELS


def configuration(settings, gpu):
    """(transformers config, ModelShape or None) of settings["model"]; "auto" is put into words there."""
    from transformers import AutoConfig, GPT2Config
    if settings["model"] == "auto":
        settings["model"] = "gpt2" if gpu else "tiny"
    name = settings["model"]
    if name in MODELS and not (settings["pretrained"] and name != "tiny"):
        if settings["pretrained"]:
            raise SettingsError("pretrained=True: tiny has no published weights. Use model=gpt2, or pretrained=False.")
        shape = MODELS[name]
        # no dropout, so that every strategy computes the same; token 0 ends a document of the embedded text
        return GPT2Config(n_layer=shape.layers, n_embd=shape.hidden, n_head=shape.heads, vocab_size=shape.vocab,
                          n_positions=shape.seq, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0,
                          attn_pdrop=0.0, use_cache=False), shape
    near = nearest(name, MODELS)
    if near and near != name and "/" not in name and abs(len(near) - len(name)) < 2:
        raise SettingsError(f"there is no model={name} here. Did you mean model={near}? Others: {', '.join(MODELS)}, a folder, or "
                            "a hub name with its owner.")
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:
        raise SettingsError(f"model={name} is none of {', '.join(MODELS)}, and no folder or hub model that can be read "
                            f"here ({type(error).__name__}: {str(error).splitlines()[0][:160]}). "
                            "Give the path of a folder with config.json, or a name of that list.") from None
    config.use_cache = False
    return config, None


def tensors_of(model_config):
    """The model's Tensors, without allocating them: sizes in order, and what a second module uses again."""
    import torch
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    model.tie_weights()
    uses = [parameter for module in model.modules() for parameter in module._parameters.values() if parameter is not None]
    once, reused = set(), []
    for parameter in uses:
        if id(parameter) in once:
            reused.append(parameter.numel())
        once.add(id(parameter))
    return deepspeed_memory.Tensors(tuple(p.numel() for p in model.parameters()), tuple(reused))


def build(plan):
    """The model of a plan on this rank's device: random weights from the run's seed, or pretrained ones.

    Built whole on every rank; deepspeed.initialize then shares it out. Under deepspeed.zero.Init the weights would
    not get transformers' initialisation (embeddings of standard deviation 1 in place of 0.02).
    """
    import torch
    from transformers import AutoModelForCausalLM
    if plan.settings["pretrained"]:
        model = AutoModelForCausalLM.from_pretrained(plan.settings["model"], config=plan.model_config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(plan.model_config)
    if plan.settings["activation_checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if plan.settings["compile"]:
        model.compile()
    return model


def evaluate(engine, plan, rank):
    """Mean loss, in nats per token, over eval_batches of the held-out text; None where it is too short or not asked for."""
    import torch

    from yardstick import data
    count = plan.settings["eval_batches"]
    if not count or len(plan.corpus.validation) < plan.seq * rank.world:
        return None
    batches = data.Batches(plan.corpus.validation, plan.seq, rank.world, seed=0)
    engine.eval()
    total = torch.zeros((), device=engine.device)
    with torch.no_grad():
        for step in range(count):
            tokens_BT = torch.from_numpy(batches.step(step, rank.rank, rank.world)[0]).to(engine.device)
            total += engine(input_ids=tokens_BT, labels=tokens_BT).loss.float()
    torch.distributed.all_reduce(total)
    engine.train()
    return total.item() / count / rank.world


def sample(engine, plan, prompt="def ", temperature=0.8):
    """Text that the model continues, drawn with the run's seed; every rank computes it, as stage 3 needs them all."""
    import torch
    if not plan.settings["sample_tokens"]:
        return None
    generator = torch.Generator().manual_seed(plan.settings["seed"])
    ids = list(plan.corpus.encode(prompt))
    engine.eval()
    with torch.no_grad():
        for _ in range(plan.settings["sample_tokens"]):
            window = torch.tensor([ids[-plan.seq:]], device=engine.device)
            logits_V = engine(input_ids=window).logits[0, -1, :plan.corpus.vocab].float().cpu()
            if not torch.isfinite(logits_V).all():           # the run diverged: there is nothing to draw from
                break
            ids.append(torch.multinomial(torch.softmax(logits_V / temperature, -1), 1, generator=generator).item())
    engine.train()
    return plan.corpus.decode(ids)
