"""Nobody is locked in: megatron-energon and webdataset read our shards, every sample and byte of them."""

import json
import os
import subprocess
import sys

import pytest
import webdataset

from himix_megatron.data.ingest.verify import verify_dataset
from himix_megatron.data.shards.reader import ShardDataset
from tests.support.data_fixtures import encoded, make, mixed, picture, row


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return mixed(tmp_path_factory.mktemp("energon"))


def stored(dataset):
    """{key: {member without its key: content}} by our own reader; the suffixes are the source's (see `mixed_source`)."""
    samples = {}
    for i in range(len(dataset)):
        suffixes = [f"{k}.{'jpg' if i % 2 == 0 or k else 'png'}" for k in range(dataset.num_images(i))]
        images = [dataset.image_bytes(i, k) for k in range(len(suffixes))]
        samples[f"{i:09d}"] = {"json": dataset.text(i), **dict(zip(suffixes, images, strict=True))}
    return samples


def members(sample):
    """A peer's raw sample the same way: text parsed, names of its own left out."""
    return {
        name: json.loads(data) if name == "json" else bytes(data) for name, data in sample.items() if not name.startswith("__")
    }


def test_webdataset_reads_every_byte(dataset):
    tars = sorted(str(path) for path in (dataset.path / "shards").glob("*.tar"))
    found = {sample["__key__"]: members(sample) for sample in webdataset.WebDataset(tars, shardshuffle=False)}
    assert found == stored(dataset)


def test_megatron_energon_reads_every_byte_and_disturbs_nothing(dataset):
    energon = pytest.importorskip("megatron.energon", reason="megatron-energon is not installed")
    from tools.bench.data import export_energon as export

    before = {path: path.read_bytes() for path in dataset.path.rglob("*") if path.is_file()}
    for _ in range(2):  # over its own files, too
        assert export(dataset.path, num_workers=1) == 24

    @energon.stateless
    def unchanged(sample):
        return sample

    class Raw(energon.DefaultTaskEncoder):
        """No decoding, no collating."""

        decoder = None
        cookers = (energon.Cooker(unchanged),)

    one_process = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    read = energon.get_train_dataset(
        dataset.path,
        worker_config=one_process,
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
        task_encoder=Raw(),
    )
    samples = list(energon.get_loader(read, watchdog_timeout_seconds=None))
    assert len(samples) == 24
    assert {sample["__key__"]: members(sample) for sample in samples} == stored(dataset)

    assert {path: path.read_bytes() for path in before} == before
    report = verify_dataset(dataset.path)
    assert (report.findings, report.foreign) == ((), ())
    assert stored(ShardDataset(dataset.path)) == stored(dataset)


def test_a_shard_without_samples_is_left_out_of_the_export(tmp_path):
    pytest.importorskip("megatron.energon", reason="megatron-energon is not installed")
    from tools.bench.data import export_energon as export

    (tmp_path / "0.png").write_bytes(encoded(picture(), "PNG"))
    rows = [row(i, "missing.png" if i < 2 else "0.png") for i in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    dataset = make(tmp_path / "out", tmp_path / "rows.json", tmp_path, samples_per_shard=2, max_bad_fraction=0.5)
    assert [shard.num_samples for shard in dataset.manifest.shards] == [0, 2, 2]
    assert verify_dataset(dataset.path).findings == ()
    assert export(dataset.path, num_workers=1) == 4


def export_command(folder, *before):
    script = f"{'; '.join(before)}\nimport runpy; runpy.run_module('tools.bench.data', run_name='__main__', alter_sys=True)"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-c", script, "--export-energon", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_without_megatron_energon_one_line_says_how_to_get_it(dataset):
    done = export_command(dataset.path, "import sys", "sys.modules['megatron.energon'] = None")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: megatron-energon is not installed: pip install megatron-energon\n"


def test_a_folder_that_is_no_dataset_is_refused_in_one_line(tmp_path):
    pytest.importorskip("megatron.energon", reason="megatron-energon is not installed")
    done = export_command(tmp_path)
    assert done.returncode == 2
    assert "is not a shard dataset" in done.stderr
    assert done.stderr.count("\n") == 1
