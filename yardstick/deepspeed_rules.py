"""What goes wrong between several keys of a DeepSpeed config: the rules that deepspeed_config.lint applies.

A rule is (key, when it holds, message). ERRORS are what DeepSpeedConfig itself refuses, or what has no effect below
the stage it needs; WARNINGS are combinations that DeepSpeed takes and then fails on, or gets wrong, in release 0.19.8.
"""

HALF_SHARE = 2**19                       # elements of 2 bytes in MIN_AIO_BYTES, 1 MiB: the least share that is swapped
SUPPORTED = ("torch.optim.Adam", "torch.optim.AdamW", "FusedAdam", "DeepSpeedCPUAdam", "torch.optim.Adagrad",
             "DeepSpeedCPUAdagrad", "DeepSpeedCPULion", "FusedLion", "MuonWithAuxAdam")   # ZERO_SUPPORTED_OPTIMIZERS
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
Z, ZF = "zero_optimization.", "zero_optimization.zenflow."
OP, OO = "zero_optimization.offload_param.", "zero_optimization.offload_optimizer."


class View:
    """A config seen by the rules: `c("bf16.enabled")` is its value, or DeepSpeed's default."""

    def __init__(self, sound, spelled, spec, optimizer, scheduler, ranks, accelerator):
        self.sound, self.spelled, self.spec = sound, spelled, spec
        self.optimizer, self.scheduler, self.ranks, self.cpu = optimizer, scheduler, ranks, accelerator == "cpu"
        self.stage = sound.get(Z + "stage", int(sound.get("zero_optimization") is True))
        self.optimizer_on, self.param_on = self(OO + "device"), self(OP + "device")
        self.half = self("bf16.enabled") or self("fp16.enabled")
        self.zenflow = sound.get(Z + "zenflow") is not None

    def __call__(self, key):
        return self.sound[key] if key in self.sound else self.spec(key)["default"]

    def has(self, key):
        """Whether the config gives the key, and not as null; what else is wrong with its value does not matter."""
        return key in self.spelled and self.sound.get(key, "refused") is not None

    def parameter(self, name):
        return self.sound.get(f"optimizer.params.{name}")


ERRORS = [
    (OP + "device", lambda c: c.param_on != "none" and c.stage < 3,
     "weights can be offloaded at stage 3 only; here it is without effect. Set \"zero_optimization.stage\": 3, or delete "
     "\"offload_param\"."),
    (OO + "device", lambda c: c.optimizer_on == "nvme" and c.stage < 3,
     "an optimizer on NVMe needs stage 3; at stages 1 and 2 it stays in host memory. Set \"zero_optimization.stage\": 3, "
     "or \"cpu\"."),
    ("bf16.enabled",
     lambda c: c("bf16.enabled") and c("fp16.enabled"), "bf16 and fp16 are both enabled. Enable one of them."),
    ("gradient_allreduce_op", lambda c: c("gradient_allreduce_op").lower() == "sum" and (
        c.stage == 3 or c.zenflow or c("compile.deepcompile")),
     "\"sum\" is refused with stage 3, zenflow and deepcompile. Use \"mean\"."),
    ("fp16.fp16_master_weights_and_grads", lambda c: c("fp16.fp16_master_weights_and_grads") and not c.stage,
     "needs ZeRO stage 1, 2 or 3. Set the stage, or false."),
    ("bf16.bf16_master_weights_and_grads", lambda c: c("bf16.bf16_master_weights_and_grads") and not c.stage,
     "needs ZeRO stage 1, 2 or 3. Set the stage, or false."),
    ("bf16.bf16_optimizer_states", lambda c: c("bf16.bf16_optimizer_states") and not (
        c.stage and c("bf16.bf16_master_weights_and_grads")),
     "needs ZeRO and \"bf16_master_weights_and_grads\": true. Set both, or false."),
    (Z + "compute_grad_norm", lambda c: not c(Z + "compute_grad_norm") and c.stage not in (1, 2),
     "false is allowed at stages 1 and 2 only. Set true."),
    (OO + "ratio",
     lambda c: c(OO + "ratio") < 1 and c.stage != 3, "part of an optimizer can be offloaded at stage 3 only. Set 1.0."),
    (Z + "cpu_offload", lambda c: Z + "cpu_offload" in c.spelled and Z + "offload_optimizer" in c.spelled,
     "DeepSpeed refuses it beside \"offload_optimizer\". Delete it."),
    (Z + "cpu_offload_param", lambda c: Z + "cpu_offload_param" in c.spelled and Z + "offload_param" in c.spelled,
     "DeepSpeed refuses it beside \"offload_param\". Delete it."),
    (Z + "stage3_gather_fp16_weights_on_model_save",
     lambda c: Z + "stage3_gather_fp16_weights_on_model_save" in c.spelled
     and Z + "stage3_gather_16bit_weights_on_model_save" in c.spelled,
     "DeepSpeed refuses it beside \"stage3_gather_16bit_weights_on_model_save\". Delete it."),
    ("aio.use_gds", lambda c: c.cpu and c("aio.use_gds"), "GPUDirect Storage needs a CUDA device. Set false."),
    ("data_efficiency.data_sampling.curriculum_learning.enabled",
     lambda c: c("data_efficiency.data_sampling.curriculum_learning.enabled")
     and not c.has("data_efficiency.data_sampling.curriculum_learning.curriculum_metrics"),
     "needs \"curriculum_metrics\". Describe them."),
    ("data_efficiency.data_sampling.dynamic_batching.enabled",
     lambda c: c("data_efficiency.data_sampling.dynamic_batching.enabled")
     and not c.has("data_efficiency.data_sampling.dynamic_batching.max_tokens"),
     "needs \"max_tokens\". Give the tokens of a batch."),
]

