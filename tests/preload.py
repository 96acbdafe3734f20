"""What every rank of a test needs, imported once: the fork server that ranks come from loads this and starts no threads."""

from himix_megatron import cpu

cpu.activate_if_needed()

import himix_megatron.generate  # noqa: E402
import himix_megatron.train  # noqa: E402, F401
import pipelines.cli  # noqa: E402, F401
