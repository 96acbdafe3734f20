"""What every rank of a test needs, imported once: the fork server that ranks come from loads this and starts no threads."""

from himix_megatron.runtime.process import bulk_import

with bulk_import():
    from himix_megatron.distributed import cpu_backend

    cpu_backend.activate_if_needed()

    import torch._dynamo  # the first optimizer of a process imports it, and rank 0 the next
    import torch.utils.tensorboard  # noqa: F401

    import himix_megatron.inference.generator
    import himix_megatron.training.loop  # noqa: F401
    import pipelines.cli  # noqa: F401
