"""Let accelerate wrap a student for data parallelism that was evaluated before its training."""

from transformers import Trainer


def forget_evaluation(trainer: Trainer) -> None:
    """Mark the model as not prepared, if an evaluation alone has prepared it.

    Trainer's evaluation lets accelerate prepare the model without DistributedDataParallel, and
    accelerate prepares a model once: a training afterwards would reduce no gradients, and each
    process would train a student of its own.
    """
    models, model = trainer.accelerator._models, trainer.model
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    is_evaluated = trainer.model_wrapped is model and any(known is model for known in models)
    if is_evaluated and trainer.accelerator.num_processes > 1 and not sharded:
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        model._is_accelerate_prepared = False
        models[:] = [known for known in models if known is not model]
