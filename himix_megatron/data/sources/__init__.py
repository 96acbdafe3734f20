"""Raw image-text data in, samples out, one file per layout: LLaVA JSON, parquet, WebDataset, img2dataset."""

from himix_megatron.data.sources.files import FileReader, FileScan, FilesSource, find_files
from himix_megatron.data.sources.img2dataset import open_img2dataset
from himix_megatron.data.sources.llava import LlavaSource
from himix_megatron.data.sources.parquet import ParquetReader
from himix_megatron.data.sources.sample import MAX_SAMPLE_BYTES, BadRow, Part, Sample, Source, SourceError
from himix_megatron.data.sources.webdataset import TarReader

__all__ = [
    "MAX_SAMPLE_BYTES",
    "BadRow",
    "FileReader",
    "FileScan",
    "FilesSource",
    "LlavaSource",
    "ParquetReader",
    "Part",
    "Sample",
    "Source",
    "SourceError",
    "TarReader",
    "find_files",
    "open_img2dataset",
]