WARNINGS = [
    ("gradient_clipping", lambda c: not c.has("gradient_clipping"),
     "not given: gradients are clipped at a norm of 1.0, which was 0 (off) in releases before June 2026. Write the "
     "value you mean."),
    ("optimizer.type", lambda c: not c.has("optimizer.type"),
     "not given: unless the program hands its own optimizer to deepspeed.initialize, stages 1 and 2 fail and the "
     "others do not train. Name one, or hand one over."),
    # offload
    (OO + "device",
     lambda c: c.optimizer_on == "cpu" and not c.stage, "nothing is offloaded at stage 0. Set stage 1, 2 or 3."),
    (OO + "device", lambda c: c.has(Z + "offload_optimizer") and not c.has(OO + "device"),
     "not given: nothing is offloaded. Set \"cpu\" or \"nvme\"."),
    (OP + "device", lambda c: c.has(Z + "offload_param") and not c.has(OP + "device"),
     "not given: nothing is offloaded. Set \"cpu\" or \"nvme\"."),
    (OO + "nvme_path", lambda c: c.optimizer_on == "nvme" and not c.has(OO + "nvme_path"),
     "not given: initialisation fails. Name a folder on the disk that is to hold the states."),
    (OP + "nvme_path", lambda c: c.param_on == "nvme" and not c.has(OP + "nvme_path"),
     "not given: initialisation fails. Name a folder on the disk that is to hold the weights."),
    (OP + "device", lambda c: c.param_on == "nvme" and not c.half,
     "weights on NVMe are kept in 16 bits even when training is fp32: a crash in forward, or silent rounding. Enable "
     "bf16."),
    (OP + "max_in_cpu",
     lambda c: c.param_on == "nvme" and c(OP + "max_in_cpu") == 0 and c(Z + "stage3_prefetch_bucket_size") > 0,
     "0 with prefetching fails in forward (\"already assigned swap buffer id\"). Set "
     "\"stage3_prefetch_bucket_size\": 0."),
    (OP + "max_in_cpu", lambda c: c.param_on == "nvme" and c(OP + "max_in_cpu") >= 10**9,
     "up to 1e9 elements, which may be all, stay in memory although files are written. Set how many may, 0 for none."),
    (OP + "buffer_size", lambda c: c.param_on == "nvme" and c(OP + "buffer_size") < HALF_SHARE,
     f"shares of tensors are swapped from {HALF_SHARE:,} elements on, and none of those fits (\"More elements than "
     f"buffer size\"). Give at least the largest share."),
    ("aio.block_size", lambda c: "nvme" in (c.optimizer_on, c.param_on) and c("aio.block_size") > 2**20,
     "tensors with fewer bytes than this stay in memory. Use 1048576 to move all that DeepSpeed can."),
    ("aio", lambda c: c.has("aio") and "nvme" not in (c.optimizer_on, c.param_on) and not c.has("checkpoint.writer"),
     "nothing is on NVMe, so this has no effect. Delete it, or offload to \"nvme\"."),
    (Z + "stage3_param_persistence_threshold",
     lambda c: c.param_on != "none" and not c.has(Z + "stage3_param_persistence_threshold"),
     "not given: tensors below 100,000 elements, in a small model all, stay whole on every rank and are not "
     "offloaded. Set it."),
    (Z + "reduce_bucket_size", lambda c: c.stage > 0 and not c.has(Z + "reduce_bucket_size"),
     "not given: 5e8 elements, 2 GB in fp32; stage 3 holds them from the start. Set it, 5e7 for example."),
    (Z + "reduce_bucket_size",
     lambda c: c.stage == 3 and c.sound.get(Z + "reduce_bucket_size", 0) >= 5 * 10**8,
     "stage 3 holds a buffer of so many elements from the start, 2 GB in fp32 for 5e8. Set less, 5e7 for example."),
    (OO + "super_offload", lambda c: c.stage == 3 and c(OO + "super_offload") and (c.cpu or c.optimizer_on != "cpu"),
     "SuperOffload needs an NVIDIA GPU and \"device\": \"cpu\"; initialisation fails. Set false."),
    (OO + "ratio",
     lambda c: c.stage == 3 and c(OO + "ratio") < 1 and c.optimizer_on != "none" and c.optimizer != "DeepSpeedCPUAdam",
     "part of an optimizer can be offloaded with DeepSpeed's own Adam only; initialisation fails. Set 1.0."),
    (OO + "cpuadam_cores_perc", lambda c: c.has(OO + "cpuadam_cores_perc") and not c(OO + "super_offload"),
     "no effect without \"super_offload\": true. Delete it."),
    (Z + "legacy_stage1", lambda c: c(Z + "legacy_stage1"), "initialisation fails, that code is gone. Delete it."),
    # zenflow
    (Z + "zenflow", lambda c: c.zenflow and c.stage in (1, 2),
     "release 0.19.8 stores every 2-D weight in transposed order, at initialisation and at each update: compare the "
     "first loss with one without zenflow before you trust it."),
    (Z + "zenflow",
     lambda c: c.zenflow and c.stage == 0, "zenflow fails in the first step at stage 0. Use stage 1 or 2."),
    (Z + "zenflow",
     lambda c: c.zenflow and c.stage == 3 and c.cpu, "zenflow at stage 3 names the device cuda. Use stage 1 or 2."),
    (Z + "zenflow",
     lambda c: c.zenflow
        and c.optimizer_on != "cpu", "zenflow needs the optimizer on the CPU. Set \"offload_optimizer\"."),
    (ZF + "update_interval", lambda c: c.zenflow and c(ZF + "update_interval") == "auto",
     "\"auto\" makes the number of accumulated steps 0, and the loss is NaN from step 2 on. Give a whole number."),
    (ZF + "select_interval",
     lambda c: c.zenflow and c(ZF + "select_strategy") == "auto" and c(ZF + "select_interval") != "auto",
     "a number fails at initialisation with \"select_strategy\": \"auto\". Set \"step\" or \"epoch\"."),
    (ZF + "select_interval",
     lambda c: c.zenflow and c(ZF + "select_strategy") != "auto" and c(ZF + "select_interval") == "auto",
     "\"auto\" fails at initialisation with this \"select_strategy\". Give a number."),
    (ZF + "select_interval", lambda c: c.zenflow and c(ZF + "select_strategy") == "step" and "auto" not in (
        c(ZF + "select_interval"), c(ZF + "update_interval")) and 0 < c(ZF + "select_interval") < c(ZF + "update_interval"),
     "less than \"update_interval\", which fails at initialisation. Give at least as much."),
    ("gradient_accumulation_steps", lambda c: c.zenflow and c.has("gradient_accumulation_steps")
     and c("gradient_accumulation_steps") != c(ZF + "update_interval"),
     "zenflow's \"update_interval\" replaces it, the batch sizes no longer agree. Give both the same value."),
    ("optimizer.params.torch_adam",
     lambda c: c.zenflow and c.parameter("torch_adam"), "zenflow fails with torch's Adam. Delete it."),
    # optimizers and schedules
    ("optimizer.type",
     lambda c: c.stage > 0 and c.optimizer and c.optimizer not in SUPPORTED and not c("zero_allow_untested_optimizer"),
     "ZeRO fails with this optimizer unless \"zero_allow_untested_optimizer\" is true. Set it, or use AdamW."),
    ("optimizer.type", lambda c: c.cpu and c.optimizer in ("FusedLamb", "FusedLion"),
     "this optimizer has no code for a CPU; initialisation fails. Use AdamW."),
    ("optimizer.type", lambda c: c.optimizer == "MuonWithAuxAdam" and c.stage == 3 and c(Z + "reduce_scatter"),
     "Muon fails at stage 3 unless \"reduce_scatter\" is false. Set it."),
    ("optimizer.type", lambda c: c.optimizer == "FusedLamb" and c("fp16.loss_scale") != 0,
     "LAMB fails with a fixed \"fp16.loss_scale\". Set that to 0."),
    ("optimizer.type",
     lambda c: (c("optimizer.type") or "").lower().startswith("mu") and c.optimizer != "MuonWithAuxAdam",
     "needs the package mup, which DeepSpeed does not install. Install it, or use AdamW."),
    ("scheduler.params", lambda c: c.has("scheduler.type") and not c.has("scheduler.params"),
     "not given: initialisation fails. Give at least {}."),
    ("scheduler.params.total_num_steps", lambda c: c.sound.get("scheduler.params.total_num_steps", 2**63) <
     c.sound.get("scheduler.params.warmup_num_steps", 0),
     "less than \"warmup_num_steps\": the warm-up never ends. Give the steps of the run."),
    ("scheduler.type",
     lambda c: c.scheduler and "arm" not in c.scheduler and c.scheduler not in ("LRRangeTest", "OneCycle")
     and (c.stage > 0 or c.half),
     "torch's schedules fail on DeepSpeed's wrapped optimizer (\"is not an Optimizer\"). Use WarmupLR "
     "or its like, or hand over a schedule of your own."),
    ("scheduler.type",
     lambda c: c.scheduler == "ReduceLROnPlateau", "engine.step() gives it no metric, so it fails. Use another."),
    # precision and reduction
    ("prescale_gradients", lambda c: c.stage in (2, 3) and c(Z + "reduce_scatter") and c("prescale_gradients"),
     "fails at stages 2 and 3 with \"reduce_scatter\". Set false."),
    ("gradient_predivide_factor",
     lambda c: c.stage in (2, 3) and c(Z + "reduce_scatter") and c("gradient_predivide_factor") != 1,
     "fails at stages 2 and 3 with \"reduce_scatter\". Set 1.0."),
    (Z + "compute_grad_norm",
     lambda c: not c(Z + "compute_grad_norm") and (c("gradient_clipping") > 0 or c.zenflow or c.optimizer_on != "none"),
     "false fails with clipping, zenflow and an offloaded optimizer. Set true, or \"gradient_clipping\": 0."),
    ("fp16.fp16_master_weights_and_grads",
     lambda c: c("fp16.fp16_master_weights_and_grads") and c.optimizer != "DeepSpeedCPUAdam",
     "fails without \"offload_optimizer\" and DeepSpeed's own Adam. Set false."),
    ("bf16.bf16_master_weights_and_grads",
     lambda c: c("bf16.bf16_master_weights_and_grads") and c.optimizer != "DeepSpeedCPUAdam"
     and (c.optimizer_on != "none" or not c("bf16.bf16_optimizer_states")),
     "fails without \"offload_optimizer\" and DeepSpeed's own Adam, or \"bf16_optimizer_states\" without offload. "
     "Set one of these."),
    ("fp16.enabled",
     lambda c: c.cpu and c("fp16.enabled"), "most CPUs have no fp16, and DeepSpeed then refuses it. Use bf16."),
    ("data_types.param_dtype", lambda c: c.has("data_types.param_dtype") and _width(c("data_types.param_dtype")) != (
        "bf16" if c("bf16.enabled") else "fp16" if c("fp16.enabled") else "fp32"),
     "differs from the precision that bf16 and fp16 enable; initialisation fails. Delete it."),
    ("data_types.grad_accum_dtype", lambda c: c.stage == 0 and c.has("data_types.grad_accum_dtype") and _width(
        c("data_types.grad_accum_dtype")) != ("bf16" if c("bf16.enabled") else "fp16" if c("fp16.enabled") else "fp32"),
     "stage 0 cannot sum gradients in another type than the model's; initialisation fails. Delete it, or use ZeRO."),
    ("managed_gradient_accumulation", lambda c: not c("managed_gradient_accumulation") and (
        c("compile.deepcompile") or c.stage < 2 and c(Z + "overlap_comm")),
     "false fails with deepcompile, and below stage 2 with \"overlap_comm\". Set true."),
    # parallelism, checkpoints, the rest
    ("pipeline",
     lambda c: c.has("pipeline") and c.stage > 1, "the pipeline engine refuses stages 2 and 3. Use stage 0 or 1."),
    ("expert_parallel.enabled", lambda c: c("expert_parallel.enabled") and c.stage == 3 and (
        c(Z + "zero_quantized_gradients") or c(Z + "zero_hpz_partition_size") > 1 or c("sequence_parallel_size") > 1),
     "experts at stage 3 fail with ZeRO++ and with sequence parallelism. Turn those off, or use stage 1 or 2."),
    ("expert_parallel.enabled", lambda c: c("expert_parallel.enabled") and c.stage == 2 and not (
        c(Z + "contiguous_gradients") and c(Z + "reduce_scatter")),
     "experts at stage 2 need \"contiguous_gradients\" and \"reduce_scatter\". Set both to true."),
    ("tensor_parallel.autotp_size",
     lambda c: c.ranks and c("tensor_parallel.autotp_size") and c.ranks % c("tensor_parallel.autotp_size"),
     "does not divide the number of ranks. Give a divisor."),
    ("data_parallel_size", lambda c: c.ranks and c("data_parallel_size") and c.has("sequence_parallel_size")
     and c.ranks != c("data_parallel_size") * c("sequence_parallel_size"),
     "times \"sequence_parallel_size\" is not the number of ranks; initialisation fails. Delete it."),
    ("wandb.enabled", lambda c: c("wandb.enabled"), "needs the package wandb, which DeepSpeed does not install."),
    ("comet.enabled", lambda c: c("comet.enabled"), "needs the package comet_ml, which DeepSpeed does not install."),
    ("datastates_ckpt",
     lambda c: c("datastates_ckpt") is not False, "needs the package DataStates, which DeepSpeed does not install."),
    ("sequence_parallel_size",
     lambda c: c.ranks
        and c.ranks % c("sequence_parallel_size"), "does not divide the number of ranks. Give a divisor."),
    ("checkpoint", lambda c: c.has("checkpoint") and c.optimizer_on == "nvme",
     "plain DeepSpeed resumes wrong from an optimizer on NVMe: Adam's step counter begins anew. Offload to \"cpu\" "
     "where a run must resume."),
    ("checkpoint.load_universal", lambda c: c("checkpoint.load_universal") and c.stage == 0,
     "stage 0 has no universal checkpoints, and needs none: its own load on any number of ranks. Set false."),
    ("checkpoint.load_universal", lambda c: c("checkpoint.load_universal") and c.optimizer_on == "nvme",
     "no universal checkpoint can be made of an optimizer on NVMe. Offload to \"cpu\"."),
    ("activation_checkpointing", lambda c: c.has("activation_checkpointing"),
     "the engine only stores it. Call deepspeed.checkpointing.configure(mpu, deepspeed_config=...) in the program."),
    ("activation_checkpointing.cpu_checkpointing", lambda c: c.cpu and c("activation_checkpointing.cpu_checkpointing")
     and not c("activation_checkpointing.partition_activations"), "on a CPU it empties the tensors in use. Set false."),
    ("activation_checkpointing.contiguous_memory_optimization",
     lambda c: c("activation_checkpointing.contiguous_memory_optimization") and not (
        c("activation_checkpointing.partition_activations") and c.has("activation_checkpointing.number_checkpoints")),
     "needs \"partition_activations\" and \"number_checkpoints\". Give both."),
    ("compile.deepcompile",
     lambda c: c.cpu and c("compile.deepcompile"), "its op is built for CUDA only, engine.compile() fails. Set false."),
]
QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def findings(c, known):
    """(level, key, message) of all that is wrong between the keys of a View; `known` is the map of keys."""
    yield from _batch(c)
    yield from ((level, key, message) for level, rules in (("error", ERRORS), ("warning", WARNINGS))
                for key, holds, message in rules if holds(c))
    for key, value in c.sound.items():
        spec = known["keys"].get(key, {})
        if key.startswith(Z + "stage3_") and c.stage < 3:
            yield "error", key, (f"belongs to stage 3 and does nothing at stage {c.stage}. Delete it, or set "
                                 "\"zero_optimization.stage\": 3.")
        elif "stages" in spec and c.stage not in spec["stages"] and not isinstance(value, dict) and value != spec["default"]:
            yield "warning", key, f"does nothing at stage {c.stage}, only at {', '.join(map(str, spec['stages']))}. Delete it."
        elif spec.get("nvme") and c(key.rpartition(".")[0] + ".device") != "nvme" and value != spec["default"]:
            yield "warning", key, "does nothing unless \"device\" is \"nvme\". Delete it."
        elif c.cpu and c.stage == 3 and key[len(Z):] in QUANTIZED and value:
            yield "warning", key, "its op has no code for a CPU, so it fails. Set false."
    if c.scheduler and c.has("scheduler.params"):
        for name in known["schedulers"][c.scheduler]["required"]:
            if not c.has(f"scheduler.params.{name}"):
                yield "warning", f"scheduler.params.{name}", f"not given: {c.scheduler} cannot be built without it. Give a value."


