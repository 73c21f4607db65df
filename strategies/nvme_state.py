"""The exact state of ZeRO-3 with its optimizer on NVMe, out of a live engine and into a fresh one, as safetensors.

DeepSpeed 0.19 copies the swap files and forgets Adam's step counter, so that a resumed run corrects its moments' bias
anew: the losses drift without a word (engine.load_checkpoint skips _load_zero_checkpoint with an NVMe optimizer). Here
each sub-group is brought in as an update does it, and all of it is written: fp32 weights, both moments, the counter.
One sub-group is in memory at a time; the 16-bit weights follow from the fp32 ones, as after every update.
"""

import json


def _sub_groups(optimizer):
    """(index, flat fp32 weights) of each sub-group of this rank, swapped in while the caller has it."""
    for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        swapped = optimizer._swappable_optimizer_subgroup(i)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(i)
        yield i, flat, swapped


def save(engine, folder, rank):
    """Write this rank's share to folder/rankNNNNN/, a file per sub-group; between steps. Collective at its end."""
    from safetensors.torch import save_file
    own = folder / f"rank{rank:05d}"
    own.mkdir(parents=True)
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    for i, flat, swapped in _sub_groups(optimizer):
        state = optimizer.optimizer.state.get(flat, {})
        tensors = {"weights": flat.data}
        plain = {key: value for key, value in state.items() if not hasattr(value, "numel")}
        tensors.update({key: value for key, value in state.items() if hasattr(value, "numel")})
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()},
                  own / f"group{i:05d}.safetensors", metadata={"plain": json.dumps(plain)})
        if swapped:
            optimizer._release_swap_buffers(i)
    scheduler = {key: value for key, value in engine.lr_scheduler.state_dict().items() if key != "lr_lambdas"}
    (own / "engine.json").write_text(json.dumps({
        "global_steps": engine.global_steps, "global_samples": engine.global_samples, "skipped_steps": engine.skipped_steps,
        "lr_scheduler": scheduler, "rates": [group["lr"] for group in optimizer.optimizer.param_groups]}))
    buffers = {name: value.detach().cpu().contiguous() for name, value in engine.module.named_buffers()
               if name in engine.module.state_dict()}
    if buffers:
        save_file(buffers, own / "buffers.safetensors")
    optimizer.checkpoint_event_epilogue()


def load(engine, folder, rank):
    """Put what `save` wrote into a fresh engine of the same model, config and ranks. Collective at its end."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file
    own = folder / f"rank{rank:05d}"
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    with torch.no_grad():
        for i, flat, swapped in _sub_groups(optimizer):
            with safe_open(own / f"group{i:05d}.safetensors", "pt") as file:
                flat.data.copy_(file.get_tensor("weights"))
                state = {key: file.get_tensor(key) for key in file.keys() if key != "weights"}
                state.update(json.loads(file.metadata()["plain"]))
            # moments are registered with the swapper, and written, as after a first update
            optimizer.optimizer.state[flat] = {key: value.to(flat.device) if hasattr(value, "numel") and value.dim() else value
                                               for key, value in state.items()}
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
            if swapped:
                optimizer._optimizer_states_and_gradient_swap_out(i)
    if (own / "buffers.safetensors").exists():
        engine.module.load_state_dict(load_file(own / "buffers.safetensors"), strict=False)
    kept = json.loads((own / "engine.json").read_text())
    engine.global_steps, engine.global_samples = kept["global_steps"], kept["global_samples"]
    engine.skipped_steps = kept["skipped_steps"]
    engine.lr_scheduler.load_state_dict({**kept["lr_scheduler"], "lr_lambdas": [None] * len(kept["rates"])})
    for group, rate in zip(optimizer.optimizer.param_groups, kept["rates"]):
        group["lr"] = rate
    optimizer.checkpoint_event_epilogue()
