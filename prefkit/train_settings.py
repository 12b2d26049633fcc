"""The sections of a pipeline file below the torch line: the reference pass, adapters, training."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from prefkit.sections import Section, Share


class PrecomputeConfig(Section):
    """The reference pass: which model, and how pairs become tokens."""

    model: str | None = Field(None, description="folder of the reference model and its tokenizer")
    max_length: Annotated[int, Field(gt=1)] = Field(1024, description="longest prompt + completion, in tokens")
    min_completion_tokens: Annotated[int, Field(gt=0)] = Field(
        16, description="room a long prompt must leave for the completion"
    )
    long_prompt: Literal["drop", "cut"] = Field(
        "drop", description="a prompt that leaves less: drop the pair, or cut its left"
    )
    max_boundary_share: Share = Field(
        0.05, description="the pass stops when more prompts are no token prefix of prompt + completion"
    )
    chat_template: str | None = Field(
        None, description="a jinja file, or `transcript`, where the tokenizer has no template"
    )
    dtype: Literal["float32", "bfloat16", "bfloat16_weights"] = "float32"
    max_batch_tokens: Annotated[int, Field(gt=0, strict=True)] | None = Field(
        None,
        description="prompt + chosen + rejected tokens that a batch holds, a longer pair alone; left out: 2048 on a "
        "CPU; on a GPU what its free memory holds, measured once and kept in the plan",
    )
    attention: Literal["auto", "packed", "flex", "sdpa", "eager"] = Field(
        "auto",
        description="of the reference pass and of training; auto: the fastest that scores this very model right; flex "
        "is compiled, for CUDA",
    )


DPOP_LAMBDA = 50.0  # the paper's (arXiv 2402.13228)


class LoraSettings(Section):
    """A low-rank adapter (arXiv 2106.09685), trained by itself while the model stays as it is."""

    r: Annotated[int, Field(gt=0)] = Field(16, description="its rank")
    alpha: Annotated[float, Field(gt=0)] = Field(32, description="its product is scaled by alpha / r")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="names of the layers that get one; all-linear: all but the output matrix"
    )
    use_rslora: bool = Field(False, description="scaled by alpha / sqrt(r) (arXiv 2312.03732)")


class TrainConfig(Section):
    """DPO training. max_length, dtype and template are the reference's and stand in its reference.json."""

    model: str | None = Field(None, description="the policy to start from; precompute.model if left out")
    other_reference: bool = Field(
        False, description="the reference is another model on purpose; only its tokenizer must be the policy's"
    )
    loss: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "ipo_sum", "robust", "apo_zero", "apo_down", "dpop"] = (
        Field(
            "sigmoid",
            description="sigmoid_norm and ipo average log-ratios over tokens, as TRL does; ipo_sum is the paper's",
        )
    )
    beta: Annotated[float, Field(gt=0)] = 0.1
    beta_end: Annotated[float, Field(gt=0)] | None = Field(
        None, description="beta of the last update, reached as beta_schedule says; left out: beta throughout"
    )
    beta_schedule: Literal["linear", "cosine"] = "linear"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="assumed share of flipped preferences; sigmoid, sigmoid_norm and robust only"
    )
    dpop_lambda: Annotated[float, Field(gt=0)] = Field(
        DPOP_LAMBDA, description="weight of the penalty on a chosen log-prob below the reference's; dpop only"
    )
    sft_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of chosen's negative log-likelihood, a token, that is added to the loss"
    )
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    optimizer: str = Field("adamw", description="rmsprop is the DPO paper's; or any class of torch.optim, by name")
    optimizer_args: dict[str, Any] = Field({}, description="further arguments of its class: betas, eps, momentum...")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    lora: LoraSettings | None = Field(None, description="train an adapter; left out: all weights")
    merge_adapter: bool = Field(False, description="the final model is the whole model, the adapter folded into it")
    batch_size: Annotated[int, Field(gt=0)] = Field(8, description="most pairs in a forward and backward pass")
    gradient_accumulation_steps: Annotated[int, Field(gt=0)] = Field(
        1, description="batch_size times this are the pairs of an update, in however many processes"
    )
    max_batch_tokens: Annotated[int, Field(gt=0, strict=True)] | None = Field(
        None,
        description="prompt + chosen + rejected tokens that a pass holds, a longer pair alone, in place of batch_size; "
        "left out: batch_size pairs, and on a CPU no more than 2048 tokens",
    )
    gradient_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile the layers: docs/training.md says what it gains where")
    shard_weights: bool = Field(
        False, description="of several processes each keeps a share of weights, gradients and optimiser (FSDP)"
    )
    max_steps: Annotated[int, Field(gt=0)] | None = Field(None, description="updates; epochs decides if left out")
    epochs: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    eval_steps: Annotated[int, Field(gt=0)] | None = Field(
        None, description="evaluate every so many updates; the end always is"
    )
    best_metric: Literal["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"] | None = Field(
        None, description="the final model is the one that was best by it, of all evaluations; left out: the last one"
    )
    early_stopping_patience: Annotated[int, Field(gt=0)] | None = Field(
        None, description="stop after so many evaluations without a better best_metric"
    )
    logging_steps: Annotated[int, Field(gt=0)] = Field(1, description="keep every so-manieth row in steps.parquet")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="who else is told every logged step, through accelerate"
    )
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of one device in this dtype, for perf.mfu, where prefkit does not know its own"
    )
    save_steps: Annotated[int, Field(gt=0)] | None = Field(None, description="checkpoint every so many updates")
    save_total_limit: Annotated[int, Field(gt=0)] = Field(2, description="newest checkpoints kept")
    seed: int = 0

    @model_validator(mode="after")
    def _all_have_an_effect(self) -> "TrainConfig":
        if self.label_smoothing and self.loss not in ("sigmoid", "sigmoid_norm", "robust"):
            raise ValueError(
                f"train.label_smoothing has no effect on train.loss {self.loss}: it is sigmoid's, sigmoid_norm's and "
                "robust's"
            )
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("train.loss robust is sigmoid without train.label_smoothing: set it above 0")
        if self.max_steps is not None and self.epochs != 1.0:
            raise ValueError("train.epochs has no effect beside train.max_steps: --set train.max_steps=null")
        if self.dpop_lambda != DPOP_LAMBDA and self.loss != "dpop":
            raise ValueError(f"train.dpop_lambda has no effect on train.loss {self.loss}: it is dpop's")
        if self.beta_schedule != "linear" and self.beta_end is None:
            raise ValueError("train.beta_schedule has no effect without train.beta_end")
        if self.early_stopping_patience is not None and self.best_metric is None:
            raise ValueError("train.early_stopping_patience has no effect without train.best_metric")
        if self.best_metric is not None and self.eval_steps is None:
            raise ValueError("train.best_metric has no effect without train.eval_steps")
        if self.beta_end is not None and self.best_metric not in (None, "eval_rewards/accuracies"):
            raise ValueError(
                f"train.best_metric {self.best_metric} changes with beta, and train.beta_end changes that: take "
                "eval_rewards/accuracies"
            )
        if self.compile and self.gradient_checkpointing:
            raise ValueError("train.compile and train.gradient_checkpointing exclude each other")
        return self