def _batch(c):
    """The rule train_batch_size = micro-batch x accumulation x ranks, as far as the config and the ranks are known."""
    total, micro, times = (c(key) for key in BATCH)
    if any(key in c.spelled and key not in c.sound for key in BATCH):          # "auto", or refused already
        return
    if total is None and micro is None:
        yield "error", BATCH[0], f"neither this nor \"{BATCH[1]}\" is given, and DeepSpeed needs one of them. Give the latter."
        return
    if total is None:
        return
    parts = (micro or 1) * (times or 1)
    ranks = c.ranks and c.ranks // c("sequence_parallel_size")
    words = " x ".join([*([f"micro-batch {micro}"] if micro else []), *([f"accumulation {times}"] if times else []),
                        *([f"{ranks} ranks"] if ranks else [])])
    if total % (parts * (ranks or 1)):
        yield "error", BATCH[0], f"{total} cannot be divided by {words}. Give a multiple of {parts * (ranks or 1)}."
    elif micro and times and ranks and total != parts * ranks:
        yield "error", BATCH[0], f"{total} is not {words} = {parts * ranks}. Leave one of the three out."


def _width(name):
    """fp32, fp16 or bf16, from any of the names of DeepSpeed's DtypeEnum."""
    name = name.removeprefix("torch.")
    return {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}.get(name, name)
