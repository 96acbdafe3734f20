"""himix-megatron: distributed pretraining of HiMix vision-language models on Megatron-core.

`model/attention/mixture_attention.py` is where vision meets text; `config/` holds every setting;
the programs that people run are in `pipelines/`.
"""

from .distributed.fused_kernels import prepare_import

prepare_import()  # before anything below can import megatron-core

__version__ = "0.1.0"
