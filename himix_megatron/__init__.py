"""himix-megatron: distributed pretraining of HiMix vision-language models on Megatron-core.

`model/mixture_attention.py` is where vision meets text; `config.py` holds every setting;
the programs that people run are in `pipelines/`.
"""

__version__ = "0.1.0"
