"""What every rank of a test needs, imported once: the fork server that ranks come from loads this and starts no threads."""

from himix_megatron.distributed import cpu_backend

cpu_backend.activate_if_needed()

import himix_megatron.inference.generator  # noqa: E402
import himix_megatron.training.loop  # noqa: E402, F401
import pipelines.cli  # noqa: E402, F401
